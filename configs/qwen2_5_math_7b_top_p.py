"""Ablation of arXiv 2603.22117, Fig. 3c: DAPO on rollouts drawn with top-p, hence without improbable tokens.

    python -m train --config configs/qwen2_5_math_7b_top_p.py

Plain DAPO otherwise, on Qwen2.5-Math-7B. The figure's curves are one run for each top-p; their values are not in the
published scripts, so 0.95 is a choice: `--rollout.top-p 0.9 --run-dir runs/qwen2_5_math_7b_top_p_0.9` for another. Its
control is configs/qwen2_5_math_7b_dapo.py (top-p 1). Log-probs and ratios stay those of the whole distribution.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_top_p",
    rollout=replace(base.rollout, top_p=0.95),
    algorithm=replace(base.algorithm, reweight=replace(base.algorithm.reweight, kind="none")),
)
