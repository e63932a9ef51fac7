"""The small pretrained model inside the package, and the text it is healed and measured on."""

from importlib.resources import as_file, files
from pathlib import Path

from refold.data.readers import DataSource, from_documents
from refold.errors import SourceError
from refold.studies.stdlib_corpus import held_out_documents, training_documents

SHIPPED_NAME = "stdlib-5m"


def shipped_model() -> Path:
    """Returns the folder of the model that ships with refold.

    Raises:
        SourceError: The installation lacks it.
    """
    with as_file(files("refold") / "shipped" / SHIPPED_NAME) as folder:
        if not (folder / "config.json").is_file():
            raise SourceError(f"{folder}: the shipped model is required (not there); install refold again")
        return Path(folder)


def training_data() -> DataSource:
    """The running Python's standard library without the held-out modules."""
    return from_documents(training_documents(), name="the standard library")


def held_out_data() -> DataSource:
    """The held-out modules of the running Python's standard library."""
    return from_documents(held_out_documents(), name="held-out modules of the standard library")
