"""Choices with one window size: a model holds one, and the menu offers several."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TypeVar

from refold.errors import RefoldError
from refold.families.arch import ArchSpec
from refold.fitting.budget import Limits
from refold.fitting.choose import BoundedChoice, cheapest, choose_several
from refold.fitting.menu import FitChoice, Menu, PartForm, PartMenu

T = TypeVar("T")


def choose_candidates(
    menu: Menu, arch: ArchSpec, limits: Limits, k: int, without: Collection[str] = ()
) -> list[BoundedChoice]:
    """Returns up to `k` choices as `choose_several`, each with one window size at most.

    Args:
        menu: The menu.
        arch: The source, whose own windows count.
        limits: Upper limits.
        k: Number of choices.
        without: As of `choose`.

    Raises:
        RefoldError: No choice meets the limits.
    """

    def several(each: Menu) -> list[BoundedChoice]:
        return choose_several(each, limits, k, without)

    found = [each for made in _by_window(menu, arch, several, _many_windows(arch)) for each in made]
    return sorted(found, key=lambda each: each.choice.loss)[:k]


def cheapest_candidate(
    menu: Menu, arch: ArchSpec, quantity: str, max_loss: float, limits: Limits, without: Collection[str] = ()
) -> FitChoice:
    """Returns the choice of `cheapest` with one window size at most; arguments and errors as there."""
    find = partial(cheapest, quantity=quantity, max_loss=max_loss, limits=limits, without=without)
    found = _by_window(menu, arch, find, lambda made: _many_windows(arch)([made]))
    return min((each.choice for each in found), key=lambda choice: getattr(choice.costs, quantity))


def _by_window(menu: Menu, arch: ArchSpec, find: Callable[[Menu], T], is_mixed: Callable[[T], bool]) -> Sequence[T]:
    """Returns the results of a whole menu, or those for each window size if the whole menu's mix several."""
    whole = find(menu)
    if not is_mixed(whole):
        return [whole]
    found: list[T] = []
    failed: RefoldError | None = None
    for each in _one_window_menus(menu, arch):
        try:
            found.append(find(each))
        except RefoldError as error:
            failed = error
    if not found:
        assert failed is not None
        raise failed
    return found


def _many_windows(arch: ArchSpec) -> Callable[[Sequence[BoundedChoice]], bool]:
    own = source_windows(arch)

    def is_mixed(found: Sequence[BoundedChoice]) -> bool:
        windows = ({_window(part.form) for part in each.choice.parts} - {None} for each in found)
        return any(len(own | each) > 1 for each in windows)

    return is_mixed


def _one_window_menus(menu: Menu, arch: ArchSpec) -> Iterator[Menu]:
    """Yields the menu with each window size alone; beside windows of the source only with theirs."""
    own = source_windows(arch)
    offered = {_window(form) for part in menu.parts for form in part.forms} - {None}
    for size in sorted(offered & own if own else offered, key=str) or [None]:
        yield menu.model_copy(update={"parts": tuple(_with_window(part, size) for part in menu.parts)})


def source_windows(arch: ArchSpec) -> set[int]:
    """Returns the window sizes of a source's layers."""
    return {layer.window for layer in arch.layers if layer.window is not None}


def _with_window(part: PartMenu, size: int | None) -> PartMenu:
    kept = tuple(form for form in part.forms if _window(form) in (None, size))
    return part.model_copy(update={"forms": kept})


def _window(form: PartForm) -> int | None:
    """Returns the window of softmax attention that a form has instead of the source's; None: none."""
    is_window = form.setting.get("type") == "attention" and form.setting.get("window")
    return int(form.setting["window"]) if is_window else None
