"""The other side of a conversation: a running server, or a model that is opened here."""

import json
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from refold.errors import RefoldError
from refold.suggest import must_be_one_of

if TYPE_CHECKING:
    from refold.engine.engine import Engine

Turn = Mapping[str, str]
"""A message: `{"role": ..., "content": ...}`."""
ANSWER_SECONDS = 600.0
"""Longest wait for the next bytes of a server."""
LOOK_SECONDS = 10.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class SpeakSettings:
    """How answers are drawn.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token.
        top_p: As for `refold.Sampling`.
        seed: Seed of the first answer; each further answer has the next one.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0


class Speaker(ABC):
    """A model that answers.

    Attributes:
        name: Of the model.
        has_chat: Whether it answers conversations; without, it continues texts.
    """

    name: str
    has_chat: bool

    @abstractmethod
    def chat(self, turns: Sequence[Turn], settings: SpeakSettings) -> Generator[str]:
        """Yields the answer to a conversation as it comes; closing the iterator stops it.

        Raises:
            RefoldError: There is no answer.
        """

    @abstractmethod
    def complete(self, text: str, settings: SpeakSettings) -> Generator[str]:
        """Yields the continuation of a text as it comes; closing the iterator stops it.

        Raises:
            RefoldError: There is no continuation.
        """


class LocalSpeaker(Speaker):
    """A model that an engine of this process runs.

    Args:
        engine: The engine.
        name: Of the model.

    Raises:
        RefoldError: The model has no tokenizer.
    """

    def __init__(self, engine: "Engine", name: str):
        if engine.tokenizer is None:
            raise RefoldError(
                "chat: a model with a tokenizer is required (it has none); copy the files into its folder"
            )
        self._engine, self.name = engine, name
        self.has_chat = bool(engine.tokenizer.chat_template)

    def chat(self, turns: Sequence[Turn], settings: SpeakSettings) -> Generator[str]:
        return self._stream(list(turns), settings)

    def complete(self, text: str, settings: SpeakSettings) -> Generator[str]:
        return self._stream(text, settings)

    def _stream(self, prompt: Any, settings: SpeakSettings) -> Generator[str]:
        from refold.engine.answers import stream_text
        from refold.generation.sampling import Sampling

        wanted = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        room = self._engine.max_context - len(
            self._engine.prepare(prompt, replace(wanted, max_new_tokens=1)).prompt_ids
        )
        yield from stream_text(self._engine, prompt, replace(wanted, max_new_tokens=min(settings.max_new_tokens, room)))


class RemoteSpeaker(Speaker):
    """A model of a running server with OpenAI's API.

    Args:
        url: Address of the server, with or without `/v1`.
        key: Its key; None: it needs none.
        name: Of the model; None: its first one.

    Raises:
        RefoldError: There is no such server, or no such model.
    """

    def __init__(self, url: str, key: str | None = None, name: str | None = None):
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        # A proxy of the network does not reach servers of this machine.
        proxies = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(*proxies)
        names = [str(each["id"]) for each in self._get("/v1/models").get("data", [])]
        if not names:
            raise RefoldError(f"chat: a server with a model is required ({self._url} has none)")
        if name is not None and name not in names:
            raise RefoldError(f"name: {must_be_one_of(name, names)}")
        self.name = names[0] if name is None else name
        self.has_chat = self._find_chat()

    def chat(self, turns: Sequence[Turn], settings: SpeakSettings) -> Generator[str]:
        return self._stream("/v1/chat/completions", {"messages": list(turns), **self._wanted(settings)})

    def complete(self, text: str, settings: SpeakSettings) -> Generator[str]:
        return self._stream("/v1/completions", {"prompt": text, **self._wanted(settings)})

    def _wanted(self, settings: SpeakSettings) -> dict[str, Any]:
        return {
            "model": self.name,
            "stream": True,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
        }

    def _find_chat(self) -> bool:
        """Says whether the model has a chat template; servers that do not tell are expected to chat."""
        try:
            models = self._get("/state").get("models", [])
        except RefoldError:
            return True
        return next((bool(each.get("has_chat", True)) for each in models if each.get("name") == self.name), True)

    def _get(self, path: str) -> dict[str, Any]:
        with self._open(path, None, LOOK_SECONDS) as response:
            try:
                found = json.loads(response.read())
            except ValueError:
                found = None
        if not isinstance(found, dict):
            raise RefoldError(f"chat: a server with OpenAI's API is required (got something else from {self._url})")
        return found

    def _stream(self, path: str, body: dict[str, Any]) -> Generator[str]:
        response = self._open(path, json.dumps(body).encode(), ANSWER_SECONDS)
        return self._pieces(response)

    def _pieces(self, response: HTTPResponse) -> Generator[str]:
        with response:
            try:
                for line in response:
                    kind, _, data = line.decode(errors="replace").partition(":")
                    if kind != "data" or data.strip() == "[DONE]":
                        continue
                    yield from _texts(json.loads(data))
            except (OSError, HTTPException, ValueError) as error:
                raise RefoldError(f"chat: the whole answer is required (it broke off: {error})") from None

    def _open(self, path: str, body: bytes | None, seconds: float) -> HTTPResponse:
        request = urllib.request.Request(self._url + path, body, self._headers)
        try:
            return self._opener.open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise RefoldError(f"chat: {_told_error(error)} (status {error.code})") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RefoldError(
                f"chat: a running server is required ({self._url}: {reason}); start it with `refold serve MODEL`"
            ) from None


def _texts(chunk: dict[str, Any]) -> Generator[str]:
    """Yields what a chunk adds to the first choice."""
    if error := chunk.get("error"):
        raise RefoldError(f"chat: {error.get('message', error) if isinstance(error, dict) else error}")
    for choice in chunk.get("choices", []):
        text = choice.get("text") if "text" in choice else choice.get("delta", {}).get("content")
        if text and choice.get("index", 0) == 0:
            yield text


def _told_error(error: urllib.error.HTTPError) -> str:
    try:
        found = json.loads(error.read(65536))
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason or "the server refused"
