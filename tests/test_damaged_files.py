"""Files that a run can make again: damage is noticed, said once, and costs time, no more."""

import json
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decode.results.files import Row, RowLog, Timing, TokenParts
from decode.results.parts import JsonLines, part_names, read_part, write_part
from rlvr_jax.microscope import files as microscope_files
from rlvr_jax.models import hf
from rlvr_jax.models.hf import load_hf, save_hf
from rlvr_jax.models.qwen import init_params
from rlvr_jax.runs import program
from rlvr_jax.runs.files import atomic_path, remove_leftovers
from tests.tiny import tiny_config
from train.records.metrics import MetricLog
from train.records.trackers import _known
from train.step.groups import Group, Spool, to_plain

FLIPS = 60


def damages(data, *, seed=0):
    """The bytes of a file with one bit flipped, at 60 random places; cut in the middle; empty."""
    rng = random.Random(seed)
    for _ in range(FLIPS):
        bit = rng.randrange(8 * len(data))
        made = bytearray(data)
        made[bit // 8] ^= 1 << bit % 8
        yield bytes(made)
    yield data[: len(data) // 2]
    yield b""


class Text(NamedTuple):
    text: str


# ---- lines ---------------------------------------------------------------------------------------------------------


def test_a_damaged_line_is_moved_aside_and_said_once(tmp_path, caplog):
    path, texts = tmp_path / "seed0.rows.jsonl", [f"é {i / 3} \u2028 \ud800" for i in range(4)]

    def read(**options):
        return JsonLines(path).read(lambda record: Text(**record).text, **options)

    JsonLines(path).append([{"text": text} for text in texts])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    refused = 0
    for made in damages(whole):
        path.write_bytes(made)
        got = read()
        assert set(got) <= set(texts), made
        caplog.clear()
        assert read() == got  # what is left is whole
        assert not caplog.records
        refused += len(got) < len(texts)
    assert refused > FLIPS
    path.write_bytes(b"".join((lines[0], b"{\n", lines[1], lines[2][:-3] + b"1}\n", lines[3])))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not JSON"):
        read(repair=False)
    aside = path.with_name(path.name + ".damaged")
    aside.unlink()
    assert read() == [texts[0], texts[1], texts[3]]
    (said,) = caplog.messages
    assert "2 damaged lines, the first is line 2" in said
    assert aside.read_bytes() == b"{\n" + lines[2][:-3] + b"1}\n"


def test_lines_of_older_versions_have_no_checksum(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": 2}\n')
    assert JsonLines(path).read(lambda record: record) == [{"x": 1}, {"x": 2}]


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_a_damaged_part_counts_as_not_there(tmp_path, caplog):
    table = pa.table({"key": range(50), "values": [[0.5 * i] * (i % 4) for i in range(50)]})
    write_part(tmp_path, "000007", table)
    (path,) = part_names(tmp_path).values()
    data = path.read_bytes()
    for made in damages(data):
        path.write_bytes(made)
        assert read_part(path) is None
        assert not part_names(tmp_path)
    assert f"moved to {path.name}.damaged" in caplog.text
    path.write_bytes(data)
    assert part_names(tmp_path).keys() == {"000007"}
    assert read_part(path).equals(table)


def token_row(seed, problem, sample):
    return {"seed": seed, "problem": problem, "sample": sample, "tokens": [1, 2], "logp": [-0.5, -1.0]}


def test_rows_whose_tokens_are_lost_are_not_whole(tmp_path):
    parts = TokenParts(tmp_path)
    parts.add([token_row(0, 1, 0)])
    assert parts.whole() == {(0, 1, 0)}
    parts.assemble()
    parts.add([token_row(0, 1, 1)])
    parts.add([token_row(0, 2, 0)])
    (first, _) = part_names(parts.parts).values()
    first.write_bytes(first.read_bytes()[:-9])
    assert parts.whole() == {(0, 1, 0), (0, 2, 0)}
    table = bytearray(parts.table_path.read_bytes())
    table[20] ^= 1  # in a page of the first column
    parts.table_path.write_bytes(table)
    assert parts.whole() == {(0, 2, 0)}
    parts.add([token_row(0, 1, 0), token_row(0, 1, 1)])
    parts.assemble()
    assert parts.whole() == {(0, 1, 0), (0, 1, 1), (0, 2, 0)}
    assert pq.read_table(parts.table_path).num_rows == 3
    parts.table_path.unlink()  # nor are those of a file that is gone
    assert parts.whole() == set()


def test_a_damaged_table_of_a_diagnosis_is_named(tmp_path):
    response = microscope_files.Response(0, 0, "rl", "p", "t" * 50, None, None, 1)
    microscope_files.write_responses(tmp_path, [response])
    path = tmp_path / microscope_files.RESPONSES
    data, refused = path.read_bytes(), 0
    for made in damages(data):
        path.write_bytes(made)
        try:
            got = microscope_files.read_responses(tmp_path)
        except ValueError as error:
            refused += "responses.parquet" in str(error)
        else:
            assert got == [response]
    assert refused >= 10


# ---- training ------------------------------------------------------------------------------------------------------


def test_a_damaged_generation_batch_is_generated_again(tmp_path, caplog):
    group = Group(
        *(3, 1, 0, np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), np.float32)),
        *(np.array([6, 2], np.int32), np.array([True, False]), np.array([True, False]), ("a", None)),
    )
    spool = Spool(tmp_path, 2, "run")
    spool.save(0, 1, [group], {"rollout": 1.5})

    def plain(groups):
        values, arrays = to_plain(groups)
        return values, {name: x.tobytes() for name, x in arrays.items()}

    (path,) = tmp_path.iterdir()
    data, lost = path.read_bytes(), 0
    for made in damages(data):
        path.write_bytes(made)
        found = spool.load(0, 1)
        if found is None:
            lost += 1
        else:
            assert plain(found[0]) == plain([group])
            assert found[1] == {"rollout": 1.5}
    assert lost > FLIPS // 2
    assert f"{path}: damaged (" in caplog.text
    spool.save(0, 1, [group], {"rollout": 1.5})
    assert plain(spool.load(0, 1)[0]) == plain([group])


def test_damaged_lines_of_metrics_are_left_out(tmp_path, caplog):
    lines = [json.dumps({"kind": "train", "trainer_steps": i}).encode() + b"\n" for i in range(1, 5)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines)[:-9])  # cut short by a kill
    MetricLog(tmp_path, after_step=4, tensorboard=False).close()
    assert path.read_bytes() == b"".join(lines[:3])
    assert not caplog.records
    path.write_bytes(b"".join((lines[0], b"\xff\n", b"3\n", b"{}\n", lines[1])))
    log = MetricLog(tmp_path, after_step=4, tensorboard=False)
    log.close()
    assert path.read_bytes() == b"".join(lines[:2])
    assert log.last_step("train") == 2
    assert "metrics.jsonl: line 2 is damaged and left out, 3 in all" in caplog.text
    path.write_bytes(lines[0] + lines[1][:-1])  # a line break did not fit on the disk
    MetricLog(tmp_path, after_step=4, tensorboard=False).close()
    assert path.read_bytes() == b"".join(lines[:2])
    path.unlink()
    MetricLog(tmp_path, after_step=4, tensorboard=False).close()
    assert "metrics.jsonl: is gone, and with it the records of the steps up to 4" in caplog.text


def test_a_damaged_list_of_trackers_is_a_new_identity(tmp_path, caplog):
    path = tmp_path / "trackers.json"
    assert _known(path) == {}
    for content in ("", "[1]", '{"wandb": '):
        path.write_text(content)
        caplog.clear()
        assert _known(path) == {}
        assert "the run gets a new identity there" in caplog.text
    path.write_text('{"wandb": "x"}')
    assert _known(path) == {"wandb": "x"}


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setattr(program, "_MIN_COMPILE_S", 0.0)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_compiled_program_cut_short_is_compiled_again(tmp_path, no_cache, caplog, recwarn):
    def start():
        with program.compile_cache("auto", tmp_path):
            return jax.jit(lambda x: jnp.cumsum(jnp.cos(x)) * 3.5)(np.arange(5.0, dtype=np.float32)).tobytes()

    first = start()
    entries = list((tmp_path / "compile_cache").glob("*-cache"))
    whole = {path: path.read_bytes() for path in entries}
    for path, data in whole.items():
        path.write_bytes(data[: len(data) // 2])
    assert start() == first
    assert f"{len(whole)} damaged programs" in caplog.text
    assert {path.name for path in (tmp_path / "compile_cache").glob("*-cache")} == {path.name for path in entries}
    caplog.clear()
    assert start() == first
    assert not caplog.records
    assert not [one for one in recwarn if "compilation cache" in str(one.message)]


# ---- what kills leave ----------------------------------------------------------------------------------------------


def test_an_export_killed_anywhere_is_whole_or_no_model_and_is_made_again(tmp_path, monkeypatch):
    """What a kill leaves at every write, as a copy of the folder at that moment: `KeyboardInterrupt` cleans up, a kill
    does not."""
    config = tiny_config(num_layers=1)
    old, new = (init_params(config, jax.random.key(seed), jnp.float32) for seed in (0, 1))
    save_hf(tmp_path / "run" / "hf", config, old)
    places = []

    class Killed(BaseException):
        pass

    def dying(function, at):
        def die(*args, **options):
            places.append(function.__name__)
            if len(places) == at:
                raise Killed
            return function(*args, **options)

        return die

    def loaded():
        return np.asarray(load_hf(tmp_path / "run" / "hf", dtype=jnp.float32)[1]["embed"])

    for at in range(1, 20):
        places.clear()
        with monkeypatch.context() as patch:
            patch.setattr(hf.shutil, "rmtree", lambda *_, **__: None)  # the clean-up, which a kill has none of
            for name in ("rename", "replace"):
                patch.setattr(hf.os, name, dying(getattr(hf.os, name), at))
            try:
                save_hf(tmp_path / "run" / "hf", config, new, overwrite=True)
            except Killed:
                pass
            else:
                break
        if (tmp_path / "run" / "hf" / "config.json").exists():
            assert any((loaded() == np.asarray(params["embed"])).all() for params in (old, new))
        remove_leftovers(tmp_path / "run", "hf")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["hf"]
        save_hf(tmp_path / "run" / "hf", config, new, overwrite=True)
        assert (loaded() == np.asarray(new["embed"])).all()
        old, new = new, old
    assert at > 2


def test_atomic_path_leaves_nothing_of_a_failed_write(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(TypeError), atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half") + "more"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_row_that_is_damaged_is_missing(tmp_path):
    path = tmp_path / "seed0.rows.jsonl"
    rows = [Row(0, i, f"text {i}", False, None, None, 4, True) for i in range(3)]
    RowLog(path).append(rows, Timing(12, 0.5, True))
    path.write_bytes(path.read_bytes().replace(b"text 1", b"text 7"))
    log = RowLog(path)
    assert list(log.rows.values()) == [rows[0], rows[2]]
    log.append(rows)
    assert sorted(RowLog(path).rows.values(), key=lambda row: row.sample) == rows
