"""Plain DAPO on Qwen3-8B-Base, the baseline of the tables of arXiv 2603.22117 (Avg@32 44.26, Pass@16 69.19).

    python -m train --config configs/qwen3_8b_base_dapo.py

configs/qwen3_8b_base.py without re-weighting.
"""

from dataclasses import replace

from configs.qwen3_8b_base import config as base

config = replace(
    base,
    run_dir="runs/qwen3_8b_base_dapo",
    algorithm=replace(base.algorithm, reweight=replace(base.algorithm.reweight, kind="none")),
)
