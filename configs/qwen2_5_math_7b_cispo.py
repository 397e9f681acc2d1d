"""CISPO (MiniMax-M1, 2506.13585) on Qwen2.5-Math-7B: clipped importance weights, no token is dropped.

    python -m train --config configs/qwen2_5_math_7b_cispo.py

No lower bound, as published; the published upper bound is not printed, so 1 + clip_high = 5 is a choice. Token-level
mean, dynamic sampling and the punishment of long responses are those of configs/qwen2_5_math_7b_dapo.py.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_cispo",
    algorithm=replace(
        base.algorithm,
        reweight=replace(base.algorithm.reweight, kind="none"),
        loss="cispo",
        clip_low=1.0,
        clip_high=4.0,
    ),
)
