"""From settings and what is missing of them to responses, one at a time as they end."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from decode.check.inputs import Inputs
from decode.config import DecodeConfig, Setting
from rlvr_jax.decoding.batch import Queue, make_queue, select_rows
from rlvr_jax.decoding.engine import EngineStats, serve
from rlvr_jax.decoding.selective import make_rule
from rlvr_jax.decoding.state import LanguageModel
from rlvr_jax.generation import language_model
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import load_hf
from rlvr_jax.runs.program import RunError
from rlvr_jax.sharding.decode_layout import DECODE_RULES


class Loaded(NamedTuple):
    """A model in memory: its architecture, its functions, its parameters prepared for decoding."""

    config: QwenConfig
    model: LanguageModel
    params: Any


Models = dict[str, Loaded]


def load(role: str, folder: Path, dtype: str, cache_dtype: str, mesh: Mesh | None, vocab_size: int) -> Loaded:
    """A model and its parameters, laid out for decoding. (A function, so that what was read is freed on return.)

    `cache_dtype` is "model" or "int8". Of the vocabulary the first `vocab_size` rows are read.

    Raises RunError for weights that cannot be read.
    """
    try:
        config, params = load_hf(
            folder, dtype=jnp.dtype(dtype), mesh=mesh, rules=DECODE_RULES, overrides={"vocab_size": vocab_size}
        )
    except (ValueError, OSError) as error:
        raise RunError(f"{role} = {error}") from error
    config = dataclasses.replace(config, dtype=dtype)
    model = language_model(config, None if cache_dtype == "model" else cache_dtype)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return Loaded(config, model, model.prepare(params))


class Wanted(NamedTuple):
    """A response to be drawn: the place of its problem in the inputs, sample and seed."""

    place: int
    sample: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A response. Arrays have one entry a token, the stop token included; the last three are there for a pair.

    `invalid`: the logits after its last token were not finite. `passes`: forward passes of the sampled and of the other
    model while it was in its slot.
    """

    place: int
    problem: int
    sample: int
    seed: int
    tokens: np.ndarray
    logp: np.ndarray
    finished: bool
    invalid: bool
    passes: tuple[int, int]
    fired: np.ndarray | None = None
    delta_logp: np.ndarray | None = None
    sampled_token: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens, the stop token included."""
        return len(self.tokens)


def program(setting: Setting) -> tuple:
    """What is compiled for a setting: those with the same can be drawn from one queue."""
    if setting.model != "pair":
        return (setting.model,)
    return (setting.model, setting.criterion, setting.sample_from, setting.top_logprobs)


def draw(
    models: Models,
    config: DecodeConfig,
    inputs: Inputs,
    wanted: Sequence[tuple[Setting, Sequence[Wanted]]],
    *,
    slots: int,
    mesh: Mesh | None,
    on_chunk: Callable[[int, int], None] | None = None,
    max_new_tokens: int | None = None,
    stats: EngineStats | None = None,
) -> Iterator[tuple[Setting, Drawn]]:
    """Draws the wanted responses of settings of one `program`, their tau known, and yields each when it ends.

    A slot goes on with the next response, be it of the next setting. A response depends on its setting, problem, sample
    and seed alone.
    """
    rows = [(setting, one) for setting, ones in wanted for one in ones]
    if not rows:
        return
    first = rows[0][0]
    queues = [_queue(config, inputs, setting, ones, max_new_tokens) for setting, ones in wanted if ones]
    roles = ("base", "rl") if first.model == "pair" else (first.model or "",)
    rule = None
    if first.model == "pair":
        rule = make_rule(
            first.criterion or "", first.tau, sample_from=first.sample_from, top_logprobs=first.top_logprobs
        )
    responses = serve(
        tuple(models[role].model for role in roles),
        tuple(models[role].params for role in roles),
        _joined(queues),
        rule=rule,
        slots=slots,
        block=config.block if rule is not None else None,
        reserve=jax.default_backend() != "cpu",  # elsewhere a cache that grows is there twice while it is copied
        mesh=mesh,
        on_chunk=on_chunk,
        stats=stats,
    )
    for response in responses:
        setting, one = rows[response.row]
        yield (
            setting,
            Drawn(
                place=one.place,
                problem=inputs.problems[one.place].index,
                sample=one.sample,
                seed=one.seed,
                tokens=response.tokens,
                logp=response.logp,
                finished=response.finished,
                invalid=response.invalid,
                passes=(response.passes[0], sum(response.passes[1:])),
                fired=response.fired,
                delta_logp=response.delta_logp,
                sampled_token=response.sampled_token,
            ),
        )


def _queue(
    config: DecodeConfig, inputs: Inputs, setting: Setting, wanted: Sequence[Wanted], max_new_tokens: int | None
) -> Queue:
    places = list(dict.fromkeys(one.place for one in wanted))
    columns = list(dict.fromkeys((one.seed, one.sample) for one in wanted))
    queue = make_queue(
        [inputs.prompts[place] for place in places],
        max_new_tokens=max_new_tokens or config.max_new_tokens,
        n=len(columns),
        temperature=setting.temperature,
        top_p=setting.top_p,
        top_k=setting.top_k,
        tau=0.0 if setting.tau is None else setting.tau,
        gamma=setting.gamma,
        seed=[seed for seed, _ in columns],
        problem_ids=[inputs.problems[place].index for place in places],
        sample_ids=[sample for _, sample in columns],
        stop_tokens=inputs.stop_tokens,
        prompt_length=max(map(len, inputs.prompts)),
    )
    place_at = {place: i for i, place in enumerate(places)}
    column_at = {column: i for i, column in enumerate(columns)}
    return select_rows(queue, [place_at[one.place] * len(columns) + column_at[one.seed, one.sample] for one in wanted])


def _joined(queues: Sequence[Queue]) -> Queue:
    """One queue after another. Each keeps prompts of its own, so that none is held from one setting to the next."""
    fields: dict[str, Any] = {
        name: np.concatenate([getattr(queue, name) for queue in queues])
        for name in Queue._fields
        if name.endswith(("_R", "_R2"))
    }
    begins = np.cumsum([0, *(len(queue.prompts) for queue in queues[:-1])])
    fields["prompt_R"] = np.concatenate(
        [queue.prompt_R + np.int32(begin) for queue, begin in zip(queues, begins, strict=True)]
    )
    return queues[0]._replace(prompts=tuple(prompt for queue in queues for prompt in queue.prompts), **fields)
