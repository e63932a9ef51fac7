"""A conversation with a speaker that repeats each line; its answer to the line `long` has no end."""

import time
from collections.abc import Generator, Sequence

from refold.serve.dialogue import Dialogue, converse
from refold.serve.speakers import Speaker, SpeakSettings, Turn


class Slow(Speaker):
    name = "slow"
    has_chat = True

    def chat(self, turns: Sequence[Turn], settings: SpeakSettings) -> Generator[str]:
        said = turns[-1]["content"]
        yield f"heard {said} "
        while said == "long":
            time.sleep(0.05)
            yield "on "

    def complete(self, text: str, settings: SpeakSettings) -> Generator[str]:
        raise NotImplementedError


speaker = Slow()
converse(Dialogue(speaker, SpeakSettings()), speaker)
print("ended well")
