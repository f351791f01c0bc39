"""Where a result comes from: versions, machine, and the state of the source.

Owns the facts that every result carries, and the choice of cores that follows from the machine. Measures nothing. Runs in the
process of the demo, a benchmark or the doctor; imports neither torch nor vLLM.
"""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from vllm_specbranch import __version__

_PACKAGES = ("vllm", "torch", "transformers", "msgspec", "pyzmq", "numpy")
_COMMAND_TIMEOUT_S = 10.0


def versions() -> dict[str, str]:
    """Name to version; `missing` where a package is not installed."""
    found = {"python": platform.python_version(), "vllm-specbranch": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def available_cores() -> tuple[int, ...]:
    """The cores that this process may use."""
    return tuple(sorted(os.sched_getaffinity(0)))


def gpus() -> list[str]:
    """Names of the GPUs that vLLM would use; none where vLLM is a CPU build."""
    if "cpu" in versions()["vllm"]:
        return []
    return _lines(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], Path.cwd())


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPUs, and how busy the machine is right now (the mean load of the last minute)."""
    return {
        "cpu": _cpu_model(),
        "cores": list(available_cores()),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "platform": platform.platform(),
        "load_1min": os.getloadavg()[0],
    }


def source_state(folder: Path) -> dict[str, Any]:
    """Commit of the repository that holds `folder`, and whether files differ from it; None for both outside of one."""
    sha = _lines(["git", "rev-parse", "HEAD"], folder)
    if not sha:
        return {"git_sha": None, "dirty": None}
    return {"git_sha": sha[0], "dirty": bool(_lines(["git", "status", "--porcelain"], folder))}


def provenance(folder: Path) -> dict[str, Any]:
    """All of the above, and the command line."""
    return {**source_state(folder), "versions": versions(), "machine": machine(), "argv": sys.argv}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(command: list[str], folder: Path) -> list[str]:
    """What a command prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
