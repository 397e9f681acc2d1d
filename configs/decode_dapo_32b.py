"""python -m decode --config configs/decode_dapo_32b.py --problems aime24.jsonl

Selective extrapolation of DAPO-Qwen-32B over Qwen2.5-32B at the settings of arXiv 2603.22117, which
reports on AIME24 (Avg@32): replacement 51.67, the RL model 52.50, extrapolation 55.42. aime24.jsonl:
AIME24 in any of its published schemas. The controls that are run with it have no published figure: gamma = 0, size
without direction, each model alone, the RL model at other temperatures. --top-logprobs 50 is the published code's
rule, which sees each model's 50 best log-probabilities.

Two 32B models take 122 GiB in bfloat16, a full slot of 21,248 tokens 10.4 GiB. Both lie over all devices by default; a
plan for 32 slots needs no accelerator: `python -m decode --config configs/decode_dapo_32b.py --plan v6e:4x4`.
On 16 chips its peak is 30.2 GiB of 31.25 with 22,528 tokens a slot (prefill 29.0, insert 29.5 with 21,248), so that
`--slots 32 --memory 31` takes them all. On 8 H100s (cuda:1x1x8) the decode program's peak is 56.9 GiB of 79.2.
"""

from decode.config import BOXED_SUFFIX, DecodeConfig, Grid

config = DecodeConfig(
    base="Qwen/Qwen2.5-32B",
    rl="BytedTsinghua-SIA/DAPO-Qwen-32B",
    problems="aime24.jsonl",
    out="runs/decode_dapo_32b",
    grid=Grid(criteria=("delta_logp",), taus=("-0.3",), gammas=(0.05,)),
    seeds=tuple(range(8)),
    n=4,
    max_new_tokens=20_000,
    # slots: as many as memory holds. The two caches take 0.5 MB a token: 340 GB in bfloat16 for 32 full slots
    prompt_suffix=BOXED_SUFFIX,
)
