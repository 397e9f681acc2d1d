"""Configuration of a decoding run, and everything about it that can be refused without opening a file."""

import dataclasses
import math
import re
from typing import Annotated, Literal

import tyro

from rlvr_jax.direction import CRITERIA
from rlvr_jax.rewards.pool import RULES

ALWAYS_DECIDED = ("none", "all")  # criteria that look at no threshold
BOXED_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to decode the problem file.

    Attributes:
      name: folder of its results; empty: made from the values below
      model: base or rl alone, or the pair; default: the pair where a criterion is given, else the only model given
      criterion: where the token is drawn again from the extrapolated distribution (pair)
      tau: threshold of the criterion: nats, or a probability for random (pair)
      gamma: strength of the extrapolation; 0 is replacement by rl (pair)
      sample_from: the model that proposes each token (pair)
      temperature: of every draw; 0 is greedy
      top_p: nucleus of every draw
      top_k: 0: off
      top_logprobs: look only at this many log-probabilities of each model, the published rule (50); default: at all
    """

    name: str = ""
    model: Literal["base", "rl", "pair"] | None = None
    criterion: str | None = None
    tau: float | None = None
    gamma: float = 0.0
    sample_from: Literal["base", "rl"] = "base"
    temperature: float = 1.0
    top_p: float = 0.7
    top_k: int = 0
    top_logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices: sizes of the mesh axes, one of them -1 for the rest. All 1: a single device."""

    data: int = 1
    fsdp: int = 1
    tensor: int = -1


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """A batch decoding run: n samples a problem and seed, by one or several settings in turn.

    Attributes:
      base: Hugging Face checkpoint folder of the base model
      rl: Hugging Face checkpoint folder of the model trained from it
      problems: problem file, .parquet or .jsonl
      out: folder of the results; an earlier run in it is resumed
      setting: the one setting of the run, where settings is empty
      settings: settings run in turn with the same loaded models (a Python config file lists them)
      seeds: one result file each
      n: samples a problem and seed
      limit: decode the first so many problems only
      max_new_tokens: longest response, in tokens
      max_prompt_tokens: longest prompt allowed, in tokens; default: what the models' positions leave
      batch_rows: responses decoded together
      prompt_suffix: appended to the stripped user turn
      tokenizer: folder of the tokenizer and chat template; default: rl where given, else base
      stop_token_ids: end of a response; default: those of the tokenizer and of the models' generation_config.json
      grader: math_verify (last boxed answer), dapo_answer (last "Answer:" line), or "module:function" of your own
      grader_workers: grading processes
      dtype: float32 or bfloat16; default: float32 on CPU, bfloat16 elsewhere
      mesh: devices
      save_tokens: also write tokens.parquet: ids, log-probabilities, delta log-probabilities and where it fired
    """

    base: str | None = None
    rl: str | None = None
    problems: str = ""
    out: str = "runs/decode"
    setting: Annotated[Setting, tyro.conf.arg(name="")] = Setting()
    settings: tuple[Setting, ...] = ()
    seeds: tuple[int, ...] = (0,)
    n: int = 4
    limit: int | None = None
    max_new_tokens: int = 20_000
    max_prompt_tokens: int | None = None
    batch_rows: int = 64
    prompt_suffix: str = ""
    tokenizer: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    grader: str = "math_verify"
    grader_workers: int = 2
    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: MeshConfig = MeshConfig()
    save_tokens: bool = False


def resolve(config: DecodeConfig) -> DecodeConfig:
    """The same configuration with `settings` filled in: every name and model explicit, every value in range.

    Raises:
      ValueError: one sentence naming the key, the value and what was expected.
    """
    if config.base is None and config.rl is None:
        raise ValueError("no model: give --base, --rl or both")
    if not config.problems:
        raise ValueError("no problem file: give --problems FILE.parquet or FILE.jsonl")
    for key in ("n", "max_new_tokens", "batch_rows", "grader_workers"):
        _at_least_one(key, getattr(config, key))
    for key in ("limit", "max_prompt_tokens"):
        if getattr(config, key) is not None:
            _at_least_one(key, getattr(config, key))
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f"seeds = {config.seeds}: expected one or more different integers from 0 up")
    if config.grader not in RULES and not all(config.grader.partition(":")):
        raise ValueError(f"grader = {config.grader!r}: expected one of {', '.join(RULES)} or module:function")
    if config.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype = {config.dtype!r}: expected float32 or bfloat16")
    if config.settings and config.setting != Setting():
        raise ValueError(
            "the config lists `settings`, so single-setting values such as --tau have no effect; "
            "give --settings.0.tau and so on"
        )
    settings = tuple(_resolve_setting(config, setting) for setting in config.settings or (config.setting,))
    names = [setting.name for setting in settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"settings: the name {twice[0]!r} occurs twice; give each setting its own name")
    return dataclasses.replace(config, settings=settings, setting=Setting())


def _resolve_setting(config: DecodeConfig, setting: Setting) -> Setting:
    where = f"setting {setting.name!r}: " if setting.name else ""
    both = config.base is not None and config.rl is not None
    model = setting.model
    if model is None and setting.criterion is not None:
        model = "pair"
    if model is None and both:
        raise ValueError(f"{where}criterion missing: two models are given; set a criterion, or model to base or rl")
    model = model or ("base" if config.rl is None else "rl")
    if model not in ("base", "rl", "pair"):
        raise ValueError(f"{where}model = {model!r}: expected base, rl or pair")
    for needed in ("base", "rl") if model == "pair" else (model,):
        if getattr(config, needed) is None:
            raise ValueError(f"{where}model {model!r} needs --{needed}, a checkpoint folder")
    if model == "pair":
        _check_pair(where, setting)
    elif setting.criterion is not None or setting.tau is not None or setting.gamma or setting.top_logprobs is not None:
        raise ValueError(f"{where}criterion, tau, gamma and top_logprobs belong to model 'pair', this is {model!r}")
    if not (math.isfinite(setting.temperature) and setting.temperature >= 0):
        raise ValueError(f"{where}temperature = {setting.temperature}: expected a number from 0 (greedy) up")
    if not 0 < setting.top_p <= 1:
        raise ValueError(f"{where}top_p = {setting.top_p}: expected above 0 and at most 1")
    if setting.top_k < 0:
        raise ValueError(f"{where}top_k = {setting.top_k}: expected 0 (off) or more")
    name = setting.name or _name(setting, model)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise ValueError(f"setting name {name!r}: it names a folder; use letters, digits and . _ + -")
    return dataclasses.replace(setting, name=name, model=model)


def _check_pair(where: str, setting: Setting) -> None:
    if setting.criterion is None:
        raise ValueError(f"{where}criterion missing: expected one of {', '.join(CRITERIA)}")
    if setting.criterion not in CRITERIA:
        raise ValueError(f"{where}criterion = {setting.criterion!r}: expected one of {', '.join(CRITERIA)}")
    if setting.tau is None and setting.criterion not in ALWAYS_DECIDED:
        raise ValueError(f"{where}tau missing: criterion {setting.criterion} needs a threshold")
    for key in ("tau", "gamma"):
        value = getattr(setting, key)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{where}{key} = {value}: expected a finite number")
    if setting.sample_from not in ("base", "rl"):
        raise ValueError(f"{where}sample_from = {setting.sample_from!r}: expected base or rl")
    if setting.top_logprobs is not None:
        if setting.criterion == "js_true":
            raise ValueError(f"{where}top_logprobs = {setting.top_logprobs}: criterion js_true has no published form")
        _at_least_one(f"{where}top_logprobs", setting.top_logprobs)


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{key} = {value}: expected 1 or more")


def _name(setting: Setting, model: str) -> str:
    parts = [model]
    if model == "pair":
        parts = [str(setting.criterion)]
        if setting.tau is not None:
            parts.append(f"tau{setting.tau:g}")
        parts.append(f"gamma{setting.gamma:g}")
        if setting.sample_from == "rl":
            parts.append("from-rl")
        if setting.top_logprobs is not None:
            parts.append(f"top{setting.top_logprobs}")
    parts += [f"t{setting.temperature:g}", f"p{setting.top_p:g}"]
    if setting.top_k:
        parts.append(f"k{setting.top_k}")
    return "_".join(parts)
