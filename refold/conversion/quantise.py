"""Storing the weights of a model as integers: a new folder with the same model, each linear rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from refold.blueprint.cost import count_weight_bytes
from refold.blueprint.quantisation import describe_schemes, holds_integers, with_schemes
from refold.blueprint.schema import Blueprint
from refold.calibration.calibration import pack_calibration
from refold.calibration.shrinkage import number_folds
from refold.checkpoint import provenance
from refold.checkpoint.card import read_licence, write_card
from refold.checkpoint.companions import copy_companions
from refold.checkpoint.folded_tensors import check_folded_tensors, float_names, read_blueprint
from refold.checkpoint.folder import AtomicFolder, require_elsewhere, settle
from refold.checkpoint.headers import DTYPE_BYTES, stored_dtype
from refold.checkpoint.locate import PLAN_NAME, Source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import CALIBRATION_BYTES, ConvertOptions, convert
from refold.conversion.integer_weights import write_integers
from refold.conversion.progress import StepReport
from refold.conversion.rounding_pass import RoundingText
from refold.data.corpus import Data, name_parts, open_text
from refold.data.mixture import describe_one_kind
from refold.data.readers import DataSource
from refold.errors import RecipeError, given_or_default
from refold.modeling.configuration import MODEL_TYPE, RefoldConfig
from refold.modeling.load import choose_device, load_tokenizer
from refold.planning.plan import Plan, read_plan
from refold.planning.schemes import choose_schemes
from refold.recipe.load import load_recipe
from refold.recipe.quantise import Quantise, Rounding
from refold.recipe.recipe import Calibration


@dataclass(frozen=True)
class QuantiseOptions:
    """Further settings of a quantisation.

    Attributes:
        rounding: `plain`, `feedback`, or `auto`: feedback where there is text.
        context: Tokens of each sequence; at most the model's context.
        shrink: Strength by which rounding with feedback shrinks towards rounding without text: `none`, `auto` or a
            number, as `calibration.shrink` in a recipe.
        seed: Seed of the choice of text.
        overwrite: Replace a folder that refold wrote.
        device: Device that rounds.
        command: Command line, for the provenance.
        progress: Called with the steps done and the steps in all.
        layers: Formats by linear, one for each layer of the source; they win over `keep`.
    """

    rounding: Rounding = "auto"
    context: int = Calibration().context
    shrink: str | float | int = "none"
    seed: int = 0
    overwrite: bool = False
    device: str = "cpu"
    command: str = ""
    progress: StepReport | None = None
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantised:
    """A model after quantisation.

    Attributes:
        blueprint: With the scheme of each weight.
        rounding: `plain` or `feedback`.
        float_bytes: Bytes of all weights before.
        weight_bytes: Bytes of all weights after.
        notes: Lines about the calibration text, such as the price of text of one kind.
    """

    blueprint: Blueprint
    rounding: str
    float_bytes: int
    weight_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The weights by scheme and the rounding, in words."""
        return f"{describe_schemes(self.blueprint)}; rounding {self.rounding}"

    @property
    def figures(self) -> dict[str, str | int]:
        """Schemes, rounding and sizes as plain data."""
        return {
            "weights": describe_schemes(self.blueprint),
            "rounding": self.rounding,
            "float_bytes": self.float_bytes,
            "weight_bytes": self.weight_bytes,
        }


def quantise(
    model: str | Path | Source,
    destination: str | Path,
    to: str = "int8",
    *,
    keep: Mapping[str, str] | None = None,
    data: Data | None = None,
    tokens: int = Calibration().tokens,
    options: QuantiseOptions | None = None,
) -> Quantised:
    """Writes a model whose weights are stored as integers.

    Args:
        model: Folder or hub id of a folded model, or of a source, which is converted by the empty recipe.
        destination: The folder to write; it is complete afterwards, or does not exist.
        to: Scheme of the linears, such as `int8`, `int4` or `int3g64`.
        keep: Other formats by name: `embeddings`, `head`, `mixer`, `mlp` or a linear; a scheme or `float`.
        data: Calibration text for rounding with error feedback; see `refold.data.corpus`.
        tokens: Number of calibration tokens.
        options: Kind of rounding, device, overwriting.

    Returns:
        Schemes and sizes.

    Raises:
        RecipeError: There is no such scheme, linear or rounding; feedback without text; the model is quantised already.
        DataError: The text is missing, broken or too short.
        SourceError: The model is missing or broken.
        FolderError: The model is torn; the destination is taken, locked or cannot be written, or the disk is full.
    """
    options = given_or_default(options, QuantiseOptions, "options")
    section = make_section(to, keep, options.rounding, options.layers)
    located = model if isinstance(model, Source) else locate(model)
    config = located.read_config()
    require_text(section, data is not None)
    opened = None if data is None else open_text(data, limit=CALIBRATION_BYTES)
    price = None if opened is None else describe_one_kind(opened, "calibration")
    notes = () if price is None else (price,)
    if config.get("model_type") != MODEL_TYPE:
        return replace(_quantise_source(located, destination, section, opened, tokens, options), notes=notes)
    folder = settle(located.fetch())
    blueprint = read_blueprint(located.where, config)
    if holds_integers(blueprint):
        raise RecipeError(
            f"{located.where}: weights of floats are required (got {describe_schemes(blueprint)}); quantise the model "
            f"that it was made from"
        )
    require_elsewhere(destination, folder)
    schemes = choose_schemes(blueprint, section)
    text = None if opened is None else _pack(folder, blueprint, opened, tokens, options)
    stage = provenance.Stage(
        stage="quantise",
        source=provenance.describe_source(located),
        recipe={**section.model_dump(mode="json"), "used": "plain" if text is None else "feedback"},
        seed=options.seed,
        text={} if opened is None else name_parts(opened),
        command=options.command,
    )
    return replace(_write_folder(located, blueprint, schemes, stage, text, destination, options), notes=notes)


def make_section(
    to: str, keep: Mapping[str, str] | None, rounding: str, layers: Mapping[str, Sequence[str]] | None = None
) -> Quantise:
    """Returns the section `quantise` of arguments, checked like a recipe's.

    Raises:
        RecipeError: A value is invalid.
    """
    listed = {name: list(formats) for name, formats in (layers or {}).items()}
    section = {"to": to, "keep": dict(keep or {}), "layers": listed, "rounding": rounding}
    made = load_recipe({"quantise": section}).quantise
    assert made is not None
    return made


def require_text(section: Quantise, has_text: bool) -> None:
    """Checks that rounding with feedback has text, and that text is used.

    Raises:
        RecipeError: It is not so.
    """
    if section.rounding == "feedback" and not has_text:
        raise RecipeError("quantise.rounding: calibration text is required for feedback (got none); give --data FILE")
    if section.rounding == "plain" and has_text:
        raise RecipeError("quantise.rounding: plain uses no text (got some); remove --data, or set rounding to auto")


def _quantise_source(
    source: Source,
    destination: str | Path,
    section: Quantise,
    data: DataSource | None,
    tokens: int,
    options: QuantiseOptions,
) -> Quantised:
    """Converts a source by the empty recipe and the section."""
    recipe = {
        "quantise": section.model_dump(mode="json"),
        "calibration": {"tokens": tokens, "context": options.context, "shrink": options.shrink},
        "seed": options.seed,
        "ignore_tensors": [{"name": name, "reason": reason} for name, reason in source.ignore_tensors],
    }
    made = ConvertOptions(
        overwrite=options.overwrite,
        allow_larger=True,
        device=options.device,
        command=options.command,
        progress=options.progress,
    )
    plan = convert(source, destination, recipe, options=made, calibration=data)
    size = DTYPE_BYTES[plan.dtype]
    return _describe(plan.blueprint, size, "plain" if data is None else "feedback")


def _describe(blueprint: Blueprint, dtype_bytes: int, rounding: str) -> Quantised:
    before = count_weight_bytes(with_schemes(blueprint, {}), dtype_bytes)
    return Quantised(blueprint, rounding, before, count_weight_bytes(blueprint, dtype_bytes))


def _pack(folder: Path, blueprint: Blueprint, data: DataSource, tokens: int, options: QuantiseOptions) -> RoundingText:
    strength = load_recipe({"calibration": {"shrink": options.shrink}}).shrinkage
    length = min(options.context, blueprint.arch.max_position_embeddings)
    found = pack_calibration(
        data,
        load_tokenizer(folder),
        sequence_length=length,
        num_fit=0,
        num_held_out=max(1, tokens // length),
        seed=options.seed,
        vocab_size=blueprint.arch.vocab_size,
    )
    return RoundingText(found.held_out, strength, number_folds(found) if strength is None else None)


def _write_folder(
    located: Source,
    blueprint: Blueprint,
    schemes: Mapping[str, str],
    stage: provenance.Stage,
    text: RoundingText | None,
    destination: str | Path,
    options: QuantiseOptions,
) -> Quantised:
    folder, device = settle(located.fetch()), str(choose_device(options.device))
    made = with_schemes(blueprint, schemes)
    with CheckpointReader(folder, blueprint) as reader:
        check_folded_tensors(located.where, blueprint, reader.headers)
        dtype = stored_dtype(located.where, reader.headers, float_names(blueprint, reader.headers))
        found = _describe(made, DTYPE_BYTES[dtype], "plain" if text is None else "feedback")
        with AtomicFolder(destination, options.overwrite, found.weight_bytes) as out:
            write_integers(reader, blueprint, schemes, out, text, device, options.progress)
            config = RefoldConfig.from_pretrained(folder, local_files_only=True)
            config.blueprint = made.model_dump(mode="json")
            config.save_pretrained(out.path)
            plan = _copy_plan(folder, out.path, made)
            copy_companions(folder, out.path)
            stages = provenance.read(folder)
            provenance.write(out.path, provenance.append(stages, stage))
            base = located.hub_id or folder.name
            facts = {
                "made from": base,
                "weights": describe_schemes(made),
                "rounding": found.rounding,
                "weight bytes": f"{found.weight_bytes:,} (before {found.float_bytes:,})",
            }
            notes = [] if plan is None else [note.text for note in plan.notes]
            write_card(out.path, base, f"{base}, quantised", facts, notes, read_licence(folder))
    return found


def _copy_plan(folder: Path, target: Path, blueprint: Blueprint) -> Plan | None:
    """Writes the plan of the model with the new blueprint; None if the folder has none."""
    if not (folder / PLAN_NAME).exists():
        return None
    plan = read_plan(folder / PLAN_NAME).model_copy(update={"blueprint": blueprint})
    (target / PLAN_NAME).write_text(plan.model_dump_json(indent=2) + "\n")
    return plan
