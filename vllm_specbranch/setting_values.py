"""What a user's value of a setting may be: each function takes (value, name of the setting) and returns it in the form we keep.

All of them raise `ConfigError` with the value, what is allowed, and the name. Knows nothing of the settings themselves, which are
`config.SpecBranchConfig`'s. Pure Python, every process.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from vllm_specbranch.addresses import is_tcp, tcp_host_and_port
from vllm_specbranch.errors import ConfigError, WireError

# What Ray has names of its own for.
_RAY_OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class OnMiss:
    """What a request does after a miss (section 4 of the design).

    Attributes:
        kind: `go` submits what there is (often nothing), `wait` waits for `num_tokens`, `auto` weighs gain against cost.
        num_tokens: for `wait`: drafted tokens to wait for, 1..64; 0 otherwise.
    """

    kind: Literal["auto", "go", "wait"]
    num_tokens: int = 0


def text(value: object, field: str) -> str:
    """A string that says something."""
    if not isinstance(value, str) or not value:
        raise ConfigError(value, "a non-empty string", field)
    return value


def flag(value: object, field: str) -> bool:
    """True or false, and nothing that Python takes for them."""
    if not isinstance(value, bool):
        raise ConfigError(value, "true or false", field)
    return value


def choice(*allowed: str) -> Callable[[object, str], str]:
    """One of these words."""

    def parse(value: object, field: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ConfigError(value, "one of " + ", ".join(repr(one) for one in allowed), field)
        return value

    return parse


def integer(low: int, high: int | None) -> Callable[[object, str], int]:
    """A whole number in [low, high]; None for no upper bound."""
    allowed = f"a whole number of at least {low}" if high is None else f"a whole number in {low}..{high}"

    def parse(value: object, field: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            raise ConfigError(value, allowed, field)
        return value

    return parse


def placement(value: object, field: str) -> str:
    """Where a draft server is: a word, or addresses, which are joined by commas."""
    allowed = "'process', 'ray', 'tcp://host:port', or several such addresses (a list, or separated by commas)"
    if value in ("process", "ray"):
        return str(value)
    addresses = [one.strip() for one in value.split(",")] if isinstance(value, str) else value
    if not isinstance(addresses, list | tuple) or not addresses:
        raise ConfigError(value, allowed, field)
    for index, address in enumerate(addresses):
        if not isinstance(address, str) or not is_tcp(address):
            raise ConfigError(address if len(addresses) > 1 else value, allowed, field)
        try:
            tcp_host_and_port(address)
        except WireError as error:
            raise ConfigError(address, allowed, field) from error
        if address in addresses[:index]:
            raise ConfigError(address, "each address once", field)
    return ",".join(addresses)


def number(low: float, high: float) -> Callable[[object, str], float]:
    """A number in [low, high]."""

    def parse(value: object, field: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(value, f"a number in {low:g}..{high:g}", field)
        return float(value)

    return parse


def resources(value: object, field: str) -> tuple[tuple[str, float], ...]:
    """Custom resources of Ray: (name, amount), by name."""
    allowed = f"custom resources and amounts above 0, such as {{'draft_node': 1}}; not {', '.join(_RAY_OWN_RESOURCES)}"
    if not isinstance(value, Mapping):
        raise ConfigError(value, allowed, field)
    for name, amount in value.items():
        is_name = isinstance(name, str) and name != "" and name not in _RAY_OWN_RESOURCES
        is_amount = isinstance(amount, int | float) and not isinstance(amount, bool) and 0 < amount < float("inf")
        if not (is_name and is_amount):
            raise ConfigError(value, allowed, field)
    return tuple((name, float(value[name])) for name in sorted(value))


def on_miss(value: object, field: str) -> OnMiss:
    """`auto`, `go` or `wait:N`."""
    if isinstance(value, OnMiss):
        return value
    allowed = "'auto', 'go', or 'wait:N' with N in 1..64"
    if value == "auto":
        return OnMiss("auto")
    if value == "go":
        return OnMiss("go")
    count = value.removeprefix("wait:") if isinstance(value, str) and value.startswith("wait:") else ""
    if not (count.isascii() and count.isdecimal() and 1 <= int(count) <= 64):
        raise ConfigError(value, allowed, field)
    return OnMiss("wait", int(count))


def cores(value: object, field: str) -> tuple[int, ...]:
    """CPU cores, at least one, in order: a list of numbers, or text such as `0-2,5`."""
    allowed = "a list of core numbers or text such as '0-2,5'"
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        numbers: list[int] = []
        for part in value.split(","):
            first, _, last = part.strip().partition("-")
            if not (first.isdecimal() and (last or first).isdecimal()):
                raise ConfigError(value, allowed, field)
            numbers += range(int(first), int(last or first) + 1)
    elif isinstance(value, list | tuple) and all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        numbers = list(value)
    else:
        raise ConfigError(value, allowed, field)
    if not numbers or min(numbers) < 0:
        raise ConfigError(value, allowed, field)
    return tuple(sorted(set(numbers)))
