"""The folder that keeps the compiled programs of a run."""

import jax
import jax.numpy as jnp
import pytest

from rlvr_jax.runs import distributed, program
from rlvr_jax.runs.program import compile_cache

HIT = "/jax/compilation_cache/cache_hits"


@pytest.fixture(autouse=True)
def keep_all(monkeypatch):
    """Programs of microseconds too; no folder given to jax from outside."""
    monkeypatch.setattr(program, "_MIN_COMPILE_S", 0.0)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def hits():
    seen = []

    def listen(event, **_):
        seen.append(event == HIT)

    jax.monitoring.register_event_listener(listen)
    yield lambda: sum(seen)
    jax.monitoring.unregister_event_listener(listen)


def compiled(x):
    """A program of this call's own: jax keeps none of it in memory."""
    return jax.jit(lambda x: jnp.sin(x) * 17.25 + jnp.cumsum(x))(x)


def test_a_second_start_reads_what_the_first_compiled(tmp_path, hits):
    x, results = jnp.arange(7.0), []
    for start, run in enumerate(("run", "moved")):
        before = hits()
        with compile_cache("auto", tmp_path / run):
            results.append(compiled(x))
        assert hits() - before == start
        if not start:
            (tmp_path / "run").rename(tmp_path / "moved")
    assert results[0].tobytes() == results[1].tobytes()
    assert jax.config.jax_compilation_cache_dir is None
    before = hits()
    compiled(x)
    assert hits() == before


def test_another_folder_or_none(tmp_path):
    with compile_cache(str(tmp_path / "shared"), tmp_path / "run"):
        compiled(jnp.arange(8.0))
    assert list((tmp_path / "shared").iterdir())
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    with compile_cache(None, tmp_path / "run"):
        compiled(jnp.arange(9.0))
    assert not (tmp_path / "given").exists()
    with compile_cache("auto", tmp_path / "run"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
    assert not (tmp_path / "run").exists()


def test_several_processes_on_cpu_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(program.distributed, "cluster", lambda: distributed.Cluster(0, 2))
    with compile_cache("auto", tmp_path):
        assert jax.config.jax_compilation_cache_dir is None
