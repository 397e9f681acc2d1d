"""Processes that watch one another, on a store of threads: who is blamed, where all stop, what is gathered."""

import contextlib
import json
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from decode.run import prepare as decode_prepare
from rlvr_jax.runs import distributed, watch
from rlvr_jax.runs.distributed import Cluster, DistributedConfig, place, to_host
from rlvr_jax.runs.watch import PEER_LOST, Watch
from rlvr_jax.sharding.rules import make_mesh
from train import sft


class Store:
    """The key-value store of the coordination service, for the threads of one process."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set_bytes(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get_bytes(self, key, timeout_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def key_value_delete(self, key):
        with self.changed:
            del self.values[key]

    key_value_set, blocking_key_value_get = key_value_set_bytes, blocking_key_value_get_bytes


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def started(monkeypatch):
    """Makes watches of one run; what they said at their end, and their exit codes, are lists of theirs."""
    made = []

    class Noted(Watch):
        def _end(self, sentence, code, *, say=True, tell=True):
            if not self.ends:
                self.ends.append((sentence, code))
                self._tell(sentence if tell else None) if self._index else None
            self._closed.set()
            raise Ended

        def _beat(self):
            self._quietly(super()._beat)

        def _judge(self):
            self._quietly(super()._judge)

        def _listen(self):
            self._quietly(super()._listen)

        def _quietly(self, work):
            with contextlib.suppress(Ended):
                work()

    def start(size, **options):
        store = Store()
        for index in range(size):
            one = Noted.__new__(Noted)
            one.ends = []
            monkeypatch.setattr(watch.Watch, "_catch_abort", lambda self: None)
            one.__init__(
                store, index, [f"host{i}" for i in range(size)], ":0", **{"timeout_s": 1.0, "hang_s": 60.0} | options
            )
            made.append(one)
        return made

    yield start
    for one in made:
        one._closed.set()


def wait_for(true, seconds=20.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def test_a_silent_process_is_named_with_its_host_phase_and_step(started):
    watches = started(3)
    for one in watches:
        one.phase("rollout 3/8 responses", 7)
    wait_for(lambda: all(said.phase.startswith("rollout") for said, _ in watches[0]._heard.values()))
    watches[2]._closed.set()  # as if killed
    wait_for(lambda: all(one.ends for one in watches[:2]))
    for one in watches[:2]:
        sentence, code = one.ends[0]
        assert code == PEER_LOST == 69
        assert "process 2 of 3 (host host2) has not answered for" in sentence
        assert "in phase 'rollout 3/8 responses' after trainer step 7" in sentence


def test_the_process_behind_all_others_is_the_one_that_hangs(started):
    watches = started(3, timeout_s=30.0, hang_s=2.0)
    for _ in range(3):
        for one in (watches[0], watches[2]):
            one.phase("update", 4)
    watches[1].phase("score", 4)
    wait_for(lambda: any(one.ends for one in watches))
    sentence, _ = next(one.ends[0] for one in watches if one.ends)
    assert "process 1 of 3 (host host1) has made no progress for" in sentence
    assert "in phase 'score' after trainer step 4" in sentence


def test_progress_is_no_hang_however_long_it_takes(started):
    watches = started(2, timeout_s=30.0, hang_s=1.0)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        for one in watches:
            one.phase("update", 4)
        time.sleep(0.05)
    assert not any(one.ends for one in watches)


def test_all_stop_at_one_point_however_far_apart_they_are(started):
    watches = started(3)
    stopped = {}

    def work(index, pace):
        for point in range(1, 400):
            if watches[index].stop_here():
                stopped[index] = point
                return
            if point == 20 and index == 1:
                watches[1].asked = lambda: True
            time.sleep(pace)

    threads = [threading.Thread(target=work, args=(i, pace)) for i, pace in enumerate((0.01, 0.02, 0.03))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stopped) == 3
    assert len(set(stopped.values())) == 1
    assert stopped[0] > 20


def test_a_process_that_gives_up_says_why_to_the_others(started):
    watches = started(2, timeout_s=30.0)
    with pytest.raises(Ended):
        watches[1].failed("data.train: no such file", 2)
    assert watches[1].ends[0][1] == 2
    wait_for(lambda: watches[0].ends)
    sentence, code = watches[0].ends[0]
    assert code == PEER_LOST
    assert "process 1 of 2 (host host1) ended in phase 'start': data.train: no such file" in sentence


def test_who_is_done_waits_for_the_others_and_is_not_missed(started):
    watches = started(2)
    first = threading.Thread(target=watches[0].finished)
    first.start()
    time.sleep(1.5)
    assert first.is_alive()
    watches[1].finished()
    first.join(5)
    assert not first.is_alive()
    assert not any(one.ends for one in watches)


def in_threads(size, work):
    store, results = Store(), [None] * size

    def run(index):
        try:
            results[index] = work(Cluster(index, size, store))
        except ValueError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, store


def test_gather_and_broadcast():
    def work(cluster):
        gathered = [cluster.all_gather("verdicts", b"%d.%d" % (cluster.index, call)) for call in range(3)]
        return gathered, cluster.broadcast({"step": 3} if cluster.main else "not looked at")

    results, store = in_threads(3, work)
    for gathered, value in results:
        assert gathered == [[b"%d.%d" % (i, call) for i in range(3)] for call in range(3)]
        assert value == {"step": 3}
    assert not [key for key in store.values if key.startswith("rlvr/verdicts/0/")], "read values are not kept"
    assert Cluster().all_gather("any", b"x") == [b"x"]
    assert Cluster().broadcast([1]) == [1]


def test_who_differs_is_named():
    results, _ = in_threads(
        3, lambda cluster: cluster.require_same("the data", b"abc", b"x" if cluster.index else b"y")
    )
    for error in results:
        assert str(error) == "the data: process 0 has another than the other processes"
    assert in_threads(3, lambda cluster: cluster.require_same("the data", b"abc"))[0] == [None] * 3


@pytest.mark.parametrize(
    ("environment", "flags", "found"),
    [
        ({}, {}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "TPU_WORKER_HOSTNAMES": "a"}, {}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, {}),
        ({}, {"auto": True}, {}),
        ({}, {"coordinator": "a:1", "processes": 1, "process": 0}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"},
            {"process": 1},
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_where_the_other_processes_are_said_to_be(monkeypatch, environment, flags, found):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._described(DistributedConfig(**flags)) == found


def test_an_incomplete_description_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"distributed\.process is not given"):
        distributed._described(DistributedConfig(coordinator="a:1", processes=2))
    with pytest.raises(ValueError, match=r"distributed\.process=2 of distributed\.processes=2: expected 0 to 1"):
        distributed._described(DistributedConfig(coordinator="a:1", processes=2, process=2))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES='two'"):
        distributed._described(DistributedConfig(coordinator="a:1", process=2))


def test_programs_of_one_process_refuse_to_be_one_of_several(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="here runs as one process"):
        distributed.refuse_several("here")


def test_what_is_wrong_with_a_command_is_said_before_others_are_waited_for(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="expected one of the two"):
        sft.prepare(["--data", "d"])
    with pytest.raises(ValueError, match="no model"):
        decode_prepare(["--problems", "p"])
    with pytest.raises(ValueError, match=r"distributed\.coordinator is not given"):
        decode_prepare(["--rl", "r", "--problems", "p"])


def test_arrays_there_and_back():
    mesh = make_mesh()
    x = np.arange(48, dtype=np.float32).reshape(16, 3)
    there = place(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    assert there.sharding.spec == PartitionSpec("fsdp")
    back = to_host({"x": there, "y": [np.int32(3)]})
    np.testing.assert_array_equal(back["x"], x)
    assert json.dumps(int(back["y"][0])) == "3"
