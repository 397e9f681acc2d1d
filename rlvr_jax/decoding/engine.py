"""The host side of decoding: a fixed number of slots, refilled from a queue between compiled chunks.

`serve` yields each response when it ends. A slot whose row has ended takes the next row of the queue; a prompt is
prefilled once for all of its rows, in pieces if it is long. The compiled loop comes back to the host when enough rows
have ended to be worth a refill, so few steps are spent on slots that are done. What a row's tokens are depends on none
of this: not on slots, chunk, block or companions.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlvr_jax.decoding.batch import Queue, cache_size
from rlvr_jax.decoding.blocks import BlockChoice
from rlvr_jax.decoding.checks import check_count
from rlvr_jax.decoding.sampling import Sampling
from rlvr_jax.decoding.slots import SlotRows, empty_slots, insert_rows, prefill_prompts
from rlvr_jax.decoding.state import Cache, DecodeState, LanguageModel, Params, Selection
from rlvr_jax.decoding.steps import Rule, advance
from rlvr_jax.sharding.rules import batch_shards

CHUNK = 32
PREFILL_TOKENS = 16_384  # prompt tokens prefilled at once, padding included
_PREFILL_ROWS = tuple(2**i for i in range(9))  # prompts of one prefill program

OnChunk = Callable[[int, int], None]


class Response(NamedTuple):
    """One finished row. T tokens.

    Attributes:
      row: its index in the queue.
      tokens: int32 [T], the stop token included.
      logp: float32 [T], the emitted token's log-probability under softmax(logits / temperature) of the sampled model.
      finished: a stop token was drawn.
      invalid: the logits of the next token were not finite, so the row ended here.
      passes: forward passes made while the row was in a slot: by the sampled model and, for two, by the other.
      fired, delta_logp, sampled_token: [T], for two models; see `selective.SelectiveGeneration`.
    """

    row: int
    tokens: np.ndarray
    logp: np.ndarray
    finished: bool
    invalid: bool
    passes: tuple[int, ...]
    fired: np.ndarray | None = None
    delta_logp: np.ndarray | None = None
    sampled_token: np.ndarray | None = None


@dataclasses.dataclass
class EngineStats:
    """What a run of the engine did so far.

    Attributes:
      tokens: emitted. rows: ended.
      sampled_passes, other_passes: decoding passes of each model over all slots.
      slot_steps, live_slot_steps: slots times passes of the sampled model, and those in which the slot's row drafted.
      prefilled: prompts prefilled. chunks: calls of the compiled loop.
      blocks: how many blocks were drafted of each size.
      grown: times that the caches were made longer.
    """

    tokens: int = 0
    rows: int = 0
    sampled_passes: int = 0
    other_passes: int = 0
    slot_steps: int = 0
    live_slot_steps: int = 0
    prefilled: int = 0
    chunks: int = 0
    grown: int = 0
    blocks: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def idle_share(self) -> float:
        """Share of slot steps spent on slots whose row was done."""
        return 1 - self.live_slot_steps / max(self.slot_steps, 1)


def serve(
    models: tuple[LanguageModel, ...],
    params: tuple[Params, ...],
    queue: Queue,
    *,
    rule: Rule | None = None,
    slots: int | None = None,
    block: int | None = None,
    chunk: int = CHUNK,
    reserve: bool = False,
    mesh: Mesh | None = None,
    on_chunk: OnChunk | None = None,
    stats: EngineStats | None = None,
) -> Iterator[Response]:
    """Decodes the rows of `queue` with one model or two and yields each response when it ends.

    While the caller handles what was yielded, the next chunk already runs on the device.

    Args:
      models, params: one model, or (base, rl).
      queue: the rows; put those of one prompt together, so that the prompt is kept no longer than needed.
      rule: for two models, when a token is drawn again; None for one.
      slots: rows decoded at once; by default all.
      block: for two models, tokens drafted before the other model scores them; None chooses from the rate at which the
        criterion fires.
      chunk: about how many tokens a row may get between two looks of the host.
      reserve: allocate the caches at their longest now, instead of growing them by powers of two.
      mesh: slots are split over its data and fsdp axes; None uses the ambient mesh, if there is one.
      on_chunk: called after each chunk with the rows that are done and the tokens drawn so far.
      stats: filled in as the run goes.

    Raises:
      ValueError: naming the argument; before anything is compiled.
    """
    check_count("chunk", chunk)
    slots = queue.rows if slots is None else min(check_count("slots", slots), queue.rows)
    shards = batch_shards(jax.sharding.get_abstract_mesh() if mesh is None else mesh)
    rows = slots if slots % shards else slots // shards  # of each device
    choice = BlockChoice(rows, None if block is None else check_count("block", block))
    engine = _Engine(models, params, queue, rule, slots, choice, chunk, reserve, mesh, on_chunk, stats or EngineStats())
    return engine.run()


def prefill_rows(prompts: int, prompt_length: int) -> int:
    """Rows of the program that prefills `prompts` prompts padded to `prompt_length`, or as many of them as it takes."""
    sizes = [size for size in _PREFILL_ROWS if size <= max(1, PREFILL_TOKENS // prompt_length)]
    return next((size for size in sizes if size >= prompts), sizes[-1])


class _Held(NamedTuple):
    """Prefilled prompts: one cache a model, and for each prompt its row in them and whether its numbers are finite."""

    caches: tuple[Cache, ...]
    place: dict[int, int]
    valid: np.ndarray


class _Engine:
    """The state of `serve` between chunks."""

    def __init__(self, models, params, queue, rule, slots, choice, chunk, reserve, mesh, on_chunk, stats):
        self.models, self.queue, self.rule, self.slots = models, queue, rule, slots
        self.choice, self.chunk, self.mesh, self.on_chunk, self.stats = choice, chunk, mesh, on_chunk, stats
        self.next_row = 0
        self.row_of = [-1] * slots  # the queue's row in each slot
        self.length_of = np.zeros(slots, np.int64)  # response tokens of it so far
        self.pieces: list[list[dict[str, np.ndarray]]] = [[] for _ in range(slots)]
        self.passes = np.zeros((slots, len(models)), np.int64)
        self.left = np.bincount(queue.prompt_R, minlength=len(queue.prompts))  # rows of each prompt not yet in a slot
        self.held: list[_Held] = []
        self.prompt_length_R = queue.length_R
        self.size = queue.longest if reserve else 0
        with self._on_mesh():
            self.params = tuple(model.prepare(p) for model, p in zip(models, params, strict=True))

    def run(self) -> Iterator[Response]:
        """See `serve`."""
        ended: list[Response] = []
        state = None
        while True:
            with self._on_mesh():
                state, refused = self._fill(state)
                ended += refused
                busy = any(row >= 0 for row in self.row_of)
                if busy:
                    state, report, block = self._advance(state)
            yield from ended
            if not busy:
                return  # with every slot free no row waits
            ended = self._absorb(jax.device_get(report), block)
            if self.on_chunk is not None:
                self.on_chunk(self.stats.rows, self.stats.tokens)

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _advance(self, state: DecodeState) -> tuple[DecodeState, dict[str, jax.Array], int]:
        """Starts one chunk; the caches are long enough for it."""
        if self.rule is None:
            block, blocks = self.chunk, 1
        else:
            block = min(self.choice.block, self.chunk)
            blocks = self.chunk // block
        busy = [slot for slot, row in enumerate(self.row_of) if row >= 0]
        reached = max(int(self.prompt_length_R[self.row_of[slot]] + self.length_of[slot]) for slot in busy)
        needed = min(reached + block * blocks, self.queue.longest)
        if needed > self.size:
            self.size = cache_size(needed, self.queue.longest)
            self.stats.grown += 1
            caches = [m.grow_cache(cache, self.size) for m, cache in zip(self.models, state.caches, strict=True)]
            state = state._replace(caches=tuple(caches))
        # While rows wait, a few that have ended are worth a refill; then the last row of all decides.
        leave_at = max(1, self.slots // 8) if self.next_row < self.queue.rows else self.slots + 1
        state, report = advance(
            self.models, self.rule, block, blocks, self.params, self.queue.stop_S, np.int32(leave_at), state
        )
        return state, report, block

    def _absorb(self, report: dict[str, np.ndarray], block: int) -> list[Response]:
        """Takes what a chunk emitted; frees the slots of rows that ended and returns their responses."""
        emitted_nB, drafting_nB, steps_n = report.pop("emitted"), report.pop("drafting"), report.pop("steps")
        finished_B, invalid_B = report.pop("finished"), report.pop("invalid")
        ran = int((steps_n > 0).sum())
        steps_n, emitted_nB, drafting_nB = steps_n[:ran], emitted_nB[:ran], drafting_nB[:ran]
        stats = self.stats
        stats.chunks += 1
        stats.sampled_passes += int(steps_n.sum())
        stats.slot_steps += int(steps_n.sum()) * self.slots
        stats.live_slot_steps += int(drafting_nB.sum())
        stats.tokens += int(emitted_nB.sum())
        if self.rule is not None:
            stats.other_passes += ran
            stats.blocks[block] = stats.blocks.get(block, 0) + ran
            counted_nBK = np.arange(block) < emitted_nB[:, :, None]
            self.choice.saw(int((report["fired"][:ran] & counted_nBK).sum()), int(emitted_nB.sum()))
        ended = []
        for slot, row in enumerate(self.row_of):
            if row < 0:
                continue
            taken_nK = np.arange(block) < emitted_nB[:, slot, None]
            self.pieces[slot].append({name: value[:ran, slot][taken_nK] for name, value in report.items()})
            if self.rule is None:
                self.passes[slot] += (int(drafting_nB[:, slot].sum()),)
            else:
                took_part_n = drafting_nB[:, slot] > 0
                self.passes[slot] += (int(steps_n[took_part_n].sum()), int(took_part_n.sum()))
            self.length_of[slot] += int(emitted_nB[:, slot].sum())
            if finished_B[slot] or invalid_B[slot] or self.length_of[slot] >= self.queue.limit_R[row]:
                ended.append(self._response(slot, bool(finished_B[slot]), bool(invalid_B[slot])))
        return ended

    def _response(self, slot: int, finished: bool, invalid: bool) -> Response:
        pieces = self.pieces[slot]
        arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        response = Response(
            row=self.row_of[slot],
            finished=finished,
            invalid=invalid,
            passes=tuple(self.passes[slot].tolist()),
            **arrays,
        )
        self.row_of[slot], self.pieces[slot], self.length_of[slot], self.passes[slot] = -1, [], 0, 0
        self.stats.rows += 1
        return response

    def _fill(self, state: DecodeState | None) -> tuple[Any, list[Response]]:
        """Puts waiting rows into free slots; returns the state and the responses that end before they begin."""
        refused: list[Response] = []
        free = [slot for slot, row in enumerate(self.row_of) if row < 0]
        while free and self.next_row < self.queue.rows:
            held, rows = self._next_rows(len(free))
            source_B, new_B = np.full(self.slots, -1, np.int32), [-1] * self.slots
            for row in rows:
                place = held.place[int(self.queue.prompt_R[row])]
                if not held.valid[place]:
                    refused.append(self._refusal(row))
                    continue
                slot = free.pop(0)
                self.row_of[slot] = new_B[slot] = row
                source_B[slot] = place
            if state is None:
                state = self._empty_state()
            if (source_B >= 0).any():
                state = insert_rows(self.models, state, held.caches, source_B, self._fields(new_B))
        return state, refused

    def _next_rows(self, most: int) -> tuple[_Held, list[int]]:
        """The next rows, at most `most`, whose prompts lie in one prefilled batch, which is made if it is not there."""
        queue = self.queue
        prompt = int(queue.prompt_R[self.next_row])
        held = next((held for held in self.held if prompt in held.place), None)
        if held is None:
            held = self._prefill(most)
            self.held.append(held)
        rows = []
        while len(rows) < most and self.next_row < queue.rows and int(queue.prompt_R[self.next_row]) in held.place:
            rows.append(self.next_row)
            self.left[queue.prompt_R[self.next_row]] -= 1
            self.next_row += 1
        self.held = [held for held in self.held if any(self.left[prompt] for prompt in held.place)]
        return held, rows

    def _prefill(self, most: int) -> _Held:
        """Prefills the prompts of the next `most` rows, as many as one program takes."""
        queue = self.queue
        wanted = dict.fromkeys(queue.prompt_R[self.next_row : self.next_row + most].tolist())
        kept = {prompt for held in self.held for prompt in held.place}
        prompts = [prompt for prompt in wanted if prompt not in kept]
        size = prefill_rows(len(prompts), queue.prompt_length)
        prompts = prompts[:size]
        tokens_PL = np.zeros((size, queue.prompt_length), np.int32)
        length_P = np.zeros(size, np.int32)
        for place, prompt in enumerate(prompts):
            tokens = queue.prompts[prompt]
            tokens_PL[place, : len(tokens) - 1] = tokens[:-1]
            length_P[place] = len(tokens) - 1
        caches, valid_P = prefill_prompts(self.models, self.params, tokens_PL, length_P)
        self.stats.prefilled += len(prompts)
        return _Held(caches, {prompt: place for place, prompt in enumerate(prompts)}, jax.device_get(valid_P))

    def _refusal(self, row: int) -> Response:
        self.stats.rows += 1
        empty = {"tokens": np.zeros(0, np.int32), "logp": np.zeros(0, np.float32)}
        if self.rule is not None:
            empty |= {"fired": np.zeros(0, bool), "delta_logp": np.zeros(0, np.float32)}
            empty["sampled_token"] = np.zeros(0, np.int32)
        return Response(row=row, finished=False, invalid=True, passes=(0,) * len(self.models), **empty)

    def _empty_state(self) -> DecodeState:
        if not self.size:
            first = int((self.prompt_length_R + np.minimum(self.chunk, self.queue.limit_R)).max())
            self.size = cache_size(max(first, self.queue.prompt_length), self.queue.longest)
        return empty_slots(self.models, self.slots, self.size)

    def _fields(self, rows: Sequence[int]) -> SlotRows:
        """The rows that go into the slots; an entry of -1 leaves its slot as it is."""
        queue, row_B = self.queue, np.maximum(rows, 0)
        prompt_B = queue.prompt_R[row_B]
        return SlotRows(
            last_B=np.array([queue.prompts[prompt][-1] for prompt in prompt_B], np.int32),
            position_B=self.prompt_length_R[row_B] - 1,
            limit_B=queue.limit_R[row_B],
            problem_B=queue.problem_R[row_B],
            sample_B=queue.sample_R[row_B],
            seed_B2=queue.seed_R2[row_B],
            sampling=Sampling(queue.temperature_R[row_B], queue.top_p_R[row_B], queue.top_k_R[row_B]),
            selection=Selection(queue.tau_R[row_B], queue.gamma_R[row_B]),
        )
