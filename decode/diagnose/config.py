"""Configuration of a diagnosis, and everything about it that can be refused without opening a file."""

import dataclasses
from typing import Annotated, Literal

import tyro

from decode.config import MeshConfig, StopTokens
from rlvr_jax.data.template_args import TemplateArgs
from rlvr_jax.rewards.pool import RuleName
from rlvr_jax.runs.bounds import (
    Count,
    Gigabytes,
    InnerShare,
    MaybePath,
    PathText,
    Range,
    Seed,
    Several,
    Steps,
    Temperature,
    Tokens,
    TopP,
    Words,
    Workers,
    require,
)

FREE_TO_CHANGE = (
    *("out", "findings", "page", "mesh", "batch_tokens", "chunk", "slots", "memory"),
    *("grader_workers", "grader_sandbox", "unsafe_evaluation"),
    *("compile_cache", "problems"),  # the decoding run in the folder compares their content
)


@dataclasses.dataclass(frozen=True)
class FindingsConfig:
    """What findings.json and the figures are taken at.

    Attributes:
      tail: share of all tokens that count as a number's tail (of dlogp, the largest absolute values)
      rate: share of tokens that each criterion selects where criteria are compared, and that "high dlogp" means
      extremes: tokens listed at either end of dlogp
      resamples: bootstrap resamples of the problems, for the intervals of overlaps
      confidence: of the intervals
      seed: of the resamples
    """

    tail: InnerShare = 0.05
    rate: Annotated[float, Range(0.0, 0.5, "(]")] = 0.05
    extremes: Annotated[int, Range(0, 1_000_000)] = 20
    resamples: Count = 2_000
    confidence: InnerShare = 0.95
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class PageConfig:
    """What the page shows: responses to problems spread evenly over all, the first of each source, then the next.

    Attributes:
      responses: how many
      problems: only these problems' responses, by their number
    """

    responses: Count = 32
    problems: Annotated[tuple[Annotated[int, Range(0, 1_000_000_000)], ...], Several(0)] = ()


@dataclasses.dataclass(frozen=True)
class DiagnoseConfig:
    """Every token of given or decoded responses under two models; findings, figures and a page.

    Attributes:
      base: Hugging Face checkpoint folder of the base model
      rl: Hugging Face checkpoint folder of the model trained from it
      responses: responses to score: the folder of a decoding or training run, or files: seedN.json of a decoding run,
        rollouts/step_N.jsonl of a training run, or .jsonl with prompt (text as the model reads it) or messages,
        response, and if known answer, correct, problem, sample, source, tokens
      problems: instead of responses: a problem file; n responses to each are decoded from base and from rl
      out: folder of the results; an earlier run in it is resumed
      n: responses a problem and model (problems)
      limit: the first so many problems (or responses of each file) only
      seed: of the decoding (problems)
      temperature: of the decoding (problems)
      top_p: nucleus of the decoding; below 1 the mean of dlogp on rl's responses may be negative (problems)
      max_new_tokens: longest response, in tokens (problems)
      max_prompt_tokens: longest prompt allowed, in tokens (problems)
      prompt_column, answer_column: columns of the problem file, as in python -m decode (problems)
      prompt_suffix: appended to the stripped user turn (problems)
      template_args: arguments of the chat template, such as enable_thinking=false
      stop_token_ids: end of a response; default: those of the tokenizer and the models (problems)
      graders: as in python -m decode; the first decides what is correct (problems)
      grader_workers: grading processes for each grader (problems)
      grader_sandbox: grade each response in a process that can open nothing and start nothing (Linux); for a grader of
        your own that runs what the model wrote. reasoning_gym does so in any case, where it can (problems)
      unsafe_evaluation: where there is no sandbox, let tasks of reasoning-gym evaluate answers all the same; text that
        the model wrote may then run as code with all your rights (problems)
      slots: responses decoded at once; default: as many as the memory holds (problems)
      memory: GiB a device for weights and caches while decoding; default: what the device has (problems)
      top: most probable tokens of each model that are kept for every token
      batch_tokens: tokens, padding included, that are scored together; both models' caches for so many are held
      chunk: tokens whose logits are held at a time
      cache_dtype: model: that of the weights; int8: half the memory of bfloat16, log-probabilities differ a little
      tokenizer: folder of the tokenizer and chat template; default: rl
      dtype: float32 or bfloat16; default: float32 on CPU, bfloat16 elsewhere
      mesh: devices
      compile_cache: folder that keeps compiled programs; auto: compile_cache in out; None: none is kept
      findings: what the findings are taken at
      page: what the page shows
    """

    base: PathText | None = None
    rl: PathText | None = None
    responses: Annotated[tuple[PathText, ...], Several(0, repeats=True)] = ()
    problems: MaybePath = ""
    out: PathText = "runs/diagnosis"
    n: Count = 2
    limit: Steps | None = None
    seed: Seed = 0
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: Tokens = 8_192
    max_prompt_tokens: Tokens | None = None
    prompt_column: Words = ""
    answer_column: Words = ""
    prompt_suffix: Words = ""
    template_args: TemplateArgs = dataclasses.field(default_factory=dict)
    stop_token_ids: StopTokens = ()
    graders: Annotated[tuple[RuleName, ...], Several()] = ("math_verify",)
    grader_workers: Workers = 2
    grader_sandbox: bool = False
    unsafe_evaluation: bool = False
    slots: Count | None = None
    memory: Gigabytes | None = None
    top: Annotated[int, Range(1, 1000)] = 5
    batch_tokens: Tokens = 16_384
    chunk: Tokens = 512
    cache_dtype: Literal["model", "int8"] = "model"
    tokenizer: PathText | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    compile_cache: PathText | None = "auto"
    findings: FindingsConfig = FindingsConfig()
    page: PageConfig = PageConfig()


@dataclasses.dataclass(frozen=True)
class PageCommand:
    """Findings, figures and page anew from the files of a finished diagnosis, or of a training run's microscope.

    Attributes:
      run: folder with tokens.parquet, or with step_* folders that have it
      findings: what the findings are taken at
      page: what the page shows
    """

    run: Annotated[PathText, tyro.conf.Positional]
    findings: FindingsConfig = FindingsConfig()
    page: PageConfig = PageConfig()


def check(config: DiagnoseConfig) -> None:
    """Refuses what is out of range.

    Raises:
      ValueError: one sentence naming the key, the value and what was expected.
    """
    require(config)
    for role in ("base", "rl"):
        if getattr(config, role) is None:
            raise ValueError(f"{role} missing: a diagnosis compares two models; give --{role} FOLDER")
    if bool(config.responses) == bool(config.problems):
        given = "both are given" if config.problems else "neither is given"
        raise ValueError(f"responses and problems: expected one of --responses PATH and --problems FILE, {given}")
