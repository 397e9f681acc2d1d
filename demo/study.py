"""Which settings the demo decodes, criteria compared at equal shares of selected tokens.

The decoding program finds each threshold by its calibration pass. The share reached in decoding differs a little, since
a replaced token changes what follows; results are plotted at the share reached.
"""

import dataclasses

from decode.config import Setting

SHARES: dict[str, tuple[float, ...]] = {
    "delta_logp": (0.01, 0.025, 0.05, 0.1),
    "abs_delta_logp": (0.025, 0.05, 0.1),
    "kl": (0.025, 0.05, 0.1, 0.25),
    "entropy_base": (0.05, 0.1, 0.2, 0.4),
    "random": (0.05, 0.1, 0.2, 0.4),
}
GAMMAS = (0.5, 1.0, 2.0)
EXTRAPOLATED_SHARE = 0.05  # of base's tokens, by delta_logp
EXTRAPOLATED_SHARE_OF_RL = 0.01

# Criterion `none` is the sampled model alone; it also records dlogp on that model's own responses.
ALONE = (
    Setting("base", "pair", "none", sample_from="base", top_p=1.0),
    Setting("rl", "pair", "none", sample_from="rl", top_p=1.0),
)


def settings() -> tuple[Setting, ...]:
    """Replacement at every share, extrapolation at every gamma, and the controls each of them needs."""
    chosen = [
        Setting("base_greedy", "base", temperature=0.0, top_p=1.0),
        Setting("rl_T0.5", "rl", temperature=0.5, top_p=1.0),
        Setting("rl_greedy", "rl", temperature=0.0, top_p=1.0),
    ]
    for criterion, shares in SHARES.items():
        chosen += [
            Setting(f"replace_{criterion}_{share:g}", "pair", criterion, share=share, top_p=1.0) for share in shares
        ]
    for gamma in GAMMAS:
        extra = Setting(f"extra_base_g{gamma:g}", "pair", "delta_logp", None, gamma, "base", top_p=1.0)
        chosen.append(dataclasses.replace(extra, share=EXTRAPOLATED_SHARE))
    for gamma in (0.0, *GAMMAS):
        extra = Setting(f"extra_rl_g{gamma:g}", "pair", "delta_logp", None, gamma, "rl", top_p=1.0)
        chosen.append(dataclasses.replace(extra, share=EXTRAPOLATED_SHARE_OF_RL))
    chosen += [Setting(f"extra_everywhere_g{g:g}", "pair", "all", None, g, "rl", top_p=1.0) for g in (0.5,)]
    return tuple(chosen)
