"""The commands `serve` and `chat`: mistakes are a line and status 2."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from refold.cli import serve_options


def test_mistakes_are_a_line(command: Callable[..., object], shipped: Path, tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("# none\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (["serve", "/nowhere"], "no such folder"),
            (["serve", shipped, "--port", "70000"], "port: must lie in 0..65535"),
            (["serve", shipped, "--port", port], f"port: a free address is required (got 127.0.0.1:{port}: "),
            (["serve", shipped, "--host", "no.such.host.invalid"], "host: an address of this machine is required"),
            (["serve", shipped, "--api-key-file", empty], "api_key_file: at least one key is required"),
            (["serve", shipped, "--api-key-file", tmp_path / "none"], "api_key_file: a readable text file is required"),
            (["serve", shipped, "--name", "a/b"], "name: a name of 1 to 128 printable characters"),
            (["serve", shipped, "--against", shipped], "name: a name for each model is required"),
            (["serve", shipped, "--exits", "0.1", "--lossless"], "lossless: no --exits are required"),
            (["serve", shipped, "--log-level", "loud"], "log_level: must be one of debug, info, warning, error"),
            (["serve", shipped, "--drain-seconds", "0"], "drain_seconds: more than 0 seconds are required"),
            (["serve", shipped, "--memory", "much"], "must be a whole number"),
            (["chat", "http://127.0.0.1:1"], "chat: a running server is required"),
            (["chat", "http://127.0.0.1:1", "--api-key-file", empty], "api_key_file: at least one key is required"),
            (["chat", "/nowhere"], "no such folder"),
        ):
            done = command(*arguments)
            assert (done.status, done.out) == (2, ""), (arguments, done)  # type: ignore[attr-defined]
            assert message in done.err  # type: ignore[attr-defined]
            assert len(done.err.splitlines()) == 1, done.err  # type: ignore[attr-defined]


def test_a_missing_extra_is_named(
    command: Callable[..., object], shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_options, "EXTRA", ("uvicorn", "no_such_module"))
    done = command("serve", shipped)
    assert done.status == 2  # type: ignore[attr-defined]
    assert "serve: the package no_such_module is required (not installed); pip install 'refold[serve]'" in done.err  # type: ignore[attr-defined]
