"""Data sets of the hub by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refold.data.blocks import first_line
from refold.data.dataset_source import open_dataset
from refold.data.field import Document, Field
from refold.data.location import HubName
from refold.data.readers import DataSource
from refold.data.streams import DatasetStream
from refold.errors import DataError


def open_hub(wanted: HubName, field: Field) -> DataSource[Document] | DatasetStream:
    """Opens a data set of the hub; code in it is never run.

    Args:
        wanted: which one.
        field: which column holds the document.

    Raises:
        DataError: there is no such data set, revision, configuration, split or column, or the hub cannot be reached.
    """
    import datasets

    name = f"hf://{wanted.name}" + (f"@{wanted.revision}" if wanted.revision else "")
    with _explained(name):
        revision = _resolve(wanted)
        loaded: Any = datasets.load_dataset(
            wanted.name, wanted.config, split=wanted.split, revision=revision, streaming=wanted.is_streamed
        )
    if not wanted.is_streamed:
        return open_dataset(loaded, field, name)
    identity = f"{wanted.name}@{revision} {wanted.config} {wanted.split} {field.name} {field.form}"
    return DatasetStream(loaded, field, name, identity)


def _resolve(wanted: HubName) -> str | None:
    """Returns the commit; offline the revision as it was named, which `datasets` then looks for in its cache."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE and not wanted.is_streamed:
        return wanted.revision
    return HfApi().dataset_info(wanted.name, revision=wanted.revision, timeout=30).sha


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of the hub client and of `datasets` into one line each."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise DataError(f"{name}: gated on the hub: access is required; ask there, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{name}: no such revision on the hub; check the part after @") from None
    except errors.RepositoryNotFoundError:
        raise DataError(f"{name}: no such data set on the hub (or a private one); check the name") from None
    except errors.HFValidationError as error:
        raise DataError(f"{name}: a hub id org/name is required ({first_line(error)})") from None
    except errors.HfHubHTTPError as error:
        raise DataError(f"{name}: the hub refused ({first_line(error)}); try again later") from None
    except (errors.OfflineModeIsEnabled, ConnectionError, TimeoutError, errors.HTTPError) as error:
        raise DataError(
            f"{name}: a network is required, or with HF_HUB_OFFLINE=1 a copy in the cache ({first_line(error)}); go "
            f"online, or give files"
        ) from None
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{name}: a readable data set is required ({first_line(error)})") from None
