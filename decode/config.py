"""Configuration of a decoding run, and everything about it that can be refused without opening a file."""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from rlvr_jax.criteria import CRITERIA, criterion_of, criterion_value
from rlvr_jax.data.template_args import TemplateArgs
from rlvr_jax.entries import is_own
from rlvr_jax.rewards.pool import RuleName
from rlvr_jax.runs.bounds import (
    Axis,
    Count,
    Gigabytes,
    InnerShare,
    Name,
    PathText,
    Range,
    Seed,
    Several,
    Steps,
    Temperature,
    Text,
    Tokens,
    TopK,
    TopP,
    Words,
    Workers,
    faults,
    require,
)
from rlvr_jax.runs.distributed import DistributedConfig

CriterionName = Annotated[str, Text.entry_of(CRITERIA)]
Control = Literal["gamma0", "abs_delta_logp", "rl", "temperatures", "base"]
Role = Literal["setting", "gamma0", "abs_delta_logp", "rl", "base", "temperatures"]
Gamma = Annotated[float, Range(-100.0, 100.0)]
ProblemFile = Annotated[str, Text("a problem file, --problems FILE.parquet or FILE.jsonl")]
StopTokens = Annotated[tuple[Annotated[int, Range(0, 1 << 24)], ...], Several(0)]
_NAME = "letters, digits and . _ + -, since it names a folder"
BOXED_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to decode the problem file.

    Attributes:
      name: folder of its results; empty: made from the values below
      model: base or rl alone, or the pair; default: the pair where a criterion is given, else the only model given
      criterion: where the token is drawn again from the extrapolated distribution (pair): delta_logp, neg_delta_logp,
        abs_delta_logp, entropy_base, entropy_rl, kl, kl_reverse, js, js_true, random, none, all, or your own as
        module:name
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

    name: Annotated[str, Text(_NAME, r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}", empty=True)] = ""
    model: Literal["base", "rl", "pair"] | None = None
    criterion: CriterionName | None = None
    tau: Annotated[float, Range(-10_000.0, 10_000.0)] | None = None
    gamma: Gamma = 0.0
    sample_from: Literal["base", "rl"] = "base"
    temperature: Temperature = 1.0
    top_p: TopP = 0.7
    top_k: TopK = 0
    top_logprobs: Count | None = None
    share: InnerShare | None = None
    role: Annotated[Role, tyro.conf.Suppress] = "setting"
    control_of: Annotated[tuple[Name, ...], Several(0), tyro.conf.Suppress] = ()


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

    criteria: Annotated[tuple[CriterionName, ...], Several(0)] = ()
    taus: Annotated[tuple[Name, ...], Several(0)] = ()
    gammas: Annotated[tuple[Gamma, ...], Several()] = (0.0,)
    sample_from: Annotated[tuple[Literal["base", "rl"], ...], Several()] = ("base",)


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
    skip: Annotated[tuple[Control, ...], Several(0)] = ()
    temperatures: Annotated[tuple[Temperature, ...], Several(0)] = (0.3, 0.6, 0.0)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The pass that finds tau for a wanted share of selected tokens.

    Responses are drawn from the sampled model alone and scored by both; tau is a quantile of the criterion's values.

    Attributes:
      responses: how many, spread over the problems
      max_new_tokens: longest of them, in tokens; default: that of the run
    """

    responses: Count = 64
    max_new_tokens: Tokens | None = None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices: sizes of the mesh axes, one of them -1 for the rest. All 1: a single device."""

    data: Axis = 1
    fsdp: Axis = 1
    tensor: Axis = -1


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
      changed_code: resume although the file of a criterion or grader of your own is not what the run began with
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
      compile_cache: folder that keeps compiled programs, so that a resumed run does not compile again; auto:
        compile_cache in out, or that of JAX_COMPILATION_CACHE_DIR where it is set; None: none is kept
      distributed: the processes of a run over several hosts
      save_tokens: also write tokens.parquet: ids, log-probabilities, delta log-probabilities and where it fired
      print_table: print the table of the settings at the end; summary.txt has it in any case
    """

    base: PathText | None = None
    rl: PathText | None = None
    problems: ProblemFile = ""
    out: PathText = "runs/decode"
    setting: Annotated[Setting, tyro.conf.arg(name="")] = Setting()
    settings: Annotated[tuple[Setting, ...], Several(0)] = ()
    grid: Grid = Grid()
    match_rate: Annotated[tuple[InnerShare, ...], Several(0)] = ()
    controls: Controls = Controls()
    calibration: Calibration = Calibration()
    seeds: Annotated[tuple[Seed, ...], Several()] = (0,)
    n: Count = 4
    limit: Steps | None = None
    max_new_tokens: Tokens = 20_000
    max_prompt_tokens: Tokens | None = None
    slots: Count | None = None
    memory: Gigabytes | None = None
    cache_dtype: Literal["model", "int8"] = "model"
    block: Annotated[int, Range(1, 4096)] | None = None
    prompt_column: Words = ""
    answer_column: Words = ""
    prompt_suffix: Words = ""
    template_args: TemplateArgs = dataclasses.field(default_factory=dict)
    tokenizer: PathText | None = None
    stop_token_ids: StopTokens = ()
    graders: Annotated[tuple[RuleName, ...], Several()] = ("math_verify",)
    grader_workers: Workers = 2
    grader_sandbox: bool = False
    unsafe_evaluation: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: MeshConfig = MeshConfig()
    compile_cache: PathText | None = "auto"
    changed_code: bool = False
    save_tokens: bool = False
    print_table: bool = True
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def check_run(config: DecodeConfig) -> None:
    """Refuses what is out of range outside the settings.

    Raises:
      ValueError: one sentence naming the key, the value and what was expected.
    """
    require(config)
    if config.base is None and config.rl is None:
        raise ValueError("no model: give --base, --rl or both")


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
    resolved = dataclasses.replace(setting, name=setting.name or _name(setting, model), model=model)
    for fault in faults(resolved):  # what a grid or a control made
        raise ValueError(f"{where}{fault.sentence}")
    return resolved


def unmarked(setting: Setting) -> Setting:
    """What two settings must share to be one."""
    return dataclasses.replace(setting, name="", role="setting", control_of=())


def _check_pair(where: str, setting: Setting) -> None:
    if setting.criterion is None:
        raise ValueError(f"{where}criterion missing: expected one of {', '.join(CRITERIA)}, or module:name of your own")
    criterion = criterion_of(setting.criterion)
    _try_criterion(where, setting.criterion)
    decided = criterion.constant is not None
    if setting.tau is not None and decided:
        raise ValueError(f"{where}tau={setting.tau}: criterion {setting.criterion} looks at no threshold")
    if setting.tau is None and setting.share is None and not decided:
        raise ValueError(
            f"{where}tau missing: criterion {setting.criterion} needs a threshold, or --match-rate to find one"
        )
    if setting.share is not None and (setting.tau is not None or decided):
        given = f"tau={setting.tau}" if setting.tau is not None else f"criterion {setting.criterion}"
        raise ValueError(f"{where}share={setting.share} and {given}: expected only one of them")
    if setting.top_logprobs is not None and not criterion.takes_top_logprobs:
        raise ValueError(
            f"{where}top_logprobs={setting.top_logprobs}: criterion {setting.criterion} has no published form"
        )


def _try_criterion(where: str, criterion: str) -> None:
    """Traces one of the user's own on a tiny batch; no device is used."""
    if not (is_own(criterion) and criterion_of(criterion).measures):
        return
    logp_BV, token_B = jax.ShapeDtypeStruct((2, 3), np.float32), jax.ShapeDtypeStruct((2,), np.int32)
    try:
        jax.eval_shape(functools.partial(criterion_value, criterion), logp_BV, logp_BV, token_B)
    except Exception as error:  # whatever the user's function raises
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{where}criterion={criterion}: failed on a tiny batch: {type(error).__name__}: {first:.500}"
        ) from error


def _name(setting: Setting, model: str) -> str:
    parts = [model]
    if model == "pair":
        parts = [str(setting.criterion).replace(":", ".")]
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
