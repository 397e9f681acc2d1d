"""python -m decode --config configs/decode_unireason_14b.py --problems aime24.jsonl

Selective extrapolation of UniReason-Qwen3-14B-RL over Qwen3-14B-Base at the settings of arXiv 2603.22117, which
reports on AIME24 (Avg@32): replacement 54.06, the RL model 54.58, extrapolation 55.83. aime24.jsonl has lines with
`problem` and `answer`. The controls have no published figure: size without direction, and the RL model
at lower temperatures. --settings.0.top-logprobs 50 is the published code's rule, which sees each model's 50
best log-probabilities.
"""

from decode.config import BOXED_SUFFIX, DecodeConfig, Setting

config = DecodeConfig(
    base="Qwen/Qwen3-14B-Base",
    rl="ReasoningTransferability/UniReason-Qwen3-14B-RL",
    problems="aime24.jsonl",
    out="runs/decode_unireason_14b",
    settings=(
        Setting("extrapolate", "pair", "delta_logp", tau=-0.35, gamma=0.1),
        Setting("replace", "pair", "delta_logp", tau=-0.35, gamma=0.0),
        Setting("rl", "rl"),
        Setting("base", "base"),
        Setting("extrapolate_by_size", "pair", "abs_delta_logp", tau=0.35, gamma=0.1),
        Setting("rl_t0.6", "rl", temperature=0.6),
        Setting("rl_t0.3", "rl", temperature=0.3),
    ),
    seeds=tuple(range(8)),
    n=4,
    max_new_tokens=20_000,
    batch_rows=32,  # the two caches take 0.3 MB a token: 210 GB in bfloat16 when all rows are full
    prompt_suffix=BOXED_SUFFIX,
)
