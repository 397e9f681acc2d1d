"""Shared test set-up: 8 simulated CPU devices and run-time checked annotations."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("rlvr_jax", "beartype.beartype")
