"""Inside `planning.process`: a small real program, a scan over layers of two matrix products and its gradient."""

import sys

import jax
import jax.numpy as jnp

from rlvr_jax.planning import process
from rlvr_jax.planning.programs import compile_program, placed
from rlvr_jax.planning.topology import Topology

LAYERS, ROWS, WIDTH, INNER = 5, 64, 256, 512


def loss(weights, x_BD):
    """Sum of squares after LAYERS times x + relu(x W) V."""

    def layer(x_BD, w):
        return x_BD + jax.nn.relu(x_BD @ w["in"]) @ w["out"], None

    return jnp.sum(jnp.square(jax.lax.scan(layer, x_BD, weights)[0].astype(jnp.float32)))


def main() -> None:
    topology = Topology.parse(sys.argv[1])
    mesh = topology.mesh({"data": 1, "fsdp": 2, "tensor": -1})
    weights = {
        "in": placed(mesh, (LAYERS, WIDTH, INNER), jnp.bfloat16, ("layers", "embed", "ffn")),
        "out": placed(mesh, (LAYERS, INNER, WIDTH), jnp.bfloat16, ("layers", "ffn", "embed")),
    }
    x_BD = placed(mesh, (ROWS, WIDTH), jnp.bfloat16, ("batch", None))
    lower = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda x: x.sharding, weights)).lower
    made = compile_program("small", lambda: lower(weights, x_BD), mesh, topology.chip, holds={"params": weights})
    process.say(program=made.plain())


if __name__ == "__main__":
    main()
