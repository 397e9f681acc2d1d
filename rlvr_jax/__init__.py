"""rlvr_jax: reinforcement learning with verifiable rewards on Qwen models, by the direction of the update.

Everything a researcher composes, and nothing else, in the order of the pipeline: a model, its responses, their rewards,
the objective, the update, and decoding with the pair. The docstring of each name gives shapes, units and sources.
"""

from rlvr_jax import dapo
from rlvr_jax.criteria import Criterion, Threshold, criterion_value, fires, threshold_for_share
from rlvr_jax.data.packing import PackedRows
from rlvr_jax.decoding.generate import Generation
from rlvr_jax.decoding.sampling import filtered_logprobs, sample
from rlvr_jax.decoding.selective import SelectiveGeneration
from rlvr_jax.direction import delta_logp, entropy, extrapolate, js_average, js_divergence, kl_divergence
from rlvr_jax.evaluation import avg_at_k, maj_at_k, pass_at_k
from rlvr_jax.generation import generate, generate_selective
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import load_hf, save_hf
from rlvr_jax.models.qwen import Qwen, hidden_states, init_params, model_apply, unembedding
from rlvr_jax.objectives.advantages import group_advantages
from rlvr_jax.objectives.correction import importance_weights, kl_penalty
from rlvr_jax.objectives.logprobs import chunked_logprobs, token_logprobs
from rlvr_jax.objectives.masks import TokenMask, token_mask
from rlvr_jax.objectives.policy import aggregate, cispo_loss, gspo_loss, policy_loss
from rlvr_jax.objectives.reweight import Reweighting, reweight
from rlvr_jax.objectives.tokens import Tokens
from rlvr_jax.rewards import Graded, dapo_answer_reward, math_verify_reward, overlong_penalty
from rlvr_jax.sharding.rules import ShardingRules, constrain, make_mesh
from rlvr_jax.training import TrainState, adamw, make_train_step, with_learning_rate

# In the order of the pipeline.
__all__ = [  # noqa: RUF022
    # a model, and where it lies
    "QwenConfig", "Qwen", "load_hf", "save_hf", "init_params", "hidden_states", "unembedding", "model_apply",
    "make_mesh", "ShardingRules", "constrain",
    # responses and their rewards
    "generate", "Generation", "sample", "filtered_logprobs",
    "math_verify_reward", "dapo_answer_reward", "Graded", "overlong_penalty", "avg_at_k", "pass_at_k", "maj_at_k",
    # the objective
    "dapo", "Tokens", "PackedRows", "token_logprobs", "chunked_logprobs", "group_advantages", "token_mask", "TokenMask",
    "reweight", "Reweighting", "policy_loss", "gspo_loss", "cispo_loss", "kl_penalty", "importance_weights",
    "aggregate",
    # the update
    "TrainState", "make_train_step", "adamw", "with_learning_rate",
    # its direction, and decoding with the pair
    "delta_logp", "entropy", "kl_divergence", "js_average", "js_divergence", "extrapolate",
    "Criterion", "criterion_value", "fires", "Threshold", "threshold_for_share",
    "generate_selective", "SelectiveGeneration",
]  # fmt: skip
