"""A conversion's cut vocabulary: the tokens are counted and chosen, and the plan and the files follow."""

from pathlib import Path

from refold.blueprint.cost import cost
from refold.checkpoint.companions import Companions, copy_companions
from refold.checkpoint.locate import Source
from refold.data.readers import DataSource
from refold.families.arch import ArchSpec
from refold.modeling.configuration import RefoldConfig
from refold.planning.build import UNCOUNTED_TOKENS
from refold.planning.notes import Note
from refold.planning.plan import CostPair, Plan, StackPlan
from refold.sources.source_model import SourceModel
from refold.vocabulary.choice import choose_tokens
from refold.vocabulary.counting import count_tokens
from refold.vocabulary.kept_tokens import KeptTokens
from refold.vocabulary.tokenizer_folder import cut_tokenizer


def find_kept(plan: StackPlan, model: SourceModel, text: DataSource | None) -> KeptTokens | None:
    """Counts the tokens of a text, if the recipe asks for it, and chooses those to keep; None without `vocabulary`.

    Raises:
        RecipeError, SourceError, DataError: As `count_tokens` and `choose_tokens`.
    """
    section = plan.recipe.vocabulary
    if section is None:
        return None
    counts = None
    if section.counts_text:
        assert text is not None
        counts = count_tokens(model, text, section.tokens, plan.recipe.seed)
    return choose_tokens(model, section, counts)


def with_kept(plan: Plan, kept: KeptTokens, dtype_bytes: int) -> Plan:
    """Returns a plan whose target has only the kept tokens."""
    section, arch = plan.recipe.vocabulary, plan.blueprint.arch
    assert section is not None
    blueprint = plan.blueprint.model_copy(update={"arch": arch.model_copy(update={"vocab_size": kept.size})})
    told = (
        f"vocabulary: {kept.size:,} of {arch.vocab_size:,} tokens are kept ({section.describe()}); text with others "
        f"takes more tokens, which the model has rarely seen together"
    )
    notes = tuple(note for note in plan.notes if not note.text.startswith(UNCOUNTED_TOKENS))
    changes = {
        "blueprint": blueprint,
        "cost": CostPair(source=plan.cost.source, target=cost(blueprint, dtype_bytes)),
        "notes": (*notes, Note(text=told)),
    }
    return plan.model_copy(update=changes)


def write_companions(source: Source, target: Path, kept: KeptTokens | None, config: RefoldConfig) -> Companions:
    """Copies a source's companions into a folder, with its tokenizer cut to the kept tokens, and saves the config.

    Args:
        source: The source.
        target: The folder to write.
        kept: The kept tokens; None: the tokenizer is copied as it is.
        config: The config of the folded model.

    Raises:
        SourceError: As `copy_companions` and `cut_tokenizer`.
    """
    copied = copy_companions(source.fetch_companions(), target)
    config.save_pretrained(target)
    if kept is not None:
        cut_tokenizer(target, kept)
    return copied


def source_arch(arch: ArchSpec, kept: KeptTokens | None) -> ArchSpec:
    """Returns the architecture of a folded model with the vocabulary of its source."""
    return arch if kept is None else arch.model_copy(update={"vocab_size": kept.source_size})
