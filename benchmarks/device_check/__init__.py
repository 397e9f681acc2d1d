"""Does rlvr_jax compute the right thing on this accelerator, and how fast? See `__main__`."""
