"""GSPO (2507.18071) on Qwen2.5-Math-7B: one ratio and one clip a response, in DAPO's pipeline.

    python -m train --config configs/qwen2_5_math_7b_gspo.py

The published clips (3e-4 below, 4e-4 above) and four mini-batches a trainer step; sampling, rewards and dynamic
sampling are those of configs/qwen2_5_math_7b_dapo.py.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_gspo",
    algorithm=replace(
        base.algorithm,
        reweight=replace(base.algorithm.reweight, kind="none"),
        loss="gspo",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="seq-mean-token-mean",
        mini_batch=128,
        micro_batches=64,
    ),
)
