"""What jax.profiler saw on the GPU's streams: kernels by time, launches, and the share of time in which one ran."""

import collections
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

LARGEST = 15


def traced(run: Callable[[], Any], out: Path, name: str, passes: int) -> dict:
    """Runs once under the profiler and keeps the trace as `out/trace_NAME.json.gz`; `passes` divides the launches."""
    folder = out / f"trace_{name}"
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(run())
    files = sorted(folder.rglob("*.trace.json.gz"))
    found = {"events": 0} if not files else summary(json.loads(gzip.decompress(files[-1].read_bytes())), passes)
    if files:
        files[-1].replace(out / f"trace_{name}.json.gz")
    shutil.rmtree(folder)
    return found


def summary(trace: dict, passes: int) -> dict:
    """Figures of a trace in Chrome's format. `events` is 0 where nothing ran on a GPU."""
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    kernels = [
        e
        for e in events
        if e.get("ph") == "X"
        and "GPU" in processes.get(e["pid"], "")
        and "Stream" in threads.get((e["pid"], e["tid"]), "")
    ]
    if not kernels:
        return {"events": 0}
    spans = sorted((e["ts"], e["ts"] + e.get("dur", 0)) for e in kernels)
    busy, end = 0.0, spans[0][0]
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    wall = end - spans[0][0]
    microseconds, launches = collections.Counter(), collections.Counter()
    for event in kernels:
        microseconds[event["name"]] += event.get("dur", 0)
        launches[event["name"]] += 1
    copies = sum(count for name, count in launches.items() if "memcpy" in name.lower())
    return {
        "events": len(kernels),
        "wall_ms": wall / 1e3,
        "idle_share": 1 - busy / wall if wall else 0.0,
        "launches_per_pass": len(kernels) / passes,
        "copies_per_pass": copies / passes,
        "largest": [
            {"kernel": name[:80], "launches": launches[name], "ms": us / 1e3}
            for name, us in microseconds.most_common(LARGEST)
        ],
    }
