"""The device check in its small form: every part gives its figures, and a wrong number ends it with exit code 1."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.device_check import __main__ as program
from benchmarks.device_check import decode, reference, trace

SELDOM_THERE = ("tyro", "grain", "math_verify", "orbax")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device_check")
    assert program.main(["--size", "tiny", "--out", str(folder), "--budget", "3000", "--threads", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def found(out):
    return json.loads((out / "device_check.json").read_text())


def test_every_part_gives_its_figures(found):
    assert found["left_out"] == []
    assert found["wrong"] == []
    assert found["identity"]["backend"] == "cpu"
    assert found["machine"]["copy_TB_s"] > 0
    assert found["machine"]["data_dependent_loop_turn_us"] > 0
    assert found["sampler"]["top_p_0.7"]["passes"] > 0
    for name in ("train_auto", "decode_tiny_single", "decode_tiny_pair"):
        assert found[name]["compile_s"] > 0
        assert found[name]["profile"] == {"events": 0}  # no GPU
    assert found["train_auto"]["seconds"] > 0
    assert found["train_auto"]["optimizer"]["seconds"] > 0
    assert {case["temperature"] for case in found["decode_tiny_pair"]["cases"]} == {0.0, 1.0}
    assert all(case["tokens"] > 0 for case in found["decode_tiny_single"]["cases"])
    assert len(found["pair_over_single"]) == len(found["decode_tiny_pair"]["cases"])


def test_this_platform_agrees_with_itself(found):
    numbers = found["numerics"]["float32, exact products"]
    assert found["numerics"]["gradient_of_equal_tokens"] == [8192, 8192]
    assert numbers["same_bits"]
    assert numbers["gradient"]["relative"] < 1e-5
    assert numbers["same_tokens"]["pair and pair_in_blocks"] == 1
    assert 0 < numbers["fired_share"] < 1


def test_figures_are_drawn(out):
    assert (out / "decode.png").stat().st_size > 10_000
    assert not (out / "reference.npz").exists()


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    return {
        "same_bits": np.array(True),
        "loss": np.array(0.5),
        "gradient['embed']": rng.standard_normal((4, 3)),
        "updated['embed']": rng.standard_normal((4, 3)),
        "logp": -rng.random((2, 5)),
        "entropy": rng.random((2, 5)),
        "greedy": rng.integers(0, 9, (2, 8)),
        "drawn": rng.integers(0, 9, (2, 8)),
        "pair": rng.integers(0, 9, (2, 8)),
        "fired": np.array([[True, False]]),
        "gap": np.zeros((2, 8)),
    }


WRONG = {
    "gradient['embed']": (lambda x: x * 1.01, "gradient['embed'] is off by 0.01"),
    "updated['embed']": (lambda x: x + 0.1, "updated['embed'] is off"),
    "logp": (lambda x: x - 0.5, "logp is off by 0.5 nats"),
    "entropy": (lambda x: x * np.nan, "not finite"),
    "gap": (lambda x: x + 0.2, "sampler and trainer differ by 0.2 nats"),
    "drawn": (lambda x: x + (np.arange(8) > 4), "drawn: only 62.5% of the tokens are the same"),
    "same_bits": (lambda x: ~x, "other bits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_number_is_named(numbers, name):
    numbers["pair_in_blocks"] = numbers["pair"]
    change, expected = WRONG[name]
    _, wrong = reference.compare("float32, exact products", numbers | {name: change(numbers[name])}, numbers)
    assert len(wrong) >= 1
    assert any(expected in sentence for sentence in wrong), wrong
    assert reference.compare("float32, exact products", numbers, numbers)[1] == []


def test_what_is_wrong_or_fails_decides_the_exit_code(tmp_path, capsys):
    parts = program.Parts(tmp_path, "tiny", 1e9, {"device": "d", "jax": "0"})
    parts.run("good", lambda: {"a": 1}, 0)
    assert program.report(parts.found) == 0
    parts.run("bad", lambda: 1 / 0, 0)  # type: ignore[arg-type, return-value]
    parts.run("late", lambda: {"a": 1}, 1e12)
    assert program.report(json.loads((tmp_path / "device_check.json").read_text())) == 1
    said = capsys.readouterr().out
    assert "WRONG: bad failed: ZeroDivisionError" in said
    assert "LEFT OUT: late" in said


def test_it_needs_nothing_that_gpu_images_seldom_carry():
    parts = ("__main__", "machine", "reference", "sampler", "train", "decode", "sizes")
    code = "import importlib, sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in SELDOM_THERE)
    code += "".join(f"importlib.import_module('benchmarks.device_check.{name}')\n" for name in parts)
    root = Path(__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_summary_of_a_trace():
    def kernel(name, ts, dur):
        return {"ph": "X", "pid": 1, "tid": 2, "name": name, "ts": ts, "dur": dur}

    events = [
        {"name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "Stream #14"}},
        {"name": "thread_name", "pid": 1, "tid": 3, "args": {"name": "XLA Ops"}},
        *(kernel("gemm", 0, 10), kernel("gemm", 5, 10), kernel("MemcpyD2H", 30, 10)),
        {"ph": "X", "pid": 1, "tid": 3, "name": "whole", "ts": 0, "dur": 1000},
    ]
    found = trace.summary({"traceEvents": events}, passes=2)
    assert found["wall_ms"] == 0.04
    assert found["idle_share"] == 1 - 25 / 40
    assert found["launches_per_pass"] == 1.5
    assert found["copies_per_pass"] == 0.5
    assert found["largest"][0] == {"kernel": "gemm", "launches": 2, "ms": 0.02}


def test_pairs_are_divided_by_their_model_alone():
    def part(*rates):
        return {"cases": [{"live": 512, "top_p": 1.0, "temperature": t, "tokens_per_s": r} for t, r in rates]}

    found = {
        "decode_m_single": part((1.0, 100.0)),
        "decode_m_pair": part((1.0, 60.0)),
        "decode_n_single": {"error": "x"},
    }
    assert decode.pair_over_single(found) == {"m, live 512, top-p 1, temperature 1": 0.6}
