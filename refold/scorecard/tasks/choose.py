"""Tasks by name: refold's files for local data, lm-eval's own, and files of the user."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from refold.errors import RefoldError
from refold.suggest import did_you_mean, shorten

FILES = Path(__file__).parent / "files"
"""Folder with refold's task files; lm-eval's `--include_path`."""


@dataclass(frozen=True)
class _Shipped:
    """refold's task files: configs of tasks by name, and names of tasks by group."""

    tasks: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]


def choose_tasks(names: Sequence[str], task_data: Path | None) -> dict[str, Any]:
    """Returns lm-eval's tasks by name.

    Args:
        names: Names of tasks or groups, or paths of task files.
        task_data: Folder with the items of refold's tasks; None: tasks of lm-eval, which reads items from the hub.

    Raises:
        RefoldError: A name is unknown, a task file is broken, or the hub cannot be reached.
        DataError: A file of items is missing or broken.
    """
    shipped = _read_shipped()
    if task_data is not None and not task_data.is_dir():
        raise RefoldError(f"{task_data}: a folder with NAME.jsonl of each task is required (no such folder)")
    metadata: dict[str, Any] = {} if task_data is None else {"task_data": str(task_data)}
    chosen: dict[str, Any] = {}
    index: Any = None
    for name in names:
        if name.endswith((".yaml", ".yml")):
            chosen |= _load_file(Path(name), metadata)
        elif task_data is not None and name in {**shipped.tasks, **shipped.groups}:
            for member in shipped.groups.get(name, [name]):
                chosen |= _load(_manager(metadata), shipped.tasks[member], member)
        else:
            index = _manager({}, include_defaults=True) if index is None else index
            for member in shipped.groups["seven"] if name == "seven" else [name]:
                _require_known(member, index.all_tasks, shipped)
                chosen |= _load(index, member, member)
    return chosen


def _read_shipped() -> _Shipped:
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[str]] = {}
    for path in sorted(FILES.glob("[!_]*.yaml")):
        config = load_yaml(path)
        if "group" not in config:
            tasks[config["task"]] = config
            for tag in [config["tag"]] if "tag" in config else []:
                groups.setdefault(tag, []).append(config["task"])
            continue
        shared = {key: value for key, value in config.items() if key not in ("group", "task")}
        members = [each if isinstance(each, dict) else {"task": each} for each in config["task"]]
        groups[config["group"]] = [each["task"] for each in members]
        tasks |= {each["task"]: {**shared, **each} for each in members if len(each) > 1}
    return _Shipped(tasks, groups)


def _manager(metadata: dict[str, Any], include: Path | None = None, include_defaults: bool = False) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=None if include is None else str(include), include_defaults=include_defaults, metadata=metadata
    )


def _require_known(name: str, known: Sequence[str], shipped: _Shipped) -> None:
    if name in known:
        return
    names = [*shipped.groups, *shipped.tasks, *known]
    hint = did_you_mean(name, names)
    local = "; give --task-data FOLDER with its items" if name in names else ""
    raise RefoldError(
        f"tasks: a task or group of lm-eval ({len(known)} are known), {', '.join(shipped.groups)} or a task file "
        f"NAME.yaml is required (got {shorten(name)}){local or hint}"
    )


def _load_file(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        raise RefoldError(f"{path}: a task file is required (no such file); check the path")
    with explained_task(str(path)):
        return _load(_manager(metadata, path.resolve().parent), str(path.resolve()), str(path))


def _load(manager: Any, spec: str | dict[str, Any], name: str) -> dict[str, Any]:
    with explained_task(name):
        return dict(manager.load([spec])["tasks"])


@contextmanager
def explained_task(name: str) -> Iterator[None]:
    """Turns errors of lm-eval and of the hub's client about a task into one line.

    Raises:
        RefoldError: The task's file is broken or does not fit its items, or the hub cannot be reached.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (RefoldError, MemoryError):
        raise
    except (ConnectionError, TimeoutError, DatasetsError, HfHubHTTPError, HTTPError) as error:
        raise RefoldError(
            f"tasks: {name}: its items cannot be read from the hub ({_reason(error)}); go online, or give --task-data "
            f"FOLDER with local items"
        ) from error
    except FileNotFoundError as error:
        raise RefoldError(f"{name}: a file that it names is missing ({_reason(error)}); check the path") from error
    except yaml.YAMLError as error:
        raise RefoldError(f"{name}: a YAML file is required ({_reason(error)}); mend it") from error
    except Exception as error:
        # lm-eval checks task files by running them, which raises almost every type.
        raise RefoldError(f"{name}: a task of lm-eval is required ({_reason(error)}){_key_hint(error)}") from error


def _reason(error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines)[:160]}"


def _key_hint(error: Exception) -> str:
    """Returns the closest key of a task file where the error is about an unknown key."""
    from lm_eval.config.task import TaskConfig

    _, found, rest = str(error).partition("unexpected keyword argument '")
    return did_you_mean(rest.partition("'")[0], [each.name for each in fields(TaskConfig)]) if found else ""
