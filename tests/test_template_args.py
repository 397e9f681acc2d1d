"""Arguments of the chat template reach every prompt of every program, and are part of what a run is."""

import dataclasses
import json
import logging

import pytest

from decode.check.inputs import read_inputs
from decode.config import DecodeConfig, Setting
from decode.diagnose.config import DiagnoseConfig
from decode.diagnose.inputs import read_given
from decode.results.files import require_same_decode, with_whole_paths
from rlvr_jax.data.template_args import check_template_args, parse_template_args
from rlvr_jax.data.text import load_tokenizer
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.program import parse_config
from tests.runs import arguments
from tests.tiny import CHAT_TEMPLATE, tiny_checkpoint, write_tiny_problems
from train import sft
from train.check.dry_run import dry_run
from train.check.prepare import configuration, prepare
from train.config import MAY_CHANGE, Config
from train.run.same_run import require_same_run

THINKING = "{% if enable_thinking is defined and not enable_thinking %}::{% endif %}{% endif %}"
PROMPT = "<|im_start|>user\n0+0<|im_end|>\n<|im_start|>assistant\n"
FLAG = ["enable_thinking=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("template")
    tiny_checkpoint(path / "model", hidden_size=16, num_layers=1)
    (path / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE.removesuffix("{% endif %}") + THINKING)
    for name in ("train", "val"):
        write_tiny_problems(path / f"{name}.jsonl", 4)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["a=false", "b=False", "c=None", "d=null"], {"a": False, "b": False, "c": None, "d": None}),
        (["a=FALSE", "b=TRUE", "c=NULL", "d=none"], {"a": False, "b": True, "c": None, "d": None}),
        (["effort=high", 'effort_2="1"', "n=1", "x=0.5"], {"effort": "high", "effort_2": "1", "n": 1, "x": 0.5}),
        (["list=[1, 2]", "text=a=b", "none="], {"list": [1, 2], "text": "a=b", "none": ""}),
    ],
)
def test_words_of_the_command_line(words, expected):
    assert parse_template_args(words) == expected
    config = parse_config(Config, ["--data.template-args", *words, "--seed", "3"], prog="x", description="")
    assert (config.data.template_args, config.seed) == (expected, 3)
    for kind in (DecodeConfig, DiagnoseConfig, sft.SFTConfig):
        assert parse_config(kind, ["--template-args", *words], prog="x", description="").template_args == expected


def test_a_recipe_gives_a_dict_and_a_flag_replaces_it(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from train.config import Config, DataConfig\n"
        "config = Config(data=DataConfig(train=('a.jsonl', 'b'), template_args={'thinking': False, 'more': [1]}))\n"
    )
    given = configuration(["--config", str(recipe)]).data
    assert (given.template_args, given.train) == ({"thinking": False, "more": [1]}, ("a.jsonl", "b"))
    changed = configuration(["--config", str(recipe), "--data.template-args", "n=1", "--data.train", "c.jsonl"]).data
    assert (changed.template_args, changed.train) == ({"n": 1}, "c.jsonl")


def test_bad_words_and_names(place, capsys, caplog):
    for words in (["enable_thinking"], ["a=1", "a=2"]):
        with pytest.raises(SystemExit) as ended:
            parse_config(Config, ["--data.template-args", *words], prog="x", description="")
        assert ended.value.code == 2
    capsys.readouterr()
    tokenizer = load_tokenizer(place / "model")
    for name, value in (("messages", 1), ("tokenize", 1), ("a b", 1), ("", 1), ("a", {1, 2}), ("a", float("nan"))):
        with pytest.raises(ValueError, match="template_args: "):
            check_template_args(tokenizer, {name: value})
    with caplog.at_level(logging.WARNING):
        check_template_args(tokenizer, {"enable_thinking": False, "tools": []}, key="data.template_args")
    assert caplog.messages == ["data.template_args: the chat template does not read tools, which so changes nothing"]


def test_training_and_evaluation_prompts(place, caplog):
    plain, given = (
        prepare([*arguments(place, place / name, reward__rule="math_verify"), *more])
        for name, more in (("plain", []), ("given", ["--data.template-args", *FLAG]))
    )
    for job in (plain, given):
        job.folder.release()
        assert [job.tokenizer.decode(prompts.tokens[0]) for prompts in (job.train, job.val)] == [
            PROMPT + ("::" if job is given else "")
        ] * 2
    assert given.record["data"]["template_args"] == {"enable_thinking": False}
    assert "does not read" not in caplog.text
    for saved, now in ((plain, given), (given, plain)):
        with pytest.raises(ValueError, match=r"data\.template_args\.enable_thinking"):
            require_same_run(saved.record, now.record, MAY_CHANGE, defaults={})


def test_the_dry_run_tells_a_name_that_no_argument_has(place):
    with pytest.raises(ValueError, match=r"data\.template_args: 'messages' is not the name of an argument"):
        dry_run([*arguments(place, place / "dry", reward__rule="math_verify"), "--data.template-args", "messages=1"])


def test_conversations(place):
    (place / "rows.jsonl").write_text('{"prompt": "0+0", "response": "::0"}\n')
    flags = ["--model", place / "model", "--data", place / "rows.jsonl", "--batch", 8, "--template-args", *FLAG]
    job = sft.prepare([*map(str, flags), "--run-dir", str(place / "sft")])
    job.folder.release()
    ((tokens, context),) = job.conversations
    assert job.tokenizer.decode(tokens[:context]) == PROMPT + "::"
    assert job.record["template_args"] == {"enable_thinking": False}


def test_decoding_and_diagnosis(place, tmp_path):
    config = DecodeConfig(
        rl=str(place / "model"),
        problems=str(place / "val.jsonl"),
        settings=(Setting(name="rl", model="rl"),),
        max_new_tokens=8,
    )
    given = dataclasses.replace(config, template_args={"enable_thinking": False})
    assert [read_inputs(one).texts[0] for one in (config, given)] == [PROMPT, PROMPT + "::"]
    # another value is another run, also beside results of a version that did not know the key
    before = with_whole_paths(config)
    for saved in (before, {key: value for key, value in before.items() if key != "template_args"}):
        write_json(tmp_path / "config.json", saved)
        require_same_decode(tmp_path, with_whole_paths(config), (), {})
        with pytest.raises(ValueError, match="template_args"):
            require_same_decode(tmp_path, with_whole_paths(given), (), {})
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "0+0"}], "response": "0"}) + "\n")
    (one,) = read_given([str(rows)], load_tokenizer(place / "model"), enable_thinking=False)
    assert one.prompt == PROMPT + "::"
