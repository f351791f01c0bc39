"""Keys of the wire over TCP: makes the files, reads them, and knows which clients a server admits.

Owns the key files and who may read them; the sockets that use the keys are in `zmq_port`. CURVE (CurveZMQ, as libzmq has it)
encrypts what travels and tells both ends who the other is. Runs wherever an end of the wire is opened.

    DIR/server.key_secret     the server's own pair                          needed by the server
    DIR/clients/*.key         public keys of the engines it admits           needed by the server
    DIR/client.key_secret     an engine's own pair                           needed by the engine
    DIR/server.key            the server's public key                        needed by the engine

The files have the form that pyzmq writes and reads. Secrets are in no message, no log line and no `repr`.
"""

import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import zmq
import zmq.auth

from vllm_specbranch.errors import ConfigError

logger = logging.getLogger("vllm.specbranch.keys")

# The word that takes the place of keys where somebody else guards the network.
INSECURE: Final = "insecure"

SERVER_SECRET = "server.key_secret"
SERVER_PUBLIC = "server.key"
CLIENT_SECRET = "client.key_secret"
CLIENTS = "clients"
CLIENT_PUBLIC = f"{CLIENTS}/client.key"

_Z85_KEY = re.compile(rb"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")


@dataclass(frozen=True)
class ServerKeys:
    """What a server needs: its pair (40 characters of Z85 each), and the directory of the clients it admits."""

    public: bytes
    secret: bytes = field(repr=False)
    clients: Path


@dataclass(frozen=True)
class ClientKeys:
    """What an engine needs: its pair, and the public key of its server."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


ServerSecurity = ServerKeys | Literal["insecure"]
ClientSecurity = ClientKeys | Literal["insecure"]


def make_keys(directory: str | Path) -> list[Path]:
    """Make the pairs of a server and of one client.

    Args:
        directory: new, or empty and for its owner alone.

    Returns:
        The files made.

    Raises:
        ConfigError: there is something in the directory, others may enter it, or it cannot be written.
    """
    root = Path(directory)
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    return _write_all(
        root,
        {
            root / SERVER_SECRET: _text(server_public, server_secret),
            root / CLIENT_PUBLIC: _text(client_public),
            root / CLIENT_SECRET: _text(client_public, client_secret),
            root / SERVER_PUBLIC: _text(server_public),
        },
    )


def make_client_keys(directory: str | Path, server: str | Path) -> list[Path]:
    """Make the pair of one more client of a server, and let the server admit it.

    Args:
        directory: new, or empty; its name becomes that of the public key among the server's clients.
        server: the directory of the server's keys.

    Returns:
        The files made.

    Raises:
        ConfigError: as of `make_keys`, the server's keys cannot be used, or it has a client of this name.
    """
    root, clients = Path(directory), load_server_keys(server, "--server")
    admitted = clients.clients / f"{root.resolve().name}.key"
    if admitted.exists():
        raise ConfigError(str(directory), f"a directory of another name: there is a client {admitted.name}", "--out")
    public, secret = zmq.curve_keypair()
    files = {root / CLIENT_SECRET: _text(public, secret), root / SERVER_PUBLIC: _text(clients.public)}
    return _write_all(root, files | {admitted: _text(public)})


def make_keys_for(directory: str | Path, client: bytes) -> bytes:
    """Make a server's pair that admits one client, whose pair was made elsewhere.

    Args:
        directory: new, or empty and for its owner alone.
        client: the client's public key, 40 characters of Z85.

    Returns:
        The server's public key. The secret one stays in the directory.

    Raises:
        ConfigError: as of `make_keys`.
    """
    root = Path(directory)
    public, secret = zmq.curve_keypair()
    _write_all(root, {root / SERVER_SECRET: _text(public, secret), root / CLIENT_PUBLIC: _text(client)})
    return public


def load_server_keys(directory: str | Path, field_name: str = "--keys") -> ServerKeys:
    """Read a server's keys.

    Raises:
        ConfigError: a file is missing or broken, a secret can be read by others, or no client is admitted.
    """
    root = Path(os.path.expanduser(directory))
    public, secret = _pair(root / SERVER_SECRET, directory, field_name)
    clients = root / CLIENTS
    found = _files(clients)
    if not found:
        raise ConfigError(str(directory), f"a directory with public keys of clients in {CLIENTS}/*.key", field_name)
    for path in found:
        _public(path, directory, field_name)
    return ServerKeys(public, secret, clients)


def load_client_keys(directory: str | Path, field_name: str = "draft_keys") -> ClientKeys:
    """Read an engine's keys.

    Raises:
        ConfigError: a file is missing or broken, or a secret can be read by others.
    """
    root = Path(os.path.expanduser(directory))
    public, secret = _pair(root / CLIENT_SECRET, directory, field_name)
    return ClientKeys(public, secret, _public(root / SERVER_PUBLIC, directory, field_name))


def client_security(given: str) -> ClientSecurity:
    """What the setting `draft_keys` names: a directory with an engine's keys, or the word.

    Raises:
        ConfigError: as of `load_client_keys`.
    """
    return INSECURE if given == INSECURE else load_client_keys(given)


class AllowList:
    """The clients that a server admits: those whose public keys lie in a directory, read again at every handshake.

    So a client can be added or shut out while the server runs; who is connected stays so.

    Args:
        directory: of the public keys.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._broken: set[Path] = set()
        self.num_refused = 0

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the client with this public key is admitted; called by pyzmq's authenticator, on its own thread."""
        del domain
        if key in self._keys():
            return True
        self.num_refused += 1
        if self.num_refused == 1:
            logger.warning(
                "Turned a client away whose public key, %s, is not in %s. More will only be counted.",
                ascii(key.decode("ascii", "replace")),
                self._directory,
            )
        return False

    def _keys(self) -> set[bytes]:
        keys = set()
        for path in _files(self._directory):
            # Removed meanwhile, or not a key: the others still count.
            try:
                keys.add(zmq.auth.load_certificate(path)[0])
            except (OSError, ValueError):
                if path not in self._broken:
                    logger.warning("%s holds no public key.", path)
                self._broken.add(path)
        return keys


def _write_all(root: Path, files: Mapping[Path, str]) -> list[Path]:
    """Write key files, in a directory that has been empty; see `make_keys`."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise ConfigError(str(root), "a new or an empty directory: keys are never overwritten", "--out")
        root.chmod(0o700)
        for path, text in files.items():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _write(path, text)
    except OSError as error:
        raise ConfigError(str(root), f"a directory that can be made and written ({error})", "--out") from error
    return list(files)


def _files(clients: Path) -> list[Path]:
    return sorted(clients.glob("*.key"))


def _text(public: bytes, secret: bytes | None = None) -> str:
    """A certificate in the form that pyzmq reads (`zmq.auth.load_certificate`)."""
    lines = ["metadata", "curve", f'    public-key = "{public.decode()}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret.decode()}"')
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a new file that only its owner can read, from its first byte on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
        stream.write(text)


def _pair(path: Path, given: str | Path, field_name: str) -> tuple[bytes, bytes]:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        allowed = f"a directory with the file {path.name} (vllm-specbranch keys makes one; {error.strerror})"
        raise ConfigError(str(given), allowed, field_name) from error
    if stat.S_IMODE(mode) & 0o077:
        allowed = f"a directory whose {path.name} only its owner can read (chmod 600; now {stat.S_IMODE(mode):03o})"
        raise ConfigError(str(given), allowed, field_name)
    public, secret = _load(path, given, field_name)
    if secret is None:
        raise ConfigError(str(given), f"a directory whose {path.name} holds a secret key", field_name)
    return public, secret


def _public(path: Path, given: str | Path, field_name: str) -> bytes:
    return _load(path, given, field_name)[0]


def _load(path: Path, given: str | Path, field_name: str) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(given), f"a directory with a key file {path.name}", field_name) from error
    if not all(key is None or _Z85_KEY.fullmatch(key) for key in (public, secret)):
        raise ConfigError(str(given), f"a directory whose {path.name} holds keys of 40 characters", field_name)
    return public, secret
