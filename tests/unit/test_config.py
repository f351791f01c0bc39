"""Settings: what is accepted, and how each mistake is refused."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from vllm_specbranch.config import CONFIG_ENV, SpecBranchConfig, load_bare_word_settings
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.setting_values import OnMiss


def test_defaults_are_those_of_the_design() -> None:
    config = SpecBranchConfig.from_user({"method": "specbranch", "model": "draft"})
    assert (config.num_speculative_tokens, config.policy, config.max_branches) == (8, "best_first", 32)
    assert (config.stop_rule, config.stop_threshold, config.on_miss) == ("none", 0.1, OnMiss("auto"))
    assert config.draft_placement == "process"
    assert config.reply_timeout_ms is None


@pytest.mark.parametrize(
    ("policy", "expected"), [("specbranch", ("confidence", 8)), ("fanout", ("none", 16)), ("pearl", ("none", 1))]
)
def test_each_policy_has_its_own_defaults(policy: str, expected: tuple[str, int]) -> None:
    config = SpecBranchConfig.from_user({"model": "draft", "policy": policy})
    assert (config.stop_rule, config.max_branches) == expected
    given = SpecBranchConfig.from_user({"model": "draft", "policy": policy, "stop_threshold": 0.4})
    assert (given.stop_rule, given.stop_threshold) == ("confidence", 0.4), "a threshold without a rule would do nothing"


def test_a_fixed_number_of_branches_is_a_matter_of_one_policy() -> None:
    assert (
        SpecBranchConfig.from_user({"model": "m", "policy": "specbranch", "branch_rule": "fixed"}).branch_rule
        == "fixed"
    )
    with pytest.raises(ConfigError, match="branch_rule"):
        SpecBranchConfig.from_user({"model": "m", "branch_rule": "fixed"})


def test_pearl_has_its_own_defaults_and_none_of_them_silently_wins_over_the_user() -> None:
    config = SpecBranchConfig.from_user({"model": "draft", "policy": "pearl"})
    assert (config.max_branches, config.stop_rule, config.on_miss) == (1, "none", OnMiss("go"))
    assert SpecBranchConfig.from_user({"model": "draft", "policy": "pearl", "on_miss": "wait:3"}).on_miss == OnMiss(
        "wait", 3
    )


def test_a_length_head_is_a_folder_or_learned_while_serving_and_none_is_with_pearl() -> None:
    given = {one: SpecBranchConfig.from_user({"model": "m", "length_head": one}) for one in (None, "online", "heads/a")}
    assert [(one.length_head, one.trained_head) for one in given.values()] == [
        (None, None),
        ("online", None),
        ("heads/a", "heads/a"),
    ]
    for head in ("online", "heads/a"):
        with pytest.raises(ConfigError, match="pearl") as caught:
            SpecBranchConfig.from_user({"model": "m", "policy": "pearl", "length_head": head})
        assert (caught.value.field, caught.value.value) == ("length_head", head)
    assert SpecBranchConfig.from_user({"model": "m", "policy": "pearl", "head_layers": 4}).head_layers == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_speculative_tokens", 0),
        ("num_speculative_tokens", 65),
        ("num_speculative_tokens", 8.0),
        ("num_speculative_tokens", True),
        ("num_speculative_tokens", "8"),
        ("policy", "fastest"),
        ("policy", 1),
        ("max_branches", 0),
        ("max_branches", 65),
        ("stop_rule", "entropy"),
        ("stop_threshold", 1.5),
        ("stop_threshold", -0.1),
        ("stop_threshold", float("nan")),
        ("on_miss", "wait"),
        ("on_miss", "wait:0"),
        ("on_miss", "wait:65"),
        ("on_miss", "wait:two"),
        ("on_miss", 3),
        ("length_head", ""),
        ("length_head", 1),
        ("length_head", True),
        ("head_layers", 0),
        ("head_layers", 65),
        ("head_layers", 2.0),
        ("draft_placement", "Ray"),
        ("draft_placement", "tcp://host"),
        ("draft_placement", "tcp://*:5600"),
        ("draft_placement", "tcp://host:0"),
        ("draft_placement", "ipc:///tmp/s"),
        ("draft_placement", 5600),
        ("draft_keys", "insecure"),
        ("draft_keys", ""),
        ("draft_keys", 3),
        ("draft_device", -1),
        ("draft_cpu_cores", []),
        ("draft_cpu_cores", "3-1"),
        ("draft_cpu_cores", "a"),
        ("draft_cpu_cores", [-1]),
        ("draft_cpu_cores", [1.5]),
        ("draft_kv_cache_bytes", 0),
        ("draft_gpu_memory_utilization", 0.0),
        ("draft_gpu_memory_utilization", 1.1),
        ("reply_timeout_ms", 0.5),
        ("reply_timeout_ms", 10_001),
        ("quantization", ""),
        ("max_model_len", 0),
        ("draft_tensor_parallel_size", 2),
        ("enforce_eager", "yes"),
        ("num_spec_tokens", 4),
    ],
)
def test_a_bad_setting_names_the_value_what_is_allowed_and_the_field(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        SpecBranchConfig.from_user({"model": "draft", key: value})
    assert caught.value.field == key
    assert repr(value) in str(caught.value)
    assert "allowed: " in str(caught.value)


@pytest.mark.parametrize("model", [None, "", 3])
def test_the_draft_model_is_required(model: object) -> None:
    with pytest.raises(ConfigError, match="model="):
        SpecBranchConfig.from_user({"model": model})


def test_pearl_has_one_chain() -> None:
    with pytest.raises(ConfigError, match="max_branches=4"):
        SpecBranchConfig.from_user({"model": "draft", "policy": "pearl", "max_branches": 4})


ON_RAY = {"model": "draft", "draft_placement": "ray"}


def test_what_the_actor_takes_can_be_said() -> None:
    config = SpecBranchConfig.from_user(ON_RAY)
    assert config.is_on_ray and not config.is_remote
    assert (config.draft_ray_num_cpus, config.draft_ray_num_gpus, config.draft_ray_resources) == (1.0, None, ())
    given = {"draft_ray_num_cpus": 2, "draft_ray_num_gpus": 0.5, "draft_ray_resources": {"b": 1, "a": 0.5}}
    config = SpecBranchConfig.from_user(ON_RAY | given)
    assert (config.draft_ray_num_cpus, config.draft_ray_num_gpus) == (2.0, 0.5)
    assert config.draft_ray_resources == (("a", 0.5), ("b", 1.0))
    hash(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("draft_ray_num_cpus", -1),
        ("draft_ray_num_cpus", "2"),
        ("draft_ray_num_gpus", 2),
        ("draft_ray_num_gpus", True),
        ("draft_ray_resources", ["draft_node"]),
        ("draft_ray_resources", {"": 1}),
        ("draft_ray_resources", {"CPU": 1}),
        ("draft_ray_resources", {"draft_node": 0}),
        ("draft_ray_resources", {"draft_node": True}),
        ("draft_ray_resources", {"draft_node": "1"}),
        ("draft_ray_resources", {1: 1}),
        ("draft_device", 0),
        ("draft_keys", "insecure"),
    ],
)
def test_what_ray_cannot_give_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        SpecBranchConfig.from_user(ON_RAY | {key: value})
    assert caught.value.field == key
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("draft_ray_num_cpus", 1), ("draft_ray_num_gpus", 0), ("draft_ray_resources", {"a": 1})]
)
@pytest.mark.parametrize("placement", [{}, {"draft_placement": "tcp://draft-0:5600", "draft_keys": "insecure"}])
def test_what_the_actor_takes_is_for_ray_alone(key: str, value: object, placement: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="draft_placement is 'ray'") as caught:
        SpecBranchConfig.from_user({"model": "draft", key: value} | placement)
    assert caught.value.field == key


REMOTE = {"model": "draft", "draft_placement": "tcp://draft-0:5600"}


@pytest.mark.parametrize("keys", ["insecure", "/etc/specbranch/keys"])
def test_an_address_needs_keys_or_the_word(keys: str) -> None:
    config = SpecBranchConfig.from_user(REMOTE | {"draft_keys": keys})
    assert (config.draft_placement, config.draft_keys, config.is_remote) == ("tcp://draft-0:5600", keys, True)
    assert not SpecBranchConfig.from_user({"model": "draft"}).is_remote
    with pytest.raises(ConfigError, match="a directory of keys or 'insecure'") as caught:
        SpecBranchConfig.from_user(REMOTE)
    assert caught.value.field == "draft_keys"


@pytest.mark.parametrize(
    "given",
    [
        "tcp://a:1,tcp://[::1]:2",
        "tcp://a:1, tcp://[::1]:2",
        ["tcp://a:1", "tcp://[::1]:2"],
        ("tcp://a:1", "tcp://[::1]:2"),
    ],
)
def test_several_servers_can_be_named(given: object) -> None:
    config = SpecBranchConfig.from_user({"model": "draft", "draft_placement": given, "draft_keys": "insecure"})
    assert config.draft_addresses == ("tcp://a:1", "tcp://[::1]:2")
    assert config.is_remote
    again = SpecBranchConfig.from_user(
        {"model": "draft", "draft_placement": config.draft_placement, "draft_keys": "insecure"}
    )
    assert again == config
    assert SpecBranchConfig.from_user({"model": "draft"}).draft_addresses == ()


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("tcp://a:1,tcp://b", "tcp://b"),
        ("tcp://a:1,process", "process"),
        ("tcp://a:1,", ""),
        (["tcp://a:1", "tcp://*:2"], "tcp://*:2"),
        (["tcp://a:1", 5600], 5600),
        (["tcp://a:1", "tcp://b:2", "tcp://a:1"], "tcp://a:1"),
        ([], []),
        ([""], [""]),
    ],
)
def test_each_of_several_addresses_is_checked(given: object, wrong: object) -> None:
    with pytest.raises(ConfigError) as caught:
        SpecBranchConfig.from_user({"model": "draft", "draft_placement": given, "draft_keys": "insecure"})
    assert (caught.value.field, caught.value.value) == ("draft_placement", wrong)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy", "specbranch"),
        ("max_branches", 4),
        ("branch_rule", "adaptive"),
        ("stop_rule", "none"),
        ("stop_threshold", 0.1),
        ("on_miss", "auto"),
        ("draft_device", 0),
        ("draft_cpu_cores", [1]),
        ("draft_kv_cache_bytes", 1000),
        ("draft_gpu_memory_utilization", 0.9),
        ("enforce_eager", True),
        ("length_head", "online"),
        ("deterministic", True),
    ],
)
def test_what_the_server_decides_cannot_be_set_by_an_engine_that_shares_it(key: str, value: object) -> None:
    """Refused even where it is the default: it would look as if it did something."""
    with pytest.raises(ConfigError) as caught:
        SpecBranchConfig.from_user(REMOTE | {"draft_keys": "insecure", key: value})
    assert caught.value.field == key


def test_the_users_dict_stays_as_it_was() -> None:
    settings = {"method": "specbranch", "model": "draft", "draft_cpu_cores": "0-2,5"}
    before = dict(settings)
    assert SpecBranchConfig.from_user(settings).draft_cpu_cores == (0, 1, 2, 5)
    assert settings == before


def test_every_setting_is_documented() -> None:
    for field in dataclasses.fields(SpecBranchConfig):
        assert field.name in (SpecBranchConfig.__doc__ or "")


def test_errors_and_settings_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(3, "4", "five")))
    assert (error.value, error.allowed, error.field) == (3, "4", "five")
    config = SpecBranchConfig.from_user({"model": "draft"})
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_bare_word_reads_the_file_beside_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    (tmp_path / "draft").mkdir()
    (tmp_path / "specbranch.json").write_text(json.dumps({"model": "draft", "policy": "pearl"}))
    settings = load_bare_word_settings(str(tmp_path))
    assert settings == {"model": str(tmp_path / "draft"), "policy": "pearl"}


def test_the_environment_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text('{"model": "org/draft"}')
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "mine.json"))
    assert load_bare_word_settings("/nowhere") == {"model": "org/draft"}


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_the_bare_word_without_a_good_file_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    if content is not None:
        (tmp_path / "specbranch.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_bare_word_settings(str(tmp_path))
    assert str(tmp_path / "specbranch.json") in str(caught.value)
    if content is None:
        assert '"model"' in str(caught.value)
        assert CONFIG_ENV in str(caught.value)


def test_each_stop_rule_has_a_threshold_of_its_own_scale() -> None:
    for rule, expected in (("confidence", 0.1), ("adaedl", 0.3), ("none", 0.1)):
        assert SpecBranchConfig.from_user({"model": "m", "stop_rule": rule}).stop_threshold == expected
    assert (
        SpecBranchConfig.from_user({"model": "m", "stop_rule": "adaedl", "stop_threshold": 0.5}).stop_threshold == 0.5
    )
