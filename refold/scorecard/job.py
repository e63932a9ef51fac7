"""The model of a scorecard with all that its sections read."""

from dataclasses import dataclass, field

from refold.data.corpus import Data
from refold.errors import RefoldError
from refold.evaluation.reference import Reference
from refold.evaluation.subject import Subject
from refold.modeling.load import ModelLike
from refold.progress import Show
from refold.scorecard.settings import ScoreSettings


@dataclass(frozen=True)
class ScoreJob:
    """Inputs of the sections of one scorecard.

    Attributes:
        model: The model as the user named it.
        subject: The loaded model, on its device, with its tokenizer.
        data: Held-out text, opened once for all models; None: none was given.
        against: The source that text is compared with; None: no comparison.
        settings: The settings.
        show: Shows the progress.
    """

    model: ModelLike
    subject: Subject
    data: Data | None
    against: Reference | None
    settings: ScoreSettings
    show: Show = field(default_factory=Show)


class SectionNotRun(RefoldError):
    """A section cannot run on this model or machine; the message says why. The other sections go on."""
