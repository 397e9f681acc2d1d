"""Token masks: hand cases, ties at the thresholds, ranks that meet no rounding, what a mask hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.objectives.masks import TOKEN_MASKS, _rank_at, token_mask

PROBABILITIES = np.array([[0.9, 0.1, 0.5, 0.7, 0.0], [0.2, 0.6, 0.8, 0.3, 0.4]])
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.float32)  # nine response tokens
OLD = np.log(np.where(MASK > 0, PROBABILITIES, 1)).astype(np.float32)
# dlogp grows with the reading order: -4, -3, -2, -1 and 0 .. 4.
REF = (OLD - np.array([[-4, -3, -2, -1, 0], [0, 1, 2, 3, 4]])).astype(np.float32)
ENTROPY = np.array([[1, 9, 2, 8, 99], [3, 7, 4, 6, 5]], np.float32)


@pytest.fixture(params=["jit", "eager"])
def run(request):
    def call(kind, quantile, mask=MASK, **arrays):
        arrays = {"old_logp_BT": OLD, "entropy_BT": ENTROPY, "ref_logp_BT": REF} | arrays
        function = lambda mask, arrays: token_mask(kind, mask, quantile=quantile, **arrays)  # noqa: E731
        return np.asarray((jax.jit(function) if request.param == "jit" else function)(mask, arrays))

    return call


def reference(kind, q, mask=MASK, old=OLD, ref=REF, entropy=ENTROPY):
    """By thresholds from a sorted list; q n taken with a hair's tolerance."""
    places = [tuple(i) for i in np.argwhere(mask > 0)]
    n = len(places)
    value = {"entropy": entropy, "delta": np.float64(old) - np.float64(ref), "logp": old}
    value = value["entropy" if "entropy" in kind else "delta" if "delta" in kind else "logp"]
    ordered = sorted(value[i] for i in places)
    low, high = (ordered[max(int(part * n + 1e-9), 1) - 1] for part in (1 - q, q))
    p = np.exp(np.float64(old))
    kept = {
        "all": places,
        "lowest": [i for i in places if value[i] <= high],
        "highest": [i for i in places if value[i] >= high],
        "middle": [i for i in places if low <= value[i] <= high],
        "ends": [i for i in places if value[i] <= low or value[i] >= high],
        "prob_below": [i for i in places if p[i] <= q + 1e-6],
        "prob_between": [i for i in places if 1 - q - 1e-6 <= p[i] <= q + 1e-6],
    }[kind if kind.startswith(("prob", "all")) else kind.split("_")[0]]
    out = np.zeros_like(mask)
    for i in kept:
        out[i] = mask[i]
    return out


@pytest.mark.parametrize(
    ("kind", "quantile", "expected"),
    [
        ("all", 0.5, MASK),
        ("lowest_logp", 1 / 3, [[0, 1, 0, 0, 0], [1, 0, 0, 1, 0]]),
        ("highest_logp", 2 / 3, [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]),
        ("prob_below", 0.35, [[0, 1, 0, 0, 0], [1, 0, 0, 1, 0]]),
        ("prob_between", 0.65, [[0, 0, 1, 0, 0], [0, 1, 0, 0, 1]]),
        ("highest_entropy", 0.8, [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]),
        ("lowest_delta_logp", 0.25, [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]),
        ("highest_delta_logp", 7 / 9, [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]),
        ("middle_delta_logp", 2 / 3, [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]),
        ("ends_delta_logp", 2 / 3, [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]),
    ],
)
def test_hand_case(run, kind, quantile, expected):
    got = run(kind, quantile)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32


@pytest.mark.parametrize("kind", TOKEN_MASKS)
def test_against_a_sorted_list(run, kind):
    rng = np.random.default_rng(4)
    mask = rng.integers(2, size=(6, 17)).astype(np.float32)
    arrays = {name: rng.normal(size=mask.shape).astype(np.float32) - 2 for name in ("old", "ref", "entropy")}
    for quantile in (0.0, 0.5, 0.7, 1.0):
        got = run(
            kind,
            quantile,
            mask,
            old_logp_BT=arrays["old"],
            ref_logp_BT=arrays["ref"],
            entropy_BT=arrays["entropy"],
        )
        np.testing.assert_array_equal(got, reference(kind, quantile, mask, **arrays), err_msg=f"{quantile}")


def test_ranks_lose_nothing_to_rounding(run):
    """0.29 * 100 is 28.999... and (1 - 0.8) * 10 is 1.999... in floating point."""
    count = np.array([10, 100, 700], np.int32)
    for percent in range(101):
        for quantile in (percent / 100, np.float32(percent / 100)):
            np.testing.assert_array_equal(_rank_at(count, quantile), count * percent // 100)
            np.testing.assert_array_equal(_rank_at(count, quantile, complement=True), count * (100 - percent) // 100)
    hundred, values = np.ones((1, 100), np.float32), np.arange(100, dtype=np.float32)[None] / 100 - 2
    arrays = {"old_logp_BT": values, "ref_logp_BT": np.zeros_like(values), "entropy_BT": values}
    assert run("lowest_logp", 0.29, hundred, **arrays).sum() == 29
    ends = run("ends_delta_logp", 0.8, hundred[:, :10], **{name: x[:, :10] for name, x in arrays.items()})
    np.testing.assert_array_equal(ends, [[1, 1, 0, 0, 0, 0, 0, 1, 1, 1]])


def test_traced_quantile():
    values = np.arange(100, dtype=np.float32)[None] / 100 - 2
    keep = jax.jit(lambda q: token_mask("lowest_logp", np.ones((1, 100), np.float32), quantile=q, old_logp_BT=values))
    assert [int(keep(percent / 100).sum()) for percent in range(101)] == [1, *range(1, 101)]
    assert keep(0.295).sum() == 29


def test_ranks_of_a_large_batch_are_exact_integers():
    """The number of tokens of a real step, 512 x 16 x 8192, does not fit float32."""
    count = 67_108_863
    assert _rank_at(jnp.asarray(count), 0.8) == count * 4 // 5
    assert _rank_at(jnp.asarray(count), 0.8, complement=True) == count // 5
    assert _rank_at(jnp.asarray(count), 0.2999) == count * 2999 // 10_000


def test_the_ends_of_the_probabilities_are_kept(run):
    certain_and_excluded = {
        "old_logp_BT": np.array([[0, -np.inf]], np.float32),
        "ref_logp_BT": None,
        "entropy_BT": None,
    }
    for kind, quantile, expected in (
        ("prob_below", 1.0, [1, 1]),
        ("prob_below", 0.0, [0, 1]),
        ("prob_between", 1.0, [1, 1]),
    ):
        got = run(kind, quantile, np.ones((1, 2), np.float32), **certain_and_excluded)
        np.testing.assert_array_equal(got, [expected], err_msg=f"{kind} {quantile}")


BY_QUANTILE = [kind for kind in TOKEN_MASKS if kind != "all" and not kind.startswith("prob")]


def test_equal_values_share_one_fate(run):
    """Values 0, 0, 0, -1, -2, 0: half of six tokens is the third smallest, one of the four zeros."""
    mask = np.array([[1, 0, 1, 1], [1, 1, 0, 1]], np.float32)
    logp = np.array([[0, 9, 0, 0], [-1, -2, 9, 0]], np.float32)
    arrays = {"old_logp_BT": logp, "ref_logp_BT": np.zeros_like(logp), "entropy_BT": logp}
    zeros = np.where(logp == 0, mask, 0)
    expected = {"lowest": mask, "highest": zeros, "middle": zeros, "ends": mask}
    for kind in BY_QUANTILE:
        np.testing.assert_array_equal(run(kind, 0.5, mask, **arrays), expected[kind.split("_")[0]], err_msg=kind)
    for quantile in (0.0, 0.3, 1.0):
        flat = {name: np.zeros_like(logp) for name in arrays}
        np.testing.assert_array_equal(run("lowest_logp", quantile, mask, **flat), mask)


def test_the_order_of_the_tokens_does_not_matter():
    rng = np.random.default_rng(7)
    mask = rng.integers(2, size=(5, 8)).astype(np.float32)
    arrays = {name: -rng.integers(4, size=(3, *mask.shape)).astype(np.float32) for name in ("old", "ref", "entropy")}
    for kind in BY_QUANTILE:
        masks = jax.jit(
            jax.vmap(
                lambda mask, old, ref, entropy, kind=kind: [
                    token_mask(kind, mask, quantile=q, old_logp_BT=old, ref_logp_BT=ref, entropy_BT=entropy)
                    for q in (0.2, 0.5, 0.8)
                ]
            )
        )
        order = np.stack([np.arange(40), rng.permutation(40), rng.permutation(40)])
        moved = [x[0].ravel()[order].reshape(3, 5, 8) for x in arrays.values()]
        for got in masks(mask.ravel()[order].reshape(3, 5, 8), *moved):
            for i in (1, 2):
                np.testing.assert_array_equal(np.ravel(got[i]), np.ravel(got[0])[order[i]], err_msg=kind)


@pytest.mark.parametrize("kind", TOKEN_MASKS)
def test_padding_of_any_content_changes_nothing(run, kind):
    wide = np.pad(MASK, ((0, 1), (1, 2)))
    junk = np.resize([np.nan, np.inf, -np.inf, 0.5], wide.shape)

    def pad(x):
        return np.where(wide > 0, np.pad(x, ((0, 1), (1, 2))), junk).astype(np.float32)

    got = run(kind, 0.7, wide, old_logp_BT=pad(OLD), ref_logp_BT=pad(REF), entropy_BT=pad(ENTROPY))
    np.testing.assert_array_equal(got[:2, 1:-2], run(kind, 0.7))
    assert got.sum() == run(kind, 0.7).sum()


def test_mask_dtypes_weights_and_an_empty_mask(run):
    for dtype in (bool, np.int32, np.float32):
        got = run("lowest_logp", 1 / 3, MASK.astype(dtype))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.array([[0, 1, 0, 0, 0], [1, 0, 0, 1, 0]], dtype))
    np.testing.assert_array_equal(run("lowest_logp", 1 / 3, 0.5 * MASK)[0], [0, 0.5, 0, 0, 0])
    for kind in TOKEN_MASKS:
        assert run(kind, 0.8, np.zeros_like(MASK)).sum() == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'logp-end'.*ends_delta_logp"):
        token_mask("logp-end", MASK, quantile=0.8)
    for kind, name in [
        ("lowest_logp", "old_logp_BT"),
        ("prob_below", "old_logp_BT"),
        ("highest_entropy", "entropy_BT"),
        ("middle_delta_logp", "ref_logp_BT"),
    ]:
        arrays = {"old_logp_BT": OLD, "entropy_BT": ENTROPY, "ref_logp_BT": REF} | {name: None}
        with pytest.raises(ValueError, match=f"{name}=None.*{kind}"):
            token_mask(kind, MASK, quantile=0.8, **arrays)
    for wrong in (1.5, np.float32(1.5), np.float64(-0.5), jnp.asarray(1.5), np.nan):
        with pytest.raises(ValueError, match=r"quantile=(1\.5|-0\.5|nan): expected a number between 0 and 1"):
            token_mask("all", MASK, quantile=wrong)
