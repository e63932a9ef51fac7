"""Flags of earlier versions, and the recipe keys that replace them."""

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
"""For each command: flags with an example of their key for `--set`, which sets the key of all stages."""


def refuse_removed_flags(arguments: Sequence[str]) -> None:
    """Refuses flags that recipe keys have replaced.

    Args:
        arguments: Arguments of `refold`, the command first.

    Raises:
        RecipeError: An argument is such a flag; the message names the key.
    """
    removed = REMOVED.get(arguments[0], {}) if arguments else {}
    for argument in arguments[1:]:
        flag, _, value = argument.partition("=")
        if flag in removed:
            key, _, example = removed[flag].partition("=")
            raise RecipeError(f"{flag}: a recipe key is required now; write --set {key}={value or example}")
