"""`python -m train` refuses bad input in one sentence, before any work."""

import dataclasses
import os
import subprocess
import sys

import pytest

from tests.runs import ROOT, arguments, write_inputs
from train import config as c
from train.prepare import check_values, prepare


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path)
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model__path": "nowhere/at/all"}, "nowhere/at/all"),
        ({"data__train": "nowhere.parquet"}, r"nowhere\.parquet: no such file"),
        ({"data__val": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
        ({"rollout__n": 0}, r"rollout\.n=0: expected 1 to 1,000,000"),
        ({"rollout__n": 1}, r"rollout\.n=1 with algorithm\.dynamic_sampling"),
        ({"algorithm__mini_batch": 3}, r"algorithm\.mini_batch=3 does not divide algorithm\.train_batch=4"),
        ({"algorithm__micro_batches": 3}, r"algorithm\.micro_batches=3 does not divide the 8 rows"),
        ({"algorithm__micro_batches": 2}, r"= 4 rows do not divide over the 8 shards"),
        (
            {"algorithm__reweight__kind": "low_probability"},
            r"algorithm\.reweight\.kind='low_probability': expected one of",
        ),
        ({"algorithm__loss_mask__kind": "low"}, r"algorithm\.loss_mask\.kind='low': expected one of"),
        ({"algorithm__aggregation": "mean"}, r"algorithm\.aggregation='mean': expected one of"),
        ({"data__max_prompt": 4, "data__too_long": "error"}, "max_tokens = 4"),
        ({"rollout__max_response": 250}, r"rollout\.max_response=250 is \d+ tokens: expected at most .*256"),
        ({"reward__overlong_buffer": 17}, r"reward\.overlong_buffer=17: expected 0 to rollout\.max_response=16"),
        ({"reward__rule": "guess"}, r"reward\.rule='guess'"),
        ({"reward__rule": "tests.tiny_rules:nothing"}, "tests.tiny_rules:nothing"),
        (
            {"reward__rule": "tests.tiny_rules:alone"},
            r"tests\.tiny_rules:alone takes \(response.*expected \(response, answer\)",
        ),
        ({"rollout__temperature": 0}, r"rollout\.temperature=0"),
        ({"rollout__top_p": 0}, r"rollout\.top_p=0"),
        ({"optim__lr": "nan"}, r"optim\.lr=nan"),
        ({"steps": 0}, "steps=0: expected 1 to"),
        ({"mesh__tensor": 3}, "mesh"),
    ],
)
def test_bad_input_is_refused_before_any_work(place, changes, match):
    with pytest.raises((ValueError, OSError), match=match):
        prepare(arguments(place, place / "refused", **changes))
    assert not (place / "refused").exists()


def test_a_folder_without_weights(place):
    (place / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        prepare(arguments(place, place / "refused", model__path=place / "empty"))


def test_empty_problem_file(place):
    (place / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no rows"):
        prepare(arguments(place, place / "refused", data__train=place / "empty.jsonl"))


def test_usage_errors_from_the_command_line(place):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for extra, expected in ((["--optim.lrr", "1"], "lrr"), (["--rollout.n", "0"], "error: rollout.n=0")):
        done = subprocess.run(
            [sys.executable, "-m", "train", *arguments(place, place / "refused"), *extra],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        assert expected in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


ALGORITHM, REWEIGHT = c.AlgorithmConfig(), c.ReweightConfig(alpha=float("nan"))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("algorithm.clip_dual=0.5", {"algorithm": dataclasses.replace(ALGORITHM, clip_dual=0.5)}),
        ("algorithm.clip_low=-0.3", {"algorithm": dataclasses.replace(ALGORITHM, clip_low=-0.3)}),
        ("algorithm.clip_low=1.5", {"algorithm": dataclasses.replace(ALGORITHM, clip_low=1.5)}),
        ("algorithm.reweight.alpha=nan", {"algorithm": dataclasses.replace(ALGORITHM, reweight=REWEIGHT)}),
        ("rollout.top_k=-1", {"rollout": c.RolloutConfig(top_k=-1)}),
        ("eval.seed=-1", {"eval": c.EvalConfig(seed=-1)}),
    ],
)
def test_values_out_of_bounds_are_refused(key, changes):
    good = c.Config(model=c.ModelConfig(path="x"), data=c.DataConfig(train="x"))
    check_values(good)
    with pytest.raises(ValueError, match=f"^{key}: expected") as error:
        check_values(dataclasses.replace(good, **changes))
    assert key in str(error.value)


def test_recipe_file_and_flags(place):
    recipe = place / "recipe.py"
    recipe.write_text(
        "from train.config import Config, ModelConfig, OptimConfig\n"
        f"config = Config(steps=7, model=ModelConfig(path={str(place / 'model')!r}), optim=OptimConfig(lr=0.5))\n"
    )
    flags = arguments(place, place / "refused")
    flags = flags[: flags.index("--optim.lr")] + flags[flags.index("--optim.lr") + 2 :]
    job = prepare(["--config", str(recipe), *flags])
    assert (job.config.optim.lr, job.config.steps) == (0.5, 4)
    recipe.write_text("from train.config import Config\nconfig = Config(stepz=7)\n")
    with pytest.raises(ValueError, match=r"recipe\.py: .*stepz"):
        prepare(["--config", str(recipe)])


def test_published_recipes_parse():
    from rlvr_jax.program import read_config
    from train.config import Config
    from train.prepare import check_values
    from train.sft import SFTConfig

    for name, alpha, response in (("qwen2_5_math_7b", 0.2, 8192), ("qwen3_8b_base", 0.1, 20480)):
        path = ROOT / "configs" / f"{name}.py"
        config = read_config(Config, path)
        check_values(config)
        assert f"python -m train --config configs/{name}.py" in path.read_text()[:400]
        algorithm = config.algorithm
        assert (algorithm.reweight.kind, algorithm.reweight.alpha) == ("low_prob", alpha)
        assert (config.rollout.max_response, config.data.max_prompt, config.rollout.n) == (response, 2048, 16)
        assert (algorithm.train_batch, algorithm.mini_batch, config.rollout.generation_batch) == (512, 32, 1536)
        assert (algorithm.clip_low, algorithm.clip_high, algorithm.clip_dual) == (0.2, 0.28, 10.0)
        assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup) == (1e-6, 0.1, 10)
        assert (config.reward.overlong_buffer, config.eval.every, config.checkpoint.every) == (4096, 5, 10)
        assert (config.eval.temperature, config.eval.top_p) == (1.0, 0.7)
    assert read_config(SFTConfig, ROOT / "configs" / "sft.py").data
