"""Resident memory of this process at its highest, since it was last reset (Linux)."""

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS}: no {name}")


def reset_peak() -> int:
    """Forgets the peak; the bytes that are resident now."""
    _CLEAR.write_text("5")
    return _bytes("VmRSS")


def peak_above(baseline: int) -> int:
    """Bytes of the peak above `baseline`."""
    return _bytes("VmHWM") - baseline
