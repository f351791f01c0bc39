"""The few kinds of error this package raises on purpose. Owns no logic; imported by every room, in every process."""


class SpecBranchError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(SpecBranchError, ValueError):
    """A user's setting cannot work. Raised before any weights load.

    Args:
        value: what the user gave.
        allowed: what is allowed, in words.
        field: the name of the setting, as the user writes it.
    """

    def __init__(self, value: object, allowed: str, field: str) -> None:
        super().__init__(f"specbranch: {field}={value!r} cannot be used; allowed: {allowed}")
        self.value = value
        self.allowed = allowed
        self.field = field

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[object, str, str]]:
        return type(self), (self.value, self.allowed, self.field)


class PatchError(SpecBranchError):
    """A patch cannot be applied: the upstream source is not the one it was written for, or it is already patched."""


class TreeError(SpecBranchError):
    """A token tree was asked for something that its state does not allow."""


class KVError(SpecBranchError):
    """KV block accounting was asked for something that its state does not allow."""


class OutOfBlocksError(KVError):
    """No free KV block is left. Nothing was changed."""


class WireError(SpecBranchError):
    """Bytes from a peer are not a message of ours: malformed, truncated, oversized, or of another version."""


class VersionError(WireError):
    """Bytes from a peer are a message of another version of the protocol."""
