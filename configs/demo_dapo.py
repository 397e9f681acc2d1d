"""python -m train --config configs/demo_dapo.py

The demo's reinforcement learning: DAPO with low-probability re-weighting (alpha 0.2) from the demo's base model.
"""

from train.config import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    ReweightConfig,
    RolloutConfig,
)

config = Config(
    run_dir="runs/demo/dapo",
    steps=10,
    model=ModelConfig(path="runs/demo/base/hf", remat="none"),
    data=DataConfig(train="runs/demo/task/train.parquet", val="runs/demo/task/test.parquet", max_prompt=24),
    rollout=RolloutConfig(generation_batch=20, n=16, max_response=48, chunk=16),
    reward=RewardConfig(rule="math_verify", overlong_buffer=8),
    algorithm=AlgorithmConfig(
        reweight=ReweightConfig(kind="low_prob", alpha=0.2),
        train_batch=16,
        mini_batch=8,
    ),
    optim=OptimConfig(lr=1e-4, warmup=4),  # three times this rate collapses the policy
    eval=EvalConfig(every=2, n=4, pass_k=(1, 4), top_p=1.0),
    checkpoint=CheckpointConfig(every=5, keep=2),
)
