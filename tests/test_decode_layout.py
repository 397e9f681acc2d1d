"""The mesh and the places that decoding uses: what they are, and that nothing decoded depends on them."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from rlvr_jax.generation import generate_selective
from rlvr_jax.models import decode_weights, qwen
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.sharding.decode_layout import DECODE_RULES, cache_shards, decode_mesh, parts_of
from rlvr_jax.sharding.rules import DEFAULT_RULES, make_mesh
from tests.decoding_tools import assert_same

# 6 heads and 2 kv heads as 28 and 4; neither the heads nor the vocabulary divide by 4, and no two sizes are equal.
CONFIG = QwenConfig("qwen2", 90, 48, 80, 1, 6, 2, 16, qkv_bias=True, dtype="float32", max_position_embeddings=256)


def parameters(seed: int) -> dict:
    params = qwen.init_params(CONFIG, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + 0.25 * jax.random.normal(next(keys), x.shape), params)


def sizes(mesh):
    return tuple(mesh.shape.get(axis, 1) for axis in ("data", "fsdp", "tensor", "rows"))


@pytest.mark.parametrize(
    ("given", "kv_heads", "tensor", "wanted"),
    [
        ((2, 2, 2), [8, 8], None, (2, 2, 2, 1)),
        ((1, 1, 16), [8, 8], None, (1, 1, 8, 2)),  # two 32B models on 16 chips
        ((1, 1, 8), [4], None, (1, 1, 4, 2)),  # Qwen2.5-7B on 8
        ((1, 1, 16), [8, 4], None, (1, 1, 4, 4)),
        ((1, 8, 1), [4], 4, (1, 2, 4, 1)),  # rollout with more parts than training
        ((4, 16, 1), [8], 32, (2, 1, 8, 4)),
        ((2, 1, 8), [8], 2, (2, 4, 2, 1)),
    ],
)
def test_the_tensor_axis_is_taken_apart(given, kv_heads, tensor, wanted):
    mesh = AbstractMesh(given, ("data", "fsdp", "tensor"))
    made = decode_mesh(mesh, kv_heads, tensor)
    assert sizes(made) == wanted
    assert decode_mesh(made, kv_heads) is made
    assert cache_shards(made) * parts_of(made, "kv_heads", 8) == made.size, "no part of a cache lies twice"
    assert cache_shards(None) == parts_of(None, "vocab", 7) == 1


@pytest.mark.parametrize(
    ("axes", "wanted"), [(("x", "y"), (1, 8, 1, 1)), (("data", "y"), (4, 2, 1, 1)), (("x", "tensor"), (1, 4, 2, 1))]
)
def test_a_mesh_may_lack_the_axes(axes, wanted):
    assert sizes(decode_mesh(AbstractMesh((4, 2), axes), [8])) == wanted


def test_the_devices_keep_their_order():
    mesh = make_mesh(1, 8, 1)
    made = decode_mesh(mesh, [2], 4)
    assert sizes(made) == (1, 2, 2, 2)
    assert list(made.devices.flat) == list(mesh.devices.flat)
    assert decode_mesh(mesh, [2]) is mesh
    with pytest.raises(ValueError, match=r"tensor=3 .*8 devices"):
        decode_mesh(mesh, [2], 3)


def test_axes_that_a_weight_cannot_use_split_its_model_dimension():
    mesh = decode_mesh(AbstractMesh((1, 1, 16), ("data", "fsdp", "tensor")), [8])
    axes = qwen.layer_specs(CONFIG)

    def spec(name, *shape):
        names = axes[name].axes if name in axes else qwen.param_specs(CONFIG)[name].axes
        return DECODE_RULES.fitting_spec(mesh, names, shape)

    assert spec("up_proj", 5120, 27_648) == P(None, ("tensor", "rows"))
    assert spec("q_proj", 5120, 40, 128) == P("rows", "tensor", None)
    assert spec("o_proj", 32, 128, 4096) == P(("tensor", "rows"), None, None)
    assert spec("k_proj", 5120, 8, 128) == P("rows", "tensor", None)
    assert spec("unembed", 5120, 152_064) == P(None, ("tensor", "rows"))
    assert spec("embed", 50_001, 4096) == P(None, ("tensor", "rows"))
    assert spec("k_bias", 8, 128) == P("tensor", None)
    # The rules of training split the model dimension over fsdp, which a decode step would have to gather.
    fsdp = AbstractMesh((1, 8, 2), ("data", "fsdp", "tensor"))
    assert DEFAULT_RULES.fitting_spec(fsdp, axes["up_proj"].axes, (64, 80)) == P("fsdp", "tensor")
    assert DECODE_RULES.fitting_spec(fsdp, axes["up_proj"].axes, (64, 80)) == P(None, "tensor")


@pytest.mark.parametrize("axes", [(1, 2, 4), pytest.param((1, 1, 8), marks=pytest.mark.slow)])
def test_more_shards_than_kv_heads_give_the_same_tokens(axes):
    base, rl = parameters(1), parameters(2)
    prompts = [[1 + i, 2, 3][: 1 + i % 3] for i in range(4)]
    call = {"criterion": "kl", "tau": 0.5, "gamma": 0.1, "block": 2, "max_new_tokens": 8, "n": 2, "top_p": 0.9}
    expected = generate_selective(CONFIG, base, CONFIG, rl, prompts, **call)
    assert expected.fired.any()
    assert_same(
        expected, generate_selective(CONFIG, base, CONFIG, rl, prompts, **call, mesh=make_mesh(*axes)), atol=1e-4
    )


def test_rollout_weights_are_laid_out_inside_one_program():
    """From fsdp over 8 devices to 2 rows of batch x 4 parts of the weights, of which 2 split kv heads."""
    params = parameters(3)
    training = make_mesh(1, 8, 1)
    placed = jax.tree.map(
        lambda x, axes: jax.device_put(x, DEFAULT_RULES.sharding(training, axes, x.shape)),
        params,
        qwen.param_axes(CONFIG),
    )
    half = dataclasses.replace(CONFIG, dtype="float16")  # CPU moves bfloat16 as float32
    rollout = decode_mesh(training, [CONFIG.num_kv_heads], 4)
    with jax.set_mesh(training), jax.set_mesh(rollout):
        made = decode_weights.prepare(half, placed)
        given = decode_weights.sources(half, placed)
        text = decode_weights.layout.lower(half, given, placed).compile().as_text()
    jax.tree.map(np.testing.assert_array_equal, made, decode_weights.prepare(half, params))
    shapes = decode_weights.prepared_shapes(half, rollout)
    same = jax.tree.map(
        lambda x, y: x.shape == y.shape and x.sharding.is_equivalent_to(y.sharding, x.ndim), made, shapes
    )
    assert all(jax.tree.leaves(same))
    assert made["layers"][0]["up_proj"].sharding.shard_shape((48, 80)) == (48, 20)
    moved = [line for line in text.splitlines() if " all-" in line or " collective-" in line]
    assert moved
    assert not [line for line in moved if "f32[" in line], "what moves between devices is in the compute dtype"
