"""What the decoding tests share: a count of compilations."""

import contextlib
from collections.abc import Iterator

import jax

_compiled: list[str] = []


def _listen(event: str, _seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry for each program that XLA compiles inside the block, the smallest eager operation included."""
    before = len(_compiled)
    inside: list[str] = []
    yield inside
    inside.extend(_compiled[before:])
