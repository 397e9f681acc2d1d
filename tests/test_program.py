"""The edge of the programs: a platform without a device is one sentence."""

import sys

import jax
import pytest

from rlvr_jax.runs import program


@pytest.fixture
def failing(monkeypatch):
    """A `prepare` that looks for devices, on a machine where jax answers as given."""

    def make(asked, answer):
        def devices():
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(sys, "argv", ["program"])
        monkeypatch.setattr(jax, "devices", devices)
        monkeypatch.setattr(program, "_platforms", lambda: asked)

        def prepare(argv):
            if isinstance(answer, Exception):
                raise answer
            raise RuntimeError("of another kind")

        return prepare

    return make


@pytest.mark.parametrize(
    ("asked", "answer", "words"),
    [
        ("cuda", AssertionError(), ["JAX_PLATFORMS=cuda", "make setup ACCELERATOR=cuda12"]),
        ("tpu,cpu", RuntimeError("Unable to initialize backend 'tpu'"), ["Unable", "ACCELERATOR=tpu"]),
        ("cdua", RuntimeError("'cdua' is not known"), ["JAX_PLATFORMS=cdua", "'cdua' is not known", "=cpu"]),
    ],
)
def test_a_platform_without_a_device_is_a_usage_error(failing, capfd, asked, answer, words):
    assert program.run_program(failing(asked, answer), pytest.fail) == program.USAGE_ERROR
    written = capfd.readouterr().err
    assert written.startswith("error: ")
    assert written.count("\n") == 1
    assert all(word in written for word in words)


def test_other_errors_of_these_types_keep_their_traceback(failing):
    with pytest.raises(RuntimeError, match="of another kind"):
        program.run_program(failing("cpu", ["a device"]), pytest.fail)
