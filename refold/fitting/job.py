"""A checked fit, before anything is written: source, texts, folder and options."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refold.checkpoint.locate import Source, locate
from refold.data.corpus import Data, open_text
from refold.data.mixture import MixedSource, describe_one_kind
from refold.data.readers import DataSource
from refold.data.split import split, split_in_three
from refold.errors import DataError
from refold.evaluation.window_pass import Stopwatch
from refold.fitting.look import HeldOutSource, Looker
from refold.fitting.options import FitOptions
from refold.fitting.report import FitText
from refold.fitting.vocabulary import TRIMMED
from refold.fitting.workspace import FitFolder
from refold.modeling.load import choose_device
from refold.recipe.load import load_recipe
from refold.recipe.recipe import Recipe
from refold.sources.source_model import SourceModel, read_source_model

LEAVING_TOKENS = 4_096
"""Held-out tokens on which the model is measured without single parts."""
LOOK_SHARE = 4
"""Held-out tokens of the report for each token on which candidates are compared."""


@dataclass
class FitJob:
    """A checked fit, before anything is written.

    Attributes:
        source: The source.
        model: The source, read for planning.
        folder: Folder of the fit.
        options: Options of the fit.
        train: Text for measurements, fits and healing.
        look_text: Text on which candidates are compared.
        report_text: Text on which the result is reported.
        notes: Lines about the data and the device.
        watch: Seconds by stage.
    """

    source: Source
    model: SourceModel
    folder: FitFolder
    options: FitOptions
    train: DataSource
    look_text: DataSource
    report_text: DataSource
    notes: list[str]
    watch: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def open(
        cls, source: str | Path | Source, out: str | Path, options: FitOptions, data: Data, held_out: Data | None
    ) -> "FitJob":
        """Reads and checks everything that a fit needs."""
        choose_device(options.device)
        located = source if isinstance(source, Source) else locate(source)
        model = read_source_model(located)
        opened = open_text(data)
        if held_out is None:
            train, look_text, report_text = split_in_three(opened)
        else:
            report_text = open_text(held_out)
            try:
                train, look_text = split(opened)
            except DataError:
                raise DataError(
                    f"{opened.name}: more text is required, because candidates are compared on a part of it that is "
                    f"not measured on (got too little); give more --data"
                ) from None
        price = describe_one_kind(opened, "calibration")
        notes = [*model.notes, *([price] if price else [])]
        twice = sorted({*opened.files} & {*report_text.files}) if held_out is not None else []
        if twice:
            notes.append(f"{twice[0]} is in --data and in --held-out: its loss is smaller than that of unseen text")
        return cls(located, model, FitFolder(out), options, train, look_text, report_text, notes)

    def identity(self) -> dict[str, Any]:
        """Returns the source, texts and settings that the measurements depend on."""
        return {
            "format": 1,
            "source": self.source.fingerprint(),
            "data": self.train.identity,
            "held_out": self.report_text.identity,
            "calibration_tokens": self.options.calibration_tokens,
            "seed": self.options.seed,
        }

    @property
    def shared(self) -> dict[str, Any]:
        """The keys that every recipe of the fit has."""
        tokens = self.options.calibration_tokens
        context = min(tokens // 2, Recipe().calibration.context, self.model.arch.max_position_embeddings)
        found: dict[str, Any] = {"seed": self.options.seed} if self.options.seed else {}
        found |= TRIMMED if self.options.trim_vocabulary else {}
        return {**found, "calibration": {"tokens": tokens, "context": context}}

    @property
    def settings(self) -> Recipe:
        """The recipe of `shared` alone."""
        return load_recipe(self.shared)

    @property
    def leaving_settings(self) -> Recipe:
        """The settings by which held-out text for parts that leave the model is packed."""
        calibration = self.settings.calibration.model_copy(update={"tokens": LEAVING_TOKENS})
        return self.settings.model_copy(update={"calibration": calibration})

    def looker(self, context: int) -> Looker:
        """Returns the looker of the fit."""
        return Looker(
            source=self.source,
            model=self.model,
            folder=self.folder,
            train=self.train,
            held_out={
                "look": HeldOutSource(self.look_text, max(2, self.options.eval_tokens // LOOK_SHARE)),
                "report": HeldOutSource(self.report_text, self.options.eval_tokens),
            },
            context=context,
            device=self.options.device,
            command=self.options.command,
            show=self.options.show,
        )

    def texts(self) -> tuple[FitText, ...]:
        """Returns the kinds of calibration text with their shares."""
        parts: list[DataSource] = [self.train]
        shares = [1.0]
        if isinstance(self.train, MixedSource):
            parts = list(self.train.parts)
            weights = self.train.weights or [1.0] * len(parts)
            shares = [float(weight) / float(sum(weights)) for weight in weights]
        tokens = self.options.calibration_tokens
        return tuple(
            FitText(name=part.name, weight=share, tokens=round(share * tokens))
            for part, share in zip(parts, shares, strict=True)
        )
