"""python -m decode --config configs/decode_unireason_14b.py --problems aime24.jsonl

Selective extrapolation of UniReason-Qwen3-14B-RL over Qwen3-14B-Base at the settings of arXiv 2603.22117, which
reports on AIME24 (Avg@32): replacement 54.06, the RL model 54.58, extrapolation 55.83. aime24.jsonl:
AIME24 in any of its published schemas. The controls that are run with it have no published figure: gamma = 0, size
without direction, each model alone, the RL model at other temperatures. --top-logprobs 50 is the published code's
rule, which sees each model's 50 best log-probabilities.

A plan for 32 slots needs no accelerator: `python -m decode --config configs/decode_unireason_14b.py --plan v6e:4x4`. On
16 chips the decode program's peak is 17.0 GiB of 31.25.
"""

from decode.config import BOXED_SUFFIX, DecodeConfig, Grid

config = DecodeConfig(
    base="Qwen/Qwen3-14B-Base",
    rl="ReasoningTransferability/UniReason-Qwen3-14B-RL",
    problems="aime24.jsonl",
    out="runs/decode_unireason_14b",
    grid=Grid(criteria=("delta_logp",), taus=("-0.35",), gammas=(0.1,)),
    seeds=tuple(range(8)),
    n=4,
    max_new_tokens=20_000,
    # slots: as many as memory holds. The two caches take 0.3 MB a token: 210 GB in bfloat16 for 32 full slots
    prompt_suffix=BOXED_SUFFIX,
)
