"""rlvr_jax: reinforcement learning with verifiable rewards on Qwen models, by the direction of the update.

Everything a researcher composes, and nothing else; the docstring of each name gives shapes, units and sources.
"""

from rlvr_jax.criteria import fires
from rlvr_jax.decoding.generate import Generation
from rlvr_jax.decoding.sampling import filtered_logprobs, sample
from rlvr_jax.decoding.selective import SelectiveGeneration
from rlvr_jax.direction import delta_logp, entropy, extrapolate, js_average, js_divergence, kl_divergence
from rlvr_jax.evaluation import avg_at_k, maj_at_k, pass_at_k
from rlvr_jax.generation import generate, generate_selective
from rlvr_jax.microscope.columns import TokenColumns
from rlvr_jax.microscope.pair import score_pair
from rlvr_jax.microscope.statistics import bootstrap, gradient_by_probability, histogram, overlap, tail_mass
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import load_hf, save_hf
from rlvr_jax.models.qwen import Qwen
from rlvr_jax.objectives.advantages import group_advantages
from rlvr_jax.objectives.correction import importance_weights, kl_penalty
from rlvr_jax.objectives.logprobs import chunked_logprobs, token_logprobs
from rlvr_jax.objectives.masks import token_mask
from rlvr_jax.objectives.policy import aggregate, cispo_loss, gspo_loss, policy_loss
from rlvr_jax.objectives.reweight import reweight
from rlvr_jax.rewards import Graded, dapo_answer_reward, math_verify_reward, overlong_penalty
from rlvr_jax.sharding import ShardingRules, constrain, make_mesh
from rlvr_jax.training import TrainState, make_train_step

__all__ = [
    "Generation", "Graded", "Qwen", "QwenConfig", "SelectiveGeneration", "ShardingRules", "TokenColumns", "TrainState",
    "aggregate", "avg_at_k", "bootstrap", "chunked_logprobs", "cispo_loss", "constrain", "dapo_answer_reward",
    "delta_logp", "entropy", "extrapolate", "filtered_logprobs", "fires", "generate", "generate_selective",
    "gradient_by_probability", "group_advantages", "gspo_loss", "histogram", "importance_weights", "js_average",
    "js_divergence", "kl_divergence", "kl_penalty", "load_hf", "maj_at_k", "make_mesh", "make_train_step",
    "math_verify_reward", "overlap", "overlong_penalty", "pass_at_k", "policy_loss", "reweight", "sample", "save_hf",
    "score_pair", "tail_mass", "token_logprobs", "token_mask",
]  # fmt: skip
