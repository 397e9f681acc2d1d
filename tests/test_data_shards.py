"""Several files, folders of shards, patterns, URLs and names on the hub as one source; columns by name."""

import json

import pytest

from rlvr_jax.data.problems import read_problems, write_problems
from rlvr_jax.data.sft import read_conversations
from rlvr_jax.data.shards import data_files, names
from rlvr_jax.data.sources import check_source
from tests.test_data_problems import published, write_jsonl


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "data"
    write_problems(folder / "train-01.parquet", [published(2, "c", "3")])
    write_problems(folder / "train-00.parquet", [published(0, "a", "1"), published(1, "b", "2")])
    write_problems(folder / "train-02.jsonl", [published(3, "d", "4")])
    (folder / "dataset_info.json").write_text("{}")
    (folder / ".hidden.jsonl").write_text("?")
    (folder / "README.md").write_text("?")
    return folder


def answers(source, **options):
    return [problem.answer for problem in read_problems(source, **options)]


def test_folders_patterns_and_lists(shards):
    assert answers(shards) == ["1", "2", "3", "4"]
    assert answers(f"{shards}/train-*.parquet") == ["1", "2", "3"]
    assert answers([f"{shards}/train-02.jsonl", f"{shards}/train-0[01].parquet"]) == ["4", "1", "2", "3"]
    assert [p.index for p in read_problems(shards)] == [0, 1, 2, 3]
    assert answers(f"file://{shards}") == answers(f"file://{shards}/train-*") == ["1", "2", "3", "4"]
    odd = shards / "a[1]*.jsonl"
    write_problems(odd, [published(0)])  # what exists is meant as it stands
    assert data_files(odd) == [odd]
    assert names([str(odd), "b"]) == f"{odd}, b"
    check_source(str(shards), rule="math_verify")


def test_the_same_index_in_two_files_is_two_problems(tmp_path):
    for name, text in (("aime24", "a"), ("aime25", "b")):
        write_jsonl(tmp_path / f"{name}.jsonl", {"problem": text, "answer": "1", "id": 0})
    assert [p.id for p in read_problems(tmp_path)] == ["aime24/0", "aime25/0"]


def test_a_row_is_named_by_its_own_file(shards):
    write_jsonl(shards / "train-03.jsonl", {"problem": "x", "answer": "1"}, {"problem": "x"})
    with pytest.raises(ValueError, match=r"train-03\.jsonl row 1: no 'reward_model.ground_truth'"):
        read_problems(shards)


def test_conversations_of_several_files(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"prompt": name, "response": "y"})
    assert [chat[0]["content"] for chat in read_conversations(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl: no such file"),
        ("OWNER/name", "a data set on the hub is hf://datasets/OWNER/NAME/FILE"),
        ("empty", "empty: no .parquet or .jsonl file there"),
        ("nothing-*.jsonl", "no .parquet or .jsonl file there"),
        ("hf://models/a/b", "expected hf://datasets/OWNER/NAME"),
    ],
)
def test_a_source_without_files_is_named(tmp_path, monkeypatch, source, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=part):
        data_files(source)
    with pytest.raises(ValueError, match="no data file"):
        data_files([])


@pytest.fixture
def hub(monkeypatch, shards):
    """A hub that has one data set, whose files are those of `shards` under data/."""
    asked = []

    def listed(repository, *, repo_type, revision):
        asked.append(("list", repository, repo_type, revision))
        return [".gitattributes", "README.md", *sorted(f"data/{p.name}" for p in shards.iterdir()), "test.json"]

    def downloaded(repository, name, *, repo_type, revision):
        asked.append((name, repository, repo_type, revision))
        path = shards.parent / name
        if not path.is_file():
            raise FileNotFoundError("no such entry\nin the hub")
        return str(path)

    monkeypatch.setattr("huggingface_hub.list_repo_files", listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", downloaded)
    return asked


def test_names_on_the_hub(hub):
    assert answers("hf://datasets/o/n/data/train-00.parquet") == ["1", "2"]
    assert hub == [("data/train-00.parquet", "o/n", "dataset", None)]  # no listing: the cache is enough
    assert answers("hf://datasets/o/n@v1/data") == ["1", "2", "3", "4"]
    assert answers("hf://datasets/o/n@v1/data/*.parquet") == ["1", "2", "3"]
    assert {revision for *_, revision in hub[1:]} == {"v1"}
    with pytest.raises(ValueError, match=r"o/n: no \.parquet or \.jsonl file there; it has .*data/dataset_info\.json"):
        read_problems("hf://datasets/o/n")
    with pytest.raises(ValueError, match=r"none\.jsonl: not obtained from the hub \(.*no such entry in the hub"):
        read_problems("hf://datasets/o/n/none.jsonl")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Name or service not known")  # the clients' errors have no common kind

    monkeypatch.setattr("huggingface_hub.list_repo_files", fails)
    with pytest.raises(ValueError, match=r"datasets/o/n/data: not obtained from the hub \(.*Name or service not known"):
        data_files("hf://datasets/o/n/data")


def test_columns_by_name(tmp_path):
    row = {"Instruction": "a?", "answer": "wrong", "meta": {"gold": 3.0, "x.y": "5"}, "problem": "other"}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    (problem,) = read_problems(path, prompt_column="Instruction", answer_column="meta.gold")
    assert (problem.messages[0]["content"], problem.answer) == ("a?", "3")
    write_problems(tmp_path / "a.parquet", [{**published(1), "gold.value": "7"}])
    assert answers(tmp_path / "a.parquet", answer_column="gold.value") == ["7"]
    for options, part in (
        ({"prompt_column": "instruction!"}, "no 'instruction!'"),
        ({"answer_column": "meta.silver"}, "no 'meta.silver'"),
        ({"answer_column": "meta"}, "'meta' = {.*expected a text"),
        ({"prompt_column": "meta"}, "'meta' = {.*expected a list"),
    ):
        with pytest.raises(ValueError, match=rf"a\.jsonl row 0: {part}"):
            read_problems(path, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a?"}], "ground_truth": "7"},  # open-instruct
        {"prompt": [{"role": "user", "content": "a?"}], "reward_model": {"ground_truth": 7.0}},  # verl
        {"prompt": "a?", "solution": "so \\boxed{7}"},  # TRL
        {"question": "a?", "ground_truth": 7},
        {"problem": "a?", "answer": "7", "ground_truth": "8"},
    ],
)
def test_columns_as_the_peers_name_them(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (problem,) = read_problems(tmp_path / "a.json")
    assert (problem.messages, problem.answer) == (({"role": "user", "content": "a?"},), "7")
