import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlvr_jax.runs.checkpoint import Checkpoints, require_same_config
from rlvr_jax.sharding.rules import make_mesh
from rlvr_jax.training import TrainState, adamw


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def a_state(mesh=None):
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    values[0, :3] = [np.nan, 1e-42, -0.0]  # what only an exact copy keeps
    w = jax.device_put(values, None if mesh is None else NamedSharding(mesh, P("fsdp", "tensor")))
    return TrainState.create(
        {
            "w": w,
            "b": jax.device_put(
                values[0].astype(jnp.bfloat16), w.sharding if mesh is None else NamedSharding(mesh, P())
            ),
        },
        adamw(),
    )


def test_round_trip_is_exact_with_host_values_and_ragged_arrays(tmp_path):
    state = a_state()
    host = {"counters": {"trainer_steps": 3}, "names": ["a", None], "float": 0.1 + 0.2}
    arrays = {"tokens": np.arange(5, dtype=np.int32), "empty": np.zeros((0, 3), np.float32)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state, host=host, arrays=arrays)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest == 3
        assert checkpoints.host(3) == host
        restored = checkpoints.restore(a_state(), 3)
    assert restored.step == 3
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.host == host
    np.testing.assert_array_equal(restored.arrays["tokens"], arrays["tokens"])
    assert restored.arrays["tokens"].dtype == np.int32
    assert restored.arrays["empty"].shape == (0, 3)


def test_only_empty_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": jnp.ones(2)}, host={}, arrays={"e": np.zeros(0, np.int64)})
        assert checkpoints.restore({"x": jnp.ones(2)}, 0).arrays["e"].dtype == np.int64


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    big = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big, host={})
        big = overwrite(big)
        jax.block_until_ready(big)
        restored = checkpoints.restore(big, 1)
    np.testing.assert_array_equal(restored.state["w"], np.arange(2_000_000, dtype=np.float32))


def test_restores_onto_another_mesh(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        saved = a_state(make_mesh(fsdp=4, tensor=2))
        checkpoints.save(1, saved, host={})
        like = a_state(make_mesh(data=2, fsdp=2, tensor=2))
        restored = checkpoints.restore(like, 1).state
    assert bits(restored) == bits(saved)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


def test_keeps_the_newest_and_names_a_missing_step(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(step, {"x": jnp.full(2, step)}, host={"step": step})
        checkpoints.save(5, {"x": jnp.zeros(2)}, host={"step": 0})  # a second save of a step is not made
        checkpoints.wait()
        assert checkpoints.steps == [2, 5]
        np.testing.assert_array_equal(checkpoints.restore({"x": jnp.zeros(2, int)}, 5).state["x"], [5, 5])
        with pytest.raises(ValueError, match="no checkpoint of step 1"):
            checkpoints.restore({"x": jnp.zeros(2)}, 1)
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)}, host={})
    (tmp_path / "2.orbax-checkpoint-tmp-1").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1


def test_require_same_config_names_the_key():
    saved = {"optim": {"lr": 1e-6}, "steps": 3, "tuple": (1, 2), "log": {"every": 1}}
    require_same_config(saved, saved | {"steps": 9, "tuple": [1, 2], "log": {"every": 2}}, may_change=("steps", "log"))
    with pytest.raises(ValueError, match=r"optim\.lr: .*1e-06.*0\.001"):
        require_same_config(saved, saved | {"optim": {"lr": 1e-3}}, may_change=("steps",))
    with pytest.raises(ValueError, match="new_key"):
        require_same_config(saved, saved | {"new_key": 1}, may_change=())
    with pytest.raises(ValueError, match="steps_b"):
        require_same_config({"steps_b": 1}, {"steps_b": 2}, may_change=("steps",))
