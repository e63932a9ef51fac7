"""Description of a folded model's folder, from its files without loading weights."""

import json
from pathlib import Path
from typing import Any

from refold.blueprint.cost import cost
from refold.blueprint.passes import describe_passes
from refold.blueprint.schema import Blueprint
from refold.checkpoint import provenance
from refold.checkpoint.folded_tensors import check_folded_tensors, float_names, read_blueprint
from refold.checkpoint.folder import settle
from refold.checkpoint.headers import DTYPE_BYTES, read_headers, stored_dtype
from refold.checkpoint.locate import PLAN_NAME, locate
from refold.checkpoint.manifest import verify as verify_files
from refold.conversion.vocabulary import source_arch
from refold.errors import FolderError
from refold.families.arch import Frozen
from refold.planning.approximation import Approximation
from refold.planning.build import identity_blueprint
from refold.planning.lines import MemoryNeeds, compare_memory
from refold.planning.plan import CostPair, read_plan
from refold.vocabulary.kept_tokens import read_kept_tokens


class Inspection(Frozen):
    """Description of a folded model's folder."""

    path: str
    blueprint: Blueprint
    cost: CostPair
    memory: MemoryNeeds
    dtype: str
    num_files: int
    """Number of weight files; with `verify` the number of hashed files."""
    stages: tuple[dict[str, Any], ...]
    """Stages of the provenance, first to last."""
    kept_energy: dict[str, float]
    """By `depths.<d>.<linear>`: the share of the residual's energy that the LoRA kept at conversion."""
    approximation: dict[str, Approximation]
    """By `depths.<d>`: error of the feature maps against the source's softmax at conversion."""
    passes: tuple[str, ...]
    """Segments of the stack as the engine launches them."""
    notes: tuple[str, ...]
    source_vocabulary: int | None = None
    """Size of the source's vocabulary, of which the model keeps only some tokens; None: it keeps all."""


def inspect(folder: str | Path, *, verify: bool = False) -> Inspection:
    """Describes a folded model's folder.

    Args:
        folder: The folder.
        verify: Also hash every file against the manifest.

    Raises:
        FolderError: Not a folded model, torn, or with `verify` changed since it was written.
        SourceError: Missing, or a weight file is damaged.
    """
    path = settle(folder)
    config = locate(path).read_config()
    if "blueprint" not in config:
        raise FolderError(
            f"{folder}: a folded model is required (got model_type {config.get('model_type')!r}); use plan"
        )
    blueprint = read_blueprint(str(path), config)
    headers = read_headers(path)
    assert headers is not None
    check_folded_tensors(str(path), blueprint, headers)
    num_files = len(headers.files)
    if verify:
        verify_files(path)
        num_files = len(json.loads((path / "manifest.json").read_text())["files"])
    dtype = stored_dtype(str(path), headers, float_names(blueprint, headers))
    plan = read_plan(path / PLAN_NAME) if (path / PLAN_NAME).exists() else None
    size = DTYPE_BYTES[dtype]
    kept = read_kept_tokens(path)
    costs = CostPair(
        source=cost(identity_blueprint(source_arch(blueprint.arch, kept)), size), target=cost(blueprint, size)
    )
    return Inspection(
        path=str(path),
        blueprint=blueprint,
        cost=costs,
        memory=compare_memory(costs.source, costs.target),
        dtype=dtype,
        num_files=num_files,
        stages=tuple(vars(stage) for stage in provenance.read(path)),
        kept_energy=dict(plan.kept_energy) if plan is not None else {},
        approximation=dict(plan.approximation) if plan is not None else {},
        passes=describe_passes(blueprint),
        notes=tuple(note.text for note in plan.notes) if plan is not None else (),
        source_vocabulary=None if kept is None or kept.size == kept.source_size else kept.source_size,
    )
