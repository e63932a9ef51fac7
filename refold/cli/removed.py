"""Flags that earlier versions had, and the recipe keys that take their place."""

from collections.abc import Mapping, Sequence

from refold.errors import RecipeError

_STAGE = {
    "--learning-rate": "heal.learning_rate=1e-3",
    "--seed": "heal.seed=1",
}
REMOVED: Mapping[str, Mapping[str, str]] = {
    "heal": {
        **_STAGE,
        "--objective": "heal.objective=next_token",
        "--batch-tokens": "heal.batch_tokens=4096",
        "--context": "heal.context=512",
        "--teacher-tokens": "heal.teacher_tokens=20M",
    },
    "run": _STAGE,
}
"""By command: flag to an example of its key for `--set`, which applies to all stages."""


def refuse_removed_flags(arguments: Sequence[str]) -> None:
    """Refuses a flag that is a recipe key now.

    Args:
        arguments: Of `refold`, the command first.

    Raises:
        RecipeError: One of them is such a flag; the message names the key.
    """
    removed = REMOVED.get(arguments[0], {}) if arguments else {}
    for argument in arguments[1:]:
        flag, _, value = argument.partition("=")
        if flag in removed:
            key, _, example = removed[flag].partition("=")
            raise RecipeError(f"{flag}: a recipe key is required now; write --set {key}={value or example}")
