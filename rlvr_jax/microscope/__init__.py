"""Two checkpoints, token by token: what a base model and its RL-trained form give every token of a response."""

from rlvr_jax.microscope.columns import TokenColumns
from rlvr_jax.microscope.pair import score_pair
from rlvr_jax.microscope.statistics import bootstrap, gradient_by_probability, histogram, overlap, tail_mass

__all__ = [
    "TokenColumns",
    "bootstrap",
    "gradient_by_probability",
    "histogram",
    "overlap",
    "score_pair",
    "tail_mass",
]
