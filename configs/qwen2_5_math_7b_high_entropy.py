"""DAPO on the fifth of the tokens with the highest entropy (Wang et al., "80/20", 2506.01939), Qwen2.5-Math-7B.

    python -m train --config configs/qwen2_5_math_7b_high_entropy.py

The loss is the mean over the selected tokens; they are the highest 20% of each trainer step's response tokens. On
Qwen3-8B-Base: `--config configs/qwen3_8b_base.py --algorithm.reweight.kind none --algorithm.loss-mask.kind
highest_entropy --algorithm.loss-mask.quantile 0.8`.
"""

from dataclasses import replace

from configs.qwen2_5_math_7b import config as base
from train.config import MaskConfig

config = replace(
    base,
    run_dir="runs/qwen2_5_math_7b_high_entropy",
    algorithm=replace(
        base.algorithm,
        reweight=replace(base.algorithm.reweight, kind="none"),
        loss_mask=MaskConfig(kind="highest_entropy", quantile=0.8),
    ),
)
