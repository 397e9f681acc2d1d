"""GRPO (DeepSeekMath, 2402.03300) on Qwen2.5-Math-7B with the data and sizes of the DAPO runs.

    python -m train --config configs/qwen2_5_math_7b_grpo.py

One clip of 0.2 on both sides, each response's mean, a KL penalty of 0.04 against the base model (as published), every
group trained on, no punishment of long responses. Without the penalty, hence without a second model:
`--algorithm.kl-coef 0`.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_grpo",
    rollout=replace(base.rollout, generation_batch=base.algorithm.train_batch),
    reward=replace(base.reward, overlong_buffer=0),
    algorithm=replace(
        base.algorithm,
        reweight=replace(base.algorithm.reweight, kind="none"),
        clip_low=0.2,
        clip_high=0.2,
        clip_dual=None,
        kl_coef=0.04,
        aggregation="seq-mean-token-mean",
        dynamic_sampling=False,
    ),
)
