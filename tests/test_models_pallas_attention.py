"""The Pallas decode attention, interpreted on CPU, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.models import layers
from rlvr_jax.models.kernels.pallas_attention import MAX_QUERIES, _work_list, fits, pallas_cached_attention
from rlvr_jax.sharding.rules import make_mesh

NOWHERE = 1 << 30


def case(B, T, K, G, S, H, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, K * G, H), (B, K, S, H), (B, K, S, H)))
    first_B = rng.integers(0, S - T + 1, B)
    first_B[:2] = 0, S - T  # the shortest and the longest
    return q, k, v, jnp.asarray(first_B[:, None] + np.arange(T), jnp.int32)


def plain(q, k, v, positions_BT):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return layers.attention(q, k, v, jnp.arange(k.shape[2]) <= positions_BT[:, :, None])


def kernel(*arrays, block=None):
    return jax.jit(lambda *x: pallas_cached_attention(*x, block=block, interpret=True))(*arrays)


@pytest.mark.parametrize(
    ("shape", "block", "dtype", "tolerance"),
    [
        ((4, 1, 2, 2, 384, 64), 128, jnp.float32, 1e-5),
        ((3, 8, 2, 3, 300, 16), 128, jnp.float32, 1e-5),  # an odd number of rows, a last block that is not full
        ((6, 16, 1, 5, 512, 32), 256, jnp.bfloat16, 1.5e-2),
        ((2, 2, 2, 7, 40, 16), None, jnp.float32, 1e-5),
    ],
)
def test_equals_the_plain_form(shape, block, dtype, tolerance):
    arrays = case(*shape, dtype=dtype)
    out = kernel(*arrays, block=block)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), plain(*arrays), atol=tolerance)


def test_what_is_not_live_is_finite_and_disturbs_nobody():
    q, k, v, positions = case(6, 4, 2, 2, 384, 16)
    expected = plain(q, k, v, positions)
    unused = jnp.arange(384) > positions[:, -1:, None].swapaxes(1, 2)
    k, v = (jnp.where(unused[..., None], jnp.nan, x) for x in (k, v))  # nobody wrote there
    positions = positions.at[2].set(NOWHERE).at[3].set(-1).at[4, 2:].set(NOWHERE)
    out = kernel(q, k, v, positions, block=128)
    live = np.ones((6, 4), bool)
    live[[2, 3]] = live[4, 2:] = False
    np.testing.assert_allclose(out[live], expected[live], atol=1e-5)
    assert np.isfinite(out).all()
    assert np.isfinite(kernel(q, k, v, jnp.full_like(positions, NOWHERE), block=128)).all()


def test_an_int8_cache():
    q, k, v, positions = case(4, 2, 2, 2, 300, 16)
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.integers(-127, 128, k.shape), jnp.int8) for _ in "kv")
    k_scale, v_scale = (jnp.asarray(rng.uniform(0.001, 0.02, k.shape[:3]), jnp.float32) for _ in "kv")
    expected = plain(q, k * k_scale[..., None], v * v_scale[..., None], positions)
    np.testing.assert_allclose(kernel(q, k, v, positions, k_scale, v_scale, block=128), expected, atol=1e-5)


def test_cost_is_that_of_what_each_row_has_used():
    length_PR = jnp.asarray([[1, 128, 0, 129], [0, 512, 3, 0]])
    item_PI, count_P = _work_list(length_PR, block=128, blocks=4)
    assert count_P.tolist() == [4, 5]
    entries = [[(int(i) >> 3, int(i) & 7) for i in items[:n]] for items, n in zip(item_PI, count_P, strict=True)]
    assert entries[0] == [(0, 0), (1, 0), (3, 0), (3, 1)]
    assert entries[1] == [(5, 0), (5, 1), (5, 2), (5, 3), (6, 0)]
    assert {int(i) >> 3 for i in item_PI[1, 5:]} == {4}  # what does not count stays among the part's own rows


def test_a_mesh_changes_nothing():
    arrays = case(8, 2, 2, 3, 256, 16)
    alone = kernel(*arrays, block=128)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        compiled = jax.jit(lambda *x: pallas_cached_attention(*x, block=128, interpret=True)).lower(*arrays).compile()
        np.testing.assert_allclose(compiled(*arrays), alone, atol=1e-6)
        assert "all-gather" not in compiled.as_text()


def test_shapes_it_does_not_take():
    q, k, v, positions = case(2, 1, 2, 2, 64, 16)
    with jax.set_mesh(make_mesh(2, 1, 4)) as mesh:
        assert not fits(jax.sharding.get_abstract_mesh(), q.shape, k.shape), mesh
        with pytest.raises(ValueError, match="kv heads that the mesh divides"):
            pallas_cached_attention(q, k, v, positions)
    many = jnp.zeros((2, MAX_QUERIES + 1, 4, 16))
    with pytest.raises(ValueError, match="at most 16 queries"):
        pallas_cached_attention(many, k, v, jnp.zeros((2, MAX_QUERIES + 1), jnp.int32))
