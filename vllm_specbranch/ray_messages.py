"""What the engine's worker, its Ray driver and the draft server's actor tell each other, as JSON. Data goes another way.

    worker (`ray_placement`) --Order, then a start's number per line--> driver (`ray_driver`) --Order, number--> actor (`ray_actor`)
                             <----------- Placed, Ended ---------------                       <----- Placed ----

Owns the forms; any process.
"""

from typing import Any

import msgspec

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_model import DraftModelSettings

# The Ray namespace of all draft servers.
NAMESPACE = "specbranch"


class TargetPlace(msgspec.Struct, frozen=True):
    """What is known of where the target runs.

    Attributes:
        address: of the Ray cluster, as `ray.init` takes it; None leaves it to Ray.
        node_id: the node of the target's worker; None if that worker is not Ray's: then it is the driver's.
        placement_group: hexadecimal id of the target's placement group, if there is one.
        runtime_env: that of the engine.
    """

    address: str | None = None
    node_id: str | None = None
    placement_group: str | None = None
    runtime_env: dict[str, Any] = {}


class Order(msgspec.Struct, frozen=True):
    """A draft server that is wanted.

    Attributes:
        name: of its actor; no other has it.
        target: where the target runs.
        resources: what the actor takes of its node, by Ray's names.
        directory: of the engine, private: sockets go there when the actor is on the same machine.
        client_key: the engine's public key, for when it is not.
        cores: for the draft server on the target's node; None leaves it unbound.
        on_cpu: whether the draft model runs on CPUs.
        environment: variables that the draft server gets where its node does not set them.
        module: what is run, with its arguments.
        model, config: what it loads, and the engine's settings.
    """

    name: str
    target: TargetPlace
    resources: dict[str, float]
    directory: str
    client_key: str
    cores: tuple[int, ...] | None
    on_cpu: bool
    environment: dict[str, str]
    module: tuple[str, ...]
    model: DraftModelSettings
    config: SpecBranchConfig


class Placed(msgspec.Struct, frozen=True, tag=True):
    """A draft server has been started.

    Attributes:
        number: of the start.
        address: where it listens.
        pid: its process id, on its node.
        node_id: that node.
        server_key: its public key, for TCP.
    """

    number: int
    address: str
    pid: int
    node_id: str
    server_key: str | None = None


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A start has come to its end, perhaps before anything was placed.

    Attributes:
        number: of the start.
        reason: in words.
        status: the draft server's exit status, where that is what ended.
    """

    number: int
    reason: str
    status: int | None = None


Report = Placed | Ended


def read_report(line: bytes) -> Report:
    """What the driver says on a line.

    Raises:
        msgspec.DecodeError: it is no report.
    """
    report: Report = msgspec.json.decode(line, type=Report)
    return report
