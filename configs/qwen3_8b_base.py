"""DAPO with low-probability re-weighting on Qwen3-8B-Base: the published setting (arXiv 2603.22117).

    python -m train --config configs/qwen3_8b_base.py --model.path Qwen/Qwen3-8B-Base \
        --data.train data/dapo-math-17k.parquet --data.val data/aime-2024.parquet

The two files are DAPO-Math-17k and AIME-2024 as published by BytedTsinghua-SIA. The mesh is for 64 accelerators; choose
`--mesh.*` and `--algorithm.micro-batches` for yours: neither changes the loss. For plain DAPO:
`--algorithm.reweight.kind none`.
"""

from train.config import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    ReweightConfig,
    RolloutConfig,
)

config = Config(
    run_dir="runs/qwen3_8b_base",
    epochs=1,
    model=ModelConfig(path="Qwen/Qwen3-8B-Base", remat="full", logprob_chunk=8192),
    data=DataConfig(train="data/dapo-math-17k.parquet", val="data/aime-2024.parquet", max_prompt=2048),
    rollout=RolloutConfig(
        generation_batch=1536, n=16, max_response=20480, temperature=1.0, top_p=1.0, prompts_at_once=32
    ),
    reward=RewardConfig(rule="dapo_answer", workers=8, overlong_buffer=4096, overlong_factor=1.0),
    algorithm=AlgorithmConfig(
        reweight=ReweightConfig(kind="low_prob", alpha=0.1),
        clip_low=0.2,
        clip_high=0.28,
        clip_dual=10.0,
        aggregation="token-mean",
        dynamic_sampling=True,
        max_generation_batches=10,
        train_batch=512,
        mini_batch=32,
        micro_batches=32,
    ),
    optim=OptimConfig(lr=1e-6, warmup=10, weight_decay=0.1, clip_norm=1.0),
    mesh=MeshConfig(data=1, fsdp=16, sequence=2, tensor=2),
    eval=EvalConfig(every=5, n=32, temperature=1.0, top_p=0.7, prompts_at_once=16),
    checkpoint=CheckpointConfig(every=10, keep=3),
    log=LogConfig(rollouts=16),
)
