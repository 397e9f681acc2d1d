"""Supervised training of a small Qwen2.5 on your own conversations.

    python -m train.sft --config configs/sft.py --model Qwen/Qwen2.5-0.5B --data data/conversations.jsonl

A row of the file has `messages` (chat messages, the last by the assistant), or `prompt` and `response`. To start from
random weights instead: `--model '' --init-config CONFIG.JSON --tokenizer FOLDER`.
"""

from train.config import CheckpointConfig, MeshConfig
from train.sft import SFTConfig, SFTOptim

config = SFTConfig(
    model="Qwen/Qwen2.5-0.5B",
    data="data/conversations.jsonl",
    run_dir="runs/sft",
    epochs=2,
    batch=64,
    micro_batches=4,
    max_tokens=2048,
    remat="full",
    optim=SFTOptim(lr=1e-5, schedule="cosine", warmup=50),
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
    checkpoint=CheckpointConfig(every=500, keep=2),
)
