"""Rewards of verifiable answers: two published rules, the overlong penalty, the guarded workers."""

from rlvr_jax.rewards.grading import dapo_answer_reward, math_verify_reward
from rlvr_jax.rewards.overlong import overlong_penalty
from rlvr_jax.rewards.pool import Graded, GraderPool

__all__ = ["Graded", "GraderPool", "dapo_answer_reward", "math_verify_reward", "overlong_penalty"]
