"""`python -m train report`: what is read, what is drawn (the numbers of the lines), what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from rlvr_jax.runs.program import config_dict
from train import config as c
from train.records import figure
from train.records.curves import curve, find_metric, lines, read_run
from train.records.report import ReportConfig, prepare, read, run, summary
from train.step.metrics import BINS

BASE = c.Config(run_dir="x", eval=c.EvalConfig(n=4))


def write_run(folder, values, *, config=BASE, **changes):
    """A run folder whose accuracy after step s is values[s - 1]; evaluated every other step."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_dict(dataclasses.replace(config, **changes))))
    records = []
    for step, value in enumerate(values, start=1):
        shares = {f"{kind}_share_{name}": 1 / 7 for name in BINS for kind in ("gradient", "token")}
        seconds = {f"seconds_{phase}": 1.0 for phase in figure.PHASES}
        numbers = {"accuracy": value, "rollout_gap_mean_abs": 2 - value, "entropy": None if step == 2 else 1 / step}
        records.append({"kind": "train", "trainer_steps": step, "seconds": 9.0, **numbers, **shares, **seconds})
        if step % 2 == 0:
            avg = {"avg@4": value / 2, "avg@4_low": value / 2 - 0.1, "avg@4_high": value / 2 + 0.2, "pass@16": 1.0}
            records.append({"kind": "eval", "trainer_steps": step, "pass@4": 0.5, **avg})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "trainer_st')  # cut short: being written
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one configuration (one ended early) and one run at another alpha."""
    other = c.AlgorithmConfig(reweight=c.ReweightConfig("low_prob", 0.5))
    return [
        write_run(tmp_path / "a", [0.1, 0.2, 0.3, 0.4], seed=0),
        write_run(tmp_path / "b", [0.3, 0.4, 0.5, 0.6], seed=1, steps=9, run_dir="y"),
        write_run(tmp_path / "c", [0.2, 0.6], seed=2),
        write_run(tmp_path / "d", [0.9, 0.8, 0.7], seed=0, algorithm=other),
    ]


def read_all(folders):
    return lines([read_run(folder, folder.name) for folder in folders])


def test_seeds_are_one_line_and_labels_say_what_differs(runs):
    found = read_all(runs)
    assert [[run.name for run in line.runs] for line in found] == [["a", "b", "c"], ["d"]]
    assert [line.label for line in found] == ["alpha 0.2, kind none", "alpha 0.5, kind low_prob"]
    made = curve(found[0], "train/accuracy")
    np.testing.assert_allclose(made.steps, [1, 2, 3, 4])
    np.testing.assert_allclose(made.mean, [0.2, 0.4, 0.4, 0.5])
    np.testing.assert_allclose(made.low, [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(made.high, [0.3, 0.6, 0.5, 0.6])
    assert made.count.tolist() == [3, 3, 2, 2]
    assert curve(found[1], "train/entropy").steps.tolist() == [1, 3]  # null is no number
    assert curve(found[1], "train/nothing") is None


def test_a_seed_that_comes_twice_is_a_line_of_its_own(tmp_path):
    folders = [write_run(tmp_path / name, [0.1], seed=3) for name in ("old", "new")]
    assert [line.label for line in read_all(folders)] == ["old", "new"]


def test_many_differences_are_the_names_of_the_runs(tmp_path):
    optim = c.OptimConfig(lr=1.0, b1=0.1, b2=0.2, eps=0.3)
    folders = [write_run(tmp_path / "one", [0.1]), write_run(tmp_path / "two", [0.1], optim=optim)]
    assert [line.label for line in read_all(folders)] == ["one", "two"]
    folders.append(write_run(tmp_path / "three", [0.1], seed=1))
    assert [line.label for line in read_all(folders)] == ["one and 1 more", "two"]


def drawn(axes):
    """The finite points of each line, and the band's extent by step."""
    found = [np.column_stack(line.get_data()) for line in axes.lines]
    found = [points[np.isfinite(points).all(axis=1)].tolist() for points in found]
    bands = [np.concatenate([path.vertices for path in band.get_paths()]) for band in axes.collections]
    return found, [{x: (v[v[:, 0] == x, 1].min(), v[v[:, 0] == x, 1].max()) for x in set(v[:, 0])} for v in bands]


def test_the_figure_draws_these_numbers(runs):
    made = figure.curves_figure(read_all(runs), ["train/accuracy", "eval/avg@4", "train/entropy", "train/seconds"])
    accuracy, evaluation = made.axes[:2]
    assert accuracy.get_title() == "accuracy"
    assert evaluation.get_title() == "avg@4 (evaluation)"
    points, bands = drawn(accuracy)
    np.testing.assert_allclose(points[0], [[1, 0.2], [2, 0.4]])  # all seeds
    np.testing.assert_allclose(points[1], [[2, 0.4], [3, 0.4], [4, 0.5]])  # two of three go on, thin
    np.testing.assert_allclose(points[2], [[1, 0.9], [2, 0.8], [3, 0.7]])
    assert accuracy.lines[1].get_linewidth() < accuracy.lines[0].get_linewidth()
    assert accuracy.lines[0].get_color() == accuracy.lines[1].get_color() != accuracy.lines[2].get_color()
    assert len(bands) == 1
    assert bands[0] == {1: pytest.approx((0.1, 0.3)), 2: pytest.approx((0.2, 0.6))}
    points, bands = drawn(evaluation)
    np.testing.assert_allclose(points[0], [[2, 0.2]])
    np.testing.assert_allclose(points[2], [[2, 0.4]])
    assert bands[0] == {2: pytest.approx((0.1, 0.3))}  # least and greatest of the seeds
    assert bands[1] == {2: pytest.approx((0.3, 0.6))}  # one run: its interval over problems
    legend = made.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "alpha 0.2, kind none (3 seeds)",
        "alpha 0.5, kind low_prob",
    ]
    assert legend.get_title().get_text() == f"{figure.BAND}; {figure.INTERVAL}"


def test_bars_of_gradient_and_time(runs):
    found = read_all(runs)
    bars = figure.gradient_figure(found).axes[0].containers
    assert [bar.get_label() for bar in bars] == ["tokens", *(line.label for line in found)]
    np.testing.assert_allclose([patch.get_height() for patch in bars[1]], 100 / 7)
    phases = figure.time_figure(found).axes[0].containers
    assert [bar.get_label() for bar in phases] == list(figure.PHASES)
    assert [patch.get_x() for patch in phases[3]] == [3, 3]
    none = dataclasses.replace(found[0], runs=(dataclasses.replace(found[0].runs[0], curves={}),))
    assert figure.gradient_figure([none]) is None
    assert figure.time_figure([none]) is None


def test_one_run_gives_files_and_a_table(runs, capsys):
    report = prepare([str(runs[0])])
    assert report.out == runs[0] / "report"
    assert report.metrics == [
        *("eval/avg@4", "eval/pass@4", "eval/pass@16", "train/accuracy", "train/entropy"),
        *("train/rollout_gap_mean_abs", "train/seconds"),
    ]
    run(report)
    for name in ("curves.png", "gradient.png", "time.png"):
        content = (report.out / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 5000
    out = capsys.readouterr().out
    assert "rollout_gap_mean_abs" in out
    assert str(report.out / "curves.png") in out
    written = json.loads((report.out / "report.json").read_text())
    assert written["lines"] == [{"label": "a", "runs": ["a"]}]
    assert [row["metric"] for row in written["metrics"]] == report.metrics


def test_last_and_best_values(runs):
    line = read_all(runs)[0]
    accuracy = summary(line, "train/accuracy")
    assert accuracy["first"] == {"value": pytest.approx(0.2), "step": 1}
    assert accuracy["last"] == pytest.approx({"value": 0.4, "step": 2, "low": 0.2, "high": 0.6})  # all seeds have it
    assert accuracy["best"]["step"] == 2
    single = read_all(runs[3:])[0]
    assert summary(single, "train/accuracy")["best"] == {"value": 0.9, "step": 1}
    assert summary(single, "train/rollout_gap_mean_abs")["best"]["step"] == 1  # less is better
    entropy = summary(single, "train/entropy")
    assert "best" not in entropy
    assert (entropy["greatest"]["step"], entropy["least"]["step"]) == (1, 3)


def test_what_is_not_there_is_named(runs, tmp_path):
    def refused(match, *folders, **options):
        with pytest.raises(ValueError, match=match):
            read(ReportConfig(runs=tuple(map(str, folders)), **options))

    refused(r"^runs=\(\): expected one or more")
    refused(r"nowhere: no such run folder$", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(r"empty: no config\.json, so this is not the folder of a training run", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused(r"empty: no metrics\.jsonl", tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    refused(r"metrics\.jsonl: no record yet", tmp_path / "empty")
    refused(r"the run .*a is given twice", runs[0], runs[0] / ".." / "a")
    refused(r"^--metrics acuracy: no such metric in these runs; near it: accuracy", runs[0], metrics=("acuracy",))
    assert find_metric("avg@4", ["train/x", "eval/avg@4"]) == "eval/avg@4"
    assert find_metric("seconds", ["eval/seconds", "train/seconds"]) == "train/seconds"
    assert find_metric("eval/seconds", ["eval/seconds", "train/seconds"]) == "eval/seconds"


def test_chosen_metrics_and_folder(runs, tmp_path):
    report = prepare([*map(str, runs), "--metrics", "entropy", "avg@4", "entropy", "--out", str(tmp_path / "out")])
    assert report.metrics == ["train/entropy", "eval/avg@4"]
    assert report.out == tmp_path / "out"
    assert prepare([str(folder) for folder in runs]).out.as_posix() == "runs/report"
