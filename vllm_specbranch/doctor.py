"""The doctor: can specbranch run here?

Owns a list of checks and their wording; mends nothing. Runs in the process that the user started; loads torch and vLLM.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm_specbranch import shipped_pair
from vllm_specbranch.errors import PatchError
from vllm_specbranch.provenance import available_cores, gpus, machine, versions


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        is_ok: whether it is as it must be.
        text: what was found, in one line.
    """

    is_ok: bool
    text: str


def run(write: Callable[[str], object]) -> int:
    """Write what was found; return 1 if something is wrong."""
    all_ok = True
    for finding in findings():
        all_ok &= finding.is_ok
        write(f"{'ok   ' if finding.is_ok else 'WRONG'}  {finding.text}\n")
    write("specbranch can run here.\n" if all_ok else "specbranch cannot run here until that is mended.\n")
    return 0 if all_ok else 1


def findings() -> Iterator[Finding]:
    """Check one thing after the other, the quick ones first."""
    found = versions()
    for name, version in found.items():
        yield Finding(version != "missing", f"{name} {version}")
    facts = machine()
    yield Finding(True, f"{facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB, {facts['platform']}")
    yield _cores()
    yield _shipped_pair()
    if found["vllm"] != "missing":
        yield _torch()
        yield from _patches(found["vllm"])


def _cores() -> Finding:
    cores, names = available_cores(), gpus()
    if names:
        shared = "; target and draft would share it" if len(names) == 1 else ""
        return Finding(True, f"{len(names)} GPU(s): {', '.join(names)}{shared}")
    shared = "; target and draft would share it" if len(cores) == 1 else ""
    return Finding(True, f"{len(cores)} core(s) for this process: {', '.join(map(str, cores))}{shared}")


def _shipped_pair() -> Finding:
    try:
        return Finding(True, f"shipped pair: {shipped_pair.target_path()} and {shipped_pair.draft_path()}")
    except FileNotFoundError as error:
        return Finding(False, f"shipped pair: {error}")


def _torch() -> Finding:
    import torch

    return Finding(
        True, f"torch build: {torch.version.cuda or torch.version.hip or 'CPU'}, {torch.get_num_threads()} threads"
    )


def _patches(vllm_version: str) -> Iterator[Finding]:
    from vllm_specbranch import patching
    from vllm_specbranch.plugin import all_patches

    patches = all_patches()
    verified = patching.verified_versions(patches)
    version = patching.base_version(vllm_version)
    yield Finding(version in verified, f"vLLM {version}: verified versions are {', '.join(verified)}")
    for patch in patches:
        expected = patch.fingerprints.get(version)
        if expected is None or patching.is_applied(patch):
            continue
        try:
            is_ok, note = patching.fingerprint(patch.symbol) == expected, "the source that the patch was written for"
        except PatchError as error:
            is_ok, note = False, str(error)
        yield Finding(is_ok, f"{patch.symbol}: {note if is_ok else 'not ' + note}")
