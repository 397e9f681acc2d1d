"""The table of a plan: a column a program, everything a chip, every time an estimate."""

from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.table import Table

from rlvr_jax.planning.account import KERNEL_EFFICIENCY
from rlvr_jax.planning.chips import CHIPS
from rlvr_jax.planning.programs import ProgramAccount

_GIB = 1 << 30
NOTE = (
    "Compiler's account and estimates, nothing was run. FLOPs: matrix products, and kernels by their shapes, causal "
    "attention as half of the square. Estimated time: the compiler's cycles of the fusions (for CUDA, where it gives "
    f"none, their FLOPs at {KERNEL_EFFICIENCY:.0%} of the peak or their bytes), kernels at {KERNEL_EFFICIENCY:.0%} of "
    "the peak (an assumption) or at the memory's bandwidth, collectives at the rate of the links, none beside another. "
    "A loop that may end early counts to its end, a cache as full."
)


def table(programs: Sequence[ProgramAccount], title: str) -> Table:
    """The programs side by side."""
    made = Table(title=escape(title), title_justify="left", show_lines=False)
    made.add_column("a chip")
    for program in programs:
        made.add_column(escape(program.name), justify="right")

    def row(name: str, cell: Callable[[ProgramAccount], str], style: str | None = None) -> None:
        made.add_row(escape(name), *(cell(program) for program in programs), style=style)

    chip = CHIPS[programs[0].chip]
    for kind in _ordered(kind for program in programs for kind in program.kinds):
        row(f"{kind}, GiB", lambda x, kind=kind: _gib(x.kinds.get(kind)))
    row(f"peak, GiB of {chip.memory / _GIB:.1f}", _peak, "bold")
    made.add_section()
    row("TFLOPs", lambda x: f"{x.flops / 1e12:.2f}")
    row("of kernels", lambda x: f"{sum(x.kernels.values()) / 1e12:.2f}" if x.kernels else "")
    row("ideal: the model's", lambda x: f"{x.model_flops / 1e12:.2f}" if x.model_flops else "")
    row("ideal: with its remat policy", lambda x: f"{x.ideal_flops / 1e12:.2f}" if x.ideal_flops else "")
    row("TFLOPs / that ideal", lambda x: f"{x.flops / x.ideal_flops:.2f}" if x.ideal_flops else "")
    made.add_section()
    for kind, axes in _ordered((c["kind"], tuple(c["axes"])) for program in programs for c in program.collectives):
        row(f"{kind} {' x '.join(axes) or 'self'}", lambda x, key=(kind, axes): _collective(x, key))
    for axis in _ordered(axis for program in programs for axis in program.ideal_collectives):
        row(f"least for {axis}, GB", lambda x, axis=axis: _gb(x.ideal_collectives.get(axis)))
    made.add_section()
    row("est. s, fusions", lambda x: f"{x.fusion_s:.4f}")
    row("by FLOPs and bytes alone", lambda x: f"{x.roofline_s:.4f}" if chip.clock else "")
    row("est. s, kernels", lambda x: f"{x.kernel_s:.4f}")
    row("est. s, collectives", lambda x: f"{x.collective_s:.4f}")
    row("that may overlap", lambda x: f"{x.overlapped_s:.4f}" if x.overlapped_s else "")
    row("est. s, all", lambda x: f"{x.seconds:.4f}", "bold")
    row("MFU that it implies", lambda x: f"{x.mfu:.1%}" if x.model_flops and x.seconds else "")
    row("share of bandwidth", lambda x: f"{x.bandwidth_share:.1%}" if x.ideal_bytes and x.seconds else "")
    row("mostly", lambda x: x.dominates)
    row("compiled in, s", lambda x: f"{x.compile_s:.0f}")
    return made


def warnings(programs: Sequence[ProgramAccount]) -> list[str]:
    """What the figures leave out, a line each."""
    lines = []
    for program in programs:
        if program.uncounted_kernels:
            kernels = ", ".join(sorted(set(program.uncounted_kernels)))
            lines.append(f"{program.name}: FLOPs of {kernels} are not counted")
        if program.unknown_loops:
            lines.append(f"{program.name}: the length of {len(program.unknown_loops)} loops depends on data")
    return lines


def _ordered(names) -> list:
    return list(dict.fromkeys(names))


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / _GIB:.2f}"


def _gb(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


def _peak(x: ProgramAccount) -> str:
    size = f"{x.peak / _GIB:.2f}"
    return size if x.fits else f"[red]{size} does not fit[/red]"


def _collective(x: ProgramAccount, key: tuple[str, tuple[str, ...]]) -> str:
    found = [c for c in x.collectives if (c["kind"], tuple(c["axes"])) == key]
    return " ".join(f"{c['bytes'] / 1e9:.2f} GB / {c['count']:,}" for c in found)
