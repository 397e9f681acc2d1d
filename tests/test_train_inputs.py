"""`python -m train` refuses bad input in one sentence, before any work."""

import json
import runpy
import sys

import pytest

from tests.runs import arguments, write_inputs
from train.check.prepare import prepare
from train.config import MAY_CHANGE
from train.run.same_run import require_same_run


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


@pytest.mark.parametrize(
    ("extra", "said"), [(["--optim.lrr", "1"], "lrr"), (["--rollout.n", "0"], "error: rollout.n=0: expected 1 to ")]
)
def test_usage_errors_from_the_command_line(place, monkeypatch, capsys, extra, said):
    monkeypatch.setattr(sys, "argv", ["train", *arguments(place, place / "refused"), *extra])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("train", run_name="__main__")
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert said in written.out + written.err


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


def test_columns_and_several_files_of_a_run(place):
    for name in ("a", "b"):
        (place / f"{name}.jsonl").write_text(json.dumps({"q": {"text": "0+0"}, "gold": name, "answer": "x"}) + "\n")
    columns = ["--data.prompt-column", "q.text", "--data.answer-column", "gold"]
    jobs = []
    for names in ("ba", "ab"):
        flags = arguments(place, place / names, reward__rule="math_verify", data__val=place / "a.jsonl") + columns
        jobs.append(prepare([*flags, "--data.train", *(str(place / f"{name}.jsonl") for name in names)]))
    for job, answers in zip(jobs, ("ba", "ab"), strict=True):
        job.folder.release()
        assert "".join(problem.answer for problem in job.train.problems) == answers
        assert [problem.answer for problem in job.val.problems] == ["a"]
    with pytest.raises(ValueError, match=r"data\.train: the content is not what"):  # order matters
        require_same_run(jobs[0].record, jobs[1].record, MAY_CHANGE, defaults={})
