"""Key files: what is made, who may read it, and what is refused."""

import os
from pathlib import Path

import pytest
import zmq
import zmq.auth

from vllm_specbranch import cli
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.keys import (
    CLIENT_PUBLIC,
    CLIENT_SECRET,
    CLIENTS,
    SERVER_PUBLIC,
    SERVER_SECRET,
    AllowList,
    load_client_keys,
    load_server_keys,
    make_keys,
)


def test_the_keys_of_both_sides_fit_together_and_are_private(tmp_path: Path) -> None:
    root = tmp_path / "new" / "keys"
    old = os.umask(0o000)
    try:
        made = make_keys(root)
    finally:
        os.umask(old)
    assert sorted(path.relative_to(root).as_posix() for path in made) == sorted(
        [SERVER_SECRET, CLIENT_PUBLIC, CLIENT_SECRET, SERVER_PUBLIC]
    )
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (root, root / CLIENTS)} == {0o700}
    server, client = load_server_keys(root), load_client_keys(root)
    assert client.server == server.public == zmq.curve_public(server.secret)
    assert client.public == zmq.curve_public(client.secret)
    assert zmq.auth.load_certificates(server.clients) == {client.public: True}
    assert server.secret != client.secret


def test_one_more_engine_gets_keys_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, more = tmp_path / "keys", tmp_path / "second"
    make_keys(root)
    assert cli.main(["keys", "--out", str(more), "--server", str(root)]) == 0
    assert "one more engine" in capsys.readouterr().out
    first, second, server = load_client_keys(root), load_client_keys(more), load_server_keys(root)
    assert second.server == server.public
    assert zmq.auth.load_certificates(server.clients) == {first.public: True, second.public: True}
    assert sorted(path.relative_to(more).as_posix() for path in more.rglob("*")) == [CLIENT_SECRET, SERVER_PUBLIC]
    assert {path.stat().st_mode & 0o777 for path in [*more.iterdir(), server.clients / "second.key"]} == {0o600}
    assert cli.main(["keys", "--out", str(tmp_path / "elsewhere" / "second"), "--server", str(root)]) == 2
    assert "another name" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    assert cli.main(["keys", "--out", str(tmp_path / "third"), "--server", str(more)]) == 2
    assert "server.key_secret" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    for keys in (load_server_keys(tmp_path / "keys"), load_client_keys(tmp_path / "keys")):
        assert keys.secret.decode() not in repr(keys)
        assert keys.public.decode() in repr(keys)


def test_the_command_prints_paths_and_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "keys"
    assert cli.main(["keys", "--out", str(root)]) == 0
    shown = capsys.readouterr()
    assert str(root / SERVER_SECRET) in shown.out
    for path in root.rglob("*.key*"):
        public, secret = zmq.auth.load_certificate(path)
        assert public.decode() not in shown.out + shown.err
        assert secret is None or secret.decode() not in shown.out + shown.err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "keys"
    make_keys(root)
    before = {path: path.read_bytes() for path in root.rglob("*.key*")}
    assert cli.main(["keys", "--out", str(root)]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in root.rglob("*.key*")} == before


def test_a_directory_that_others_may_enter_is_closed_first(tmp_path: Path) -> None:
    root = tmp_path / "keys"
    root.mkdir(mode=0o755)
    make_keys(root)
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="--out"):
        make_keys(tmp_path / "file" / "keys")


@pytest.mark.parametrize(
    ("load", "needed"),
    [(load_server_keys, SERVER_SECRET), (load_client_keys, CLIENT_SECRET), (load_client_keys, SERVER_PUBLIC)],
)
def test_what_is_missing_or_broken_is_named(tmp_path: Path, load: object, needed: str) -> None:
    assert callable(load)
    root = tmp_path / "keys"
    make_keys(root)
    path = root / needed
    good = path.read_text()
    for broken in ("", "curve\n", good.replace('"', '"!!'), good.replace("key = ", "kex = ")):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=path.name):
            load(root)
    path.unlink()
    with pytest.raises(ConfigError, match=path.name):
        load(root)


@pytest.mark.parametrize(("load", "secret"), [(load_server_keys, SERVER_SECRET), (load_client_keys, CLIENT_SECRET)])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, load: object, secret: str, mode: int) -> None:
    assert callable(load)
    make_keys(tmp_path)
    (tmp_path / secret).chmod(mode)
    with pytest.raises(ConfigError, match="only its owner can read"):
        load(tmp_path)


def test_a_server_needs_clients(tmp_path: Path) -> None:
    make_keys(tmp_path)
    (tmp_path / CLIENT_PUBLIC).unlink()
    with pytest.raises(ConfigError, match=r"clients/\*\.key"):
        load_server_keys(tmp_path)


def test_clients_come_and_go_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_keys(tmp_path / "one")
    make_keys(tmp_path / "two")
    one, two = load_client_keys(tmp_path / "one"), load_client_keys(tmp_path / "two")
    clients = load_server_keys(tmp_path / "one").clients
    allowed = AllowList(clients)
    assert allowed.callback("", one.public)
    assert not allowed.callback("", two.public)
    (clients / "two.key").write_bytes((tmp_path / "two" / CLIENT_PUBLIC).read_bytes())
    (clients / "broken.key").write_text("nothing")
    assert allowed.callback("", two.public)
    (clients / "client.key").unlink()
    assert not allowed.callback("", one.public)
    assert not allowed.callback("", one.public)
    assert allowed.num_refused == 3
    assert sum("holds no public key" in record.message for record in caplog.records) == 1
    assert sum("Turned a client away" in record.message for record in caplog.records) == 1
