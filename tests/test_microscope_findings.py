"""Findings of a few tokens, against numbers worked out by hand or in plain float64 numpy."""

import numpy as np
import pyarrow as pa
import pytest

from rlvr_jax.evaluation import mean_interval
from rlvr_jax.microscope import statistics
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


def test_what_counts_and_what_is_listed(table):
    """Tails by size, thresholds included, one token per response, token types of several problems."""
    delta = table.values["delta_logp"].copy()
    delta[:4], delta[4] = (1.0, 1.0, -1.0, -1.0), 1.5  # exactly at the threshold
    token = table.token.copy()
    token[100:112], delta[100:112] = 40, 3.0  # often, and in one response
    token[[0, 150, 300, 450]] = 41  # in four problems, too rarely
    text = pa.chunked_array([pa.array([f"<{t}>" for t in token])])
    found = findings(table._replace(values=table.values | {"delta_logp": delta}, token=token, text=text), Options())
    base = table.response % 2 == 0
    for side, expected in (("above", delta >= 1), ("below", delta <= -1)):
        share = found["delta_logp_tails"]["base"][1][side]["value"]
        assert share == pytest.approx(expected[base].mean())
    assert found["delta_logp_tails"]["base"][1]["below"]["value"] > (delta[base] < -1).mean()
    one = found["histograms"]["delta_logp"]
    assert one["tail_threshold"] == pytest.approx(np.quantile(np.abs(delta), 0.95))
    assert one["tail_share"]["rl"]["value"] == pytest.approx((np.abs(delta) >= one["tail_threshold"])[~base].mean())
    for end, sign in (("highest", 1), ("lowest", -1)):
        listed = found["extremes"][end]
        keys = [(x["problem"], x["sample"], x["source"]) for x in listed]
        assert len(keys) == len(set(keys)) == 12
        largest = [sign * (sign * delta[table.response == r]).max() for r in range(12)]
        assert [x["delta_logp"] for x in listed] == pytest.approx(sorted(largest, key=lambda x: -sign * x))
    types = found["token_types"]
    assert (types["at_least"], {x["id"] for end in ("highest", "lowest") for x in types[end]}) == (5, {0, 1, 2, 3, 4})
    assert found["agreement"]["base"]["jaccard_by_chance"] == pytest.approx(0.05 / 1.95)


def test_the_interval_of_an_overlap_is_the_reflected_one(table):
    """Resamples overlap less than all tokens do, so their quantiles lie below the value and are turned over."""
    found = findings(table, Options(resamples=300))["histograms"]["kl"]
    problem, base = table.response // 2, table.response % 2 == 0
    counts = [
        np.array([statistics.histogram(table.values["kl"][side & (problem == p)], found["edges"]) for p in range(6)])
        for side in (base, ~base)
    ]
    drawn = statistics.bootstrap(statistics.overlap, *counts, resamples=300)
    got = found["overlap"]
    assert got["value"] == pytest.approx(drawn.value)
    assert (got["low"], got["high"]) == pytest.approx(
        (2 * drawn.value - drawn.high, min(1, 2 * drawn.value - drawn.low))
    )
    assert got["low"] != pytest.approx(drawn.low)


def test_a_probability_that_rounds_above_one(table):
    values = table.values | {"logp_rl": np.full(600, 1e-6, np.float32)}
    found = findings(table._replace(values=values), Options(resamples=2, extremes=1, context=1))
    assert found["high_delta_logp"]["rl"]["all"]["p_rl"]["mean"]["value"] == 1
