"""python -m train.sft --config configs/demo_sft_clean.py

The demo's base model, first half: from random weights, on demonstrations without mistakes. Single facts such as 8-5=3
are learnt from clean data; from noisy data alone they are not.
"""

from train.sft import SFTConfig, SFTOptim

config = SFTConfig(
    init_config="runs/demo/task/init",
    tokenizer="runs/demo/task/init",
    data="runs/demo/task/clean.jsonl",
    run_dir="runs/demo/clean",
    steps=230,
    batch=128,
    max_tokens=64,
    optim=SFTOptim(lr=3e-3, schedule="constant", warmup=10, weight_decay=0.0),
    log_every=10,
)
