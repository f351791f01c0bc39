"""Tests of the way from a user's settings to vLLM's config, with real configs of small models and no weights loaded."""

import copy
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specbranch import patching, speculative_config
from vllm_specbranch.config import CONFIG_ENV, CONFIG_FILE_NAME, SpecBranchConfig
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.keys import make_keys
from vllm_specbranch.patches import arg_utils
from vllm_specbranch.shipped_pair import draft_path, target_path

MakeModel = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def hooks() -> Iterator[None]:
    there = [patch for patch in arg_utils.PATCHES if patching.is_applied(patch)]
    patching.apply(arg_utils.PATCHES, "0.32.0")
    yield
    patching.revert([patch for patch in arg_utils.PATCHES if patch not in there])


@pytest.fixture(autouse=True)
def no_config_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Make a folder with the shipped draft's config, changed."""

    def make(name: str = "model", weights: bool = True, **changes: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(draft_path() / file, folder)
        config = json.loads((draft_path() / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        if weights:
            (folder / "model.safetensors").symlink_to(draft_path() / "model.safetensors")
        return str(folder)

    return make


def engine_args(speculative: Any, target: str | None = None, **given: Any) -> Any:
    from vllm import EngineArgs

    return EngineArgs(model=target or str(target_path()), speculative_config=speculative, dtype="float32", **given)


def ours(**settings: object) -> dict[str, object]:
    return {"method": "specbranch", "model": str(draft_path())} | settings


def refused(args: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        args.create_engine_config()
    return caught.value


def test_vllm_s_config_carries_ours() -> None:
    user = ours(**{"num-speculative-tokens": 5, "max_branches": 3})
    given = copy.deepcopy(user)
    args = engine_args(user)
    vllm_config = args.create_engine_config()
    config = vllm_config.speculative_config

    assert (config.method, config.model) == ("custom_class", "vllm_specbranch.proposer.Proposer")
    assert config.num_speculative_tokens == config.specbranch.num_speculative_tokens == 5
    assert config.specbranch.max_branches == 3
    assert (config.draft.model, config.draft.max_model_len) == (str(draft_path()), 2048)
    assert (config.draft.dtype, config.draft.vocab_size) == ("float32", 4096)
    assert vllm_config.parallel_config.worker_cls == "vllm_specbranch.worker.SpecBranchCPUWorker"
    assert vllm_config.scheduler_config.scheduler_cls == "vllm_specbranch.scheduler.SpecBranchScheduler"
    assert vllm_config.scheduler_config.async_scheduling is False
    assert not vllm_config.use_v2_model_runner

    assert user == given
    assert args.speculative_config is user
    again = args.create_engine_config().speculative_config
    assert (again.specbranch, again.draft) == (config.specbranch, config.draft)

    copied = pickle.loads(pickle.dumps(vllm_config)).speculative_config
    assert type(copied) is type(config)
    assert (copied.specbranch, copied.draft) == (config.specbranch, config.draft)


def test_the_hash_is_upstream_s_for_the_same_target() -> None:
    from vllm.config import SpeculativeConfig

    config = engine_args(ours()).create_engine_config().speculative_config
    other = engine_args(ours(policy="pearl")).create_engine_config().speculative_config
    plain = SpeculativeConfig(
        method="custom_class",
        model=config.model,
        num_speculative_tokens=8,
        target_model_config=config.target_model_config,
        target_parallel_config=config.target_parallel_config,
    )
    assert config.compute_hash() == other.compute_hash() == plain.compute_hash()


def test_the_flags_are_merged() -> None:
    args = engine_args({"max_branches": 2}, spec_method="specbranch", spec_model=str(draft_path()), spec_tokens=4)
    for _ in range(2):
        settings = args.create_engine_config().speculative_config.specbranch
        assert (settings.num_speculative_tokens, settings.max_branches) == (4, 2)
    assert args.speculative_config == {"max_branches": 2}


def test_a_flag_and_its_key_exclude_each_other() -> None:
    error = refused(engine_args(ours(), spec_model="other"))
    assert error.field == "--spec-model"
    assert refused(engine_args({"method": "ngram"}, spec_method="specbranch")).field == "--spec-method"


@pytest.mark.parametrize("typed", [{"method": "specbranch"}, "specbranch"])
def test_the_bare_word_reads_the_file_beside_the_target(make_model: MakeModel, typed: Any) -> None:
    target = make_model("target")
    (Path(target) / CONFIG_FILE_NAME).write_text(json.dumps({"model": str(draft_path()), "num_speculative_tokens": 3}))
    config = engine_args(typed, target).create_engine_config().speculative_config
    assert (config.num_speculative_tokens, config.draft.model) == (3, str(draft_path()))


def test_keys_are_read_before_weights_load(tmp_path: Path) -> None:
    remote = {"draft_placement": "tcp://127.0.0.1:5600"}
    error = refused(engine_args(ours(**remote, draft_keys=str(tmp_path / "missing"))))
    assert error.field == "draft_keys"
    assert "client.key_secret" in str(error)
    make_keys(tmp_path / "keys")
    for keys in (str(tmp_path / "keys"), "insecure"):
        config = engine_args(ours(**remote, draft_keys=keys)).create_engine_config().speculative_config
        assert config.specbranch.draft_keys == keys
        assert config.specbranch.draft_device is None


def test_the_bare_word_without_a_file_says_what_to_write(make_model: MakeModel) -> None:
    target = make_model("target")
    message = str(refused(engine_args({"method": "specbranch"}, target)))
    assert target in message
    assert CONFIG_FILE_NAME in message


@pytest.mark.parametrize("field", ["no_such_key", "num_speculative_tokens"])
def test_bad_settings_are_ours_to_refuse(field: str) -> None:
    assert refused(engine_args(ours(**{field: 0}))).field == field


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./no/folder", "~nobody-here/model", "org/not-cached", "not a name"]
)
def test_a_missing_draft_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(engine_args(ours(model=model)))
    assert (error.field, error.value) == ("model", model)


def test_a_folder_that_is_no_model(tmp_path: Path, make_model: MakeModel) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(engine_args(ours(model=str(empty)))).field == "model"
    odd = make_model("odd", architectures=["NoSuchModel"], model_type="nope")
    assert refused(engine_args(ours(model=odd))).field == "model"


def test_a_folder_without_weights(make_model: MakeModel) -> None:
    model = make_model(weights=False)
    error = refused(engine_args(ours(model=model)))
    assert error.field == "model"
    assert "*.safetensors" in error.allowed
    dummy = engine_args(ours(model=model), load_format="dummy").create_engine_config()
    assert dummy.speculative_config.draft.model == model


def test_another_vocabulary_size(make_model: MakeModel) -> None:
    error = refused(engine_args(ours(model=make_model(vocab_size=4097))))
    assert error.field == "model"
    assert "4096" in error.allowed
    assert "4097" in error.allowed


def change_tokenizer(model: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = Path(model) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def test_another_vocabulary_of_the_same_size(make_model: MakeModel) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        first, second = list(vocabulary)[500:502]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    model = make_model()
    change_tokenizer(model, swap)
    error = refused(engine_args(ours(model=model)))
    assert error.field == "model"
    assert "tokenizers differ, first at id" in error.allowed


def test_tokenizers_that_differ_elsewhere_are_fine(make_model: MakeModel) -> None:
    model = make_model()
    change_tokenizer(model, lambda tokenizer: tokenizer.update(truncation=None, note="x"))
    assert engine_args(ours(model=model)).create_engine_config().speculative_config.draft.model == model
    (Path(model) / "tokenizer.json").write_text("{")
    assert engine_args(ours(model=model)).create_engine_config().speculative_config.draft.model == model


@pytest.mark.parametrize(
    ("draft_context", "wanted", "expected"),
    [(1024, None, 1024), (4096, None, 2048), (1024, 512, 512), (4096, 3000, 2048)],
)
def test_the_effective_context(make_model: MakeModel, draft_context: int, wanted: int | None, expected: int) -> None:
    from vllm_specbranch.speculative_config import logger

    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda entry: messages.append(entry.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        args = engine_args(ours(model=make_model(max_position_embeddings=draft_context), max_model_len=wanted))
        assert args.create_engine_config().speculative_config.draft.max_model_len == expected
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert len(messages) == (expected < 2048)


def test_max_model_len_beyond_the_draft_s_context(make_model: MakeModel) -> None:
    error = refused(engine_args(ours(model=make_model(max_position_embeddings=1024), max_model_len=1025)))
    assert (error.field, error.value) == ("max_model_len", 1025)
    assert "1024" in error.allowed


def test_what_the_engine_must_not_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (
        {"pipeline_parallel_size": 2},
        {"async_scheduling": True},
        {"scheduler_cls": "other.Scheduler"},
        {"worker_cls": "other.Worker"},
    ):
        error = refused(engine_args(ours(), **given))
        assert {error.field: error.value} == given
    assert refused(engine_args(ours(draft_tensor_parallel_size=2))).field == "draft_tensor_parallel_size"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert refused(engine_args(ours())).field == "VLLM_USE_V2_MODEL_RUNNER"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    engine_args(ours()).create_engine_config()


def test_our_own_classes_may_be_named() -> None:
    given = {
        "worker_cls": "vllm_specbranch.worker.SpecBranchCPUWorker",
        "scheduler_cls": "vllm_specbranch.scheduler.SpecBranchScheduler",
    }
    vllm_config = engine_args(ours(), **given).create_engine_config()
    assert vllm_config.parallel_config.worker_cls == given["worker_cls"]


class Gpus(SimpleNamespace):
    """A machine with GPUs 4 to 7 visible, as far as placement asks."""

    def is_cpu(self) -> bool:
        return False

    def device_count(self) -> int:
        return 4

    def visible_device_id_to_physical_device_id(self, device_id: int) -> int:
        return 4 + device_id


@pytest.mark.parametrize(("world_size", "wanted", "expected"), [(1, None, 5), (3, None, 7), (4, 4, 4), (1, 0, 0)])
def test_the_draft_server_gets_a_gpu_that_the_target_does_not_use(
    monkeypatch: pytest.MonkeyPatch, world_size: int, wanted: int | None, expected: int
) -> None:
    monkeypatch.setattr(speculative_config, "current_platform", Gpus())
    settings = SpecBranchConfig.from_user({"model": "draft", "draft_device": wanted})
    parallel = SimpleNamespace(world_size=world_size, data_parallel_size_local=1, data_parallel_rank_local=None)
    assert speculative_config._place_on_device(settings, parallel).draft_device == expected


def test_without_a_free_gpu_the_user_must_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative_config, "current_platform", Gpus())
    parallel = SimpleNamespace(world_size=4, data_parallel_size_local=1, data_parallel_rank_local=None)
    with pytest.raises(ConfigError, match="takes 4 of 4 visible"):
        speculative_config._place_on_device(SpecBranchConfig.from_user({"model": "draft"}), parallel)


def test_there_is_no_draft_gpu_on_a_cpu_machine() -> None:
    settings = SpecBranchConfig.from_user({"model": "draft", "draft_device": 1})
    with pytest.raises(ConfigError, match="draft_device=1"):
        speculative_config._place_on_device(settings, SimpleNamespace())


def test_ray_chooses_the_device_and_the_engine_s_processes_are_told_which_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose(*_: object) -> None:
        raise AssertionError("that is for Ray to do")

    monkeypatch.setattr(speculative_config, "_place_on_device", choose)
    monkeypatch.setattr(speculative_config, "connected_address", lambda: "10.0.0.1:6379")
    config = engine_args(ours(draft_placement="ray")).create_engine_config().speculative_config
    assert pickle.loads(pickle.dumps(config)).ray_address == "10.0.0.1:6379"
    assert config.specbranch.draft_device is None


def test_ray_must_be_there_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))
    monkeypatch.setattr("vllm_specbranch.ray_cluster.importlib", nothing)
    assert refused(engine_args(ours(draft_placement="ray"))).field == "draft_placement"
