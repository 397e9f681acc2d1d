"""Decoding with one model: `decode` draws n responses to each prompt and returns them as arrays."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlvr_jax.decoding.batch import Ids, Prompts, make_queue
from rlvr_jax.decoding.checks import Numbers
from rlvr_jax.decoding.engine import CHUNK, OnChunk, serve
from rlvr_jax.decoding.state import LanguageModel, Params
from rlvr_jax.typing import Bool, Float, Int


class Generation(NamedTuple):
    """Responses as numpy arrays. R rows, problem-major: row = prompt * n + sample.

    Attributes:
      tokens: int32 [R, max_new_tokens], the stop token included, 0 after it.
      logp: float32, the emitted token's log-probability under softmax(logits / temperature) of the sampled model,
        before top-k and top-p (temperature 0: at temperature 1); 0 beyond the length.
      lengths: int32 [R], in tokens, the stop token included.
      finished: bool [R], a stop token was drawn (otherwise the response was cut, at max_new_tokens if not `invalid`).
      invalid: bool [R], the logits after the last token were not finite, so the row ended there.
      passes: int32 [R], forward passes of the model that the row took part in, without the prompt's.
    """

    tokens: Int[np.ndarray, "R T"]
    logp: Float[np.ndarray, "R T"]
    lengths: Int[np.ndarray, " R"]
    finished: Bool[np.ndarray, " R"]
    invalid: Bool[np.ndarray, " R"]
    passes: Int[np.ndarray, " R"]


def decode(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    n: int = 1,
    temperature: Numbers = 1.0,
    top_p: Numbers = 1.0,
    top_k: Numbers = 0,
    seed: int = 0,
    problem_ids: Ids | None = None,
    sample_ids: Ids | None = None,
    stop_tokens: Ids = (),
    prompt_length: int | None = None,
    slots: int | None = None,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
    on_chunk: OnChunk | None = None,
) -> Generation:
    """Draws `n` responses to each prompt from one model.

    A row depends on its prompt, seed, problem id, sample id and settings alone: not on the other rows, the padding, the
    slots, the chunk size or the mesh (up to the order of float sums, which the shapes of a program decide).

    Args:
      model: the functions of the model.
      params: its parameters.
      prompts: lists of token ids, of any lengths.
      max_new_tokens: the most tokens of a response.
      n: responses a prompt. The prompt is prefilled once.
      temperature, top_p, top_k: numbers, or one for each of the prompts * n rows; see `sampling.filtered_logprobs`.
      seed: from 0 to 2**64 - 1.
      problem_ids: [prompts], identify a prompt whatever batch it is decoded in; by default 0, 1, ...
      sample_ids: [n] or [prompts, n]; by default 0, 1, ...
      stop_tokens: ids that end a response.
      prompt_length: pads the prompts to this many tokens, for programs that must not differ from call to call; by
        default to a bucket above the longest.
      slots: rows decoded at once, refilled as they end; by default all.
      chunk: the most steps between two looks of the host.
      mesh: rows are split over its data and fsdp axes; None uses the ambient mesh, if there is one.
      on_chunk: called after each chunk with the rows that are done and the tokens drawn so far, over all rows.

    Returns:
      The responses.

    Raises:
      ValueError: naming the argument, its value and what was expected; nothing was compiled by then.
    """
    queue = make_queue(
        prompts,
        max_new_tokens=max_new_tokens,
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        problem_ids=problem_ids,
        sample_ids=sample_ids,
        stop_tokens=stop_tokens,
        prompt_length=prompt_length,
    )
    shape = (queue.rows, max_new_tokens)
    result = Generation(
        tokens=np.zeros(shape, np.int32),
        logp=np.zeros(shape, np.float32),
        lengths=np.zeros(queue.rows, np.int32),
        finished=np.zeros(queue.rows, bool),
        invalid=np.zeros(queue.rows, bool),
        passes=np.zeros(queue.rows, np.int32),
    )
    for row in serve((model,), (params,), queue, slots=slots, chunk=chunk, mesh=mesh, on_chunk=on_chunk):
        length = result.lengths[row.row] = len(row.tokens)
        result.tokens[row.row, :length], result.logp[row.row, :length] = row.tokens, row.logp
        result.finished[row.row], result.invalid[row.row] = row.finished, row.invalid
        (result.passes[row.row],) = row.passes
    return result
