"""`python -m decode diagnose --base X --rl Y (--responses FILE ... | --problems FILE) --out RUN`: the update, by token.

Given responses, or ones decoded from either model, are scored by both, teacher-forced; every token's numbers go to disk
as they come, and the same command resumes where a killed run stopped. At the end: `responses.parquet`,
`tokens.parquet`, `findings.json`, `figures/*.png` and `.svg`, and `page.html`, which opens from disk.

`python -m decode diagnose page RUN` makes findings, figures and page anew from the files of a run.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from decode import run as decoding
from decode.check.inputs import check_vocabularies, model_folder, of_pair
from decode.config import DecodeConfig, Setting
from decode.diagnose.config import FREE_TO_CHANGE, DiagnoseConfig, PageCommand, check
from decode.diagnose.inputs import Given, check_given, fingerprint, read_given
from decode.diagnose.page import draw_results
from decode.draw import load
from decode.results.files import RowLog, require_same_decode, with_whole_paths
from decode.results.parts import part_names, read_part, write_part
from decode.results.progress import DecodeProgress
from rlvr_jax.data.template_args import check_template_args
from rlvr_jax.data.text import Tokenizer, decode_ids, load_tokenizer, token_pieces
from rlvr_jax.microscope import files
from rlvr_jax.microscope.columns import ScoredResponse
from rlvr_jax.microscope.files import Response
from rlvr_jax.microscope.pair import iterate_pair
from rlvr_jax.models.config import QwenConfig, platform_dtype
from rlvr_jax.runs.bounds import require
from rlvr_jax.runs.distributed import refuse_several
from rlvr_jax.runs.files import remove_leftovers, write_json
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.program import Preempted, Preemption, RunError, compile_cache, parse_config, writing_to
from rlvr_jax.runs.remote import TEXT_FILES, local
from rlvr_jax.sharding.decode_layout import decode_mesh

DESCRIPTION = "Every token of given or decoded responses under two models; findings, figures and a page."
STRETCH = 1 << 18  # tokens of responses that are scored longest first; their numbers are put in order in memory


@dataclasses.dataclass(frozen=True)
class Job:
    """A diagnosis whose input has been checked. `given` are its responses, or `decode` is the run that draws them."""

    config: DiagnoseConfig
    folders: dict[str, Path]
    vocab_size: int
    mesh: Mesh | None
    tokenizer: Tokenizer
    given: list[Given] | None
    decode: decoding.Job | None
    inputs: dict[str, str]
    folder: RunFolder

    @property
    def out(self) -> Path:
        """Folder of the results on this machine."""
        return self.folder.local


def prepare(argv: Sequence[str]) -> Job | PageCommand:
    """A job from the command line. Raises ValueError or OSError for anything that can be known before long work."""
    refuse_several("python -m decode diagnose")
    if argv[:1] == ["page"]:
        command = parse_config(
            PageCommand, argv[1:], prog="python -m decode diagnose page", description=str(PageCommand.__doc__)
        )
        require(command)
        return command
    return checked(parse_config(DiagnoseConfig, argv, prog="python -m decode diagnose", description=DESCRIPTION))


def checked(config: DiagnoseConfig) -> Job:
    """A job from a configuration; see `prepare`."""
    check(config)
    config = dataclasses.replace(config, dtype=config.dtype or platform_dtype())
    folders = {role: model_folder(role, str(getattr(config, role))) for role in ("base", "rl")}
    models = {role: QwenConfig.from_hf(folder) for role, folder in folders.items()}
    tokenizer_folder = Path(local(config.tokenizer, TEXT_FILES)) if config.tokenizer else folders["rl"]
    tokenizer = load_tokenizer(tokenizer_folder)
    models = check_vocabularies(models, folders, tokenizer, tokenizer_folder)
    vocab_size = models["rl"].vocab_size
    if config.top > vocab_size:
        raise ValueError(f"top = {config.top}: expected at most {vocab_size}, the vocabulary")
    mesh = decoding.mesh_of(config.mesh)
    mesh = None if mesh is None else decode_mesh(mesh, [model.num_kv_heads for model in models.values()])
    inputs = of_pair(folders, tokenizer, tokenizer_folder)
    given = None
    if config.responses:
        check_template_args(tokenizer, config.template_args)
        given = read_given(config.responses, tokenizer, config.limit, **config.template_args)
        check_given(given, models)
        inputs["responses"] = fingerprint(given)
    with RunFolder(config.out).taken() as folder:
        require_same_decode(folder.local, with_whole_paths(config), FREE_TO_CHANGE, inputs)
        drawn = None if given is not None else decoding.check(_decode_config(config, folder.local / "decode"))
    return Job(config, folders, vocab_size, mesh, tokenizer, given, drawn, inputs, folder)


def run(job: Job | PageCommand) -> None:
    """Does the job. Raises RunError for what ends a run."""
    if isinstance(job, PageCommand):
        try:
            folder = RunFolder(job.run)
            if folder.url is None and not folder.local.is_dir():
                raise ValueError(f"{job.run}: no such folder")
            with folder.take():
                draw_results(folder.local, job.findings, job.page)
        except ValueError as error:
            raise RunError(str(error)) from error
        return
    try:
        with (
            writing_to(job.config.out),
            job.folder,
            compile_cache(job.config.compile_cache, job.out),
            Preemption() as preemption,
        ):
            _run(job, preemption)
    except ValueError as error:  # a damaged file, named
        raise RunError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"out of device memory with batch_tokens = {job.config.batch_tokens} and chunk = {job.config.chunk}; "
            "give fewer of them, more devices, or --cache-dtype int8 with another --out"
        ) from error


def _run(job: Job, preemption: Preemption) -> None:
    config, out = job.config, job.out
    remove_leftovers(out, "figures")
    given = job.given
    if job.decode is not None:
        decoding.run(job.decode)
        given = _decoded(job.decode)
    assert given is not None
    if not (out / files.TOKENS).is_file():
        _score(job, given, preemption)
    _claim(job)  # what may change in a finished one
    if not (out / files.VOCABULARY).is_file():
        files.write_vocabulary(out, lambda token: decode_ids(job.tokenizer, [token]))
    for path in part_names(out / "parts").values():
        path.unlink()
    with contextlib.suppress(OSError):
        (out / "parts").rmdir()
    draw_results(out, config.findings, config.page)


def _claim(job: Job) -> None:
    """From here on the folder is this diagnosis's."""
    write_json(job.out / "config.json", with_whole_paths(job.config))
    write_json(job.out / "inputs.json", job.inputs)


def _decode_config(config: DiagnoseConfig, out: Path) -> DecodeConfig:
    """The decoding run that draws the responses, base's and rl's, into a folder of the diagnosis."""
    settings = tuple(
        Setting(name=role, model=role, temperature=config.temperature, top_p=config.top_p) for role in ("base", "rl")
    )
    names = {field.name for field in dataclasses.fields(DecodeConfig)} & {
        field.name for field in dataclasses.fields(DiagnoseConfig)
    }
    return DecodeConfig(
        **{name: getattr(config, name) for name in names - {"out"}},
        out=str(out),
        settings=settings,
        seeds=(config.seed,),
        save_tokens=True,
    )


def _decoded(job: decoding.Job) -> list[Given]:
    """The responses of the finished decoding run, sorted by problem, sample and source."""
    place = {problem.index: i for i, problem in enumerate(job.inputs.problems)}
    found = []
    for setting in job.config.settings:
        folder = job.out / setting.name
        (seed,) = job.config.seeds
        rows = RowLog(folder / f"seed{seed}.rows.jsonl").rows
        for row in pq.read_table(folder / "tokens.parquet", columns=["problem", "sample", "tokens"]).to_pylist():
            at = place[row["problem"]]
            found.append(
                Given(
                    *(row["problem"], row["sample"], setting.name, job.inputs.texts[at], job.inputs.prompts[at]),
                    *(row["tokens"], job.inputs.problems[at].answer, rows[row["problem"], row["sample"]].correct),
                )
            )
    return sorted(found, key=lambda one: one.key)


# ---- scoring -------------------------------------------------------------------------------------------------------


def _score(job: Job, given: list[Given], preemption: Preemption) -> None:
    """Writes responses.parquet and tokens.parquet; what parts of a killed run have is not scored again.

    Raises:
      Preempted: the run was asked to end; what was scored is in parts.
    """
    config, parts = job.config, job.out / "parts"
    remove_leftovers(parts)
    stretches = list(_stretches(given))
    done = {key for path in part_names(parts).values() for key in _keys(path)}
    missing = [[one for one in stretch if one.tokens and one.key not in done] for stretch in stretches]
    work = sum(len(one.tokens) for stretch in missing for one in stretch)
    progress = DecodeProgress(len(given), len(given) - sum(map(len, missing)), work=work)
    with progress:
        if any(missing):
            models = [
                load(role, folder, str(config.dtype), config.cache_dtype, job.mesh, job.vocab_size)
                for role, folder in job.folders.items()
            ]
            _claim(job)  # after the models: one that cannot be read claims no folder
            progress.stage("scoring with both models")
            tokens = 0
            for number, stretch in enumerate(missing):
                for part in _scored(job, models, stretch):
                    job.folder.check()
                    _write_part(parts, number, part)
                    tokens += sum(len(one.pieces) for one in part)
                    for _ in part:
                        progress.response()
                    progress.drawn(0, tokens)
                    if preemption.asked:
                        raise Preempted(
                            "stopped on request (SIGTERM), what was scored is saved; the same command resumes"
                        )
        files.write_responses(job.out, [_row(job.tokenizer, one) for one in given])
        files.write_tokens(job.out / files.TOKENS, _assembled(parts, stretches))


def _row(tokenizer: Tokenizer, one: Given) -> Response:
    text = decode_ids(tokenizer, one.tokens)
    return Response(*one.key, one.prompt, text, one.answer, one.correct, length=len(one.tokens))


def _scored(job: Job, models: Sequence[Any], stretch: list[Given]) -> Iterator[list[ScoredResponse]]:
    """Batches of scored responses; each is on disk before the next is asked for."""
    config = job.config
    if not stretch:
        return
    waiting: list[ScoredResponse] = []
    base, rl = models
    for row, columns in iterate_pair(
        *(base.config, base.params, rl.config, rl.params),
        [one.prompt_ids for one in stretch],
        [one.tokens for one in stretch],
        written_by=["base" if one.source == "base" else "rl" for one in stretch],
        top=config.top,
        cache_dtype=None if config.cache_dtype == "model" else config.cache_dtype,
        batch_tokens=config.batch_tokens,
        chunk=config.chunk,
        mesh=job.mesh,
    ):
        one = stretch[row]
        pieces = token_pieces(job.tokenizer, one.tokens)
        text = "".join(pieces)
        waiting.append(
            ScoredResponse(*(*one.key, one.prompt, text, one.answer, one.correct), pieces=pieces, columns=columns)
        )
        if sum(len(x.pieces) for x in waiting) >= config.batch_tokens:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _write_part(folder: Path, stretch: int, part: list[ScoredResponse]) -> None:
    of_stretch = [name.split("-") for name in part_names(folder)]
    number = max((int(last) for first, last in of_stretch if int(first) == stretch), default=-1) + 1
    write_part(folder, f"{stretch:06d}-{number:06d}", pa.concat_tables([files.token_table(one) for one in part]))


def _stretches(given: Sequence[Given]) -> Iterator[list[Given]]:
    """Consecutive responses, together some `STRETCH` tokens."""
    stretch, tokens = [], 0
    for one in given:
        stretch.append(one)
        tokens += len(one.tokens)
        if tokens >= STRETCH:
            yield stretch
            stretch, tokens = [], 0
    if stretch:
        yield stretch


def _keys(part: Path) -> set[tuple[int, int, str]]:
    """The responses that a part has: none where it is damaged, which is moved aside then."""
    names = ["problem", "sample", "source"]
    table = read_part(part)
    if table is None:
        return set()
    table = table.select(names).group_by(names).aggregate([])
    return {(row["problem"], row["sample"], row["source"]) for row in table.to_pylist()}


def _assembled(parts: Path, stretches: Sequence[Sequence[Given]]) -> Iterator[pa.Table]:
    """The tokens of all parts in the order of the responses, a stretch at a time in memory."""
    for number, stretch in enumerate(stretches):
        paths = sorted(parts.glob(f"{number:06d}-*.parquet"))
        tables = {}
        for path in paths:
            table = pq.read_table(path).combine_chunks()
            rows = zip(*(table[name].to_pylist() for name in ("problem", "sample", "source")), strict=True)
            for key, run_ in itertools.groupby(enumerate(rows), key=lambda item: item[1]):
                places = [place for place, _ in run_]
                tables[key] = table.slice(places[0], len(places))
        yield from (tables[one.key] for one in stretch if one.tokens)
