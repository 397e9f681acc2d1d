"""python -m train.sft --config configs/demo_sft_mixed.py

The demo's base model, second half: on what a crowd writes, most of whom jump over steps and are then mostly wrong.
"""

from train.sft import SFTConfig, SFTOptim

config = SFTConfig(
    model="runs/demo/clean/hf",
    data="runs/demo/task/mixed.jsonl",
    run_dir="runs/demo/base",
    steps=120,
    batch=128,
    max_tokens=64,
    optim=SFTOptim(lr=1.5e-3, schedule="constant", warmup=10, weight_decay=0.0),
    log_every=10,
)
