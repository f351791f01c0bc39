"""Tests of the entry point: what it changes in vLLM, what it leaves alone, and the register of patches."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_specbranch import patches, patching, plugin

FRONTEND = [patch for patch in plugin.all_patches() if patch.process == "frontend"]
METRICS = [patch for patch in plugin.all_patches() if patch.process == "metrics"]
WORKER = [patch for patch in plugin.all_patches() if patch.process == "worker"]


@pytest.fixture
def untouched_vllm() -> Iterator[None]:
    """VLLM as it comes: the entry point may have run in this process before, and may have to be there again after."""
    import vllm

    version = vllm.__version__
    there = [patch for patch in plugin.all_patches() if patching.is_applied(patch)]
    patching.revert(there)
    yield
    patching.revert(plugin.all_patches())
    if there:
        patching.apply(there, version)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            messages.append(entry.getMessage())

    handler = Keep(logging.WARNING)
    plugin.logger.addHandler(handler)
    yield messages
    plugin.logger.removeHandler(handler)


def namespaces() -> list[Any]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    holders = (
        EngineArgs,
        SamplingParams,
        GPUModelRunner,
        Sampler,
        rejection_sampler,
        topk_topp_sampler,
        StatLoggerManager,
    )
    return [dict(vars(holder)) for holder in holders]


def test_readme_is_what_the_records_say() -> None:
    readme = Path(patches.__path__[0]) / "README.md"
    assert readme.read_text() == patching.render_readme(plugin.all_patches()), (
        "write it again: python -m vllm_specbranch.patches > patches/README.md"
    )


def test_every_record_says_why_and_until_when_and_agrees_on_versions() -> None:
    assert patching.verified_versions(plugin.all_patches()) == ("0.32.0",)
    for patch in plugin.all_patches():
        assert patch.why and patch.remove_when
        assert all(len(digest) == 64 for digest in patch.fingerprints.values())


def test_importing_the_plugin_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from vllm_specbranch import plugin; plugin.all_patches(); import vllm_specbranch.patches.__main__;"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_register_applies_the_frontend_hooks_only_and_only_once(untouched_vllm: None) -> None:
    before = namespaces()
    plugin.register()
    once = namespaces()
    plugin.register()
    assert namespaces() == once
    assert all(patching.is_applied(patch) for patch in FRONTEND)
    assert not any(patching.is_applied(patch) for patch in WORKER)
    changed = {name for old, new in zip(before, once, strict=True) for name in old if old[name] is not new[name]}
    assert changed == {"add_cli_args", "create_speculative_config", "_validate_spec_decode"}
    patching.revert(FRONTEND)
    assert namespaces() == before


def test_metrics_patches_are_applied_when_settings_that_choose_us_become_a_config(untouched_vllm: None) -> None:
    before = namespaces()
    plugin.apply_metrics_patches()
    plugin.apply_metrics_patches()
    assert [patch for patch in plugin.all_patches() if patching.is_applied(patch)] == METRICS
    assert len(METRICS) == 1
    patching.revert(METRICS)
    assert namespaces() == before


def test_worker_patches_are_the_rest(untouched_vllm: None) -> None:
    before = namespaces()
    plugin.apply_worker_patches()
    plugin.apply_worker_patches()
    assert all(patching.is_applied(patch) for patch in WORKER)
    assert {patch.process for patch in plugin.all_patches()} == {"frontend", "worker", "metrics"}
    patching.revert(WORKER)
    assert namespaces() == before


def test_another_vllm_is_left_alone_with_one_warning(
    untouched_vllm: None, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = namespaces()
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    plugin.register()
    assert namespaces() == before
    assert len(warnings) == 1
    assert all(part in warnings[0] for part in ("0.31.2", "0.32.0", "'specbranch' will be refused"))


def test_a_rival_plugin_is_named_and_vllm_left_alone(
    untouched_vllm: None, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def rival(self: Any, target_model_config: Any, target_parallel_config: Any) -> None:
        return None

    monkeypatch.setattr(EngineArgs, "create_speculative_config", rival)
    before = namespaces()
    plugin.register()
    assert namespaces() == before
    assert len(warnings) == 1
    assert "EngineArgs.create_speculative_config" in warnings[0]


def test_worker_patches_do_raise(untouched_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(patching.PatchError, match=r"0\.33\.0.*0\.32\.0"):
        plugin.apply_worker_patches()
