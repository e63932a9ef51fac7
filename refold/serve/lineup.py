"""The served models by name, each with what its requests share."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from refold.serve.admission import Admission
from refold.serve.faults import ApiFault
from refold.serve.link import EngineLink
from refold.serve.prompting import Prompter, TokenThreads
from refold.serve.served import ServedModel
from refold.serve.settings import ServeSettings
from refold.suggest import did_you_mean, shorten


class ServedPlace(NamedTuple):
    """A served model.

    Attributes:
        served: The model.
        prompter: Its tokenizer.
        admission: Room of its engine, shared with the other models of the engine.
        engine: Name of the first model of its engine.
        created: When the server began to serve it, in seconds since 1970.
    """

    served: ServedModel
    prompter: Prompter
    admission: Admission
    engine: str
    created: int


class Lineup:
    """The served models, a list that is set at the start.

    Args:
        models: At least one.
        settings: Of the server.
    """

    def __init__(self, models: Sequence[ServedModel], settings: ServeSettings):
        assert models
        assert len({each.name for each in models}) == len(models)
        self.threads = TokenThreads()
        self.links: dict[EngineLink, str] = {}
        """Engines, each with the name of its first model."""
        self.places: dict[str, ServedPlace] = {}
        admissions: dict[EngineLink, Admission] = {}
        now = int(time.time())
        for served in models:
            link = served.link
            if link not in admissions:
                admissions[link] = Admission(link, settings.max_queue, settings.max_total_tokens)
                self.links[link] = served.name
            prompter = Prompter(served, self.threads)
            self.places[served.name] = ServedPlace(served, prompter, admissions[link], self.links[link], now)

    def find(self, name: str) -> ServedPlace:
        """Returns a model by its name.

        Raises:
            ApiFault: There is none.
        """
        place = self.places.get(name)
        if place is None:
            hint = did_you_mean(name, self.places)
            raise ApiFault(
                404,
                f"model: must be one of {', '.join(self.places)} (got {shorten(name)}){hint}",
                param="model",
                code="model_not_found",
            )
        return place
