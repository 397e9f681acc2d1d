"""Configuration of a DAPO run: nested frozen dataclasses, filled from a recipe file and from flags."""

import dataclasses
from typing import Annotated, Literal

from rlvr_jax.data.template_args import TemplateArgs
from rlvr_jax.objectives.correction import IMPORTANCE_WEIGHTS
from rlvr_jax.objectives.masks import TOKEN_MASKS, token_mask_of
from rlvr_jax.objectives.policy import AGGREGATIONS, LOSSES
from rlvr_jax.objectives.reweight import REWEIGHTINGS, reweighting_of
from rlvr_jax.rewards.pool import RuleName
from rlvr_jax.runs.bounds import (
    Axis,
    Count,
    Every,
    Name,
    PathText,
    Range,
    Seconds,
    Seed,
    Several,
    Share,
    Source,
    Steps,
    Temperature,
    Text,
    Tokens,
    TopK,
    TopP,
    Words,
    Workers,
)
from rlvr_jax.runs.distributed import DistributedConfig

# What AdamW takes, of both training programs.
LearningRate = Annotated[float, Range(0.0, 10.0, "(]")]
Decay = Annotated[float, Range(0.0, 1.0, "[)")]
Epsilon = Annotated[float, Range(0.0, 1.0, "(]")]
WeightDecay = Annotated[float, Range(0.0, 10.0)]
ClipNorm = Annotated[float, Range(0.0, 1e12, "(]")]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: PathText = ""
    """Hugging Face folder of the base model, with its tokenizer.json."""
    max_position_embeddings: Tokens | None = None
    """Declared context length in tokens; None takes config.json's."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU. Master weights are float32 in any case."""
    remat: Literal["none", "dots", "attention", "full"] = "full"
    """What the training forward keeps for the backward pass: everything, matmul results, layer inputs and what
    attention gave, or layer inputs only."""
    attention: Literal["auto", "plain", "chunked", "splash", "cudnn"] = "auto"
    """How the training forward computes attention. auto: splash on TPU; elsewhere plain up to 1,024 tokens a row, then
    chunked. cudnn (NVIDIA GPUs, bfloat16) needs algorithm.packing off."""
    logprob_chunk: Tokens = 1024
    """Tokens whose logits exist at one time, over all devices: about 1,024 a device."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: Source = ""
    """Training problems: parquet in the published schema, JSONL, or "reasoning_gym:TASK,...?size=500&seed=1". Also a
    folder of such files, a pattern, several of them, or "hf://datasets/OWNER/NAME/PATH" on the Hugging Face hub."""
    val: Source | None = None
    """Validation problems, in the same forms; None: no evaluation."""
    prompt_column: Words = ""
    """Column of the prompt, in train and val; a.b is b inside of a. Empty: prompt, problem, question or messages."""
    answer_column: Words = ""
    """Column of the answer; empty: reward_model.ground_truth, answer, ground_truth, or the last box of solution."""
    template_args: TemplateArgs = dataclasses.field(default_factory=dict)
    """Arguments of the chat template, such as enable_thinking=false; in a recipe a dict."""
    deduplicate: bool = False
    """Keep one training row of each problem id. The 1.8 million rows of DAPO-Math-17k are 17 thousand problems, each
    about 100 times, by accident. The published runs read the file as it is, so their one epoch is 100 passes: with
    `deduplicate` the same is `epochs=100`, with no repeats inside a batch."""
    prompt_suffix: Words = ""
    """Appended to the (stripped) last user turn. Empty: nothing (reasoning-gym: `rlvr_jax.data.tasks.SUFFIX`)."""
    max_prompt: Tokens = 2048
    """Longest prompt in tokens."""
    too_long: Literal["truncate_left", "drop", "error"] = "truncate_left"
    """What becomes of longer prompts. How many there are is said at the start and stands in the metrics."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    generation_batch: Count = 1536
    """Prompts a generation batch."""
    n: Count = 16
    """Responses a prompt: one group."""
    max_response: Tokens = 8192
    """Longest response in tokens, the stop token included."""
    temperature: Annotated[float, Range(0.001, 100.0, why="a greedy policy is no policy")] = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    prompts_at_once: Count | None = None
    """Prompts decoded together; bounds the memory of the cache. None: the whole generation batch."""
    chunk: Count = 64
    """Decode steps between two looks of the host."""
    tensor: Count | None = None
    """In how many parts the policy's weights are split to decode, over the devices of the mesh; None: mesh.tensor. The
    others split the rows. More parts than in training suit large models whose training splits little but fsdp."""
    one_step_off: bool = False
    """Collect the groups of the next trainer step, with the policy as it is, while this step updates it: its responses
    are then one trainer step behind (`rollout_gap` and `algorithm.importance` are about that). On one device only."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    rule: RuleName = "math_verify"
    """"math_verify", "dapo_answer", "reasoning_gym" (of its problems), or "module:function" of your own, called with
    (response, answer): a bool it returns counts as +1 or -1, a float is the reward itself (see docs/rewards.md)."""
    workers: Workers = 2
    """Grading processes."""
    timeout_s: Seconds = 10.0
    """Seconds an answer may take; a slower one counts as wrong."""
    memory_mb: Annotated[int, Range(1, 1 << 24)] | None = 2048
    """MiB that the grading of an answer may take; one that needs more counts as wrong. None: no limit."""
    sandbox: bool = False
    """Grade every answer in a process of its own that can open no file and no socket and start nothing (Linux). For a
    rule of your own that runs what the model wrote. "reasoning_gym" does so in any case, where it can."""
    unsafe_evaluation: bool = False
    """Where there is no sandbox: let tasks of reasoning-gym evaluate answers all the same. At risk is all that you may
    read, write or send: text that the model wrote may run as code with your rights."""
    overlong_buffer: Annotated[int, Range(0, 1 << 24)] = 4096
    """Tokens before max_response over which the punishment grows; 0: none."""
    overlong_factor: Annotated[float, Range(0.0, 1000.0)] = 1.0


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    kind: Annotated[str, Text.entry_of(TOKEN_MASKS)] = "all"
    """A kind of `rlvr_jax.token_mask`, or "module:name" of your own; "all": every response token."""
    quantile: Share = 0.8


@dataclasses.dataclass(frozen=True)
class ReweightConfig:
    kind: Annotated[str, Text.entry_of(REWEIGHTINGS)] = "none"
    """A kind of `rlvr_jax.reweight`, or "module:name" of your own; "low_prob" is the paper's."""
    alpha: Annotated[float, Range(-100.0, 100.0)] = 0.2
    """Strength; below 0 it favours what the kind otherwise holds back."""
    where: Literal["all", "positive", "negative"] = "all"
    mask: MaskConfig = MaskConfig()
    """Only these tokens are re-weighted."""


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    reweight: ReweightConfig = ReweightConfig()
    loss_mask: MaskConfig = MaskConfig()
    """Only these tokens enter the loss."""
    loss: Annotated[str, Text.entry_of(LOSSES)] = "dapo"
    """dapo: the clipped loss of each token, which is that of PPO, GRPO and Dr. GRPO too (their clips, aggregation,
    normalize_by_std and kl_coef make the difference); gspo: one ratio and one clip a response; cispo: clipped weights.
    The clips below are dapo's; gspo's are a thousand times smaller, see the recipes. "module:name": a function
    (logp_BT, tokens, clips) -> (loss_BT, metrics) of your own (docs/extend.md)."""
    normalize_by_std: bool = True
    """Divide advantages by the standard deviation of the group's scores. Dr. GRPO does not."""
    clip_low: Share = 0.2
    """Lower bound of the ratio: 1 - clip_low."""
    clip_high: Annotated[float, Range(0.0, 10_000.0)] = 0.28
    """Upper bound of the ratio: 1 + clip_high."""
    clip_dual: Annotated[float, Range(1.0, 1e6, "(]")] | None = 10.0
    """Bound of the ratio where the advantage is negative (loss "dapo" alone); None: none."""
    kl_coef: Annotated[float, Range(0.0, 1000.0)] = 0.0
    """Weight of the KL penalty against the base model in the loss of each token; more than 0 runs that model beside."""
    importance: Annotated[str, Text.one_of(IMPORTANCE_WEIGHTS)] = "none"
    """Truncated importance weights of the loss where sampler and trainer disagree: of each token, or of each response.
    The sampler's log-probs are those before top-p and top-k, so the weights do not undo these filters."""
    importance_cap: Annotated[float, Range(0.0, 1e6, "(]")] = 2.0
    """The largest such weight."""
    aggregation: Annotated[str, Text.entry_of(AGGREGATIONS)] = "token-mean"
    dynamic_sampling: bool = True
    """Keep only groups whose accuracy varies (under a reward rule with graded scores: whose scores vary)."""
    max_generation_batches: Count = 10
    """Generation batches a trainer step may take."""
    when_short: Literal["error", "pad"] = "error"
    """After that many without a full batch: stop, or train on the groups there are, padded with zero-weight rows."""
    surplus: Literal["carry", "discard"] = "carry"
    """Kept groups beyond train_batch: first in line for the next step, or thrown away (as published)."""
    train_batch: Count = 512
    """Prompts (groups) a trainer step."""
    mini_batch: Count = 32
    """Prompts (groups) an optimizer step."""
    micro_batches: Count = 1
    """Parts of a mini-batch (and of its scoring) that pass through the model one after the other, were every response
    of full length. Shorter ones are packed together, so that there are fewer parts, each of the same size (hence 1 part
    stays 1, however short they are)."""
    row_length: Tokens | None = None
    """Tokens of a row into which responses are packed with their prompts; None: the longest prompt + max_response."""
    packing: bool = True
    """Several responses in a row; off: one a row, padding behind it, which changes nothing but what is computed."""

    @property
    def needs_reference(self) -> bool:
        """Whether the reference (base) model runs over every batch."""
        masks = (self.loss_mask.kind, self.reweight.mask.kind)
        needed = [*(token_mask_of(kind).needs for kind in masks), reweighting_of(self.reweight.kind).needs]
        return self.kl_coef > 0 or any("ref_logp_BT" in names for names in needed)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    lr: LearningRate = 1e-6
    warmup: Every = 10
    """Trainer steps: step s, counted from 0, has min(1, s / warmup) * lr, so the first runs at 0, as published."""
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Epsilon = 1e-8
    weight_decay: WeightDecay = 0.1
    clip_norm: ClipNorm = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: Axis = 1
    fsdp: Axis = -1
    tensor: Axis = 1
    sequence: Axis = 1
    """In how many parts the tokens of a row are split: for rows too long for one device, or fewer rows than devices."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: Every = 5
    """Trainer steps between evaluations; 0: none in between. The first and the last model are evaluated in any case,
    if there are validation problems (data.val)."""
    n: Count = 32
    """Responses a problem."""
    pass_k: Annotated[tuple[Count, ...], Several(0)] = (1, 4, 16)
    """Pass@k for these k (those not above n); none: no Pass@k."""
    temperature: Temperature = 1.0
    top_p: TopP = 0.7
    prompts_at_once: Count | None = None
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: Every = 10
    """Trainer steps between checkpoints; 0: the last step only."""
    keep: Count | None = None
    """Newest checkpoints kept; None: all."""
    fallback: bool = False
    """Where the newest checkpoint is damaged, resume from the newest whole one before it (the damaged one is renamed to
    N.damaged). Without it a run with a damaged checkpoint is refused."""
    changed_code: bool = False
    """Resume although the file of a function of your own ("module:name") is not what the run began with."""
    generated: bool = True
    """Keep graded generation batches in run_dir/generated until a checkpoint covers them: a killed run reads them
    again instead of decoding them again. 8 bytes a response token on disk."""
    export_every: Every = 0
    """Trainer steps between exports of a Hugging Face folder to run_dir/hf_step_N; 0: to run_dir/hf at the end only."""
    export_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the compute dtype."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = True
    trackers: Annotated[tuple[Literal["wandb", "trackio"], ...], Several(0)] = ()
    """Experiment trackers that get every record too; their packages must be installed."""
    project: Name = "rlvr_jax"
    """Project of the trackers."""
    name: Name | None = None
    """Name of the run there; None: that of the run's folder."""
    rollouts: Annotated[int, Range(0, 1_000_000)] | None = None
    """Groups a trainer step whose responses go to run_dir/rollouts, one JSONL file a step; None: all; 0: none."""
    tokens: bool = True
    """Each of those responses token by token: text, advantage after re-weighting, weight, log-prob."""
    microscope_every: Every = 0
    """Trainer steps between two looks through the microscope: some of the step's responses, token by token, under the
    initial policy and the current one, in run_dir/microscope (docs/microscope.md). 0: none."""
    microscope_responses: Count = 32
    """Responses of each look, of groups spread over the step's."""
    profile_step: Steps | None = None
    """Trainer step, counted from 1, of which jax.profiler writes a trace to run_dir/profile (process 0, its devices);
    None: none. The first steps compile: take the third or a later one."""


@dataclasses.dataclass(frozen=True)
class Config:
    run_dir: PathText = "runs/dapo"
    """Where everything goes. A run continues from its newest checkpoint there."""
    compile_cache: PathText | None = "auto"
    """Folder that keeps compiled programs, so that a resumed run does not compile again. auto: compile_cache in
    run_dir, or that of JAX_COMPILATION_CACHE_DIR where it is set; None: none is kept."""
    steps: Steps | None = None
    """Trainer steps in all; None: as many as the epochs give."""
    epochs: Steps = 1
    """Passes over the training problems; the run ends with them, or after `steps` if that comes first."""
    seed: Seed = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


# What may differ between a checkpoint and the run that continues it: none of it changes what is trained. Model and data
# may lie elsewhere, since their content is compared (`train.run.same_run`).
MAY_CHANGE = (
    *("model.path", "data.train"),
    *("run_dir", "compile_cache", "steps", "epochs", "mesh", "eval", "checkpoint", "log", "data.val"),
    *("model.remat", "model.attention", "model.logprob_chunk", "rollout.prompts_at_once", "rollout.chunk"),
    "rollout.tensor",
    *("algorithm.micro_batches", "algorithm.row_length", "algorithm.packing"),
    *("reward.workers", "reward.timeout_s", "reward.memory_mb", "reward.sandbox", "reward.unsafe_evaluation"),
)
