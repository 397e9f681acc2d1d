"""Drawing tokens: temperature, top-k, top-p, all of them traced arrays, without ever sorting a vocabulary.

A token is drawn by Gumbel-max in two levels, first a block of the vocabulary, then a token in it, so a draw costs
V / 128 + 128 random numbers a row instead of V. Top-p is exact and needs no threshold: draw from the whole
distribution, keep the token if the tokens more probable than it hold less than `top_p`, else draw again among those
more probable ones. What is accepted is distributed as the renormalised nucleus, and as the set shrinks at every
rejection the loop ends after two or three passes over the vocabulary for usual values of top_p.

The nucleus has one definition, `_outside_nucleus`, and the sums that decide it are sums of integers. So programs that
add in another order (a draw, `filtered_logprobs`, a sharded vocabulary) agree on it to the last token, ties included.
A draw makes these sums only where ordinary ones come too close to the limit to tell.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlvr_jax.decoding.checks import check_setting
from rlvr_jax.typing import Array, Float, Int

_BLOCK = 128  # tokens of a block; the last two axes [V / 128, 128] suit TPU lanes
_CLOSE = 1e-3  # relative: far more than float32 sums of any vocabulary differ by
_DIGITS = 3  # of a mass that is summed exactly: 36 bits for a vocabulary of 2^18, more for a smaller one


class Sampling(NamedTuple):
    """How each row draws. All fields are traced, so none of them is a reason to compile again.

    Attributes:
      temperature: float32 [B]; 0 takes the most probable token.
      top_p: float32 [B] in [0, 1]; 1 keeps everything, 0 only the most probable token and its equals.
      top_k: int32 [B]; 0 keeps everything.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B: Array,
    *,
    temperature: ArrayLike,
    top_p: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
) -> Int[jax.Array, " B"]:
    """Draws one token a row from `filtered_logprobs(logits_BV, ...)`.

    Args:
      logits_BV: logits, or log-probabilities; -inf excludes a token.
      keys_B: one random key a row, typed [B] or raw uint32 [B, 2]. A row's token depends on its own logits, key and
        settings alone.
      temperature, top_p, top_k: scalars or one per row, see `filtered_logprobs`.

    Returns:
      int32 [B]. For a row with a NaN or without a finite logit it is some token of the vocabulary.

    Raises:
      ValueError: a wrong shape; a setting outside its range where the value is not traced.
    """
    shape = jnp.shape(logits_BV)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"logits_BV has shape {shape}: expected [B, V], a row for each token to draw")
    return draw(logits_BV, keys_B, broadcast_sampling(shape[:-1], temperature, top_p, top_k))[0]


def filtered_logprobs(
    logits_BV: Float[Array, "*B V"],
    *,
    temperature: ArrayLike,
    top_p: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
) -> Float[jax.Array, "*B V"]:
    """The normalised log-probabilities that `sample` draws from; -inf for tokens that cannot be drawn.

    In this order: softmax(logits / temperature); the `top_k` most probable tokens, renormalised; the smallest set of
    most probable tokens whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al., arXiv
    1904.09751), renormalised. Tokens as probable as the last one kept are all kept, so the order of tokens is nothing.
    In other words: a token stays if those more probable than it hold less than `top_p`, or if there are none. So the
    most probable token always stays, at top_p 0 alone with its equals. Temperature 0 puts everything on the first of
    the most probable tokens, whatever top_p and top_k.

    Args:
      logits_BV: logits or log-probabilities over the last axis.
      temperature: 0, or at least 1e-20. top_p: in [0, 1]. top_k: 0, or at least V, for no limit. Each of them is a
        scalar or one per row.

    Returns:
      float32, the shape of the logits.

    Raises:
      ValueError: a wrong shape; a setting outside its range where the value is not traced.
    """
    shape = jnp.shape(logits_BV)
    if not shape or shape[-1] == 0:
        raise ValueError(f"logits_BV has shape {shape}: expected [..., V], logits over the last axis")
    sampling = broadcast_sampling(shape[:-1], temperature, top_p, top_k)
    logits, sampling, never = _varying_together(jnp.asarray(logits_BV, jnp.float32), sampling)
    scaled = _scaled(logits, sampling.temperature)
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    kept = _in_top_k(scaled, sampling.top_k)
    mass = jnp.where(kept, jnp.exp(scaled - peak), 0.0)
    bits = jax.lax.bitcast_convert_type(mass, jnp.int32)  # non-negative floats compare like them
    cut = _largest_cut(bits, sampling.top_p < 1, lambda above: (_outside_nucleus(mass, above, sampling.top_p), never))
    kept &= bits >= cut[..., None]
    filtered = jax.nn.log_softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    is_first = jnp.arange(scaled.shape[-1]) == first_argmax(scaled, peak)[..., None]
    greedy = (sampling.temperature == 0)[..., None]
    return jnp.where(greedy, jnp.where(is_first, 0.0, -jnp.inf), filtered)


def draw(
    logits_BV: Float[Array, "B V"], keys_B: Array, sampling: Sampling
) -> tuple[Int[jax.Array, " B"], Float[jax.Array, " B"]]:
    """`sample`, and the normaliser that turns a drawn token's logit into its log-probability before top-k and top-p.

    Returns:
      token_B int32, and log_z_B = logsumexp(logits / temperature) (temperature 0: at temperature 1).
    """
    rows, vocabulary = logits_BV.shape
    keys_B = as_keys(keys_B, rows)
    logits_BV, sampling, never_B = _varying_together(
        jnp.asarray(logits_BV, jnp.float32), sampling, jax.random.key_data(keys_B)[:, 0]
    )
    scaled_BV = _scaled(logits_BV, sampling.temperature)
    peak_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
    mass_BV = jnp.exp(scaled_BV - peak_B1)
    blocks_BN = _block_sums(mass_BV)
    log_z_B = peak_B1[:, 0] + jnp.log(jnp.sum(blocks_BN, axis=-1))
    greedy_B = sampling.temperature == 0
    limited_B = ~greedy_B & (sampling.top_k > 0) & (sampling.top_k < vocabulary)

    def only_top_k() -> tuple[jax.Array, jax.Array]:
        kept_BV = jnp.where(_in_top_k(scaled_BV, jnp.where(limited_B, sampling.top_k, 0)), mass_BV, 0.0)
        return kept_BV, _block_sums(kept_BV)

    kept_BV, kept_BN = jax.lax.cond(jnp.any(limited_B), only_top_k, lambda: (mass_BV, blocks_BN))
    nucleus_B = ~greedy_B & (sampling.top_p < 1)
    need_B = _above_zero(sampling.top_p * jnp.sum(kept_BN, axis=-1))

    def propose(carry: tuple) -> tuple:
        index, accepted_B, token_B, floor_B, above_BN = carry
        proposed_B, mass_B = _pick(kept_BV, above_BN, floor_B, jax.vmap(jax.random.fold_in, (0, None))(keys_B, index))

        def look_above() -> tuple[jax.Array, jax.Array]:
            higher_BN = _block_sums(jnp.where(kept_BV > mass_B[:, None], kept_BV, 0.0))
            above_B = jnp.sum(higher_BN, axis=-1)
            outside_B = above_B >= need_B
            close_B = nucleus_B & ~accepted_B & (jnp.abs(above_B - need_B) <= _CLOSE * need_B)

            def decide() -> jax.Array:
                exact_B = _outside_nucleus(kept_BV, kept_BV > mass_B[:, None], sampling.top_p)
                return jnp.where(close_B, exact_B, outside_B)

            return nucleus_B & jax.lax.cond(jnp.any(close_B), decide, lambda: outside_B), higher_BN

        outside_B, higher_BN = jax.lax.cond(jnp.any(nucleus_B), look_above, lambda: (never_B, above_BN))
        token_B = jnp.where(accepted_B, token_B, proposed_B)
        accepted_B |= ~outside_B
        floor_B = jnp.where(accepted_B, floor_B, mass_B)
        return index + 1, accepted_B, token_B, floor_B, jnp.where(accepted_B[:, None], above_BN, higher_BN)

    start = (0, never_B, never_B.astype(jnp.int32), jnp.where(never_B, 0, jnp.float32(-1)), kept_BN)
    token_B = jax.lax.while_loop(lambda carry: jnp.any(~carry[1]), propose, start)[2]
    token_B = jax.lax.cond(
        jnp.any(greedy_B), lambda: jnp.where(greedy_B, first_argmax(scaled_BV, peak_B1), token_B), lambda: token_B
    )
    return token_B, log_z_B


def log_normaliser(logits_BV: Float[Array, "B V"]) -> Float[jax.Array, " B"]:
    """logsumexp over the vocabulary, summed in the same order as in `draw`."""
    peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return peak_B1[:, 0] + jnp.log(jnp.sum(_block_sums(jnp.exp(logits_BV - peak_B1)), axis=-1))


def token_logprob(
    logits_BV: Float[Array, "B V"], token_B: Int[Array, " B"], temperature_B: Float[Array, " B"], log_z_B: Array
) -> Float[jax.Array, " B"]:
    """log softmax(logits / temperature) at the tokens, given its normaliser from `draw`; temperature 0 counts as 1."""
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return logit_B / jnp.where(temperature_B == 0, 1.0, temperature_B) - log_z_B


def broadcast_sampling(rows: tuple[int, ...], temperature: ArrayLike, top_p: ArrayLike, top_k: ArrayLike) -> Sampling:
    """Scalars or per-row settings as a `Sampling` of one entry a row; checked, see `checks.check_setting`."""
    return Sampling(
        temperature=jnp.broadcast_to(jnp.asarray(check_setting("temperature", temperature, rows), jnp.float32), rows),
        top_p=jnp.broadcast_to(jnp.asarray(check_setting("top_p", top_p, rows), jnp.float32), rows),
        top_k=jnp.broadcast_to(jnp.asarray(check_setting("top_k", top_k, rows), jnp.int32), rows),
    )


def as_keys(keys_B: Array, rows: int) -> jax.Array:
    """Typed keys [rows] from typed keys or raw uint32 [rows, 2] key data; ValueError for anything else."""
    keys_B = jnp.asarray(keys_B)
    typed = jnp.issubdtype(keys_B.dtype, jax.dtypes.prng_key)
    if keys_B.shape != ((rows,) if typed else (rows, 2)) or not (typed or keys_B.dtype == jnp.uint32):
        raise ValueError(
            f"keys_B is {keys_B.dtype} of shape {keys_B.shape}: expected one key a row, "
            f"typed [{rows}] (jax.random.split(key, {rows})) or uint32 [{rows}, 2]"
        )
    return keys_B if typed else jax.random.wrap_key_data(keys_B, impl="threefry2x32")


def first_argmax(scaled: Float[Array, "*B V"], peak: Float[Array, "*B 1"]) -> Int[jax.Array, "*B"]:
    """The first index of the row's maximum `peak` (XLA's own argmax is far slower on CPU)."""
    size = scaled.shape[-1]
    return jnp.min(jnp.where(scaled == peak, jnp.arange(size, dtype=jnp.int32), size - 1), axis=-1)


def _scaled(logits: Array, temperature: jax.Array) -> jax.Array:
    return jnp.asarray(logits, jnp.float32) / jnp.where(temperature == 0, 1.0, temperature)[..., None]


def _varying_together(logits: jax.Array, sampling: Sampling, *others: jax.Array) -> tuple:
    """Logits and settings, and False for each row, all varying over the mesh axes that any of them varies over.

    Inside a `shard_map` a loop's carry must have these axes from the start, and a constant has none.
    """
    never = functools.reduce(jnp.logical_or, ((x != 0) & False for x in (logits[..., 0], *sampling, *others)))
    return jnp.where(never[..., None], 0, logits), Sampling(*(jnp.where(never, 0, x) for x in sampling)), never


def _blocks(values_BV: jax.Array) -> jax.Array:
    """[B, V] -> [B, N, block], the vocabulary padded with zeros to a multiple of the block."""
    rows, vocabulary = values_BV.shape
    block = min(_BLOCK, vocabulary)
    padding = -vocabulary % block
    if padding:
        values_BV = jnp.pad(values_BV, ((0, 0), (0, padding)))
    return values_BV.reshape(rows, -1, block)


def _block_sums(values_BV: jax.Array) -> jax.Array:
    return jnp.sum(_blocks(values_BV), axis=-1)


def _pick(mass_BV: jax.Array, blocks_BN: jax.Array, floor_B: jax.Array, keys_B: jax.Array) -> tuple:
    """Draws a token a row with probability proportional to its mass, among those of mass above `floor_B`.

    `blocks_BN` holds the sums of these masses over each block. Returns the token and its mass.
    """
    mass_BNC = _blocks(mass_BV)
    blocks, block = mass_BNC.shape[1:]
    gumbel_BX = jax.vmap(lambda key: jax.random.gumbel(key, (blocks + block,), mass_BV.dtype))(keys_B)
    block_B1 = _choose(blocks_BN, gumbel_BX[:, :blocks])
    chosen_BC = jnp.take_along_axis(mass_BNC, block_B1[:, :, None], axis=1)[:, 0]
    lane_B1 = _choose(jnp.where(chosen_BC > floor_B[:, None], chosen_BC, 0.0), gumbel_BX[:, blocks:])
    token_B1 = block_B1 * block + lane_B1
    return token_B1[:, 0].astype(jnp.int32), jnp.take_along_axis(chosen_BC, lane_B1, axis=1)[:, 0]


def _choose(weights_BN: jax.Array, gumbel_BN: jax.Array) -> jax.Array:
    """An index a row with probability proportional to its weight, by Gumbel-max; never one of weight zero.

    One uniform number against cumulative sums would be cheaper, but its steps of 2^-23 make the tokens in the tail of a
    sharp distribution unreachable, and those are the ones that matter here.
    """
    scores_BN = jnp.log(weights_BN) + gumbel_BN
    return first_argmax(scores_BN, jnp.max(scores_BN, axis=-1, keepdims=True))[:, None]


def _in_top_k(scaled: jax.Array, top_k: jax.Array) -> jax.Array:
    """Whether each entry is among the k largest of its row, ties at the cut included; all where k is 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scaled == 0, 0.0, scaled), jnp.int32)  # one zero, not two
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # compares as the floats do
    limited = (top_k > 0) & (top_k < scaled.shape[-1])

    def enough(chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = jnp.sum(chosen, axis=-1, dtype=jnp.int32)
        return count >= top_k, count == top_k

    return order >= _largest_cut(order, limited, enough)[..., None]


def _outside_nucleus(mass: jax.Array, above: jax.Array, top_p: jax.Array) -> jax.Array:
    """The rule of the nucleus: whether a token is outside it, given which tokens are more probable.

    It is when those hold at least `top_p` of all mass, and more than nothing. NaN puts no token outside.

    Args:
      mass: of all tokens, in units of the most probable one's: in [0, 1].
      above: bool like `mass`, the tokens more probable than the one in question.
      top_p: one a row.
    """
    return _exact_sum(jnp.where(above, mass, 0.0)) >= _above_zero(top_p * _exact_sum(mass))


def _above_zero(need: jax.Array) -> jax.Array:
    """At top_p 0, or where the product has become 0, the most probable token must still be inside."""
    return jnp.maximum(need, jnp.finfo(jnp.float32).tiny)


def _exact_sum(mass: jax.Array) -> jax.Array:
    """The sum over the last axis of numbers in [0, 1] as float32, the same bits whatever the order of summation.

    Each number is cut into digits of so few bits that the sum of a digit over all fits an int32.
    """
    bits = 30 - (mass.shape[-1] - 1).bit_length()
    total = jnp.float32(0)
    for place in range(1, _DIGITS + 1):
        mass = mass * jnp.float32(2**bits)
        digit = jnp.floor(mass)
        mass = mass - digit
        total += jnp.sum(digit.astype(jnp.int32), axis=-1, dtype=jnp.int32).astype(jnp.float32) * 2.0 ** (-bits * place)
    return total


def _largest_cut(
    order: jax.Array, rows: jax.Array, enough: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """The largest int32 t of each row such that the entries `order >= t` are enough; by bisection.

    Args:
      order: int32, the last axis is searched.
      rows: where to search. Elsewhere, and where even all entries are not enough (by rounding), t is the smallest one.
      enough: of a choice of entries, whether they are enough, and whether fewer would not be.
    """

    def narrow(bracket: tuple) -> tuple:
        low, high = bracket
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
        reached, exactly = enough(order >= middle[..., None])
        return jnp.where(reached, middle, low), jnp.where(exactly, middle + 1, jnp.where(reached, high, middle))

    low = jnp.min(order, axis=-1)
    high = jnp.where(rows, jnp.max(order, axis=-1) + 1, low)
    return jax.lax.while_loop(lambda bracket: jnp.any(bracket[0] + 1 < bracket[1]), narrow, (low, high))[0]
