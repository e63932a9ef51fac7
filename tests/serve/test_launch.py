"""Servers as processes: how they start, what ends them, and what is left then."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from refold.errors import FolderError, RefoldError, SourceError
from refold.serve.engine_process import Wire, open_host
from refold.serve.launch import ServeLaunch, plan_engines
from refold.serve.messages import Open
from refold.serve.server import address_of, bind, is_public, listen

SCRIPT = Path(__file__).parent / "small_app.py"
MODEL = "refold/shipped/stdlib-5m"
AT_ONCE, SLOWLY, KILLED = [1], [6], [8]
COMMAND = ("-m", "refold", "serve")
STARTING = 240.0


class Server:
    """A server in a process of its own.

    Attributes:
        url: Its address.
        line: Its first line.
    """

    def __init__(
        self,
        *arguments: str | Path,
        command: Sequence[str] = (str(SCRIPT),),
        stderr: int | IO[bytes] = subprocess.DEVNULL,
    ):
        command = [sys.executable, *command, *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # These tests may themselves run under `nohup`, which switches SIGHUP off for all children.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()
        self.url = self.line.split()[0] if self.line else ""

    def get(self, path: str = "/health") -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stream(self, prompt: list[int], tokens: int) -> Any:
        body = json.dumps({"prompt": prompt, "tokens": tokens}).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + "/generate", body), timeout=60)

    def ask(self, prompt: list[int], tokens: int = 3) -> list[Any]:
        with self.stream(prompt, tokens) as response:
            return [json.loads(line) for line in response]

    @property
    def engine(self) -> int:
        return next(iter(self.get()[1]["pids"].values()))

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without a tokenizer, which an odd engine never opens."""
    path = tmp_path_factory.mktemp("models") / "odd"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def odd(folder: Path) -> Iterator[Server]:
    with Server(folder, "odd=1") as server:
        yield server


def test_a_server_tells_one_line(odd: Server) -> None:
    assert odd.line.startswith("http://127.0.0.1:")
    assert odd.line.endswith(" serves odd; odd; no exits, 2 depths")
    assert odd.get()[0] == 200
    assert [each.get("text") for each in odd.ask(AT_ONCE)] == ["0 ", "1 ", "2 ", "", None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_open_answers_end_before_the_server(folder: Path, number: int) -> None:
    with Server(folder, "odd=1") as server:
        engine = server.engine
        response = server.stream(SLOWLY, 60)
        response.readline()
        server.process.send_signal(number)
        until(lambda: refuses(int(server.url.rpartition(":")[2])))
        assert server.process.poll() is None
        assert json.loads(response.readlines()[-1]) == {"end": "length"}
        assert server.process.wait(30) == 0
        assert has_ended(engine)


def test_answers_that_take_too_long_are_told_of_the_end(folder: Path) -> None:
    with Server(folder, "odd=1", "drain_seconds=0.5") as server:
        response = server.stream(SLOWLY, 10_000)
        response.readline()
        server.process.terminate()
        assert "the server stops" in json.loads(response.readlines()[-1])["error"]
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with Server(folder, "odd=1") as server:
        engine, response = server.engine, server.stream(SLOWLY, 10_000)
        response.readline()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        assert server.end(signal.SIGINT, 10) == 0
        until(lambda: has_ended(engine))


def test_the_loss_of_the_engine_ends_the_server(folder: Path) -> None:
    with Server(folder, "odd=1") as server:
        response = server.stream(SLOWLY, 10_000)
        response.readline()
        os.kill(server.engine, signal.SIGKILL)
        error = json.loads(response.readlines()[-1])["error"]
        assert error == "engine: a running engine is required (it was killed, as a system does that runs out of memory)"
        assert server.process.wait(30) == 1


def test_a_lost_engine_runs_again(folder: Path) -> None:
    with Server(folder, "odd=1", "restart=1") as server:
        engine, response = server.engine, server.stream(SLOWLY, 10_000)
        response.readline()
        os.kill(engine, signal.SIGKILL)
        assert "it was killed" in json.loads(response.readlines()[-1])["error"]
        until(lambda: server.get()[0] == 200)
        assert server.engine != engine
        assert server.ask(AT_ONCE)[-1] == {"end": "length"}
        assert server.end() == 0


def test_a_killed_server_leaves_no_engine(folder: Path) -> None:
    with Server(folder, "odd=1") as server:
        engine = server.engine
        server.end(signal.SIGKILL)
        until(lambda: has_ended(engine))


def test_a_full_disk_for_the_log_hurts_nobody(folder: Path) -> None:
    with open("/dev/full", "wb") as full, Server(folder, "odd=1", "restart=1", stderr=full) as server:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 5) as client:
                client.sendall(b"no http\r\n\r\n")
                assert client.recv(20).startswith(b"HTTP/1.1 400")
        engine = server.engine
        os.kill(engine, signal.SIGKILL)
        until(lambda: server.engine != engine and server.get()[0] == 200)
        assert server.ask(AT_ONCE)[-1] == {"end": "length"}
        assert server.end() == 0


def test_a_closed_stderr_hurts_nobody(folder: Path) -> None:
    command = f'exec "{sys.executable}" "{SCRIPT}" "{folder}" odd=1 2>&-'
    process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        url = process.stdout.readline().split()[0]
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5) as client:
            client.sendall(b"no http\r\n\r\n")
            # Not one line of the log may be in it.
            assert client.recv(20) == b"HTTP/1.1 400 Bad Req"
        process.terminate()
        assert process.wait(30) == 0


def test_the_port_must_be_free(odd: Server) -> None:
    port = int(odd.url.rpartition(":")[2])
    with pytest.raises(RefoldError, match=rf"port: a free address is required \(got 127.0.0.1:{port}: .*in use"):
        bind("127.0.0.1", port)
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        # Both have begun at the same time.
        listen(first)
        with pytest.raises(RefoldError, match="port: a free address is required"):
            listen(second)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 300])
def test_the_host_must_be_this_machines(host: str) -> None:
    with pytest.raises(RefoldError, match=r"^(host|port): "):
        bind(host, 0)


def test_public_addresses_are_known() -> None:
    for host, expected in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        with bind(host, 0) as bound:
            assert is_public(bound) == expected
            assert address_of(bound).startswith("http://")


def test_an_open_door_is_told(folder: Path, tmp_path: Path) -> None:
    for more, expected in ((), 1), (('api_keys=["k"]',), 0):
        with (
            open(tmp_path / "log", "wb") as log,
            Server(folder, "odd=1", 'host="0.0.0.0"', *more, stderr=log) as server,
        ):
            assert server.end() == 0
        lines = (tmp_path / "log").read_text().splitlines()
        assert sum("anyone who reaches" in line for line in lines) == expected


def test_engines_get_names(folder: Path) -> None:
    engines = plan_engines(ServeLaunch(Open(model=str(folder), tolerance=0.1), against=f"first={folder}"))
    assert [(each.name, each.role) for each in engines] == [("odd", "model"), ("first", "source")]
    assert engines[1].opening.tolerance is None
    assert [each.opening.threads for each in engines] == [max(1, (os.cpu_count() or 1) // 2)] * 2
    (engine,) = plan_engines(ServeLaunch(Open(model=str(folder)), name="x", adapters=(str(folder), f"m={folder}")))
    assert engine.name == "x"
    assert engine.opening.adapters == {"odd": str(folder), "m": str(folder)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"against": "FOLDER"}, "name: a name for each model is required"),
        ({"name": "a/b"}, "name: a name of 1 to 128 printable characters without slashes"),
        ({"name": ""}, "name: a name of 1 to 128"),
        ({"name": "x" * 200}, "name: a name of 1 to 128"),
        ({"adapters": ("m=",)}, "adapters: NAME=PLACE is required"),
        ({"adapters": ("/nowhere/a",)}, "no such folder or file"),
    ],
)
def test_names_are_labels(folder: Path, given: dict[str, Any], message: str) -> None:
    given = {name: str(folder) if value == "FOLDER" else value for name, value in given.items()}
    with pytest.raises(RefoldError, match=message):
        plan_engines(ServeLaunch(Open(model=str(folder)), **given))


def test_drafts_exclude_exits(folder: Path) -> None:
    with pytest.raises(RefoldError, match="lossless: no --exits are required"):
        plan_engines(ServeLaunch(Open(model=str(folder), tolerance=0.1, is_lossless=True)))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"weights": "float7"}, "weights:"), ({"max_rows": 0}, "max_rows:"), ({"tolerance": 1.5}, "exit_tolerance:")],
    ids=str,
)
def test_wrong_settings_of_the_engine_are_told_before_it_opens(folder: Path, wrong: Any, told: str) -> None:
    with pytest.raises(RefoldError, match=told):
        plan_engines(ServeLaunch(Open(model=str(folder), **wrong)))


def test_exits_that_nobody_asked_for_do_not_keep_a_model_from_being_served(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "exits.json").write_text("{}")
    near, far = socket.socketpair()
    with near, far:
        wire = Wire(near)
        assert open_host(Open(model=str(model), memory=2**20), wire).facts().tolerances == ()
        with pytest.raises(FolderError, match=r"exits\.json"):
            open_host(Open(model=str(model), memory=2**20, tolerance=0.1), wire)


def test_a_model_must_be_there() -> None:
    with pytest.raises(SourceError, match="no such folder"):
        plan_engines(ServeLaunch(Open(model="/nowhere/at/all")))


def test_a_model_that_does_not_open_ends_the_server(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with open(tmp_path / "log", "wb") as log, Server(broken, "odd=1", stderr=log) as server:
        assert server.line == ""
        assert server.process.wait(30) == 1
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith("SourceError: model: a whole one is required")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_still_loading_ends(tmp_path: Path, number: int) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "config.json").write_text("{}")
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(slow), "odd=1"], stdout=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(
        lambda: (
            "odd_engine" in "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in children.read_text().split())
        )
    )
    engine = int(children.read_text().split()[0])
    process.send_signal(number)
    assert process.communicate(timeout=30) == (b"", None)
    assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: has_ended(engine))


@pytest.mark.long
@pytest.mark.parametrize("restarts", [False, True])
def test_a_real_engine_that_is_killed(restarts: bool, tmp_path: Path) -> None:
    options = [MODEL, "--port", "0", "--max-rows", "4", "--max-context", "512", *(["--restart"] if restarts else [])]

    def open_stream(server: Server, tokens: int) -> Any:
        body = {
            "model": "stdlib-5m",
            "prompt": "def main(",
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=120)

    def events(response: Any) -> list[Any]:
        lines = [line.removeprefix(b"data: ").strip() for line in response.readlines()]
        assert lines[-2] == b"[DONE]"
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    def text(server: Server) -> str:
        return "".join(event["choices"][0]["text"] for event in events(open_stream(server, 8)))

    def engines(server: Server) -> list[int]:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if "engine_process" in Path(f"/proc/{pid}/cmdline").read_text()]

    with open(tmp_path / "log", "wb") as log, Server(*options, command=COMMAND, stderr=log) as server:
        assert " serves stdlib-5m; weights 11 MB; keys and values " in server.line
        assert str(tmp_path) not in server.line
        before, (engine,) = text(server), engines(server)
        streams = [open_stream(server, 480) for _ in range(3)]
        os.kill(engine, signal.SIGKILL)
        for stream in streams:
            assert events(stream)[-1]["error"]["code"] == "engine_lost"
        if not restarts:
            assert server.process.wait(60) == 1
            return
        assert server.get()[0] == 503
        until(lambda: server.get()[0] == 200, STARTING)
        assert text(server) == before
        stream = open_stream(server, 100)
        stream.readline()
        (engine,) = engines(server)
        server.process.terminate()
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        assert has_ended(engine)
    assert "runs again" in (tmp_path / "log").read_text()
