"""The least that a pass takes: FLOPs and bytes from the architecture alone, to compare a compiled program with.

N counts the parameters that are multiplied with every token: all matrices and the unembedding, not the look-up of the
embedding. Attention is causal, half of the square of scores, as in `flops`. One product of scores or values of a whole
row of T tokens takes T^2 x heads x head size FLOPs a layer (2 for multiply and add, halved).
"""

import math

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.qwen import layer_specs

# Products of attention: two forward; backward four, and the scores again, since no kernel keeps T^2 of them.
FORWARD, BACKWARD, SCORES_AGAIN = 2, 4, 1


def multiplied_params(config: QwenConfig) -> tuple[int, int]:
    """(of all layers, of the unembedding): parameters that every token is multiplied with."""
    layer = sum(math.prod(spec.shape) for spec in layer_specs(config).values() if spec.init == "normal")
    return config.num_layers * layer, config.hidden_size * config.vocab_size


def attention_product(config: QwenConfig, rows: int, length: int) -> float:
    """FLOPs of one causal product (scores, or values) in all layers, for rows of so many tokens."""
    return float(rows) * length**2 * config.num_heads * config.head_dim * config.num_layers


def training_flops(config: QwenConfig, rows: int, length: int) -> tuple[float, float]:
    """FLOPs of forward and backward of rows of `length` tokens: (the model's, those of its remat policy).

    The model's are 6 N a token and six products of attention: what MFU counts. The policy's are what must be computed
    when nothing is kept that the policy drops: the scores once more in any flash attention; the logits once more, since
    they are made in chunks; with "full" every product forward once more (8 N, and nine products of attention), with
    "dots" those of attention, with "attention" all but those.
    """
    layers, unembedding = multiplied_params(config)
    tokens, product = float(rows) * length, attention_product(config, rows, length)
    model = 6 * (layers + unembedding) * tokens + (FORWARD + BACKWARD) * product
    again = 2 * unembedding * tokens + SCORES_AGAIN * product
    if config.remat in ("full", "attention"):
        again += 2 * layers * tokens
    if config.remat in ("full", "dots"):
        again += FORWARD * product
    return model, model + again


def forward_flops(config: QwenConfig, rows: int, length: int, *, logits: bool = True) -> float:
    """FLOPs of a forward pass over rows of `length` tokens: 2 N a token and two products of attention."""
    layers, unembedding = multiplied_params(config)
    return 2.0 * (layers + logits * unembedding) * rows * length + FORWARD * attention_product(config, rows, length)


def decode_flops(config: QwenConfig, rows: int, context: int) -> float:
    """FLOPs of one decoded token a row with `context` tokens in the cache."""
    layers, unembedding = multiplied_params(config)
    seen = 4.0 * context * config.num_heads * config.head_dim * config.num_layers
    return rows * (2.0 * (layers + unembedding) + seen)


def training_collectives(
    config: QwenConfig, rows: int, length: int, *, batch: int, fsdp: int, tensor: int, sequence: int = 1
) -> dict[str, float]:
    """Bytes that a chip must send for a micro-batch, by what needs them, everything in bfloat16.

    "weights": those of the layers gathered over `fsdp` and `sequence` for the forward pass, again for the backward pass
    (but with "none"), embedding and unembedding once over `fsdp`, and one reduction of all gradients. "tensor": two
    sums of activations a layer forward and two backward, one more where the layer is made again (that of attention;
    nothing needs the second one again), and one each for embedding and unembedding. A sum sends 2 (n - 1) / n of the
    array, a gather or scatter half of it. "sequence": queries, keys, values and results change hands between tokens and
    heads, forward, backward, and once more with "full" and "dots".

    Args:
      batch: in how many parts the rows are split.
      fsdp, tensor, sequence: sizes of these axes.
    """
    layers, unembedding = multiplied_params(config)
    tables = unembedding * (1 if config.tie_word_embeddings else 2)
    passes = 1 if config.remat == "none" else 2
    ways = fsdp * sequence
    weights = 2.0 * (passes + 1) * layers / tensor * (ways - 1) / ways
    weights += 2.0 * 2 * tables / (tensor * sequence) * (fsdp - 1) / fsdp
    tokens = 2.0 * rows * length / (batch * sequence)
    sums = (5 if config.remat in ("full", "attention") else 4) * config.num_layers + 2
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim / tensor
    exchanges = 3 if config.remat in ("full", "dots") else 2
    return {
        "weights": weights,
        "tensor": sums * tokens * config.hidden_size * 2 * (tensor - 1) / tensor,
        "sequence": exchanges * config.num_layers * tokens * heads * (sequence - 1) / sequence,
    }
