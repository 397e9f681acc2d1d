"""Dr. GRPO (2503.20783) on Qwen2.5-Math-7B with the data and sizes of the DAPO runs.

    python -m train --config configs/qwen2_5_math_7b_dr_grpo.py

GRPO without its two biases: advantages are not divided by the group's standard deviation, and a response's sum is
divided by the constant rollout.max_response, not by its length. No KL penalty.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_dr_grpo",
    rollout=replace(base.rollout, generation_batch=base.algorithm.train_batch),
    reward=replace(base.reward, overlong_buffer=0),
    algorithm=replace(
        base.algorithm,
        reweight=replace(base.algorithm.reweight, kind="none"),
        normalize_by_std=False,
        clip_low=0.2,
        clip_high=0.2,
        clip_dual=None,
        aggregation="seq-mean-token-sum-norm",
        dynamic_sampling=False,
    ),
)
