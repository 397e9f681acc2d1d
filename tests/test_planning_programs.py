"""Real compilers, small programs: what a plan says of them, against numbers worked out by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks.plans import PLANS
from rlvr_jax.planning import ideal, process, topology
from rlvr_jax.planning.chips import CHIPS
from rlvr_jax.planning.collectives import Collective
from rlvr_jax.planning.interconnect import Interconnect
from rlvr_jax.planning.models import PUBLISHED
from rlvr_jax.planning.programs import ProgramAccount, compile_program, placed, temporaries_refused
from rlvr_jax.planning.table import table
from rlvr_jax.planning.topology import NoCompiler, Topology
from rlvr_jax.sharding.rules import make_mesh
from tests.small_program import INNER, LAYERS, ROWS, WIDTH
from train.check import plan

needs_tpu_compiler = pytest.mark.skipif(
    topology.compiler_library() is None, reason="no TPU compiler here (`make tpu-compiler` fetches it)"
)
needs_cuda_compiler = pytest.mark.skipif(
    topology.cuda_python() is None, reason="no CUDA compiler here (`make cuda-compiler` fetches it, 4.5 GB)"
)
# Two products a layer forward and four backward; a loop makes the gradient of its first input too.
SMALL_FLOPS = 2 * ROWS * WIDTH * INNER * 6 * LAYERS


def small(text):
    (message,) = process.inside(Topology.parse(text), "tests.small_program", [text])
    return ProgramAccount.of(message["program"])


def check_small(made):
    assert made.flops * made.chips == SMALL_FLOPS
    assert made.kinds["params"] * made.chips == LAYERS * 2 * WIDTH * INNER * 2
    assert not made.unknown_loops
    over = {axis for row in made.collectives for axis in row["axes"]}
    assert over <= {"fsdp", "tensor"}
    assert "fsdp" in over
    assert made.fits
    assert made.seconds > 0
    assert ProgramAccount.of(json.loads(json.dumps(made.plain()))) == made


@needs_tpu_compiler
def test_small_program_for_tpus():
    check_small(small("v6e:2x2"))


@needs_cuda_compiler
def test_small_program_for_gpus():
    check_small(small("cuda:1x1x4"))


RUN = (
    *("--model.path", "{folder}", "--data.train", "x.parquet", "--data.max-prompt", "128"),
    *("--rollout.max-response", "384", "--rollout.n", "4", "--rollout.generation-batch", "4"),
    *("--reward.overlong-buffer", "0", "--algorithm.train-batch", "1", "--algorithm.mini-batch", "1"),
    *("--mesh.fsdp", "2", "--mesh.tensor", "2"),
)


@pytest.fixture
def run(tmp_path):
    """Arguments of a run of a small model, of which there is only the config.json."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes, **heads}))
    return [part.format(folder=tmp_path) for part in RUN]


@needs_tpu_compiler
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_plan_of_a_run(run, tmp_path, capsys, micro_batches):
    run += ["--algorithm.micro-batches", str(micro_batches)]
    argv = [*run, "--plan", "v6e:2x2", "--plan-only", "update", "--plan-json", str(tmp_path / "plan.json")]
    plan.plan(plan.prepare(argv))
    printed = capsys.readouterr().out
    assert "peak, GiB of 31.2" in printed
    written = json.loads((tmp_path / "plan.json").read_text())
    (made,) = (ProgramAccount.of(x) for x in written["programs"])
    params = 256 * 4 * 64 * 2 + 2 * 256 * 2 * 64 + 3 * 256 * 512 + 2 * 1024 * 256 + 2 * 256 + 2 * 64 + 256
    assert made.kinds["params"] == pytest.approx(params * 4 / 4, rel=0.01)  # norms lie whole on every chip
    assert made.kinds["optimizer"] == pytest.approx(2 * made.kinds["params"], rel=0.01)
    if micro_batches == 1:
        assert "gradients" not in made.kinds  # they are not there before or after the program
    else:
        assert made.kinds["gradients"] == pytest.approx(made.kinds["params"], rel=0.01)
    assert made.flops == pytest.approx(made.ideal_flops, rel=0.25)  # the plain form computes the whole square
    assert made.peak == sum(made.kinds.values())


@pytest.mark.slow  # a compilation of a minute or three
@needs_tpu_compiler
def test_a_step_of_the_8b_recipe_on_64_chips(tmp_path):
    _, topology, flags = PLANS["8b-v5p-10k-step"]
    plan.plan(plan.prepare([*flags, "--plan", topology, "--plan-json", str(tmp_path / "plan.json")]))
    (made,) = (ProgramAccount.of(x) for x in json.loads((tmp_path / "plan.json").read_text())["programs"])
    assert made.peak <= 3.8 * 2**30
    assert made.fusion_s <= 0.60
    assert made.flops <= 1.05 * made.ideal_flops


def test_what_is_wrong_is_said_before_anything_is_compiled(run, monkeypatch):
    for change, expected in {
        ("--plan", "v7:2x2"): "expected KIND:AxB",
        ("--plan", "v6e:2x2x2"): "expected 2 sizes",
        ("--plan", "v6e:4x4"): "needs 4 devices, v6e:4x4 has 16",
        ("--plan", "v6e:2x2", "--plan-only", "train"): "'train' is none of update",
        ("--plan", "v6e:2x2", "--model.path", "Qwen/Qwen9"): "expected a folder with a config.json, or one of",
    }.items():
        with pytest.raises(ValueError, match=expected):
            plan.prepare([*run, *change])
    monkeypatch.setattr(topology, "compiler_library", lambda: None)
    monkeypatch.setattr(topology, "cuda_python", lambda: None)
    with pytest.raises(NoCompiler, match="make tpu-compiler"):
        plan.prepare([*run, "--plan", "v6e:2x2"])
    with pytest.raises(NoCompiler, match="make cuda-compiler"):
        plan.prepare([*run, "--plan", "cuda:1x1x4"])


def test_what_the_compiler_refuses():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 51.5G of 31.25G hbm. Exceeded by 20G."
    assert temporaries_refused(used, 1 << 30) == int(50.5 * 2**30)
    named = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (32.00G) exceeds available HBM (31.25G)."
    assert temporaries_refused(named, 1 << 30) == 32 << 30
    assert temporaries_refused("INTERNAL: Used 3G", 0) is None

    def refuse():
        raise jax.errors.JaxRuntimeError(used)

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = placed(mesh, (1024, 1024), "float32", ("embed", "ffn"))
    made = compile_program("large", refuse, mesh, CHIPS["v6e"], holds={"params": params})
    assert not made.fits
    assert made.kinds == {"params": 1 << 20, "temporaries": int(51.5 * 2**30) - (1 << 20)}
    assert ProgramAccount.of(made.plain()) == made
    assert table([made], "a plan").row_count


def test_ideal_flops_by_hand():
    model = PUBLISHED["Qwen/Qwen3-8B-Base"]
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12_288
    assert ideal.multiplied_params(model) == (36 * layer, 4096 * 151_936)
    n, tokens = 36 * layer + 4096 * 151_936, 16 * 10_240
    square = 16 * 10_240**2 * 4096 * 36  # one product of all heads and layers, half of the square
    policies = {"none": (6, 7), "dots": (6, 9), "full": (8, 9)}
    for remat, (per_layer, products) in policies.items():
        flops = ideal.training_flops(dataclasses.replace(model, remat=remat), 16, 10_240)
        assert flops[0] == pytest.approx(6 * n * tokens + 6 * square)
        assert flops[1] == pytest.approx((per_layer * 36 * layer + 8 * 4096 * 151_936) * tokens + products * square)


def test_collectives_at_the_rate_of_the_links():
    chip = CHIPS["v5p"]
    places = np.array([[x, y, z] for x in range(4) for y in range(4) for z in range(4)])
    torus = Interconnect(chip, places, np.zeros(64, int), (4, 4, 4))

    def gather(group):
        n = len(group)
        return torus.seconds(Collective("all-gather", (), tuple(group), 900, 900e6 * (n - 1) / n, 2, False, "", ""))

    ring = 2 * (900e6 * 3 / 4 / (2 * 9e10) + 2e-6)  # both directions around four chips, two executions
    assert gather(range(4)) == pytest.approx(ring)
    plane = 2 * (900e6 * 15 / 16 / (4 * 9e10) + 2e-6)  # the rings of two dimensions
    assert gather(range(16)) == pytest.approx(plane)
    pair = 2 * (900e6 / 2 / 9e10 + 2e-6)  # half of a ring is a line
    assert gather([0, 1]) == pytest.approx(pair, rel=1e-3)
    apart = Interconnect(CHIPS["h100"], np.zeros((16, 0), int), np.arange(16) // 8, ())
    across = Collective("all-gather", (), tuple(range(16)), 800, 800e6 * 15 / 16, 1, False, "", "")
    # Half of it comes from the other node, through eight network cards.
    assert apart.seconds(across) == pytest.approx(max(800e6 / 2 / 8 / 5e10, 800e6 * 15 / 16 / 4.5e11))
