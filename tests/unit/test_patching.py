"""Tests of the patch record against a made-up upstream module: no vLLM, no torch."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_specbranch import patching
from vllm_specbranch.errors import PatchError
from vllm_specbranch.patching import ABSENT, Kind, Patch

UPSTREAM = "specbranch_fake_upstream"
VERSION = "1.2.3"
SOURCE = """
def double(value):
    return value * 2


class Runner:
    offset = 1

    def run(self, value):
        return value + self.offset

    @staticmethod
    def parse(text):
        return int(text)

    @classmethod
    def make(cls, offset):
        runner = cls()
        runner.offset = offset
        return runner


class Sub(Runner):
    pass
"""


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / f"{UPSTREAM}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(UPSTREAM, None)
    yield importlib.import_module(UPSTREAM)
    patching.revert(patch for patch in list(patching._applied) if patch.symbol.startswith(UPSTREAM))
    sys.modules.pop(UPSTREAM, None)


def plus_hundred(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any) -> Any:
        return original(*args) + 100

    return wrapped


def record(
    path: str, make: Callable[[Any], Any] = plus_hundred, kind: Kind = "wrap", digest: str | None = None
) -> Patch:
    symbol = f"{UPSTREAM}:{path}"
    fingerprints = {VERSION: patching.fingerprint(symbol) if digest is None else digest}
    return Patch(symbol, kind, "worker", "why", "never", fingerprints, make)


def test_fingerprint_is_the_sha256_of_the_dedented_source(upstream: ModuleType) -> None:
    import hashlib
    import textwrap

    source = textwrap.dedent(inspect.getsource(upstream.Runner.run))
    assert source.startswith("def run")
    assert patching.fingerprint(f"{UPSTREAM}:Runner.run") == hashlib.sha256(source.encode()).hexdigest()


@pytest.mark.parametrize("path", ["double", "Runner.run", "Runner.parse", "Runner.make"])
def test_apply_and_revert_restore_the_very_object(upstream: ModuleType, path: str) -> None:
    holder = upstream.Runner if "." in path else upstream
    name = path.rpartition(".")[2]
    before = vars(holder)[name]
    make = plus_hundred if name != "make" else lambda original: lambda cls, offset: original(cls, offset + 100)
    patch = record(path, make)

    patching.apply([patch], VERSION)
    assert patching.is_applied(patch)
    assert type(vars(holder)[name]) is type(before)
    assert vars(holder)[name] is not before
    runner = upstream.Runner()
    called = {"double": lambda: upstream.double(2), "run": lambda: runner.run(3), "parse": lambda: runner.parse("4")}
    if name == "make":
        assert upstream.Sub.make(7).offset == 107
        assert type(upstream.Sub.make(7)) is upstream.Sub
    else:
        assert called[name]() == 104

    patching.revert([patch])
    assert vars(holder)[name] is before
    assert not patching.is_applied(patch)


def test_applying_twice_is_a_no_op(upstream: ModuleType) -> None:
    patch = record("double")
    patching.apply([patch, patch], VERSION)
    once = upstream.double
    patching.apply([patch], VERSION)
    assert upstream.double is once
    assert upstream.double(1) == 102


def test_reverting_what_is_not_applied_is_a_no_op(upstream: ModuleType) -> None:
    before = upstream.double
    patching.revert([record("double")])
    assert upstream.double is before


def test_add_gives_a_name_and_revert_takes_it_away(upstream: ModuleType) -> None:
    patch = record("Runner.stop", lambda original: lambda self: original, "add", digest=ABSENT)
    patching.apply([patch], VERSION)
    assert upstream.Runner().stop() is None
    patching.revert([patch])
    assert not hasattr(upstream.Runner, "stop")


def test_add_refuses_a_name_that_upstream_has(upstream: ModuleType) -> None:
    with pytest.raises(PatchError, match=r"Runner\.run"):
        patching.apply([record("Runner.run", digest=ABSENT, kind="add")], VERSION)


def test_one_wrong_fingerprint_stops_all(upstream: ModuleType) -> None:
    before = (upstream.double, upstream.Runner.run)
    with pytest.raises(PatchError, match=rf"{UPSTREAM}:Runner\.run"):
        patching.apply([record("double"), record("Runner.run", digest="0" * 64)], VERSION)
    assert (upstream.double, upstream.Runner.run) == before


def test_a_failing_factory_leaves_nothing_behind(upstream: ModuleType) -> None:
    def fails(original: Any) -> Any:
        raise RuntimeError("no")

    before = (upstream.double, upstream.Runner.run)
    first = record("double")
    with pytest.raises(RuntimeError):
        patching.apply([first, record("Runner.run", fails)], VERSION)
    assert (upstream.double, upstream.Runner.run) == before
    assert not patching.is_applied(first)


def test_another_plugins_wrapper_is_a_mismatch_even_with_functools_wraps(upstream: ModuleType) -> None:
    patch = record("double")
    upstream.double = plus_hundred(upstream.double)
    with pytest.raises(PatchError, match=rf"{UPSTREAM}:double.*another plugin"):
        patching.apply([patch], VERSION)


def test_a_replacement_without_source_is_refused_by_name(upstream: ModuleType) -> None:
    patch = record("double")
    upstream.double = functools.partial(pow, 2)
    with pytest.raises(PatchError, match=f"{UPSTREAM}:double"):
        patching.apply([patch], VERSION)


def test_revert_refuses_to_drop_a_later_patch_of_somebody_else(upstream: ModuleType) -> None:
    patch = record("double")
    patching.apply([patch], VERSION)
    ours = upstream.double
    upstream.double = plus_hundred(ours)
    with pytest.raises(PatchError, match=f"{UPSTREAM}:double"):
        patching.revert([patch])
    assert patching.is_applied(patch)
    patching.apply([patch], VERSION)  # still a no-op: ours is below
    assert upstream.double(1) == 202
    upstream.double = ours


def test_two_records_for_one_symbol_are_refused(upstream: ModuleType) -> None:
    with pytest.raises(PatchError, match=f"{UPSTREAM}:double"):
        patching.apply([record("double"), record("double")], VERSION)
    first, second = record("double"), record("double")
    patching.apply([first], VERSION)
    with pytest.raises(PatchError, match=f"{UPSTREAM}:double"):
        patching.apply([second], VERSION)


@pytest.mark.parametrize("version", ["1.2.3", "1.2.3+cpu", "1.2.3+cu130"])
def test_the_local_part_of_a_version_is_ignored(upstream: ModuleType, version: str) -> None:
    patch = record("double")
    patching.apply([patch], version)
    assert patching.is_applied(patch)


@pytest.mark.parametrize("version", ["1.2.4", "1.2.3rc1", "1.2.3.post1", "1.2", "", "+cpu"])
def test_other_versions_are_refused_and_the_verified_ones_named(upstream: ModuleType, version: str) -> None:
    before = upstream.double
    with pytest.raises(PatchError, match=r"1\.2\.3"):
        patching.apply([record("double")], version)
    assert upstream.double is before


def test_a_version_must_be_verified_for_every_patch(upstream: ModuleType) -> None:
    newer = Patch(f"{UPSTREAM}:Runner.run", "wrap", "worker", "", "", {"1.2.4": "0" * 64}, plus_hundred)
    assert patching.verified_versions([record("double"), newer]) == ()
    with pytest.raises(PatchError, match="none"):
        patching.apply([record("double"), newer], VERSION)


@pytest.mark.parametrize("symbol", ["no_such_module_here:f", f"{UPSTREAM}:NoClass.f", f"{UPSTREAM}:no_function"])
def test_a_missing_symbol_is_named(upstream: ModuleType, symbol: str) -> None:
    patch = Patch(symbol, "wrap", "worker", "", "", {VERSION: "0" * 64}, plus_hundred)
    with pytest.raises(PatchError, match=symbol):
        patching.apply([patch], VERSION)


def test_an_inherited_attribute_is_not_the_subclass_s_own(upstream: ModuleType) -> None:
    assert patching.fingerprint(f"{UPSTREAM}:Sub.run") == ABSENT


def test_nothing_is_imported_before_a_patch_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{UPSTREAM}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    patch = Patch(f"{UPSTREAM}:double", "wrap", "worker", "", "", {VERSION: "0" * 64}, plus_hundred)
    assert not patching.is_applied(patch)
    patching.render_readme([patch])
    patching.apply([], VERSION)
    with pytest.raises(PatchError):
        patching.apply([patch], "9.9.9")
    assert UPSTREAM not in sys.modules


def test_readme_has_one_row_for_each_patch_and_escapes_bars() -> None:
    patch = Patch("a:b", "wrap", "worker", "this | that\n  and more", "never", {"1.0": "ab" * 32}, plus_hundred)
    rows = [line for line in patching.render_readme([patch]).splitlines() if line.startswith("| `")]
    assert rows == ["| `a:b` | wrap | worker | this \\| that and more | never | 1.0 (`abababababab`) |"]
