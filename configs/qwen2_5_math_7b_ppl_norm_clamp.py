"""As configs/qwen2_5_math_7b_ppl_norm.py with the weight 1 - alpha z clipped to [0.8, 1.2].

    python -m train --config configs/qwen2_5_math_7b_ppl_norm_clamp.py

A baseline of arXiv 2603.22117. The published scripts give alpha for low_prob alone; the same 0.2 is taken here
(`--algorithm.reweight.alpha`). On Qwen3-8B-Base: `--config configs/qwen3_8b_base.py --algorithm.reweight.kind
ppl_norm_clamp`, with its alpha of 0.1.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_ppl_norm_clamp",
    algorithm=replace(base.algorithm, reweight=replace(base.algorithm.reweight, kind="ppl_norm_clamp")),
)
