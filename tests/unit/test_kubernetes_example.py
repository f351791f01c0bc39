"""The Kubernetes example: valid by Kubernetes' own schemas, of one piece, and made of commands and settings that we take."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from vllm_specbranch import cli, keys
from vllm_specbranch.addresses import tcp_host_and_port
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.keys import load_client_keys, load_server_keys, make_keys

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "examples" / "kubernetes"
# The oldest and the newest release that somebody may run.
RELEASES = ("1.29", "1.34")
SOON_S = 30.0


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


KUSTOMIZATION = documents("kustomization.yaml")[0]
RESOURCES = [(one["kind"], one) for name in KUSTOMIZATION["resources"] for one in documents(name)]
DEPLOYMENTS = {one["metadata"]["name"]: one for kind, one in RESOURCES if kind == "Deployment"}
SERVICES = {one["metadata"]["name"]: one for kind, one in RESOURCES if kind == "Service"}
DRAFT, TARGET = DEPLOYMENTS["specbranch-draft"], DEPLOYMENTS["specbranch-target"]


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    "resource", [one for _, one in RESOURCES], ids=lambda one: f"{one['kind']} {one['metadata']['name']}"
)
def test_every_resource_is_valid(resource: dict[str, Any], release: str) -> None:
    kubernetes_validate.validate(resource, release, strict=True)


def test_the_validator_sees_a_misspelt_field() -> None:
    wrong = json.loads(json.dumps(DRAFT))
    container(wrong)["livenessProb"] = container(wrong).pop("livenessProbe")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, RELEASES[-1], strict=True)


def test_every_file_is_applied() -> None:
    assert {"kustomization.yaml", *KUSTOMIZATION["resources"]} == {path.name for path in FOLDER.glob("*.yaml")}
    (image,) = KUSTOMIZATION["images"]
    assert {container(one)["image"] for one in DEPLOYMENTS.values()} == {image["name"]}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_selectors_meet_their_pods(name: str) -> None:
    labels = DEPLOYMENTS[name]["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENTS[name]["spec"]["selector"]["matchLabels"] == labels
    assert SERVICES[name]["spec"]["selector"] == labels
    ports = {one["name"]: one["containerPort"] for one in container(DEPLOYMENTS[name])["ports"]}
    for one in SERVICES[name]["spec"]["ports"]:
        assert one["targetPort"] in ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        found = container(DEPLOYMENTS[name])[probe]
        used = [found[kind]["port"] for kind in ("httpGet", "tcpSocket") if kind in found]
        assert all(port in ports for port in used)
        assert used or found["exec"]
    readiness, liveness = (container(DEPLOYMENTS[name])[probe] for probe in ("readinessProbe", "livenessProbe"))
    assert readiness != liveness


def test_only_targets_reach_the_pool() -> None:
    (policy,) = (one for kind, one in RESOURCES if kind == "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == DRAFT["spec"]["template"]["metadata"]["labels"]
    rules = {rule["ports"][0]["port"]: rule["from"] for rule in policy["spec"]["ingress"] if len(rule["ports"]) == 1}
    assert len(rules) == len(policy["spec"]["ingress"])
    assert rules.keys() == {"draft", "http"}
    (allowed,) = rules["draft"]
    assert allowed["podSelector"]["matchLabels"] == TARGET["spec"]["template"]["metadata"]["labels"]
    (allowed,) = rules["http"]
    assert allowed.keys() == {"namespaceSelector"}


def test_the_pool_s_command_is_ours() -> None:
    draft = container(DRAFT)
    program, *words = [*draft["command"], *draft["args"]]
    assert program == "vllm-specbranch"
    args = cli._parser().parse_args(words)
    _, port = tcp_host_and_port(args.bind, to_bind=True)
    _, http_port = tcp_host_and_port(f"tcp://{args.http}", to_bind=True)
    assert {one["name"]: one["containerPort"] for one in draft["ports"]} == {"draft": port, "http": http_port}
    notes = DRAFT["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(http_port)
    assert str(args.keys) in [one["mountPath"] for one in draft["volumeMounts"]]


def test_the_target_s_settings_fit_the_pool() -> None:
    target, draft = container(TARGET), container(DRAFT)
    (text,) = (word.partition("=")[2] for word in target["args"] if word.startswith("--speculative-config="))
    config = SpecBranchConfig.from_user(json.loads(text))
    host, port = tcp_host_and_port(config.draft_placement)
    assert [one["port"] for one in SERVICES[host]["spec"]["ports"]] == [port]
    assert config.draft_keys in [one["mountPath"] for one in target["volumeMounts"]]
    server = cli._parser().parse_args([*draft["command"], *draft["args"]][1:])
    assert config.model == server.model
    given = dict(word.lstrip("-").split("=", 1) for word in target["args"] if word.startswith("--"))
    assert (given["dtype"], int(given["max-model-len"])) == (server.dtype, server.max_model_len)


@pytest.mark.parametrize(
    ("deployment", "load"), [(DRAFT, load_server_keys), (TARGET, load_client_keys)], ids=["draft", "target"]
)
def test_each_side_gets_its_half_of_the_keys(deployment: dict[str, Any], load: Any, tmp_path: Path) -> None:
    """Made by the command, named by the kustomization, mounted as the deployment says, and then loaded as our code does."""
    source, mounted = tmp_path / "keys", tmp_path / "mounted"
    make_keys(source)
    (volume,) = (one["secret"] for one in deployment["spec"]["template"]["spec"]["volumes"] if "secret" in one)
    (generator,) = (one for one in KUSTOMIZATION["secretGenerator"] if one["name"] == volume["secretName"])
    files = dict(word.split("=") for word in generator["files"])
    places = {one["key"]: one["path"] for one in volume.get("items", [])} or {name: name for name in files}
    assert places.keys() == files.keys()
    secrets = {path for path in files.values() if path.endswith("_secret")}
    assert len(secrets) == 1, "not the other side's"
    for name, path in places.items():
        (mounted / path).parent.mkdir(parents=True, exist_ok=True)
        (mounted / path).write_bytes((tmp_path / files[name]).read_bytes())
        (mounted / path).chmod(volume["defaultMode"])
    load(mounted)


def test_keys_are_not_committed(tmp_path: Path) -> None:
    assert "kubernetes/keys/" in (FOLDER.parent / ".gitignore").read_text().split()
    assert {
        path.parts[0]
        for path in (Path(word.split("=")[1]) for one in KUSTOMIZATION["secretGenerator"] for word in one["files"])
    } == {"keys"}
    assert keys.SERVER_SECRET in (FOLDER / "kustomization.yaml").read_text()


# --- the probes, of a draft server that hangs or ends -------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator["subprocess.Popen[str]"]:
    words = ["tcp://127.0.0.1:0", "insecure", "1000", "127.0.0.1:0"]
    command = [sys.executable, "-m", "tests.fake_draft_server", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as found:
        yield found
        found.kill()


def probe(name: str, port: str) -> bool:
    """Ask what the manifest asks, for as long as it waits."""
    words = container(DRAFT)[name]
    assert words["httpGet"]["port"] == "http"
    url = f"http://127.0.0.1:{port}{words['httpGet']['path']}"
    try:
        with urllib.request.urlopen(url, timeout=words.get("timeoutSeconds", 1)) as answer:
            return 200 <= answer.status < 400
    except OSError:
        return False


def test_the_probes_see_a_server_that_hangs(server: "subprocess.Popen[str]") -> None:
    assert server.stdout is not None
    port = server.stdout.readline().split()[2]
    names = ("startupProbe", "readinessProbe", "livenessProbe")
    until = time.monotonic() + SOON_S
    while not all(probe(name, port) for name in names):
        assert time.monotonic() < until
    os.kill(server.pid, signal.SIGSTOP)
    assert not any(probe(name, port) for name in names), "the kernel still takes connections for it"
    os.kill(server.pid, signal.SIGCONT)
    until = time.monotonic() + SOON_S
    while not all(probe(name, port) for name in names):
        assert time.monotonic() < until
    server.kill()
    server.wait()
    assert not any(probe(name, port) for name in names)
