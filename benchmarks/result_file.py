"""Where the result of a benchmark goes: the file of `--out`, checked before anything starts, and the same JSON as the last line.

Owns what all benchmarks begin and end with, a warning on a busy machine among it. Runs in the process of a benchmark.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.portable import portable
from vllm_specbranch.errors import ConfigError

Write = Callable[[str], object]
# Of the cores, busy with other work when a benchmark begins: above that its times are not to be believed.
MOST_LOAD = 0.5


def say(text: str) -> None:
    """Write to the person who waits, now."""
    sys.stdout.write(text)
    sys.stdout.flush()


def begin(out: Path) -> None:
    """Check the file before any work, and warn on standard error if the machine is busy.

    Raises:
        ConfigError: `out` is in no folder that exists.
    """
    require_out(out)
    if warning := busy_warning(os.getloadavg()[0], os.cpu_count() or 1):
        sys.stderr.write(warning + "\n")


def require_out(out: Path) -> None:
    """Check that the file can be made.

    Raises:
        ConfigError: `out` is a folder, or in no folder that exists.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(str(out), "a file in a folder that exists", "--out")


def busy_warning(load: float, num_cores: int) -> str:
    """What to say of a machine that has other work; nothing if it has little.

    Args:
        load: the load average of the last minute.
        num_cores: of the whole machine.
    """
    if load <= MOST_LOAD * num_cores:
        return ""
    return f"Warning: the machine is busy (load average {load:.1f} on {num_cores} cores): its times are not to be believed."


def require_counts(given: Mapping[str, int], least: int = 1) -> None:
    """Check whole numbers of the command line.

    Args:
        given: option to value.

    Raises:
        ConfigError: one is below `least`.
    """
    for option, value in given.items():
        if value < least:
            raise ConfigError(value, f"a whole number of at least {least}", option)


def finish(result: Mapping[str, Any], out: Path, write: Write = say) -> dict[str, Any]:
    """Write the result to its file, and as the last line; return it as it was written."""
    line = json.dumps(portable(dict(result)))
    out.write_text(line + "\n")
    write(line + "\n")
    written: dict[str, Any] = json.loads(line)
    return written
