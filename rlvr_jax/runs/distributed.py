"""Several processes that run one program: who this one is, what they tell one another, arrays that lie on all of them.

Every process runs the same program on the same configuration; the mesh covers the devices of all. What decides how the
program goes on (tokens, verdicts, which checkpoint is the newest) is therefore made equal everywhere: device arrays
are read whole by all, host values are gathered through jax's coordination service. With one process nothing here does
anything.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import socket
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rlvr_jax.runs.bounds import Count, Range, Seconds, Text
from rlvr_jax.runs.watch import PEER_LOST, Watch

_WAIT_MS = 2000


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    coordinator: Annotated[str, Text("host:port", r"\S+:\d{1,5}")] | None = None
    """host:port of process 0, a free port there. None: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID of
    the environment, or what Slurm, Open MPI and GKE's TPU pods say in theirs; where none of it is there, one process.
    """
    processes: Count | None = None
    """How many there are."""
    process: Annotated[int, Range(0, 1_000_000)] | None = None
    """Which one this is, from 0."""
    auto: bool = False
    """Let jax find the other processes where the environment does not say that there are any (a TPU pod over ssh)."""
    start_s: Seconds = 300.0
    """Seconds to wait for all processes to come."""
    timeout_s: Seconds = 60.0
    """Seconds without a sign of life after which a process counts as dead, and the others stop."""
    hang_s: Seconds = 1800.0
    """Seconds that the process which is behind all others may stay in one phase before they stop."""


class Cluster:
    """The processes of a run, as one of them sees it.

    Attributes:
      index, size: number of this process, and how many there are.
      hosts: the name of each one's host.
    """

    def __init__(self, index: int = 0, size: int = 1, client: Any = None, watch: Watch | None = None):
        self.index, self.size, self._client, self.watch = index, size, client, watch
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.index == 0

    def name(self, process: int) -> str:
        """A process in words."""
        return f"process {process}" if self.watch is None else self.watch.name(process)

    def all_gather(self, channel: str, value: bytes) -> list[bytes]:
        """The values of all processes, in their order. All make the calls on one channel in the same order."""
        if self.size == 1:
            return [value]
        with self._lock:
            number = self._calls[channel]
            self._calls[channel] += 1
        self._client.key_value_set_bytes(f"rlvr/{channel}/{number}/{self.index}", value)
        values = [
            value if process == self.index else self._wait_for(f"rlvr/{channel}/{number}/{process}")
            for process in range(self.size)
        ]
        if number:  # all have said something since, so all have read it
            self._client.key_value_delete(f"rlvr/{channel}/{number - 1}/{self.index}")
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of process 0, one that JSON can hold; what the others give is not looked at."""
        if self.size == 1:
            return value
        return json.loads(self.all_gather("broadcast", json.dumps(value if self.main else None).encode())[0])

    def broadcast_tokens(self, rows: Sequence[Sequence[int]] | None) -> list[list[int]]:
        """Lists of token ids of process 0, by way of the devices: they may be millions."""
        if self.size == 1:
            return [list(row) for row in rows or ()]
        lengths = self.broadcast([len(row) for row in rows] if rows is not None and self.main else None)
        flat = np.zeros(sum(lengths), np.int32)
        if rows is not None and self.main and flat.size:
            flat = np.concatenate([np.asarray(row, np.int32) for row in rows])
        flat = np.asarray(multihost_utils.broadcast_one_to_all(flat)) if flat.size else flat
        return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] if lengths else []

    def require_same(self, what: str, *parts: bytes) -> None:
        """Raises ValueError naming the processes whose `parts` are not those of most."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        found = self.all_gather("same", digest.digest())
        most, _ = Counter(found).most_common(1)[0]
        if others := [self.name(process) for process, one in enumerate(found) if one != most]:
            raise ValueError(f"{what}: {', '.join(others)} has another than the other processes")

    def phase(self, name: str, step: int | None = None) -> None:
        """Says what this process does, for the others to watch."""
        if self.watch is not None:
            self.watch.phase(name, step)

    def _wait_for(self, key: str) -> bytes:
        """A value that another process sets; how long that may take is the watch's business."""
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, _WAIT_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


_cluster = Cluster()


def cluster() -> Cluster:
    """The processes of this run: one, unless `initialize` found more."""
    return _cluster


def initialize(config: DistributedConfig) -> Cluster:
    """Joins the other processes, where the configuration or the environment says that there are some.

    Must come before any device is used.

    Raises:
      ValueError: an incomplete description of the processes.
    """
    global _cluster
    where = _described(config)
    if where is None:
        return _cluster
    with contextlib.suppress(AttributeError):  # of its own, where the option is
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the program's
    timer = threading.Timer(config.start_s, _nobody_came, (config, where))
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        **where,
        initialization_timeout=int(config.start_s) + 60,
        heartbeat_timeout_seconds=int(max(100, 10 * config.timeout_s)),  # ours come first
    )
    timer.cancel()
    from jax._src.distributed import global_state as state  # nothing public gives the client

    if state.num_processes > 1:
        _cluster = Cluster(state.process_id, state.num_processes, state.client)
        hosts = [host.decode() for host in _cluster.all_gather("hosts", socket.gethostname().encode())]
        _cluster.watch = Watch(
            state.client,
            state.process_id,
            hosts,
            str(state.coordinator_address),
            timeout_s=config.timeout_s,
            hang_s=config.hang_s,
        )
        if not _cluster.main:
            logging.getLogger().setLevel(logging.ERROR)  # what there is to warn of, process 0 warns of
    return _cluster


def refuse_several(program: str) -> None:
    """Raises ValueError where a launcher has started a program several times that runs as one process."""
    if _several_here():
        raise ValueError(
            f"{program} runs as one process, and the environment says that this is one of several: start it once"
        )


def identity(record: Any, program: str) -> Iterator[bytes]:
    """What `require_same` compares before a run begins: plain values that JSON can hold, jax, this package, another."""
    yield json.dumps(record, sort_keys=True, default=str).encode()
    yield jax.__version__.encode()
    for package in ("rlvr_jax", program):
        for path in sorted(Path(importlib.import_module(package).__path__[0]).rglob("*.py")):
            yield path.read_bytes()


def leave(code: int, sentence: str) -> int:
    """The end of a program that exits with `code`, having said `sentence`; does not return where others must stop too.

    0 and an end that all agreed on wait for the others.
    """
    global _cluster
    if _cluster.watch is None:
        return code
    if sentence:
        _flush()
        _cluster.watch.failed(sentence, code)
    _cluster.watch.finished()
    jax.distributed.shutdown()
    _cluster = Cluster()
    return code


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`x`, which all processes have, as an array laid out by `sharding`; each process makes its own parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])


def to_host(tree: Any) -> Any:
    """`jax.device_get`, of arrays too that lie on the devices of several processes, all of which must call it."""
    leaves, structure = jax.tree.flatten(tree)
    apart = [i for i, x in enumerate(leaves) if _apart(x)]
    if apart:
        whole = _whole(tuple(leaves[i] for i in apart), NamedSharding(leaves[apart[0]].sharding.mesh, PartitionSpec()))
        for i, x in zip(apart, whole, strict=True):
            leaves[i] = x
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _apart(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated


def _whole(arrays: tuple[jax.Array, ...], replicated: NamedSharding) -> Sequence[jax.Array]:
    return jax.jit(_same, out_shardings=replicated)(arrays)


def _same(x: Any) -> Any:
    return x


def _described(config: DistributedConfig) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None for one process."""
    given = {
        "coordinator_address": config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number(config.processes, "JAX_NUM_PROCESSES"),
        "process_id": _number(config.process, "JAX_PROCESS_ID"),
    }
    flags = dict(zip(given, ("coordinator", "processes", "process"), strict=True))
    if all(value is not None for value in given.values()):
        count, index = given["num_processes"], given["process_id"]
        if count < 1 or not 0 <= index < count:
            raise ValueError(f"distributed.process={index} of distributed.processes={count}: expected 0 to {count - 1}")
        return given if count > 1 else None
    if config.auto or _several_here():
        return {name: value for name, value in given.items() if value is not None}
    missing = [flags[name] for name, value in given.items() if value is None]
    if len(missing) < len(given):
        raise ValueError(f"distributed.{missing[0]} is not given, and the environment does not say it either")
    return None


def _number(value: int | None, variable: str) -> int | None:
    if value is not None or variable not in os.environ:
        return value
    text = os.environ[variable]
    if not text.isdigit():
        raise ValueError(f"{variable}={text!r} in the environment: expected a number")
    return int(text)


def _several_here() -> bool:
    """Whether a launcher's environment says that this is one of several processes."""
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    mpi = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    tpu = any("," in os.environ.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    return slurm or mpi or tpu


def _nobody_came(config: DistributedConfig, where: dict[str, Any]) -> None:
    address = where.get("coordinator_address", "the address that the environment gives")
    who = f"process {where['process_id']} of {where['num_processes']}" if "process_id" in where else "this process"
    _flush()
    os.write(2, f"error: {who}: not all processes came to {address} within {config.start_s:.0f} s\n".encode())
    os._exit(PEER_LOST)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
