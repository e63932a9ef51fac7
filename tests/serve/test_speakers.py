"""Speakers: a server with OpenAI's API, and an engine of this process."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.serve.speakers import LocalSpeaker, RemoteSpeaker, SpeakSettings

PLAIN = SpeakSettings(max_new_tokens=6, temperature=0.0)


class Api(BaseHTTPRequestHandler):
    """A server that knows one key and two models, of which the second one only continues texts."""

    bodies: list[Any]

    def do_GET(self) -> None:
        if self.headers["authorization"] != "Bearer key":
            return self.tell(401, {"error": {"message": "key: a valid one is required"}})
        if self.path == "/v1/models":
            return self.tell(200, {"data": [{"id": "first"}, {"id": "second"}]})
        if self.path == "/state":
            return self.tell(
                200, {"models": [{"name": "first", "has_chat": True}, {"name": "second", "has_chat": False}]}
            )
        return self.tell(404, {"detail": "nothing here"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append((self.path, body))
        self.send_response(200)
        self.end_headers()
        if "messages" in body:
            chunks: list[Any] = [
                {"choices": [{"index": 0, "delta": {"role": "assistant"}}]},
                {"choices": [{"index": 0, "delta": {"content": "hé"}}, {"index": 1, "delta": {"content": "no"}}]},
                {"choices": [{"index": 0, "delta": {"content": "llo"}}]},
                {"choices": [], "usage": {}},
            ]
        elif body["prompt"] == "fail":
            chunks = [{"choices": [{"index": 0, "text": "so"}]}, {"error": {"message": "the engine is lost"}}]
        else:
            chunks = [{"choices": [{"index": 0, "text": body["prompt"][::-1]}]}]
        for each in chunks:
            self.wfile.write(b": comment\n\ndata: " + json.dumps(each).encode() + b"\n\n")
        if body.get("prompt") == "broken":
            self.wfile.write(b"data: {\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, status: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    Api.bodies = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_for_chat_or_a_continuation(url: str) -> None:
    speaker = RemoteSpeaker(f"{url}/v1/", "key")
    assert (speaker.name, speaker.has_chat) == ("first", True)
    turns = [{"role": "user", "content": "hi"}]
    assert list(speaker.chat(turns, PLAIN)) == ["hé", "llo"]
    path, body = Api.bodies[-1]
    assert path == "/v1/chat/completions"
    assert body == {
        "messages": turns,
        "model": "first",
        "stream": True,
        "max_tokens": 6,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
    }
    second = RemoteSpeaker(url, "key", "second")
    assert not second.has_chat
    assert "".join(second.complete("abc", PLAIN)) == "cba"


def test_faults_of_a_server_are_a_line(url: str) -> None:
    with pytest.raises(RefoldError, match=r"^chat: key: a valid one is required \(status 401\)$"):
        RemoteSpeaker(url)
    with pytest.raises(RefoldError, match=r"^name: must be one of first, second"):
        RemoteSpeaker(url, "key", "third")
    with pytest.raises(RefoldError, match=r"^chat: a running server is required .*refold serve MODEL"):
        RemoteSpeaker("http://127.0.0.1:1")
    speaker = RemoteSpeaker(url, "key", "second")
    with pytest.raises(RefoldError, match=r"^chat: the engine is lost$"):
        list(speaker.complete("fail", PLAIN))
    with pytest.raises(RefoldError, match=r"^chat: the whole answer is required"):
        list(speaker.complete("broken", PLAIN))


def test_an_engine_of_this_process_answers() -> None:
    engine = Engine("refold/shipped/stdlib-5m", EngineSettings(max_rows=1, max_context=32))
    speaker = LocalSpeaker(engine, "stdlib-5m")
    assert not speaker.has_chat
    expected = engine.generate("def main(", Sampling(max_new_tokens=6))[0].text
    assert "".join(speaker.complete("def main(", PLAIN)) == expected
    # An answer ends where the context does.
    assert list(speaker.complete("def main(", SpeakSettings(max_new_tokens=500, temperature=0.0)))
    pieces = speaker.complete("def main(", SpeakSettings(max_new_tokens=20, temperature=0.0))
    next(pieces)
    pieces.close()
    engine.step()
    assert not engine.has_work
    with pytest.raises(RefoldError, match=r"^prompt: must be at most 31 tokens"):
        list(speaker.complete("x = 1\n" * 50, PLAIN))
    engine.tokenizer = None
    with pytest.raises(RefoldError, match=r"^chat: a model with a tokenizer is required"):
        LocalSpeaker(engine, "stdlib-5m")
