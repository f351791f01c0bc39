"""The `Patch` record and what can be done with one: check it against upstream, apply it, take it back, describe it.

Owns: fingerprints, the version gate and the book of applied patches. Does not own the patches themselves (one file
per vLLM module in `vllm_specbranch.patches`) nor when they are applied (`plugin`). Runs in every process; imports no
upstream module until a patch of that module is applied.
"""

import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

from vllm_specbranch.errors import PatchError

Kind = Literal["wrap", "add", "replace"]
Process = Literal["frontend", "worker", "scheduler", "metrics"]

ABSENT = "absent"
"""The fingerprint of a symbol that upstream does not have: what an `add` record lists."""

_MISSING = object()


@dataclass(frozen=True, eq=False)
class Patch:
    """One change to one upstream symbol. Records are compared by identity.

    Attributes:
        symbol: `package.module:Class.attribute` or `package.module:function`.
        kind: `wrap` calls the original, `replace` does not, `add` gives upstream a name that it lacks.
        process: where the patch matters, and so who applies it.
        why: what goes wrong without it.
        remove_when: what has to happen before it can go.
        fingerprints: verified vLLM version -> `fingerprint` of the original there.
        make: takes the original (a plain function, also where upstream has a static method; None for `add`) and
            returns what takes its place. It runs when the patch is applied, so imports of upstream modules belong
            inside.
    """

    symbol: str
    kind: Kind
    process: Process
    why: str
    remove_when: str
    fingerprints: Mapping[str, str]
    make: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a symbol lives: the module or class whose own namespace holds it, and what it holds now."""

    symbol: str
    holder: Any
    name: str
    current: Any


@dataclass(frozen=True, slots=True)
class _Applied:
    place: _Place
    replacement: Any


_applied: dict[Patch, _Applied] = {}


def base_version(vllm_version: str) -> str:
    """Return the version without its local part: `0.32.0+cpu` is checked as `0.32.0`."""
    return vllm_version.partition("+")[0]


def verified_versions(patches: Iterable[Patch]) -> tuple[str, ...]:
    """Return the vLLM versions that every one of `patches` was verified with."""
    listed = [set(patch.fingerprints) for patch in patches]
    return tuple(sorted(set.intersection(*listed))) if listed else ()


def fingerprint(symbol: str) -> str:
    """Return the sha256 of a symbol's dedented source as it is now, or `ABSENT`.

    Raises:
        PatchError: the symbol's module or class cannot be found, or it has no source (it is no function or class any
            more).
    """
    return _fingerprint(_locate(symbol))


def apply(patches: Iterable[Patch], vllm_version: str) -> None:
    """Apply patches, all or none. A patch that is already applied stays as it is.

    Args:
        patches: the records; their upstream modules are imported.
        vllm_version: the installed version, with or without a local part.

    Raises:
        PatchError: the version is not verified, or a symbol's source is not the one that the record was written for
            (another version, or another plugin was there first). Nothing was changed then.
    """
    wanted = tuple(dict.fromkeys(patches))
    version = base_version(vllm_version)
    if wanted and version not in verified_versions(wanted):
        known = ", ".join(verified_versions(wanted)) or "none"
        raise PatchError(
            f"vLLM {vllm_version} is not a version that these patches were verified with; verified: {known}"
        )
    pending = [(patch, _checked(patch, version)) for patch in wanted if not is_applied(patch)]
    _refuse_rivals([patch for patch, _ in pending])
    done: list[Patch] = []
    try:
        for patch, place in pending:
            _put(patch, place)
            done.append(patch)
    except BaseException:
        revert(done)
        raise


def revert(patches: Iterable[Patch]) -> None:
    """Give upstream the very objects back that it had. Patches that are not applied are skipped.

    Raises:
        PatchError: something else has taken the symbol since; nothing was changed.
    """
    wanted = [patch for patch in dict.fromkeys(patches) if is_applied(patch)]
    for patch in wanted:
        if _locate(patch.symbol).current is not _applied[patch].replacement:
            raise PatchError(f"{patch.symbol} cannot be reverted: something else has replaced it since")
    for patch in reversed(wanted):
        place = _applied.pop(patch).place
        if place.current is _MISSING:
            delattr(place.holder, place.name)
        else:
            setattr(place.holder, place.name, place.current)


def is_applied(patch: Patch) -> bool:
    """Whether `apply` put this record in place and `revert` has not taken it back."""
    return patch in _applied


def render_readme(patches: Sequence[Patch]) -> str:
    """Return the text of `patches/README.md`."""
    lines = [
        "# Patch register",
        "",
        "Generated from the records by `python -m vllm_specbranch.patches > patches/README.md`; a test fails when it",
        "drifts. `frontend` patches are always applied and pass everything through that is not ours; `worker` patches",
        "are applied by our worker class only, `metrics` patches where settings that choose us become a config, so with",
        "another method, or none, vLLM is untouched. `--fingerprints` prints those of the installed vLLM.",
        "",
        "| upstream symbol | kind | process | why | can go when | verified with (sha256 of the source) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for patch in patches:
        verified = ", ".join(f"{version} (`{digest[:12]}`)" for version, digest in sorted(patch.fingerprints.items()))
        cells = (f"`{patch.symbol}`", patch.kind, patch.process, patch.why, patch.remove_when, verified)
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _locate(symbol: str) -> _Place:
    module_name, _, path = symbol.partition(":")
    try:
        holder: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise PatchError(f"{symbol} cannot be patched: {module_name} cannot be imported ({error})") from error
    *outer, name = path.split(".")
    for part in outer:
        holder = vars(holder).get(part, _MISSING)
        if holder is _MISSING:
            raise PatchError(f"{symbol} cannot be patched: upstream has no {part}")
    return _Place(symbol, holder, name, vars(holder).get(name, _MISSING))


def _fingerprint(place: _Place) -> str:
    if place.current is _MISSING:
        return ABSENT
    value = _plain(place.current)
    if isinstance(value, FunctionType):
        # The code object, because inspect follows __wrapped__: another plugin's wrapper would show upstream's source.
        value = value.__code__
    try:
        source = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError) as error:
        raise PatchError(f"{place.symbol} cannot be patched: its source cannot be read ({error})") from error
    return hashlib.sha256(source.encode()).hexdigest()


def _checked(patch: Patch, version: str) -> _Place:
    place = _locate(patch.symbol)
    found = _fingerprint(place)
    if found != patch.fingerprints[version]:
        raise PatchError(
            f"{patch.symbol} is not the source that its patch was written for (vLLM {version}: expected "
            f"{patch.fingerprints[version][:12]}, found {found[:12]}); another plugin may have replaced it"
        )
    return place


def _refuse_rivals(patches: Sequence[Patch]) -> None:
    symbols = [patch.symbol for patch in patches]
    for symbol in symbols:
        if symbols.count(symbol) > 1:
            raise PatchError(f"{symbol} has more than one patch")


def _put(patch: Patch, place: _Place) -> None:
    missing = place.current is _MISSING
    replacement = patch.make(None if missing else _plain(place.current))
    if isinstance(place.current, staticmethod | classmethod):
        replacement = type(place.current)(replacement)
    setattr(place.holder, place.name, replacement)
    _applied[patch] = _Applied(place, replacement)


def _plain(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value
