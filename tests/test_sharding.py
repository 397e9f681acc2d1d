import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlvr_jax.sharding import rules as sharding
from rlvr_jax.sharding.rules import ShardingRules, constrain, make_mesh


def test_make_mesh_fills_the_free_axis():
    assert make_mesh(data=2, fsdp=-1, tensor=2).devices.shape == (2, 2, 1, 2)
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert make_mesh(fsdp=-1, sequence=4).devices.shape == (1, 2, 4, 1)
    assert make_mesh(fsdp=1, devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1}, {"data": 2, "fsdp": 2, "tensor": 1}, {"tensor": 0}])
def test_make_mesh_rejects_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(**sizes)


def test_spec_and_unknown_name():
    rules = ShardingRules()
    assert rules.spec("batch", "time", "embed") == P(("data", "fsdp"), "sequence", "fsdp")
    with pytest.raises(ValueError, match="'embedd'"):
        rules.spec("batch", "embedd")
    with pytest.raises(ValueError, match="'bach'"):
        constrain(jnp.ones(2), "bach")


def test_axes_that_do_not_divide_are_replicated_and_reported_once(caplog):
    sharding._log_replicated.cache_clear()  # another test may have had the same case
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    rules = ShardingRules()
    for _ in range(2):
        assert rules.sharding(mesh, ("embed", "kv_heads", "head_dim"), (64, 2, 16)).spec == P("fsdp", None, None)
    assert sum("kv_heads" in r.message for r in caplog.records) == 1
    assert rules.sharding(mesh, ("vocab", "embed"), (152, 64)).spec == P("tensor", "fsdp")


def test_a_mesh_axis_is_used_once_per_array():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert ShardingRules().sharding(mesh, ("batch", "embed"), (8, 8)).spec == P(("data", "fsdp"), None)


def test_constrain_places_under_a_mesh_and_is_identity_without():
    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        y = jax.jit(lambda x: constrain(x * 1, "batch", None))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 2)}
    np.testing.assert_array_equal(y, x)


def test_constrain_inside_shard_map_leaves_the_mapped_axes_alone():
    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    for mapped in ({"data", "fsdp", "sequence", "tensor"}, {"data"}):

        def local(x):
            return constrain(x * 2, "batch", "ffn")

        run = jax.shard_map(
            local,
            mesh=make_mesh(data=2, fsdp=2, tensor=2),
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names=mapped,
            check_vma=False,
        )
        np.testing.assert_array_equal(jax.jit(run)(x), 2 * x)
