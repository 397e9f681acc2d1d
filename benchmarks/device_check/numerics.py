"""The numbers of a DAPO update, of scoring and of decoding on fixed inputs, on whatever device this process has.

Everything is drawn by numpy, so that two processes on different platforms compute the same thing.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device_check.sizes import Size, numeric_config
from rlvr_jax.dapo import make_scorer
from rlvr_jax.generation import generate, generate_selective
from rlvr_jax.models import qwen
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.kernels.embedding import embed_tokens
from rlvr_jax.models.qwen import model_apply
from rlvr_jax.models.tokens import TokenLayout
from rlvr_jax.training import TrainState, make_accumulating_step, with_learning_rate
from train.config import AlgorithmConfig, OptimConfig
from train.step.objective import make_loss, scalars
from train.step.programs import make_optimizer

Arrays = dict[str, np.ndarray]
TAU, GAMMA, TOP_P = -0.02, 0.1, 0.7
EQUAL_TOKENS = 8192  # more than bfloat16 can count


def update(size: Size, dtype: str, *, attention: str = "auto", packed: bool = True) -> Arrays:
    """Loss, every gradient and the new parameters of one update; log-probs and entropies of a scorer.

    `same_bits` says whether the sums of the same micro-batch were equal in every bit when computed again.
    """
    config = numeric_config(size, dtype=dtype, remat="full", attention=attention)
    params = jax.tree.map(jnp.asarray, numpy_params(config, 1))
    apply, optimizer = model_apply(config), make_optimizer(OptimConfig())
    loss = make_loss(AlgorithmConfig(), chunk=size.numeric_length, max_response=size.numeric_length)
    step = make_accumulating_step(apply, optimizer, loss)
    batch = jax.tree.map(jnp.asarray, _batch(size, packed))
    sums = step.add(params, step.begin(params, batch), batch)
    again = step.add(params, step.begin(params, batch), batch)
    made = {"loss": sums.total / sums.weight, "weight": sums.weight}
    made |= {f"gradient{name}": x for name, x in _named(sums.grads)}
    made["same_bits"] = all(
        bool(jnp.array_equal(x, y)) for x, y in zip(jax.tree.leaves(sums), jax.tree.leaves(again), strict=True)
    )
    state = with_learning_rate(TrainState.create(params, optimizer), 1e-3)
    state, metrics = step.finish(state, sums)
    made["grad_norm"] = metrics["grad_norm"]
    made |= {f"updated{name}": x for name, x in _named(state.params)}
    score = make_scorer(apply, chunk=size.numeric_length)
    made["logp"], made["entropy"] = score(state.params, batch["tokens_BT"], batch["segment_BT"], np.float32(1))
    return {name: np.asarray(x) for name, x in made.items()}


def decode(size: Size, dtype: str) -> Arrays:
    """Tokens of one model (greedy, drawn) and of a pair (token by token, in blocks), and the sampler-trainer gap."""
    config, new = numeric_config(size, dtype=dtype), size.numeric_new
    base = numpy_params(config, 1)
    rl = jax.tree.map(lambda x, noise: x + noise / 10, base, numpy_params(config, 2))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (5, 40, 3 * size.numeric_length // 16)]
    greedy = generate(config, base, prompts, max_new_tokens=new, n=2, temperature=0.0)
    drawn = generate(config, base, prompts, max_new_tokens=new, n=2, top_p=TOP_P, seed=5)
    pair = {"criterion": "delta_logp", "tau": TAU, "gamma": GAMMA, "n": 2, "max_new_tokens": new, "top_p": TOP_P}
    one, blocks = (
        generate_selective(config, base, config, rl, prompts, seed=5, block=block, **pair) for block in (1, size.block)
    )
    longest = max(map(len, prompts)) + new
    tokens = np.zeros((2 * len(prompts), longest), np.int32)
    segment = np.zeros_like(tokens)
    for i, row in enumerate(drawn.tokens):
        whole = [*prompts[i // 2], *row]
        tokens[i, : len(whole)], segment[i, : len(whole)] = whole, 1
    score = make_scorer(model_apply(config), chunk=size.numeric_length)
    scored = np.asarray(score(jax.tree.map(jnp.asarray, base), tokens, segment, np.float32(1))[0])
    gap = [scored[i, len(prompts[i // 2]) :][:new] - drawn.logp[i] for i in range(len(tokens))]
    return {
        "greedy": greedy.tokens,
        "drawn": drawn.tokens,
        "pair": one.tokens,
        "pair_in_blocks": blocks.tokens,
        "fired": one.fired,
        "gap": np.stack(gap),
    }


def equal_tokens_gradient() -> float:
    """Gradient of one embedding entry that `EQUAL_TOKENS` tokens look up in bfloat16: exactly that many."""
    tokens = jnp.zeros((4, EQUAL_TOKENS // 4), jnp.int32)

    def total(table_VD: jax.Array) -> jax.Array:
        return jnp.sum(embed_tokens(table_VD, tokens, jnp.bfloat16, TokenLayout.of(*tokens.shape)).astype(jnp.float32))

    return float(jax.jit(jax.grad(total))(jnp.ones((2, 2), jnp.float32))[0, 0])


def numpy_params(config: QwenConfig, seed: int) -> Any:
    """float32 parameters that do not depend on the platform: normal / 16, ones and zeros."""
    rng = np.random.default_rng(seed)

    def make(spec: qwen.ParamSpec) -> np.ndarray:
        if spec.init == "normal":
            return rng.standard_normal(spec.shape, np.float32) / 16
        return np.full(spec.shape, spec.init == "ones", np.float32)

    return jax.tree.map(make, qwen.param_specs(config), is_leaf=lambda x: isinstance(x, qwen.ParamSpec))


def _batch(size: Size, packed: bool) -> dict[str, Any]:
    """Rows of three sequences and padding, or of one sequence; advantages of both signs; some tokens left out."""
    rng, shape = np.random.default_rng(7), (size.numeric_rows, size.numeric_length)
    tokens = rng.integers(0, size.numeric["vocab_size"], shape, dtype=np.int32)
    segment = np.zeros(shape, np.int32)
    counted = np.zeros(shape, np.float32)
    for row in range(len(tokens)):
        end = size.numeric_length * (15 - row) // 16
        cuts = [0, end // 3, 2 * end // 3, end] if packed else [0, end]
        for number, (begin, stop) in enumerate(itertools.pairwise(cuts), 1):
            segment[row, begin:stop] = number
            counted[row, begin + 1 : stop] = rng.random(stop - begin - 1) < 0.8
    uniform = -np.log(size.numeric["vocab_size"])
    return {
        "tokens_BT": tokens,
        "segment_BT": segment,
        "old_logp_BT": np.float32(uniform + 0.3 * rng.standard_normal(shape)) * counted,
        "advantages_BT": rng.standard_normal(shape).astype(np.float32) * counted,
        "loss_mask_BT": counted,
        "reweight_mask_BT": counted,
        **scalars(AlgorithmConfig(), 1.0),
    }


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), x
