"""Control: every advantage times the mean of low_prob's weights, on Qwen2.5-Math-7B.

    python -m train --config configs/qwen2_5_math_7b_uniform.py

The size of the paper's re-weighting (arXiv 2603.22117) without its place; the paper lacks this control. On
Qwen3-8B-Base: `--config configs/qwen3_8b_base.py --algorithm.reweight.kind uniform`, with its alpha of 0.1.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_uniform",
    algorithm=replace(base.algorithm, reweight=replace(base.algorithm.reweight, kind="uniform")),
)
