"""Shared test set-up: 8 simulated CPU devices, programs compiled quickly, run-time checked annotations."""

import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiling is most of what the tests take, and half of that is LLVM's optimisation of loops that run for microseconds.
# Said in the environment, for the programs that tests start too. The long checks optimise: see the Makefile.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's newer code for fused loops took half of the rest, up to jaxlib 0.10, where an older one can be chosen.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
from jaxtyping import install_import_hook

install_import_hook("rlvr_jax", "beartype.beartype")

_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 20_000  # Linux lets a process have 65,530


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs():
    """Forgets compiled programs when there are many: each holds maps of memory, and XLA crashes beyond their limit."""
    yield
    if _MAPS.exists() and _MAPS.read_text().count("\n") > _MOST_MAPS:
        jax.clear_caches()


def pytest_collection_modifyitems(items):
    """Whole runs first: the tests that share one then go to one worker, and short tests fill up the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_train_"))


@pytest.fixture
def disk(tmp_path):
    """Gives a file system of so many kB, which `disk.resize` makes larger, where this machine lets one be mounted."""
    folder = tmp_path / "disk"

    def mount(kilobytes, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join((*options, f"size={kilobytes}k")), "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        return folder

    folder.mkdir()
    mount.resize = lambda kilobytes: mount(kilobytes, "remount")
    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)
