"""One-step-off rollouts: the groups of the next trainer step are collected in a thread while this one updates."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from train.step.rollout import Collected

Collect = Callable[[Callable[[str], None]], Collected]


class _Cancelled(Exception):
    """The run has ended; nobody waits for the groups."""


class Ahead(contextlib.AbstractContextManager):
    """At most one collection that goes on beside the update, or its result. Work begins under the mesh given."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh, self._thread = mesh, ThreadPoolExecutor(1)
        self._future: Future[Collected] | None = None
        self._over = False

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.shutdown(cancel_futures=True)

    @property
    def begun(self) -> bool:
        """Whether there is a collection, or its result."""
        return self._future is not None

    def begin(self, collect: Collect) -> None:
        """Begins a collection; `collect` gets a function to name its phases, which ends it when the run has ended."""

        def work() -> Collected:
            with jax.set_mesh(self._mesh):
                return collect(self._phase)

        self._future = self._thread.submit(work)

    def put(self, collected: Collected) -> None:
        """What an earlier process had collected."""
        self._future = Future()
        self._future.set_result(collected)

    def wait(self) -> Collected | None:
        """The result, once it is there; None where nothing was begun. Raises what the collection raised."""
        return None if self._future is None else self._future.result()

    def take(self) -> Collected | None:
        """As `wait`, and forgets it."""
        collected, self._future = self.wait(), None
        return collected

    def _phase(self, name: str) -> None:
        if self._over:
            raise _Cancelled(name)


def own_copy(params: Any, state_params: Any) -> Any:
    """`params` without what they may share with `state_params`, which an update gives away: copied if of its dtype."""
    master = {x.dtype for x in jax.tree.leaves(state_params)}
    return jax.tree.map(lambda x: jnp.copy(x) if x.dtype in master else x, params)
