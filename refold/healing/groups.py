"""Groups of weights, by blueprint, name or pattern, and the weights that a stage trains."""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from refold.blueprint.kinds import TargetTensor
from refold.blueprint.origins import Initialisation
from refold.blueprint.schema import Blueprint, users_of
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.locate import PLAN_NAME
from refold.errors import HealError
from refold.modeling.model import RefoldForCausalLM
from refold.recipe.heal import GROUPS, KIND_GROUPS, HealStage
from refold.suggest import did_you_mean

PACKED = "_packed"


class WeightGroups:
    """Finds parameters of a model by group, name or pattern.

    Args:
        student: a folded model, or a source, which has only the groups that need no blueprint.
        folder: folder of the model; its `plan.json` tells which tensors were transferred.

    Attributes:
        names: all parameters.
        integers: those that hold weights stored as integers, which cannot train.
    """

    def __init__(self, student: nn.Module, folder: Path | None):
        self.names = tuple(name for name, _ in student.named_parameters())
        self.integers: frozenset[str] = frozenset()
        if isinstance(student, RefoldForCausalLM):
            blueprint = student.config.read_blueprint()
            self._groups = _of_blueprint(blueprint, _read_starts(folder))
            self.integers = frozenset(each.name for each in target_tensors(blueprint) if each.piece is not None)
        else:
            self._groups = _of_source(student)

    def find(self, wish: str, where: str) -> frozenset[str]:
        """Returns the parameters of a group, or those that match a name or pattern.

        Args:
            wish: group, name or pattern from the recipe.
            where: the recipe's key, for messages.

        Raises:
            HealError: no group or parameter matches, or the group is unknown for this model.
        """
        if wish == "all":
            return frozenset(self.names)
        if wish in GROUPS:
            if wish not in self._groups:
                known = ", ".join(["all", *self._groups])
                raise HealError(f"{where}: '{wish}' cannot be told for this model (it has {known}); name the tensors")
            return self._groups[wish] & frozenset(self.names)
        found = frozenset(name for name in self.names if name == wish or fnmatchcase(name, wish))
        if not found:
            hint = did_you_mean(wish, (*GROUPS, *self.names))
            raise HealError(
                f"{where}: a group ({', '.join(GROUPS)}), tensor or pattern is required (got '{wish}'){hint}"
            )
        return found

    def union(self, wishes: Iterable[str], where: str) -> frozenset[str]:
        """Returns the parameters that match at least one wish; arguments and errors as for `find`."""
        return frozenset[str]().union(*(self.find(wish, where) for wish in wishes))


class Trainable:
    """Holds the weights that a stage trains, those that it freezes first, and their factors on the learning rate.

    Attributes:
        trained: parameters that train at some time.
        frozen_first: those of `trained` that are frozen until the stage thaws.
        factors: parameter to factor on the learning rate.

    Raises:
        HealError: a group is unknown, or no weight would train.
    """

    def __init__(self, stage: HealStage, groups: WeightGroups):
        self.trained = groups.union(stage.train, "train") - groups.union(stage.freeze, "freeze")
        integers = sorted(self.trained & groups.integers)
        if integers:
            weights = sorted({name.rpartition("_")[0] for name in integers if name.endswith(PACKED)})
            shown = ", ".join(weights[:3]) + (", ..." if len(weights) > 3 else "")
            raise HealError(
                f"train: weights of floats are required ({len(weights)} are stored as integers: {shown}); train "
                f"adapters or vectors, or heal the model before it is quantised"
            )
        self.frozen_first: frozenset[str] = frozenset()
        if stage.thaw is not None:
            self.frozen_first = groups.union(stage.thaw.groups, "thaw.groups") & self.trained
            if not self.frozen_first:
                raise HealError(f"thaw.groups: weights that train are required ({', '.join(stage.thaw.groups)}: none)")
        if not self.trained - self.frozen_first:
            told = f"train: {', '.join(stage.train)}" + (f"; freeze: {', '.join(stage.freeze)}" if stage.freeze else "")
            told += f"; thaw: {', '.join(stage.thaw.groups)}" if stage.thaw else ""
            raise HealError(f"train: at least one weight to train from the start is required (none left of {told})")
        self.factors: dict[str, float] = {}
        for wish, factor in stage.rates.items():
            self.factors |= dict.fromkeys(groups.find(wish, "rates"), factor)


def _of_blueprint(blueprint: Blueprint, starts: Initialisation | None) -> dict[str, frozenset[str]]:
    tensors = list(target_tensors(blueprint))
    groups = {name: frozenset(each.name for each in tensors if name in each.groups) for name in KIND_GROUPS}
    groups["shared"] = frozenset(each.name for each in tensors if _is_shared(blueprint, each))
    if starts is not None:
        fresh = frozenset(each.name for each in tensors if each.origin(blueprint, starts).how == "fresh")
        groups["fresh"] = fresh
        groups["transferred"] = frozenset(each.name for each in tensors) - fresh
    return groups


def _is_shared(blueprint: Blueprint, tensor: TargetTensor) -> bool:
    if tensor.pool is None or tensor.part is None:
        return False
    return len(users_of(blueprint, tensor.pool, tensor.part, tensor.local)) > 1


def _of_source(student: nn.Module) -> dict[str, frozenset[str]]:
    embeddings = {id(module.weight) for module in student.modules() if isinstance(module, nn.Embedding)}
    named = dict(student.named_parameters())
    return {
        "vectors": frozenset(name for name, value in named.items() if value.ndim == 1),
        "embeddings": frozenset(name for name, value in named.items() if id(value) in embeddings),
    }


def _read_starts(folder: Path | None) -> Initialisation | None:
    path = None if folder is None else folder / PLAN_NAME
    if path is None or not path.exists():
        return None
    try:
        return Initialisation.model_validate(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError) as error:
        raise HealError(f"{path}: a readable plan is required ({str(error)[:80]}); convert the source again") from None
