"""The array annotations used on public signatures: jaxtyping over jax or numpy arrays."""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Num, PRNGKeyArray, Real, Shaped

Array = jax.Array | np.ndarray

__all__ = ["Array", "Bool", "Float", "Int", "Integer", "Num", "PRNGKeyArray", "Real", "Shaped"]
