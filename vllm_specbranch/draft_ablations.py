"""Parts of the draft server that a benchmark can take away, to measure what each is worth.

Owns the names of the parts and how each is taken away: by a simpler method of the same class in its place. Not a setting, and not
imported by anything that serves: `observed_draft_main` and replays use it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from vllm_specbranch.acceptance import AcceptanceModel
from vllm_specbranch.draft_peers import Peer
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.load_gate import LoadGate
from vllm_specbranch.planner import Planner


def _all_rows(self: Planner, values: Sequence[float], row_cost: float) -> int:
    del self, row_cost
    return len(values)


def _nothing(*_args: Any, **_keywords: Any) -> None:
    return None


# (class, attribute, what is there instead) by the name of the part.
PARTS: Mapping[str, tuple[type, str, Any]] = {
    "replies in flight": (DraftServer, "takes_messages_in_flight", False),
    "row budget": (Planner, "num_rows", _all_rows),
    "calibration": (AcceptanceModel, "observe", _nothing),
    "price of verification": (Peer, "price", property(lambda _: 0.0)),
    "trials under load": (LoadGate, "is_on", True),
}


@contextlib.contextmanager
def without(parts: Iterable[str]) -> Iterator[None]:
    """Take parts away, in this process, for as long as the context is open.

    Raises:
        ConfigError: a part of no such name.
    """
    with contextlib.ExitStack() as stack:
        for name in parts:
            if name not in PARTS:
                raise ConfigError(name, "some of " + ", ".join(map(repr, PARTS)), "without")
            owner, attribute, instead = PARTS[name]
            stack.enter_context(mock.patch.object(owner, attribute, instead))
        yield
