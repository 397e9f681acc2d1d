"""Grading and writing beside the device; slots planned from memory."""

import threading
import time
import types

import jax
import numpy as np
import pytest

import decode.check.plan
from decode.check.plan import plan
from decode.config import DecodeConfig, Setting
from decode.draw import Drawn
from decode.results.files import RowLog, TokenParts
from decode.results.writer import Destination, Writer
from rlvr_jax.models.memory import decode_weight_bytes, weight_bytes
from rlvr_jax.models.qwen import init_params
from rlvr_jax.rewards.pool import Graded
from rlvr_jax.runs.program import RunError
from rlvr_jax.sharding.rules import make_mesh
from tests.tiny import tiny_config


class Tokenizer:
    """Ids as words; 0 is special."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(token) for token in row if token or not skip_special_tokens) for row in rows]


class Pool:
    """Right when the text begins with the answer. Waits for `go` first."""

    def __init__(self, error: Exception | None = None):
        self.go, self.error, self.seen = threading.Event(), error, []

    def grade(self, rule, texts, answers):
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        self.seen.append((rule, *texts))
        return [Graded(text.startswith(a), text, None) for text, a in zip(texts, answers, strict=True)]


INPUTS = types.SimpleNamespace(tokenizer=Tokenizer(), problems=[types.SimpleNamespace(answer="7")] * 3)


def drawn(place: int, *tokens: int, **values) -> Drawn:
    some = {"logp": np.zeros(len(tokens), np.float32), "finished": True, "invalid": False, "passes": (9, 4)}
    return Drawn(place, 10 + place, 0, **({"seed": 5, "tokens": np.array(tokens, np.int32)} | some | values))


@pytest.fixture
def destination(tmp_path):
    written = []
    logs = {5: RowLog(tmp_path / "seed5.rows.jsonl")}
    return Destination(logs, TokenParts(tmp_path), True, written.append), written


def test_the_caller_does_not_wait_and_everything_is_written(destination):
    to, written = destination
    pool = Pool()
    with Writer(INPUTS, ("first", "second"), pool) as writer:
        fired = {
            **{"fired": np.array([False, True, False]), "sampled_token": np.array([7, 3, 0])},
            **{"delta_logp": np.zeros(3, np.float32)},
        }
        writer.put(to, drawn(0, 7, 8, 0, **fired), compiled=True)
        writer.put(to, drawn(1, 5, 7, **fired | {"fired": np.zeros(2, bool)}), compiled=False)
        assert not written  # the grader has not begun, and nobody waited for it
        pool.go.set()
    assert [row for rows in written for row in rows] == list(to.logs[5].rows.values())
    one, other = (RowLog(to.logs[5].path).rows[place, 0] for place in (10, 11))
    assert (one.text, one.correct, one.prediction) == ("7 8 0", True, "7 8")  # a stop token is no part of an answer
    assert (one.fired, one.original, one.assistant, one.resampled) == ((1,), (3,), (8,), (8,))
    assert one.others == {"second": (True, "7 8", None)}
    assert (other.correct, other.fired, other.length) == (False, (), 2)
    timings = RowLog(to.logs[5].path).timings
    assert timings[0].compiled
    assert sum(timing.tokens for timing in timings) == 5
    assert sum(timing.sampled_passes for timing in timings) == 18
    assert sum(timing.other_passes for timing in timings) == 8


def test_time_is_shared_by_what_was_written_together(tmp_path):
    """One seed must not be charged for another's tokens, nor pass for one that no compilation held up."""
    logs = {seed: RowLog(tmp_path / f"seed{seed}.rows.jsonl") for seed in (5, 6)}
    to, pool = Destination(logs, None, True, lambda rows: None), Pool()
    with Writer(INPUTS, ("first",), pool) as writer:
        writer.put(to, drawn(0, 1), compiled=False)  # what the thread may take before the others are there
        time.sleep(0.05)
        writer.put(to, drawn(1, 1, 2, 3), compiled=True)
        writer.put(to, drawn(2, 1, seed=6), compiled=False)
        pool.go.set()
    one, other = logs[5].timings[-1], logs[6].timings[-1]
    assert one.compiled
    assert other.compiled
    assert one.seconds > 0
    assert one.seconds / one.tokens == pytest.approx(other.seconds / other.tokens)


def test_a_response_whose_logits_were_not_finite_is_wrong_and_says_why(destination):
    to, _ = destination
    pool = Pool()
    pool.go.set()
    with Writer(INPUTS, ("first",), pool) as writer:
        writer.put(to, drawn(0, 7, finished=False, invalid=True), compiled=False)
        writer.put(to, drawn(1, 7), compiled=False)
    bad, good = (to.logs[5].rows[place, 0] for place in (10, 11))
    assert (bad.correct, bad.invalid, bad.error) == (False, True, "the logits after 1 tokens were not finite")
    assert (good.correct, good.invalid, good.error) == (True, False, None)


def test_an_error_of_the_thread_ends_the_run(destination):
    to, written = destination
    pool = Pool(RuntimeError("grading workers do not start"))
    pool.go.set()
    with pytest.raises(RunError, match="grading workers do not start"), Writer(INPUTS, ("first",), pool) as writer:
        writer.put(to, drawn(0, 7), compiled=False)
    assert not written


def test_an_interrupt_loses_nothing(destination):
    to, written = destination
    pool = Pool()

    def interrupted():
        with Writer(INPUTS, ("first",), pool) as writer:
            writer.put(to, drawn(0, 7), compiled=False)
            pool.go.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(written) == 1


# ---- slots ---------------------------------------------------------------------------------------------------------

PAIR, ALONE = Setting("x", "pair", "none"), Setting("y", "rl")


def planned(setting=PAIR, mesh=None, **values):
    model = tiny_config()
    inputs = types.SimpleNamespace(
        models={"base": model, "rl": model}, prompts=[[1] * 20, [1] * 10], problems=[None] * 50
    )
    config = DecodeConfig(**({"base": "b", "rl": "r", "n": 4, "max_new_tokens": 100} | values))
    return plan(config, inputs, "float32", mesh, setting)


def test_slots_are_planned_from_memory(monkeypatch):
    model = tiny_config()
    params = init_params(model, jax.random.key(0))
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    assert weight_bytes(model, "float32", None) == weights
    assert weight_bytes(model, "bfloat16", None) == weights / 2
    token = 2 * 2 * 2 * 8 * 4  # k and v, layers, kv heads, head size, float32
    both, alone = planned(), planned(ALONE)
    assert (both.slots, both.length) == (200, 120)  # all the 50 x 4 responses fit
    assert both.weights == alone.weights == 2 * weights
    assert both.caches == 200 * 120 * token * 2
    assert alone.caches == 200 * 120 * token
    assert planned(n=100).slots == decode.check.plan.MOST_SLOTS
    twenty = planned(slots=20)
    assert 0 < twenty.prompts < both.prompts, "prompts wait for no more slots than there are"
    gib = (twenty.weights + twenty.prompts + twenty.caches + twenty.working) / (1 << 30)
    assert planned(memory=gib).slots == 20
    assert planned(memory=gib, cache_dtype="int8").slots > 20
    monkeypatch.setattr(decode.check.plan, "device_memory", lambda: int(gib * (1 << 30)))
    assert planned().slots == 20
    with pytest.raises(ValueError, match=r"slots = 24 of 120 tokens: .* would: 20 slots, .* a cache in int8 \("):
        planned(slots=24)


def test_a_mesh_splits_weights_and_caches():
    mesh = make_mesh(2, 2, 2)
    model = tiny_config()
    params = init_params(model, jax.random.key(0))
    norms = sum(x.nbytes for path, x in jax.tree_util.tree_leaves_with_path(params) if "norm" in str(path[-1]))
    rest = sum(x.nbytes for x in jax.tree.leaves(params)) - norms
    assert weight_bytes(model, "float32", mesh) == rest / 4 + norms  # fsdp x tensor
    assert decode_weight_bytes(model, "float32", mesh) == rest / 2 + norms  # tensor alone
    one, split = planned(), planned(mesh=mesh)
    assert split.weights == 2 * (rest / 2 + norms)
    assert split.slots == one.slots
    assert split.caches == one.caches / 8  # rows over data and fsdp, kv heads over tensor
    assert planned(mesh=mesh, n=1, slots=5).slots == 8  # a multiple of the four ways that rows are split
