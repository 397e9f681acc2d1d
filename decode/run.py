"""The decoding run: check everything, load the models once, decode what is not there yet, assemble, summarise."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from decode.check.inputs import Inputs, read_inputs
from decode.check.plan import plan
from decode.config import DecodeConfig, MeshConfig, Setting
from decode.draw import Models, Wanted, draw, load, program
from decode.results.files import Row, RowLog, TokenParts, check_resume, published, write_config
from decode.results.progress import DecodeProgress, FinishedProblems, compilations
from decode.results.summary import Outcome, remarks, summarise, with_differences, write_summaries
from decode.results.tables import print_settings
from decode.results.writer import Destination, Writer
from decode.settings.calibrate import calibrate, known_thresholds
from decode.settings.sweep import resolve
from rlvr_jax.decoding.memory import MemoryPlan
from rlvr_jax.models.config import platform_dtype
from rlvr_jax.rewards.pool import RULES, GraderPool
from rlvr_jax.runs.distributed import DistributedConfig, cluster, identity, initialize
from rlvr_jax.runs.files import remove_leftovers, write_json
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.program import Preempted, Preemption, RunError, compile_cache, parse_config, writing_to
from rlvr_jax.runs.tables import screen
from rlvr_jax.sharding.decode_layout import decode_mesh
from rlvr_jax.sharding.rules import make_mesh

DESCRIPTION = "Batch decoding with one or two models. `python -m decode compare RUN RUN ...` compares finished runs."


@dataclasses.dataclass(frozen=True)
class Job:
    """A run whose input has been checked.

    `plans` says, by the name of the setting, how many responses are decoded at once; `folder` is that of the results,
    locked.
    """

    config: DecodeConfig
    inputs: Inputs
    mesh: Mesh | None
    plans: dict[str, MemoryPlan]
    folder: RunFolder

    @property
    def out(self) -> Path:
        """Folder of the results on this machine."""
        return self.folder.local


def prepare(argv: Sequence[str]) -> Job:
    """A job from the command line. Raises ValueError or OSError for anything that can be known before long work."""
    config = parse_config(DecodeConfig, argv, prog="python -m decode", description=DESCRIPTION)
    resolve(config)  # its values, before the other processes are waited for
    initialize(config.distributed)
    return check(config)


def check(config: DecodeConfig) -> Job:
    """A job from a configuration, together with the other processes, where there are some; see `prepare`."""
    cluster().phase("prepare")
    config = resolve(config)
    dtype = config.dtype or platform_dtype()
    config = dataclasses.replace(config, dtype=dtype)  # so that a run goes on in the dtype that it began in
    mesh = mesh_of(config.mesh)
    inputs = read_inputs(config)
    mesh = None if mesh is None else decode_mesh(mesh, [model.num_kv_heads for model in inputs.models.values()])
    plans = {setting.name: plan(config, inputs, dtype, mesh, setting) for setting in config.settings}
    for grader in config.graders:
        if grader not in RULES:
            with grader_pool(config, workers=1) as pool:  # a researcher's own grader is imported now, not after hours
                pool.grade(grader, [""], [""])
    record = dataclasses.asdict(dataclasses.replace(config, distributed=DistributedConfig()))
    record |= {"out": "", "files": inputs.fingerprints, "tokens": inputs.prompts}
    cluster().require_same("the configuration, the problems, the models or the code", *identity(record, "decode"))
    with RunFolder(config.out).taken() as folder:
        if cluster().main:  # the only one that writes
            check_resume(folder.local, config, inputs.fingerprints)
    return Job(config, inputs, mesh, plans, folder)


def grader_pool(config: DecodeConfig, workers: int) -> GraderPool:
    """The pool that grades as the configuration says."""
    return GraderPool(workers, sandbox=config.grader_sandbox, unsafe_evaluation=config.unsafe_evaluation)


def run(job: Job) -> None:
    """Does the job: decodes, grades, writes, summarises. Raises RunError for what ends a run."""
    try:
        with (
            writing_to(job.config.out),
            job.folder,
            compile_cache(job.config.compile_cache, job.out),
            Preemption() as preemption,
        ):
            if (watch := cluster().watch) is not None:
                watch.asked = lambda: preemption.asked
            _run(job, preemption)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"out of device memory with {max(plan.slots for plan in job.plans.values())} slots and max_new_tokens = "
            f"{job.config.max_new_tokens}; give fewer --slots, a smaller --memory to plan for, or more devices"
        ) from error


def _run(job: Job, preemption: Preemption) -> None:
    config, out, main = job.config, job.out, cluster().main
    cluster().phase("load")
    if main:
        remove_leftovers(out, "calibration")
    try:
        runs = [_SettingRun(job, setting) for setting in config.settings]
        taus = known_thresholds(out, config.settings)
    except ValueError as error:  # a damaged file, named
        raise RunError(str(error)) from error
    for one in runs:
        if one.setting.share is not None and one.setting.name not in taus and one.done:
            raise RunError(
                f"{out / 'calibration.json'} has no threshold for {one.setting.name!r}, of which {one.done} responses "
                "are there; put the file back, or remove that setting's folder"
            )
    missing = [one for one in runs if one.missing]
    models: Models = {}
    if missing:
        models = {
            role: load(
                *(role, job.inputs.folders[role], str(config.dtype), config.cache_dtype, job.mesh, model.vocab_size)
            )
            for role, model in job.inputs.models.items()
        }
    if main:
        write_config(out, config, job.inputs)  # after the models: one that cannot be read claims no folder
    job.folder.sync()  # a place that cannot be written to is found now
    progress = DecodeProgress(sum(one.total for one in runs), sum(one.done for one in runs))

    def interruptible(phase: str) -> None:
        """Where a run that is asked to end may do so: what has ended is graded and written, the rest is drawn anew."""
        cluster().phase(phase)
        job.folder.check()
        watch = cluster().watch
        if preemption.asked if watch is None else watch.stop_here():
            raise Preempted(
                "stopped on request (SIGTERM), responses that had ended are saved; the same command resumes"
            )

    with contextlib.ExitStack() as stack:
        stack.enter_context(progress)
        for line in dict.fromkeys(str(job.plans[one.setting.name]) for one in missing):
            progress.say(line)
        wanting = [one for one in missing if one.setting.share is not None]
        if wanting:
            slots = job.plans[wanting[0].setting.name].slots
            taus = calibrate(out, config, job.inputs, models, job.mesh, slots, progress, interruptible)
        for one in runs:
            one.begin(taus.get(one.setting.name), lambda: _summarise(out, runs), progress)
        groups: dict[tuple, list[_SettingRun]] = {}
        for one in missing:
            groups.setdefault(program(one.setting), []).append(one)
        writer = None
        if main:
            pool = stack.enter_context(grader_pool(config, config.grader_workers))
            writer = stack.enter_context(Writer(job.inputs, config.graders, pool))
        for together in groups.values():
            _decode(job, models, together, writer, progress, interruptible)
        cluster().phase("write")
    if not main:
        return
    records = _summarise(out, runs)
    out_screen = screen()
    if config.print_table:
        print_settings(out_screen, records, out / "summary.txt")
    for line in (*remarks(records), f"results: {job.folder.url or out}"):
        out_screen.print(line, markup=False, highlight=False, soft_wrap=True)


def _decode(
    job: Job,
    models: Models,
    runs: Sequence["_SettingRun"],
    writer: Writer | None,
    progress: DecodeProgress,
    interruptible: Callable[[str], None],
) -> None:
    """Draws all that is missing of settings that share a program, one queue for all of them; gives it to the writer."""
    interruptible("decode")
    run_of = {one.decoded.name: one for one in runs}
    shown = runs[0]
    progress.begin(job.plans[shown.setting.name].slots)
    progress.setting(shown.number, len(job.config.settings), shown.decoded.name)
    before, compiled = compilations().count, None

    def on_chunk(rows: int, tokens: int) -> None:
        nonlocal compiled
        compiled = None  # not known yet for what this chunk ended
        progress.drawn(rows, tokens)
        interruptible(f"decode, {rows} responses have ended")

    for setting, drawn in draw(
        *(models, job.config, job.inputs, [(one.decoded, one.missing) for one in runs]),
        slots=job.plans[runs[0].setting.name].slots,
        mesh=job.mesh,
        on_chunk=on_chunk,
    ):
        one = run_of[setting.name]
        if one.number > shown.number:
            shown = one
            progress.setting(one.number, len(job.config.settings), setting.name)
        if compiled is None:
            before, compiled = compilations().count, compilations().count > before
        if writer is not None:
            writer.put(one.destination, drawn, compiled=compiled)
        progress.response()


def _summarise(out: Path, runs: Sequence["_SettingRun"]) -> list[dict[str, Any]]:
    """Writes the summaries of the settings that are finished."""
    records = with_differences([one.outcome for one in runs if one.outcome is not None])
    write_summaries(out, records)
    return records


def mesh_of(sizes: MeshConfig) -> Mesh | None:
    """The mesh of a configuration, None for a single device."""
    if (sizes.data, sizes.fsdp, sizes.tensor) == (1, 1, 1) and cluster().size == 1:
        return None
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    return None if mesh.size == 1 else mesh


class _SettingRun:
    """One setting: what is there, what is missing, decoding it."""

    def __init__(self, job: Job, setting: Setting):
        self.job, self.setting = job, setting
        self.number = job.config.settings.index(setting) + 1
        self.folder = job.out / setting.name
        self.parts = TokenParts(self.folder)
        self.outcome: Outcome | None = None
        index = [problem.index for problem in job.inputs.problems]
        # Those of one problem together, so that its prompt is read once.
        wanted = [
            Wanted(place, sample, seed)
            for place in range(len(index))
            for seed in job.config.seeds
            for sample in range(job.config.n)
        ]
        self.logs: dict[int, RowLog] = {}
        there: list[Row | None] = [None] * len(wanted)
        if cluster().main:
            remove_leftovers(self.folder, "tokens.parts")
            self.logs = {seed: RowLog(self.folder / f"seed{seed}.rows.jsonl") for seed in job.config.seeds}
            there = [self.logs[one.seed].rows.get((index[one.place], one.sample)) for one in wanted]
            if job.config.save_tokens:  # what lost its tokens is drawn again, to the same tokens
                whole = self.parts.whole()
                keys = [(one.seed, index[one.place], one.sample) for one in wanted]
                there = [row if key in whole else None for row, key in zip(there, keys, strict=True)]
        self.missing = [wanted[i] for i in cluster().broadcast([i for i, row in enumerate(there) if row is None])]
        self.total, self.done = len(wanted), len(wanted) - len(self.missing)
        self.problems = FinishedProblems(len(job.config.seeds) * job.config.n)
        self.problems.add([(row.problem, row.correct) for row in there if row is not None])

    def begin(self, tau: float | None, settled: Callable[[], object], progress: DecodeProgress) -> None:
        """Before decoding: takes the threshold found for its share, and whom to tell when all is on disk."""
        self.tau, self.settled, self.progress = tau, settled, progress
        # The setting as it is decoded.
        self.decoded = self.setting if tau is None else dataclasses.replace(self.setting, tau=tau, share=None)
        self.destination = Destination(
            self.logs,
            self.parts if self.job.config.save_tokens else None,
            self.setting.gamma == 0 and self.setting.sample_from == "base",
            self._written,
        )
        if not self.missing and cluster().main:
            self._finish()

    def _written(self, rows: Sequence[Row]) -> None:
        """Called by the writing thread."""
        self.done += len(rows)
        self.problems.add([(row.problem, row.correct) for row in rows])
        self.progress.graded(self.setting.name, self.problems, len(self.job.inputs.problems))
        if self.done == self.total:
            self._finish()
            self.settled()

    def _finish(self) -> None:
        """Assembles the setting's files and its outcome."""
        config, inputs = self.job.config, self.job.inputs
        prompts = [(p.index, text, p.answer) for p, text in zip(inputs.problems, inputs.texts, strict=True)]
        for seed, log in self.logs.items():
            write_json(self.folder / f"seed{seed}.json", published(prompts, log.rows, config.n), indent=None)
        if config.save_tokens:
            self.parts.assemble()
        self.outcome = summarise(
            self.setting,
            [log.rows for log in self.logs.values()],
            [problem.index for problem in inputs.problems],
            config.n,
            [timing for log in self.logs.values() for timing in log.timings],
            graders=config.graders,
            tau=self.tau,
        )
        write_json(self.folder / "summary.json", self.outcome.record)
