"""The recipes compiled for pods and GPU clusters: one JSON file and one line of a table a plan, into docs/plans.

    make plans                          # what `make tpu-compiler` (and `make cuda-compiler`) can compile here
    make plans ARGS="8b-v5p-10k"        # some of them

Nothing is measured: memory is the compiler's account, times are estimates (`rlvr_jax.planning`).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rlvr_jax.planning.programs import ProgramAccount
from rlvr_jax.planning.topology import NoCompiler, Topology

ROOT = Path(__file__).parent.parent
_8B, _7B = "configs/qwen3_8b_base.py", "configs/qwen2_5_math_7b.py"


def _train(config: str, topology: str, *flags: str, only: str = "update") -> tuple[str, str, tuple[str, ...]]:
    return "train", topology, ("--config", config, *flags, "--plan-only", only)


def _decode(config: str, topology: str, *flags: str) -> tuple[str, str, tuple[str, ...]]:
    return "decode", topology, ("--config", config, "--problems", "none", *flags)


def _mesh(fsdp: int, sequence: int, tensor: int) -> tuple[str, ...]:
    return "--mesh.fsdp", str(fsdp), "--mesh.sequence", str(sequence), "--mesh.tensor", str(tensor)


_STEP = ("--algorithm.mini-batch", "1", "--algorithm.micro-batches", "1")  # one micro-batch of rollout.n rows
_ALL = "update,optimizer,score,weights,prefill,rollout"
_ROLLOUT = "weights,prefill,rollout"
_8_H100 = (*_mesh(4, 2, 1), "--model.logprob-chunk", "2048")

# name: (program, topology, flags). "step": a whole update of one micro-batch; else one micro-batch of a larger update.
PLANS = {
    "8b-v5p-10k-step": _train(_8B, "v5p:4x4x4", *_STEP, "--algorithm.row-length", "10240"),
    "8b-v5p-step": _train(_8B, "v5p:4x4x4", *_STEP),
    "8b-v5p-step-attention": _train(_8B, "v5p:4x4x4", *_STEP, "--model.remat", "attention"),
    "8b-8-h100-step": _train(_8B, "cuda:1x1x8", *_STEP, *_8_H100, "--rollout.n", "4"),
    "8b-8-h100-rollout": _train(_8B, "cuda:1x1x8", *_8_H100, "--rollout.prompts-at-once", "4", only=_ROLLOUT),
    "7b-8-h100-rollout": _train(_7B, "cuda:1x1x8", *_8_H100, "--rollout.prompts-at-once", "16", only=_ROLLOUT),
    "8b-64-h100-step": _train(_8B, "cuda:1x8x8", *_STEP, *_mesh(8, 4, 2), "--rollout.n", "8"),
    "8b-v5p": _train(_8B, "v5p:4x4x4", only=_ALL),
    "8b-16-v5p": _train(_8B, "v5p:2x2x4", *_mesh(16, 1, 1)),
    "8b-32-v5p": _train(_8B, "v5p:2x4x4", *_mesh(16, 1, 2)),
    "8b-128-v5p": _train(_8B, "v5p:4x4x8", *_mesh(16, 4, 2)),
    "8b-256-v5p": _train(_8B, "v5p:4x8x8", *_mesh(16, 4, 4)),
    "7b-v5p": _train(_7B, "v5p:2x4x4", only=_ALL),
    "7b-8-h100": _train(_7B, "cuda:1x1x8", *_8_H100, "--algorithm.micro-batches", "64"),
    "8b-v6e": _train(_8B, "v6e:8x8", "--rollout.prompts-at-once", "8", only="update,rollout"),
    "8b-v5e": _train(_8B, "v5e:16x16", *_mesh(32, 4, 2), "--algorithm.micro-batches", "16"),
    "8b-2-slices": _train(_8B, "2*v5p:4x4x4", "--mesh.data", "2", "--algorithm.micro-batches", "16"),
    "7b-v6e": _train(_7B, "v6e:4x8"),
    "unireason-14b-v6e": _decode("configs/decode_unireason_14b.py", "v6e:4x4"),
    "unireason-14b-8-h100": _decode("configs/decode_unireason_14b.py", "cuda:1x1x8"),
    "dapo-32b-v6e": _decode("configs/decode_dapo_32b.py", "v6e:4x4"),
    "dapo-32b-8-h100": _decode("configs/decode_dapo_32b.py", "cuda:1x1x8"),
    "orz-32b-v5p": _decode("configs/decode_orz_32b.py", "v5p:2x2x4"),
    "orz-32b-8-h100": _decode("configs/decode_orz_32b.py", "cuda:1x1x8"),
}


def line(name: str, plan: dict) -> list[str]:
    """Rows of the table: one a program."""
    rows = []
    for program in map(ProgramAccount.of, plan["programs"]):
        ratio = f"{program.flops / program.ideal_flops:.2f}" if program.ideal_flops else ""
        peak = f"{program.peak / 2**30:.2f} of {program.chip_memory / 2**30:.1f}" + ("" if program.fits else " no")
        seconds = f"{program.fusion_s:.3f} + {program.kernel_s:.3f} + {program.collective_s:.3f}"
        sent = sum(row["bytes"] for row in program.collectives) / 1e9
        share = f"{program.mfu:.0%}" if program.model_flops else ""
        cells = [name, plan["topology"], program.name, peak, ratio, f"{sent:.2f}", seconds, share]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> int:
    """Compiles, writes, prints; 1 where a plan failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(PLANS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plans")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.names or PLANS:
        program, topology, flags = PLANS[name]
        try:
            Topology.parse(topology).settings()
            Topology.parse(topology).interpreter()
        except NoCompiler as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        path = options.out / f"{name}.json"
        command = [sys.executable, "-m", program, *flags, "--plan", topology, "--plan-json", str(path)]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    header = ["plan", "topology", "program", "peak GiB a chip", "FLOPs / ideal of the remat policy", "GB a chip sends"]
    header += ["est. s: fusions + kernels + collectives", "MFU that it implies"]
    table = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name in PLANS:
        if (options.out / f"{name}.json").is_file():
            table += line(name, json.loads((options.out / f"{name}.json").read_text()))
    said = "Compiler's account and estimates: nothing was run (`make plans`). What slices send one another is not seen"
    text = f"{said} (`8b-2-slices`).\n\n" + "\n".join(table) + "\n"
    (options.out / "README.md").write_text(text)
    print(text)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
