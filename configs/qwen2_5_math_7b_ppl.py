"""DAPO with perplexity re-weighting (2508.02260) on Qwen2.5-Math-7B: advantages times 1 - alpha nll.

    python -m train --config configs/qwen2_5_math_7b_ppl.py

nll is the mean over the response's tokens. A baseline of arXiv 2603.22117 (Avg@32 41.38, Pass@16 61.08). The published
scripts give alpha for low_prob alone; the same 0.2 is taken here (`--algorithm.reweight.alpha`). On Qwen3-8B-Base:
`--config configs/qwen3_8b_base.py --algorithm.reweight.kind ppl`, with its alpha of 0.1.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_ppl",
    algorithm=replace(base.algorithm, reweight=replace(base.algorithm.reweight, kind="ppl")),
)
