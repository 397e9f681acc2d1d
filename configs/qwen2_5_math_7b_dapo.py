"""Plain DAPO on Qwen2.5-Math-7B, the baseline of the tables of arXiv 2603.22117 (Avg@32 42.12, Pass@16 57.86).

    python -m train --config configs/qwen2_5_math_7b_dapo.py

configs/qwen2_5_math_7b.py without re-weighting.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_dapo",
    algorithm=replace(base.algorithm, reweight=replace(base.algorithm.reweight, kind="none")),
)
