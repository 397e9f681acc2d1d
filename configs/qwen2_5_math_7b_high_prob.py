"""DAPO with "Dominate" (2505.12929) on Qwen2.5-Math-7B: advantages times alpha p + 1 - alpha.

    python -m train --config configs/qwen2_5_math_7b_high_prob.py

A baseline of arXiv 2603.22117 (Avg@32 43.11, Pass@16 53.63). The published scripts give alpha for low_prob alone; the
same 0.2 is taken here (`--algorithm.reweight.alpha`). On Qwen3-8B-Base: `--config configs/qwen3_8b_base.py
--algorithm.reweight.kind high_prob`, with its alpha of 0.1.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_high_prob",
    algorithm=replace(base.algorithm, reweight=replace(base.algorithm.reweight, kind="high_prob")),
)
