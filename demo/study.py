"""Which settings the demo decodes, with thresholds that give comparable shares of selected tokens.

A criterion's threshold for a wanted share is a quantile of its value on the tokens of the model that samples. The share
reached in decoding differs a little, since a replaced token changes what follows; results are plotted at the share
reached.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from decode.config import Setting
from rlvr_jax.data.problems import read_problems
from rlvr_jax.data.text import encode_chat, load_tokenizer
from rlvr_jax.direction import criterion_value
from rlvr_jax.models.hf import load_hf
from rlvr_jax.models.qwen import hidden_states, logits

SHARES = {
    "delta_logp": (0.01, 0.025, 0.05, 0.1),
    "abs_delta_logp": (0.025, 0.05, 0.1),
    "kl": (0.025, 0.05, 0.1, 0.25),
    "entropy_base": (0.05, 0.1, 0.2, 0.4),
    "random": (0.05, 0.1, 0.2, 0.4),
}
GAMMAS = (0.5, 1.0, 2.0)
EXTRAPOLATED_SHARE = 0.05  # of base's tokens, by delta_logp
EXTRAPOLATED_SHARE_OF_RL = 0.01
FIRES_BELOW = ("delta_logp",)

# Criterion `none` is the sampled model alone; it also records dlogp on that model's own responses.
ALONE = (
    Setting("base", "pair", "none", sample_from="base", top_p=1.0),
    Setting("rl", "pair", "none", sample_from="rl", top_p=1.0),
)


def settings(thresholds: dict[str, dict[float, float]], thresholds_on_rl: dict[float, float]) -> tuple[Setting, ...]:
    """Replacement at every share, extrapolation at every gamma, and the controls each of them needs."""
    chosen = [
        Setting("base_greedy", "base", temperature=0.0, top_p=1.0),
        Setting("rl_T0.5", "rl", temperature=0.5, top_p=1.0),
        Setting("rl_greedy", "rl", temperature=0.0, top_p=1.0),
    ]
    for criterion, shares in SHARES.items():
        for share in shares:
            tau = thresholds[criterion][share]
            chosen.append(Setting(f"replace_{criterion}_{share:g}", "pair", criterion, tau, 0.0, "base", top_p=1.0))
    tau = thresholds["delta_logp"][EXTRAPOLATED_SHARE]
    chosen += [Setting(f"extra_base_g{g:g}", "pair", "delta_logp", tau, g, "base", top_p=1.0) for g in GAMMAS]
    tau = thresholds_on_rl[EXTRAPOLATED_SHARE_OF_RL]
    chosen += [Setting(f"extra_rl_g{g:g}", "pair", "delta_logp", tau, g, "rl", top_p=1.0) for g in (0.0, *GAMMAS)]
    chosen += [Setting(f"extra_everywhere_g{g:g}", "pair", "all", None, g, "rl", top_p=1.0) for g in (0.5,)]
    return tuple(chosen)


def calibrate(base: str, rl: str, problems: str, tokens: Path, shares: dict[str, tuple[float, ...]]) -> dict:
    """Threshold per criterion and share, from the responses in a decoding run's tokens.parquet.

    Both models score every token of those responses given the tokens before it (teacher forcing).
    """
    tokenizer = load_tokenizer(rl)
    prompts = {problem.index: encode_chat(tokenizer, list(problem.messages)) for problem in read_problems(problems)}
    table = pq.read_table(tokens, columns=["problem", "tokens"]).to_pylist()
    rows = [(prompts[row["problem"]], row["tokens"]) for row in table]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    tokens_BT = np.zeros((len(rows), length), np.int32)
    scored_BT = np.zeros((len(rows), length), bool)  # positions whose *next* token belongs to the response
    for i, (prompt, response) in enumerate(rows):
        whole = prompt + response
        tokens_BT[i, : len(whole)] = whole
        scored_BT[i, len(prompt) - 1 : len(whole) - 1] = True
    pair = [load_hf(path, dtype=jnp.float32) for path in (base, rl)]
    measured = [name for name in shares if name != "random"]

    @jax.jit
    def values(params_base, params_rl, tokens_BT):
        logp_base_NV, logp_rl_NV = (
            jax.nn.log_softmax(logits(config, params, hidden_states(config, params, tokens_BT)[:, :-1])).reshape(
                -1, config.vocab_size
            )
            for (config, _), params in zip(pair, (params_base, params_rl), strict=True)
        )
        token_N = tokens_BT[:, 1:].reshape(-1)
        return {name: criterion_value(name, logp_base_NV, logp_rl_NV, token_N) for name in measured}

    collected: dict[str, list[np.ndarray]] = {name: [] for name in measured}
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        for name, value in values(pair[0][1], pair[1][1], tokens_BT[part]).items():
            collected[name].append(np.asarray(value)[scored_BT[part, :-1].reshape(-1)])
    thresholds: dict[str, dict[float, float]] = {}
    for name, wanted in shares.items():
        if name == "random":
            thresholds[name] = {share: share for share in wanted}
            continue
        values_N = np.concatenate(collected[name])
        quantiles = {share: share if name in FIRES_BELOW else 1 - share for share in wanted}
        thresholds[name] = {share: float(np.quantile(values_N, q)) for share, q in quantiles.items()}
    return thresholds
