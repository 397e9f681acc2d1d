"""`--dry-run`: its arithmetic against hand numbers and the real collector, its checks, and that it takes no device."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from rich.console import Console

from rlvr_jax.data.prompts import PromptSet
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.memory import kept_bytes, layer_bytes
from rlvr_jax.models.qwen import init_params
from rlvr_jax.planning.models import PUBLISHED
from rlvr_jax.rewards.pool import Graded
from rlvr_jax.runs.program import RunError
from rlvr_jax.sharding.rules import MESH_AXES
from tests.runs import ROOT, arguments, write_inputs
from tests.test_train_wiring import Recorder, problems
from tests.tiny import tiny_config
from train import config as c
from train.check import budget
from train.check.dry_run import dry_run, report
from train.check.examine import examine
from train.check.prepare import configuration
from train.step.objective import scalars
from train.step.programs import make_optimizer, make_programs, placed_like_params
from train.step.rollout import Collector


def run_config(*, steps=None, epochs=1, batch=8, n=4, **algorithm):
    return c.Config(
        steps=steps,
        epochs=epochs,
        rollout=c.RolloutConfig(generation_batch=batch, n=n, max_response=16),
        algorithm=c.AlgorithmConfig(**{"train_batch": 4, "mini_batch": 2, "dynamic_sampling": False} | algorithm),
    )


@pytest.mark.parametrize(
    ("config", "rows", "expected"),
    [
        (run_config(), 40, (5, 10, 20)),  # 5 batches of 8 groups, 4 a step
        (run_config(surplus="discard"), 40, (5, 5, 10)),
        (run_config(epochs=3), 14, (6, 12, 24)),  # 42 prompts: the sixth batch passes the end
        (run_config(batch=5), 9, (2, 3, 5)),  # 4 + 4 + 2 groups
        (run_config(steps=2), 40, (1, 2, 4)),  # the second step is carried over
        (run_config(steps=99), 40, (5, 10, 20)),
        (run_config(train_batch=20, mini_batch=5), 16, (2, 1, 4)),  # 16 groups: 5 + 5 + 5 + 1
    ],
)
def test_counters_without_dynamic_sampling_are_exact(config, rows, expected):
    assert budget.counters(config, rows) == tuple(budget.Bounds(x, x) for x in expected)


def test_counters_with_dynamic_sampling_are_bounds():
    config = run_config(batch=10, dynamic_sampling=True, max_generation_batches=3)
    assert budget.counters(config, 1000) == ((100, 100), (33, 250), (66, 500))
    # All kept: 10 groups, of which 6 wait, 2 after the second step, 8 after the third (a new batch), 4, none.
    few = dataclasses.replace(config, steps=5)
    assert budget.counters(few, 1000) == ((2, 15), (5, 5), (10, 10))
    assert [str(x) for x in budget.counters(few, 1000)] == ["2 to 15", "5", "10"]


class SomeVary:
    """Grades so that a share of the groups varies."""

    def __init__(self, share, n, seed):
        self.share, self.n, self.rng = share, n, np.random.default_rng(seed)

    def grade(self, rule, responses, answers):
        varies = self.rng.random(len(responses) // self.n) < self.share
        return [Graded(bool(varies[i // self.n]) and i % 2 == 0, None, None) for i in range(len(responses))]


@pytest.mark.parametrize("surplus", ["carry", "discard"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_counters_agree_with_the_collector(share, surplus):
    rng, ended = np.random.default_rng(0), 0
    for trial in range(6):
        rows, batch = (int(x) for x in rng.integers(5, 60, 2))
        options = {"surplus": surplus, "dynamic_sampling": share < 1, "max_generation_batches": int(rng.integers(2, 6))}
        options["when_short"] = ("error", "pad")[trial % 2]
        steps = None if trial % 3 else int(rng.integers(1, 6))
        config = run_config(steps=steps, epochs=int(rng.integers(1, 4)), batch=batch, n=2, **options)
        prompts = PromptSet(problems(rows), [[3, 4]] * rows)
        collector = Collector(config, Recorder(), prompts, SomeVary(share, 2, trial))
        made = updates = 0
        try:
            while steps is None or made < steps:
                groups = collector.collect(None, made, lambda phase: None).groups
                if not groups:
                    break
                made, updates = made + 1, updates + -(-len(groups) // 2)
        except RunError:  # too few groups vary: such a run has no end to count to
            continue
        ended += 1
        got = (collector.generation_batches, made, updates)
        for bounds, count in zip(budget.counters(config, rows), got, strict=True):
            assert bounds.least <= count <= bounds.most, (config, rows, got)
            assert share < 1 or bounds.least == bounds.most
    assert ended > 1


def mesh(data=1, fsdp=1, tensor=1, sequence=1):
    return AbstractMesh((data, fsdp, sequence, tensor), MESH_AXES)


def test_memory_by_hand():
    model = tiny_config()
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    weights = sum(4 * x.size for x in jax.tree.leaves(shapes))
    config = run_config(micro_batches=2, kl_coef=0.1)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, prompts_at_once=4),
        model=c.ModelConfig(logprob_chunk=40),
    )
    plain = dataclasses.replace(model, dtype="float32", remat="full")
    token = 2 * 2 * 2 * 8 * 4  # k and v, layers, kv heads, head size, float32
    parts = {part.name: part for part in budget.memory(config, model, "float32", mesh(), 10)}
    assert {name: (part.phase, part.size) for name, part in parts.items()} == {
        "master weights, float32": ("both", weights),
        "Adam's two moments, float32": ("both", 2 * weights),
        "reference model, float32": ("both", weights),
        "copy of the weights for decoding, float32": ("rollout", weights),
        "KV cache, 16 rows x 26 tokens, float32": ("rollout", 16 * 26 * token),
        "KV cache of prompts read together, 4 x 10": ("rollout", 4 * 10 * token),
        "next-token distributions, float32": ("rollout", 16 * 6 * 48 * 4),
        "gradients, and their sum over micro-batches, float32": ("update", 2 * weights),
        "kept for the backward pass, 4 rows x 26 tokens, float32, remat full": ("update", kept_bytes(plain, 4, 26)),
        "backward pass of one layer, an estimate": ("update", layer_bytes(plain, 4, 26)),
        "logits of 40 tokens: 3 arrays, float32 (model.logprob_chunk)": ("update", 3 * 40 * 48 * 4),
    }
    totals = budget.totals(list(parts.values()))
    assert totals["rollout"] == 5 * weights + 456 * token + 16 * 6 * 48 * 4
    kept = kept_bytes(plain, 4, 26) + layer_bytes(plain, 4, 26)
    assert totals["update"] == 6 * weights + kept + 3 * 40 * 48 * 4
    split = budget.memory(config, model, "float32", mesh(2, 2, 2), 10)
    cache = next(part for part in split if part.name.startswith("KV cache, 4 rows"))
    assert cache.size == 16 * 26 * token / 8  # rows over data and fsdp, kv heads over tensor
    inputs = next(part for part in split if part.name.startswith("kept for the backward pass, 1 rows"))
    assert inputs.size == kept_bytes(plain, 1, 26) // 2  # over tensor


def test_the_published_8b_run_over_64_devices():
    """Qwen3-8B has 8,190,735,360 parameters; all but its norms are split."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768}
    model = QwenConfig.from_hf({"model_type": "qwen3", "tie_word_embeddings": False} | sizes)
    config = configuration(["--config", str(ROOT / "configs" / "qwen3_8b_base.py")])
    parts = budget.memory(config, model, "bfloat16", mesh(1, 16, 4), 2048)
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    assert parts[0].size == 4 * ((8_190_735_360 - norms) // 64 + norms)
    by_name = {part.name: part.size for part in parts}
    # 32 prompts x 16 responses over 16 shards, 8 kv heads over 4
    assert by_name["KV cache, 32 rows x 22,528 tokens, bfloat16"] == 32 * 22528 * 2 * 36 * 2 * 128 * 2
    inputs = 36 * 22528 * 4096 * 2 // 4
    kept = by_name["kept for the backward pass, 1 rows x 22,528 tokens, bfloat16, remat full"]
    assert inputs < kept < 1.2 * inputs
    assert budget.tokens(config, 2048)["response tokens trained on a trainer step"] == 512 * 16 * 20480
    assert budget.tokens(config, 2048)["tokens that pass through the model at once"] == 16 * 22528


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_backward_pass_keeps_by_hand(dtype):
    """M tokens of L layers; with remat full their inputs, and beside the layers three float32 arrays, cos and sin."""
    config, size = tiny_config(num_layers=3, dtype=dtype, remat="full"), jnp.dtype(dtype).itemsize
    L, M, D, F, H = 3, 2 * 300, 32, 64, 8
    top = 3 * M * D * 4 + 2 * M * H // 2 * 4
    assert kept_bytes(config, 2, 300) == pytest.approx(L * M * D * size + top, rel=0.05)
    # of weight matmuls the results: q, k, v, what leaves attention, gate, up
    dots = dataclasses.replace(config, remat="dots")
    assert kept_bytes(dots, 2, 300) == pytest.approx(
        kept_bytes(config, 2, 300) + L * M * size * (4 * H + 2 * 2 * H + D + 2 * F), rel=0.05
    )
    everything = dataclasses.replace(config, remat="none")
    assert kept_bytes(everything, 2, 300) > kept_bytes(dots, 2, 300) + L * M * size * 2 * F
    assert layer_bytes(everything, 2, 300) < kept_bytes(everything, 2, 300)


def like(config, stored):
    """The configuration with the values of a stored one."""
    values = {key: value for key, value in stored.items() if hasattr(config, key)}
    for key, value in values.items():
        if dataclasses.is_dataclass(getattr(config, key)) and value is not None:
            values[key] = like(getattr(config, key), value)
    return dataclasses.replace(config, **values)


@pytest.mark.parametrize("name", ["7b-v6e", "8b-v5p", "8b-v5p-step-attention", "8b-2-slices", "8b-8-h100-step"])
def test_the_estimate_against_the_compilers_of_accelerators(name):
    """Of stored plans: the update's estimate is 1.0 to 1.3 times the peak that the compiler of the chip gives."""
    stored = json.loads((ROOT / "docs" / "plans" / f"{name}.json").read_text())
    config = like(c.Config(), stored["config"])
    sizes = dict(re.findall(r"(data|fsdp|sequence|tensor) (\d+)", stored["title"]))
    on = mesh(**{axis: int(size) for axis, size in sizes.items()})
    parts = budget.memory(config, PUBLISHED[config.model.path], "bfloat16", on, config.data.max_prompt)
    (peak,) = (program["peak"] for program in stored["programs"] if program["name"] == "update")
    assert 1.0 < budget.totals(parts)["update"] / peak < 1.3


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_the_estimate_against_the_compiler_of_this_cpu(remat):
    """A step of a small model in float32: the estimate is 0.7 to 2 times what the compiled program takes."""
    model = tiny_config(num_layers=3, hidden_size=64, intermediate_size=192, num_heads=4, head_dim=16, vocab_size=512)
    model = dataclasses.replace(model, dtype="float32", remat=remat)
    config = run_config(train_batch=1, mini_batch=1, micro_batches=1)
    config = dataclasses.replace(config, model=c.ModelConfig(logprob_chunk=128, remat=remat, attention="plain"))
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_response=216))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    state = placed_like_params(make_optimizer(config.optim), params, device)
    model = dataclasses.replace(model, attention="plain")
    shardings = jax.tree.map(lambda x: x.sharding, state)
    programs = make_programs(config, model, make_optimizer(config.optim), shardings)
    batch = dict.fromkeys(("tokens_BT", "segment_BT", "loss_mask_BT", "reweight_mask_BT"), jnp.int32)
    batch |= dict.fromkeys(("old_logp_BT", "advantages_BT"), jnp.float32)
    batch = {key: jax.ShapeDtypeStruct((4, 256), dtype) for key, dtype in batch.items()}
    batch |= {key: jax.ShapeDtypeStruct((), x.dtype) for key, x in scalars(config.algorithm, 1.0).items()}
    taken = programs.step.whole.lower(state, batch).compile().memory_analysis()
    taken = taken.argument_size_in_bytes + taken.temp_size_in_bytes
    estimate = budget.totals(budget.memory(config, model, "float32", mesh(), 40))["update"]
    assert 0.7 < estimate / taken < 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("dry")
    write_inputs(path)
    return path


def test_the_program_takes_no_device_and_writes_nothing(place):
    """The platform asked for does not exist here, so that whoever looks for a device fails; the mesh is of 64."""
    flags = arguments(place, place / "run", mesh__fsdp=16, mesh__sequence=1, mesh__tensor=4, algorithm__mini_batch=4)
    done = subprocess.run(
        [sys.executable, "-m", "train", "--dry-run", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "tpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "data 1 x fsdp 16 x sequence 1 x tensor 4: 64 devices",
        "generation batches",
        "KV cache, ",
        "algorithm.clip_high",
    ):
        assert text in done.stdout
    assert "Traceback" not in done.stderr
    assert not (place / "run").exists()


def shown(found):
    console = Console(file=io.StringIO(), width=160)
    report(found, console)
    return console.file.getvalue()


def states(found):
    return {check.name: check.ok for check in found.checks}


def test_everything_that_is_missing_is_listed(place, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = arguments(
        place,
        place / "run",
        model__path="Qwen/Qwen3-8B-Base-not-here",
        data__val=place / "none.jsonl",
        mesh__fsdp=3,
        reward__rule="tests.tiny_rules:nothing",
    )
    with pytest.raises(ValueError, match=r"^4 of \d+ checks failed\n") as error:
        dry_run([*flags, "--dry-run"])
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["mesh", "model.path", "data.val", "reward.rule"]
    assert "8 rows do not divide over the 3 shards" in lines[0]
    assert "Qwen/Qwen3-8B-Base-not-here" in lines[1]
    assert "none.jsonl: no such file" in lines[2]
    out = " ".join(capsys.readouterr().out.split())
    assert "steps │ 4" in out, "the recipe is printed whatever is missing"
    assert "generation batches │ 2 to 40" in out, "so are the counters"
    assert "memory: not counted" in out


def test_config_json_and_data_without_weights(place):
    folder = place / "bare"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (place / "model" / name).exists():
            (folder / name).write_bytes((place / "model" / name).read_bytes())
    found = examine(configuration(arguments(place, place / "run", model__path=folder, mesh__fsdp=8)))
    assert [name for name, ok in states(found).items() if ok is False] == ["weights"]
    assert "master weights, float32" in shown(found)
    assert (found.problems, found.eval_problems) == (40, 8)
    # without a tokenizer the rows are still counted, and prompts are as long as they may be
    (folder / "tokenizer.json").unlink()
    found = examine(configuration(arguments(place, place / "run", model__path=folder, mesh__fsdp=8)))
    assert [name for name, ok in states(found).items() if ok is False] == ["weights", "tokenizer"]
    assert [name for name, ok in states(found).items() if ok is None] == [
        "data.train, prompts",
        "data.val, prompts",
        "context",
    ]
    assert (found.problems, found.prompt_length) == (40, 2048)
    assert "KV cache, " in shown(found)


def test_values_prompts_and_context_are_checked(place):
    bad = {"optim__lr": 0, "rollout__n": 0, "algorithm__micro_batches": 0, "mesh__fsdp": 0}
    found = examine(configuration(arguments(place, place / "run", **bad)))
    failed = [check.says.split("=")[0] for check in found.checks if check.ok is False]
    assert failed == ["rollout.n", "algorithm.micro_batches", "optim.lr", "mesh.fsdp"]
    assert states(found)["mesh"] is None
    nothing = {"data__train": "", "reward__timeout_s": "inf", "eval__every": -3}
    found = examine(configuration(arguments(place, "", **nothing)))
    failed = [check.says.split("=")[0] for check in found.checks if check.ok is False]
    assert failed == ["run_dir", "data.train", "reward.timeout_s", "eval.every"], "each is said once"
    assert [name for name in ("run_dir", "data.train", "reward.rule") if states(found)[name] is not None] == []
    assert "values are wrong" in shown(found)
    long = {"rollout__max_response": 250, "reward__overlong_buffer": 0, "mesh__fsdp": 8}
    found = examine(configuration(arguments(place, place / "run", **long)))
    assert [name for name, ok in states(found).items() if ok is False] == ["context"]
    assert "rollout.max_response=250" in found.checks[-2].says
    found = examine(configuration(arguments(place, place / "run", data__max_prompt=4, data__too_long="error")))
    assert states(found)["data.train, prompts"] is False
    assert "counted as 1" in shown(found)
