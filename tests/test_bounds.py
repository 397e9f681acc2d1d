"""Every field of every configuration declares its bounds, and every program refuses what is outside of them."""

import copy
import dataclasses
import functools
import math
import runpy
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from decode import run as decoding
from decode.check import compiled
from decode.config import DecodeConfig, Setting
from decode.diagnose import run as diagnose
from decode.diagnose.config import DiagnoseConfig, PageCommand
from decode.results import compare
from decode.results.compare import CompareConfig
from demo import __main__ as demo
from rlvr_jax.runs.bounds import Range, Several, Text, faults, mark_of, parts, require, union_arms
from train import config as c
from train import sft
from train.check import plan, prepare
from train.records import report
from train.records.report import ReportConfig
from train.sft import SFTConfig

ROOT = Path(__file__).parent.parent
GOOD = {
    "train": c.Config(model=c.ModelConfig(path="m"), data=c.DataConfig(train="t")),
    "sft": SFTConfig(model="m", data="d"),
    "decode": DecodeConfig(rl="r", problems="p"),
    "diagnose": DiagnoseConfig(base="b", rl="r", problems="p"),
    "page": PageCommand("run"),
    "compare": CompareConfig(("run",)),
    "report": ReportConfig(("run",)),
    "demo": demo.Demo(),
}


def leaves(config: Any, path: tuple[str, ...] = ()):
    """(path, declared type) of every value of a configuration and of those nested in it."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name), hints[field.name]


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """As `dataclasses.replace`, of a nested value, past the types that the tests check of the library's classes."""
    name, *rest = path
    config = copy.copy(config)
    object.__setattr__(config, name, changed(getattr(config, name), rest, value) if rest else value)
    return config


def sample(declared: Any) -> Any:
    kind, _ = parts(declared)
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)[0]
    return {int: 1, float: 0.5, str: "x"}[kind] if kind in (int, float, str) else kind()


def nonsense(declared: Any):
    """Values that mean nothing in most fields, each with whether this field says that it means something."""
    for arm in union_arms(declared):
        kind, marks = parts(arm)
        mark, plain = mark_of(kind, marks), typing.get_origin(kind) or kind
        if isinstance(mark, Range):
            yield from ((value, False) for value in (-(2**40), 2**40, math.nan, math.inf, -math.inf, 1e30, True, "1"))
            yield from ((kind(value), mark.allows(value)) for value in (-1, 0))  # which fields do is listed below
        elif isinstance(mark, Text):
            yield from (("", mark.empty), ("a\0b", False), (7, False))
        elif isinstance(mark, Several):
            element = typing.get_args(kind)[0]
            yield from (((), mark.least == 0), ((sample(element),) * 2, mark.repeats), ([sample(element)], False))
            if not dataclasses.is_dataclass(parts(element)[0]):
                yield from (((value,), meant) for value, meant in nonsense(element))
        elif plain is Literal:
            yield from (("nonsense", False), ("", False))
        else:
            assert plain in (bool, dict, type(None)), f"{declared} has no bounds"
            yield from ((value, False) for value in ((7, math.nan) if plain is not type(None) else ()))


FIELDS = [(name, path, declared) for name, config in GOOD.items() for path, declared in leaves(config)]


@pytest.mark.parametrize("name", GOOD)
def test_every_field_refuses_nonsense_by_its_flag(name):
    assert list(faults(GOOD[name])) == []
    for program, path, declared in FIELDS:
        if program != name:
            continue
        part = functools.reduce(getattr, path[:-1], GOOD[name])  # alone, since the whole takes ten times as long
        for value, meant in nonsense(declared):
            found = list(faults(changed(part, path[-1:], value)))
            assert [fault.key for fault in found] == ([] if meant else [path[-1]]), (path, value, found)
            assert meant or ": expected " in found[0].sentence
        key = ".".join(path[1:] if path[0] == "setting" else path)  # its flags have no prefix
        (fault,) = faults(changed(GOOD[name], path, object()))
        assert fault.key == key
        assert fault.sentence.startswith(f"{key}=<object")


def accepting(value: Any) -> set[str]:
    return {
        ".".join(path) for _, path, declared in FIELDS for one, meant in nonsense(declared) if meant and one == value
    }


def test_the_fields_in_which_odd_values_mean_something():
    """-1, 0, an empty text and an empty or repeated tuple. Nobody adds a field to these lists by accident."""
    mesh = {f"mesh.{axis}" for axis in ("data", "fsdp", "sequence", "tensor")}
    assert accepting(-1) == mesh | {"algorithm.reweight.alpha", "setting.tau", "setting.gamma"}
    assert accepting((-1.0,)) == {"grid.gammas"}
    assert accepting((0,)) == {"controls.temperatures", "grid.gammas", "page.problems", "seeds", "stop_token_ids"}
    assert accepting(0) == {
        *("algorithm.clip_high", "algorithm.clip_low", "algorithm.kl_coef", "algorithm.reweight.alpha"),
        *("algorithm.loss_mask.quantile", "algorithm.reweight.mask.quantile", "rollout.top_k", "eval.temperature"),
        *("optim.b1", "optim.b2", "optim.warmup", "optim.weight_decay", "distributed.process", "seed", "eval.seed"),
        *("reward.overlong_buffer", "reward.overlong_factor", "eval.every", "log.microscope_every", "log.rollouts"),
        *("checkpoint.every", "checkpoint.export_every"),
        *("setting.tau", "setting.gamma", "setting.temperature", "setting.top_k"),
        *("findings.extremes", "findings.seed", "fillers", "temperature"),  # the last two of the demo
    }
    columns = {"prompt_column", "answer_column", "prompt_suffix"}
    assert accepting("") == columns | {f"data.{name}" for name in columns} | {
        *("model", "init_config", "tokenizer"),  # of train.sft: one of the first two
        "problems",  # of a diagnosis of given responses
        "setting.name",
    }
    assert accepting(("x", "x")) == {"metrics", "responses"}
    assert accepting(()) == {
        *("eval.pass_k", "log.trackers", "metrics", "stop_token_ids", "responses", "page.problems", "settings"),
        *("match_rate", "grid.criteria", "grid.taus", "controls.skip", "controls.temperatures", "setting.control_of"),
    }


@pytest.mark.parametrize(
    ("program", "values"),
    [
        ("train", {"rollout.top_p": (1e-6, 1, 1.0), "rollout.top_k": (0, 50), "eval.temperature": (0, 0.001, 100)}),
        ("train", {"optim.b1": (0.0, 0.999), "optim.weight_decay": (0.0,), "optim.lr": (1e-12, 10.0)}),
        ("train", {"optim.warmup": (0,), "optim.clip_norm": (1e-9, 1e12), "seed": (0, 2**31 - 1)}),
        ("train", {"algorithm.clip_low": (0.0, 3e-4), "algorithm.clip_high": (0.0, 4.0, 10_000.0)}),
        ("train", {"algorithm.clip_dual": (None, 1.0001, 10), "algorithm.loss_mask.quantile": (0, 1)}),
        ("train", {"algorithm.row_length": (None, 1, 2**24), "algorithm.micro_batches": (1, 16)}),
        ("train", {"reward.workers": (1, 1024), "reward.timeout_s": (0.01, 86_400.0), "reward.memory_mb": (None, 1)}),
        ("train", {"reward.overlong_buffer": (0, 8192), "reward.rule": ("reasoning_gym", "my_rewards:marks.strict")}),
        ("train", {"checkpoint.every": (0, 10**9), "checkpoint.keep": (None, 1), "eval.pass_k": ((1,), (4, 1))}),
        ("train", {"data.train": (("a", "b"), "a b"), "data.val": (None, "v"), "log.rollouts": (None, 0)}),
        ("train", {"distributed.coordinator": ("host:1", "[::1]:65535"), "distributed.process": (0, None)}),
        ("train", {"run_dir": ("gs://bucket/run", ".", "Läufe/1"), "data.prompt_suffix": ("\n",)}),
        ("sft", {"batch": (1, 10**6), "log_every": (1,), "optim.eps": (1e-30, 1.0), "compile_cache": (None, "x")}),
        ("decode", {"setting.temperature": (0, 0.0, 1.5), "setting.top_p": (1,), "memory": (None, 0.001, 4096)}),
        ("decode", {"seeds": ((0,), (2**31 - 1, 3)), "setting.top_logprobs": (1, 50), "block": (1, 4096)}),
        ("diagnose", {"findings.rate": (1e-9, 0.5), "findings.extremes": (0,), "limit": (1, None), "top": (1,)}),
        ("demo", {"fillers": (0, 26), "problems": (1,)}),
    ],
)
def test_right_values_at_the_edges_stay(program, values):
    for key, accepted in values.items():
        for value in accepted:
            assert list(faults(changed(GOOD[program], tuple(key.split(".")), value))) == [], (key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.temperature", 0.0009),
        ("algorithm.clip_low", 1.0),  # no lower bound, for loss cispo alone
        ("algorithm.clip_low", 1.0001),
        ("algorithm.clip_dual", 1.0),
        ("data.max_prompt", 2**24 + 1),
        ("optim.b1", 1.0),
        ("optim.lr", 10.01),
        ("seed", 2**31),
        ("reward.timeout_s", 86_401.0),
    ],
)
def test_wrong_values_at_the_edges_are_refused(key, value):
    (fault,) = prepare.value_faults(changed(GOOD["train"], tuple(key.split(".")), value))
    assert fault.sentence.startswith(f"{key}={value}: expected ")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_is_inside_its_bounds(path):
    assert list(faults(runpy.run_path(str(path))["config"])) == []


TRAIN, DECODE = ["--model.path", "m", "--data.train", "t"], ["--rl", "r", "--problems", "p"]


@pytest.mark.parametrize(
    ("read", "argv", "sentence"),
    [
        (prepare.prepare, [*TRAIN, "--eval.every", "-1"], "eval.every=-1: expected 0 to 1,000,000,000"),
        (prepare.prepare, [*TRAIN, "--run-dir", ""], "run_dir='': expected a path"),
        (plan.read, ["--plan", "v5p:2x2x1", *TRAIN, "--reward.workers", "100000"], "reward.workers=100000: expected 1"),
        (sft.prepare, ["--data", "d", "--model", "m", "--optim.lr", "inf"], "optim.lr=inf: expected above 0, at most"),
        (
            decoding.prepare,
            [*DECODE, "--temperature", "nan"],
            "temperature=nan: expected 0.001 to 100 or 0 (0: greedy)",
        ),
        (compiled.read, ["--plan", "v5p:2x2x1", *DECODE, "--n", "-1"], "n=-1: expected 1 to 1,000,000"),
        (diagnose.prepare, ["--base", "b", "--rl", "r", "--memory", "0"], "memory=0.0: expected above 0, at most 4096"),
        (diagnose.prepare, ["page", "x", "--findings.tail", "1"], "findings.tail=1.0: expected above 0 and below 1"),
        (compare.prepare, ["run", "run"], "runs=('run', 'run'): expected one or more, all different"),
        (report.prepare, ["run", "--out", " "], "out=' ': expected a path"),
        (demo.prepare, ["--fillers", "27"], "fillers=27: expected 0 to 26"),
    ],
)
def test_every_program_checks_them_before_it_opens_a_file(read, argv, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the sentence is compared
        read(argv)
    assert str(error.value).startswith(sentence)


def test_all_that_is_wrong_is_listed_and_nothing_twice():
    config = c.Config(
        rollout=c.RolloutConfig(n=0, max_response=16),
        algorithm=c.AlgorithmConfig(train_batch=10, mini_batch=4, clip_low=1.0),
        mesh=c.MeshConfig(data=-1),
    )
    assert [fault.key for fault in prepare.value_faults(config)] == [
        *("model.path", "data.train", "rollout.n"),  # then what needs two values, if both are in their bounds
        *("mesh.fsdp", "algorithm.mini_batch", "algorithm.clip_low", "reward.overlong_buffer"),
    ]


def test_the_sentence_says_what_a_union_takes_and_which_element_is_wrong():
    wrong = dataclasses.replace(GOOD["decode"], seeds=(0, -1), limit=2.5, settings=(Setting(), Setting(tau="x")))
    assert [fault.sentence for fault in faults(wrong)] == [
        "settings.1.tau='x': expected a number or None",
        "seeds has -1: expected 0 to 2,147,483,647",
        "limit=2.5: expected an integer or None",
    ]


def test_a_field_without_bounds_is_a_mistake():
    @dataclasses.dataclass(frozen=True)
    class Config:
        n: int = 4

    @dataclasses.dataclass(frozen=True)
    class Wrong:
        n: Annotated[int, Text("a text")] = 4

    for config in (Config(), Wrong()):
        with pytest.raises(TypeError, match="expected one Range"):
            require(config)


@pytest.mark.parametrize("key", ["loss", "aggregation", "reweight.kind", "loss_mask.kind"])
def test_a_choice_is_an_entry_of_its_table_or_the_user_s_own(key):
    head, _, rest = key.partition(".")

    def faults_of(name):
        part = dataclasses.replace(getattr(c.AlgorithmConfig(), head), **{rest: name}) if rest else name
        return [fault.key for fault in faults(dataclasses.replace(c.AlgorithmConfig(), **{head: part}))]

    assert faults_of("my_module.part:name.inside") == []
    for wrong in ("no_such_name", "module:", ":name", "module:na me", "a:b:c"):
        assert faults_of(wrong) == [key]
