"""Findings of a few tokens, against numbers worked out by hand or in plain float64 numpy."""

import numpy as np
import pyarrow as pa
import pytest

from rlvr_jax.evaluation import mean_interval
from rlvr_jax.microscope.files import SCALARS, Response, TokenTable
from rlvr_jax.microscope.findings import Options, findings


@pytest.fixture(scope="module")
def table() -> TokenTable:
    """6 problems, one response of base and of rl to each, 50 tokens a response."""
    rng = np.random.default_rng(0)
    responses = [Response(p, 0, s, "", "", None, None, 50) for p in range(6) for s in ("base", "rl")]
    N = 50 * len(responses)
    values = {name: rng.uniform(0.01, 2, N).astype(np.float32) for name in SCALARS}
    for name in ("logp_base", "logp_rl"):
        values[name] = -values[name]
    values["delta_logp"] = values["logp_rl"] - values["logp_base"]
    token = rng.integers(5, size=N).astype(np.int32)
    text = pa.chunked_array([pa.array([f"<{t}>" for t in token])])
    response = np.repeat(np.arange(12, dtype=np.int32), 50)
    return TokenTable(responses, response, np.tile(np.arange(50, dtype=np.int32), 12), token, text, values)


def test_numbers_are_those_of_plain_numpy(table):
    found = findings(table, Options(resamples=20, extremes=3, context=2))
    delta, base = table.values["delta_logp"].astype(float), table.response % 2 == 0
    tails = found["delta_logp_tails"]["base"][0]
    assert tails["below"]["value"] == pytest.approx((delta[base] <= -0.3).mean())
    assert tails["above"]["value"] == pytest.approx((delta[base] >= 0.3).mean())
    assert found["sources"]["rl"]["mean_delta_logp"]["value"] == pytest.approx(delta[~base].mean())
    for name, one in found["histograms"].items():
        counts = [np.histogram(np.clip(table.values[name][at], one["edges"][0], one["edges"][-1]), one["edges"])[0]
                  for at in (base, ~base)]  # fmt: skip
        np.testing.assert_allclose([one["counts"]["base"], one["counts"]["rl"]], counts, atol=1)  # float32 at an edge
        shared = np.minimum(counts[0] / 300, counts[1] / 300).sum()
        assert one["overlap"]["value"] == pytest.approx(shared, abs=0.01)
    p = np.exp(table.values["logp_base"][base].astype(float))
    gradient = found["gradient"]["base"]
    assert gradient["mass_below_half"]["value"] == pytest.approx((1 - p)[p < 0.5].sum() / (1 - p).sum())
    assert gradient["tokens_below_half"]["value"] == pytest.approx((p < 0.5).mean())
    first = found["position"]["rl"]["relative"]
    at = ~base & (table.position < 2)  # the first of 20 bins: (position + 0.5) / 50 < 0.05
    assert first["mean"]["value"][0] == pytest.approx(delta[at].mean())
    assert first["mean_absolute"]["value"][0] == pytest.approx(np.abs(delta[at]).mean())
    highest = found["extremes"]["highest"][0]
    row = int(delta.argmax())
    assert highest["delta_logp"] == pytest.approx(delta[row])
    assert highest["token"] == table.text[row].as_py()
    begin = max(row - 2, row // 50 * 50)
    assert highest["before"] == "".join(table.text[begin:row].to_pylist())
    kl, entropy = (np.argsort(-table.values[name][base])[:15] for name in ("kl", "entropy_rl"))
    agreement = found["agreement"]["base"]
    i, j = (agreement["criteria"].index(name) for name in ("kl", "entropy_rl"))
    both = len(set(kl) & set(entropy))
    assert agreement["jaccard"]["value"][i][j] == pytest.approx(both / (30 - both))


def test_tokens_that_are_not_finite_are_left_out_and_counted(table):
    values = {name: x.copy() for name, x in table.values.items()}
    values["kl"][3] = values["logp_rl"][70] = np.nan
    found = findings(table._replace(values=values), Options(resamples=5))
    assert (found["left_out"], found["tokens"]) == (2, 598)
    values["kl"][:] = np.inf
    with pytest.raises(ValueError, match="no token with finite numbers"):
        findings(table._replace(values=values))


def test_intervals_are_those_of_accuracies(table):
    """Over problems, as Avg@k has them: held at 0%, and not known where one problem has the tokens."""
    values = table.values | {"delta_logp": np.full(600, 0.5, np.float32)}
    problem, base = table.response // 2, table.response % 2 == 0
    values["delta_logp"][base & (problem % 2 == 0)] = -0.4
    found = findings(table._replace(values=values), Options(resamples=5))
    below = found["delta_logp_tails"]["base"][0]["below"]
    assert [below["low"], below["high"]] == mean_interval([1, 0, 1, 0, 1, 0]).ends
    none = found["delta_logp_tails"]["base"][1]["below"]
    assert none == {"value": 0, "low": 0, "high": pytest.approx(1 - 0.025 ** (1 / 6))}
    mean = found["sources"]["base"]["mean_delta_logp"]
    expected = mean_interval([-0.4, 0.5, -0.4, 0.5, -0.4, 0.5], bounds=None)
    assert list(mean.values()) == pytest.approx(list(expected))

    one = [r._replace(problem=3) if r.source == "base" else r for r in table.responses]
    found = findings(table._replace(responses=one), Options(resamples=5))
    for interval in (
        *(found["sources"]["base"]["mean_delta_logp"], found["delta_logp_tails"]["base"][0]["above"]),
        *(found["gradient"]["base"]["mass_below_half"], found["histograms"]["kl"]["overlap"]),
    ):
        assert interval["value"] is not None
        assert interval["low"] is interval["high"] is None
    assert found["sources"]["rl"]["mean_delta_logp"]["low"] is not None
    assert found["histograms"]["kl"]["overlap_if_alike"]["value"] is not None
