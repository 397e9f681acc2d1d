"""Configuration of a decoding run, and everything about it that can be refused without opening a file."""

import dataclasses
import math
import re
from typing import Annotated, Literal

import tyro

from rlvr_jax.data.template_args import TemplateArgs
from rlvr_jax.direction import CRITERIA
from rlvr_jax.distributed import DistributedConfig
from rlvr_jax.rewards.pool import RULES

Criterion = Literal[
    "delta_logp", "neg_delta_logp", "abs_delta_logp", "entropy_base", "entropy_rl", "kl", "kl_reverse", "js", "js_true",
    "random", "none", "all",
]  # fmt: skip
Control = Literal["gamma0", "abs_delta_logp", "rl", "temperatures", "base"]
Role = Literal["setting", "gamma0", "abs_delta_logp", "rl", "base", "temperatures"]
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
      share: instead of tau: the share of tokens to select; tau is found by a calibration pass (pair)
      role: setting, or which control this is
      control_of: names of the settings that it is a control of
    """

    name: str = ""
    model: Literal["base", "rl", "pair"] | None = None
    criterion: Criterion | None = None
    tau: float | None = None
    gamma: float = 0.0
    sample_from: Literal["base", "rl"] = "base"
    temperature: float = 1.0
    top_p: float = 0.7
    top_k: int = 0
    top_logprobs: int | None = None
    share: float | None = None
    role: Annotated[Role, tyro.conf.Suppress] = "setting"
    control_of: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()


@dataclasses.dataclass(frozen=True)
class Grid:
    """Settings of the pair: every criterion x tau (or --match-rate share) x gamma x sampled model.

    Temperature, top-p, top-k and top_logprobs are those of the single-setting flags.

    Attributes:
      criteria: which criteria
      taus: thresholds: numbers for all the criteria, or criterion=number (delta_logp=-0.3 kl=0.1)
      gammas: strengths of the extrapolation
      sample_from: which model proposes each token
    """

    criteria: tuple[Criterion, ...] = ()
    taus: tuple[str, ...] = ()
    gammas: tuple[float, ...] = (0.0,)
    sample_from: tuple[Literal["base", "rl"], ...] = ("base",)


@dataclasses.dataclass(frozen=True)
class Controls:
    """What an extrapolation's figure needs beside it.

    gamma0: the same setting at gamma = 0; abs_delta_logp: for delta_logp, size without direction, at the same share or
    |tau|; rl, base: each model alone; temperatures: rl alone at other temperatures.

    Attributes:
      on: add them; default: where a grid or a match rate is given
      skip: controls that are left out
      temperatures: of rl alone; 0 is greedy
    """

    on: bool | None = None
    skip: tuple[Control, ...] = ()
    temperatures: tuple[float, ...] = (0.3, 0.6, 0.0)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The pass that finds tau for a wanted share of selected tokens.

    Responses are drawn from the sampled model alone and scored by both; tau is a quantile of the criterion's values.

    Attributes:
      responses: how many, spread over the problems
      max_new_tokens: longest of them, in tokens; default: that of the run
    """

    responses: int = 64
    max_new_tokens: int | None = None


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
      problems: problem file, .parquet or .jsonl, a folder or pattern of such files, "hf://datasets/OWNER/NAME/PATH", or
        "reasoning_gym:TASK,...?size=500&seed=1" (with that grader)
      out: folder of the results; an earlier run in it is resumed
      setting: the one setting of the run, where neither settings nor grid is given
      settings: settings run in turn with the same loaded models (a Python config file lists them)
      grid: settings by criterion, tau and gamma
      match_rate: wanted shares of selected tokens instead of taus: of --criterion, or of every criterion of the grid
      controls: settings added for comparison
      calibration: how tau is found for a wanted share
      seeds: one result file each
      n: samples a problem and seed
      limit: decode the first so many problems only
      max_new_tokens: longest response, in tokens
      max_prompt_tokens: longest prompt allowed, in tokens; default: what the models' positions leave
      slots: responses decoded at once; default: as many as the memory holds
      memory: GiB a device for weights and caches; default: what the device has
      cache_dtype: model: that of the weights; int8: half the memory of bfloat16, log-probabilities differ a little
      block: tokens drafted before the other model scores them; default: chosen as the run goes. No token depends on it
      prompt_column: column of the prompt in problems; default: prompt, problem, question or messages
      answer_column: column of the answer; default: reward_model.ground_truth, answer, ground_truth, solution's last box
      prompt_suffix: appended to the stripped user turn
      template_args: arguments of the chat template, such as enable_thinking=false
      tokenizer: folder of the tokenizer and chat template; default: rl where given, else base
      stop_token_ids: end of a response; default: those of the tokenizer and of the models' generation_config.json, or
        of config.json where that names none
      graders: math_verify (last boxed answer), dapo_answer (last "Answer:" line), reasoning_gym (of its problems), or
        "module:function" of your own; the first decides the published `accs`
      grader_workers: grading processes for each grader
      grader_sandbox: grade each response in a process that can open nothing and start nothing (Linux); for a grader of
        your own that runs what the model wrote. reasoning_gym does so in any case, where it can
      unsafe_evaluation: where there is no sandbox, let tasks of reasoning-gym evaluate answers all the same; text that
        the model wrote may then run as code with all your rights
      dtype: float32 or bfloat16; default: float32 on CPU, bfloat16 elsewhere
      mesh: devices
      compile_cache: folder that keeps compiled programs, so that a run which goes on does not compile again; auto:
        compile_cache in out, or that of JAX_COMPILATION_CACHE_DIR where it is set; None: none is kept
      distributed: the processes of a run over several hosts
      save_tokens: also write tokens.parquet: ids, log-probabilities, delta log-probabilities and where it fired
      print_table: print the table of the settings at the end; summary.txt has it in any case
    """

    base: str | None = None
    rl: str | None = None
    problems: str = ""
    out: str = "runs/decode"
    setting: Annotated[Setting, tyro.conf.arg(name="")] = Setting()
    settings: tuple[Setting, ...] = ()
    grid: Grid = Grid()
    match_rate: tuple[float, ...] = ()
    controls: Controls = Controls()
    calibration: Calibration = Calibration()
    seeds: tuple[int, ...] = (0,)
    n: int = 4
    limit: int | None = None
    max_new_tokens: int = 20_000
    max_prompt_tokens: int | None = None
    slots: int | None = None
    memory: float | None = None
    cache_dtype: Literal["model", "int8"] = "model"
    block: int | None = None
    prompt_column: str = ""
    answer_column: str = ""
    prompt_suffix: str = ""
    template_args: TemplateArgs = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    graders: tuple[str, ...] = ("math_verify",)
    grader_workers: int = 2
    grader_sandbox: bool = False
    unsafe_evaluation: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: MeshConfig = MeshConfig()
    compile_cache: str | None = "auto"
    save_tokens: bool = False
    print_table: bool = True
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def check_run(config: DecodeConfig) -> None:
    """Refuses what is out of range outside the settings.

    Raises:
      ValueError: one sentence naming the key, the value and what was expected.
    """
    if config.base is None and config.rl is None:
        raise ValueError("no model: give --base, --rl or both")
    if not config.problems:
        raise ValueError("no problem file: give --problems FILE.parquet or FILE.jsonl")
    for key in ("n", "max_new_tokens", "grader_workers"):
        _at_least_one(key, getattr(config, key))
    for key in ("limit", "max_prompt_tokens", "slots", "block"):
        if getattr(config, key) is not None:
            _at_least_one(key, getattr(config, key))
    if config.memory is not None and not (math.isfinite(config.memory) and config.memory > 0):
        raise ValueError(f"memory = {config.memory}: expected a number of GiB above 0")
    if config.cache_dtype not in ("model", "int8"):
        raise ValueError(f"cache_dtype = {config.cache_dtype!r}: expected model or int8")
    seeds = config.seeds
    if not seeds or len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) < 2**31:
        raise ValueError(f"seeds = {seeds}: expected one or more different integers from 0 to 2**31 - 1")
    if not config.graders or len(set(config.graders)) < len(config.graders):
        raise ValueError(f"graders = {config.graders}: expected one or more different ones")
    for grader in config.graders:
        if grader not in RULES and not all(grader.partition(":")):
            raise ValueError(f"graders has {grader!r}: expected {', '.join(RULES)} or module:function")
    if config.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype = {config.dtype!r}: expected float32 or bfloat16")
    _at_least_one("calibration.responses", config.calibration.responses)
    if config.calibration.max_new_tokens is not None:
        _at_least_one("calibration.max_new_tokens", config.calibration.max_new_tokens)


def resolve_setting(config: DecodeConfig, setting: Setting) -> Setting:
    """The setting with its model and name filled in, every value in range. Raises ValueError as `check_run`."""
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
    elif (
        setting.criterion is not None
        or setting.gamma
        or (setting.tau, setting.share, setting.top_logprobs) != (*(None, None, None),)
    ):
        raise ValueError(
            f"{where}criterion, tau, share, gamma and top_logprobs belong to model 'pair', this is {model!r}"
        )
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


def unmarked(setting: Setting) -> Setting:
    """What two settings must share to be one."""
    return dataclasses.replace(setting, name="", role="setting", control_of=())


def _check_pair(where: str, setting: Setting) -> None:
    if setting.criterion is None:
        raise ValueError(f"{where}criterion missing: expected one of {', '.join(CRITERIA)}")
    if setting.criterion not in CRITERIA:
        raise ValueError(f"{where}criterion = {setting.criterion!r}: expected one of {', '.join(CRITERIA)}")
    if setting.tau is not None and setting.criterion in ALWAYS_DECIDED:
        raise ValueError(f"{where}tau = {setting.tau}: criterion {setting.criterion} looks at no threshold")
    if setting.tau is None and setting.share is None and setting.criterion not in ALWAYS_DECIDED:
        raise ValueError(
            f"{where}tau missing: criterion {setting.criterion} needs a threshold, or --match-rate to find one"
        )
    if setting.share is not None:
        if setting.tau is not None or setting.criterion in ALWAYS_DECIDED:
            given = f"tau = {setting.tau}" if setting.tau is not None else f"criterion {setting.criterion}"
            raise ValueError(f"{where}share = {setting.share} and {given}: expected only one of them")
        if not 0 < setting.share < 1:
            raise ValueError(f"{where}share = {setting.share}: expected a number above 0 and below 1")
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
        if setting.share is not None:
            parts.append(f"share{setting.share:g}")
        parts.append(f"gamma{setting.gamma:g}")
        if setting.sample_from == "rl":
            parts.append("from-rl")
        if setting.top_logprobs is not None:
            parts.append(f"top{setting.top_logprobs}")
    parts += [f"t{setting.temperature:g}", f"p{setting.top_p:g}"]
    if setting.top_k:
        parts.append(f"k{setting.top_k}")
    return "_".join(parts)
