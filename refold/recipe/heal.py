"""The `heal` section of a recipe: training stages, and the protocols that expand to stages."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from refold.blueprint.owned.registry import OWNED
from refold.fields import Amount, Count, LayerIndex, Real, Section, read_amount
from refold.recipe.objectives import StageObjectives
from refold.recipe.yaml import parse_yaml
from refold.suggest import must_be_one_of, shorten

Share = Annotated[Real, Field(ge=0, le=1)]
Groups = tuple[Annotated[str, Field(min_length=1)], ...]
KIND_GROUPS = tuple(
    dict.fromkeys(
        (
            *("adapters", "mixers", "mlps", "vectors", "embeddings", "head"),
            *(group for kind in OWNED for group in sorted(kind.groups)),
        )
    )
)
"""Names of groups that are derived from the kind and the pool of a tensor."""
GROUPS = tuple(dict.fromkeys(("all", "transferred", "fresh", "adapters", "shared", *KIND_GROUPS)))
"""Names of all groups of weights. Any other name is a tensor, or a pattern with `*`."""


def _read_objective(value: Any) -> Any:
    """Reads the forms of `objective`: a name, a list of names, or a mapping of names to options, a weight or null."""
    if callable(value):
        raise ValueError(
            "must be the name of an objective (got a function or class); subclass Objective and register it under a "
            "name with refold.register_objective"
        )
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if not isinstance(value, dict):
        return value
    return {name: _read_options(options) for name, options in value.items()}


def _read_options(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"weight": value}
    return value


class Thaw(Section):
    """Freezes some weights at first, and thaws them during training.

    The rule is the Loss Improvement Threshold of Cross-Architecture Transfer Learning (arXiv 2404.02684).
    """

    groups: Groups = ("transferred",)
    """Groups of weights that are frozen at first."""
    when: Literal["improvement", "norm", "share"] = "improvement"
    """Condition for thawing. `improvement`: from one window to the next the mean loss improves by less than the share
    `threshold`. `norm`: in a window the norm of the trained weights grows by less than the share `threshold`. `share`:
    the share `latest` of the steps is reached."""
    threshold: Annotated[Real, Field(ge=0)] = 0.01
    """Relative change for each window below which the weights thaw."""
    patience: Count = 1
    """Number of successive windows below `threshold`."""
    window: Annotated[Real, Field(gt=0, le=1)] = 0.034
    """Length of a window as a share of the stage's steps (the paper: 5,000 of 145,000)."""
    warmup: Share = 0.014
    """Share of the stage's steps over which the thawed weights' learning rate rises (the paper: 2,000 of 145,000)."""
    latest: Share = 1.0
    """Share of the steps after which the weights thaw in any case; 1: never."""


class HealStage(Section):
    """One training stage after conversion."""

    objective: Annotated[StageObjectives, BeforeValidator(_read_objective)] = StageObjectives.model_validate(
        {"distil": {}}
    )
    """Objectives to minimise: a name, a list of names, or a mapping of names to options, such as
    `{distil: {divergence: reverse_kl}, hidden_states: {weight: 0.1}}`."""
    tokens: Amount
    """Training tokens, such as 20M."""
    learning_rate: Annotated[Real, Field(gt=0)] | None = None
    """Peak learning rate. Default: chosen from the hidden size, the batch, and the distance of the stage's first loss
    from the teacher's."""
    batch_tokens: Amount | None = None
    """Tokens in one optimizer step. Default: chosen from `tokens`, so that the stage has enough steps."""
    context: Annotated[Count, Field(ge=2)] | None = None
    """Tokens in one packed sequence. Default: 1024, and at most the positions of the model and the chosen batch."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`; or `muon` for the matrices inside the stack, with AdamW for all other weights."""
    warmup: Share | None = None
    """Share of the steps over which the learning rate rises. Default: chosen from the number of steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up; `constant` decays linearly in the last fifth of the steps."""
    floor: Share = 0.1
    """Final learning rate, as a share of the peak."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Weight decay, on matrices only."""
    gradient_clip: Annotated[Real, Field(gt=0)] = 1.0
    """Maximum 2-norm of the gradient over all weights; a longer gradient is scaled down."""
    train: Groups = ("all",)
    """Weights to train: groups (`all`, `transferred`, `fresh`, `adapters`, `shared`, `mixers`, `mlps`, `vectors`,
    `embeddings`, `head`, `exits`), names of tensors, or patterns with `*`."""
    freeze: Groups = ()
    """Exceptions from `train`: weights that stay frozen."""
    rates: dict[str, Annotated[Real, Field(ge=0)]] = Field(default_factory=dict)
    """Factors on the learning rate by group, name or pattern; if several match a weight, the last one counts."""
    thaw: Thaw | None = None
    """Weights that are frozen at first, and the condition for thawing them."""
    data: Literal["text", "chat"] = "text"
    """`chat`: documents are lists of messages, rendered by the tokenizer's chat template. Only the assistant's turns
    count in the loss."""
    teacher_tokens: Amount | None = None
    """Tokens of the same data on which the source is first trained by next-token prediction to become the teacher, as
    in Relaxed Recursive Transformers. Default: the teacher is the source, without training."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; weights and optimizer states are always float32. `auto`: bfloat16 on a GPU, and on a
    CPU with AMX or AVX512-BF16 from a hidden size of 128 on; else float32."""
    micro_batch: Count | None = None
    """Sequences in one forward pass; gradients are accumulated over the batch. Default: as many as memory allows."""
    gradient_checkpointing: bool = False
    """Whether each depth's activations are computed again in the backward pass instead of being stored."""
    seed: LayerIndex = 0
    """Seed for the order of the data."""

    @model_validator(mode="after")
    def _thaws_what_trains(self) -> "HealStage":
        if self.thaw is not None and self.thaw.when == "share" and self.thaw.latest == 1:
            raise ValueError("thaw.latest: a share below 1 is required where `when` is share (got 1)")
        return self


@cache
def _built_in() -> dict[str, dict[str, Any]]:
    found = {
        path.name.removesuffix(".yaml"): parse_yaml(path.read_text(encoding="utf-8"), path.name)
        for path in files("refold.protocols").iterdir()
        if path.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def built_in_protocols() -> dict[str, str]:
    """Returns name and one-line description of each built-in protocol."""
    return {name: protocol["description"] for name, protocol in _built_in().items()}


def expand_protocol(name: str, tokens: int, changes: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Returns the stages of a protocol in the form of a recipe's `heal` list.

    Args:
        name: One of `built_in_protocols()`.
        tokens: Token budget of all stages together; each stage gets its share, at least one token.
        changes: Keys that override those of every stage.

    Raises:
        ValueError: There is no such protocol.
    """
    known = _built_in()
    if name not in known:
        raise ValueError(f"protocol {must_be_one_of(name, known)}")
    expanded = []
    for stage in known[name]["stages"]:
        share = stage["share"]
        rest = {key: value for key, value in stage.items() if key != "share"}
        expanded.append({**rest, "tokens": max(1, round(share * tokens)), **(changes or {})})
    return expanded


def read_heal(value: Any) -> Any:
    """Reads a recipe's `heal` section: a list of stages, or `{protocol: NAME, tokens: N}` and keys for every stage.

    Raises:
        ValueError: The protocol is unknown, or the token budget is missing or not a positive whole number.
    """
    if not isinstance(value, Mapping):
        return value
    changes = dict(value)
    name, tokens = changes.pop("protocol", None), read_amount(changes.pop("tokens", None))
    if name is None:
        keys = ", ".join(str(key)[:40] for key in list(value)[:6])
        raise ValueError(f"must be a list of stages, or a mapping with `protocol` (got keys {keys})")
    if not isinstance(name, str) or name not in _built_in():
        raise ValueError(f"protocol {must_be_one_of(name, _built_in())}")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"protocol {name}: requires `tokens`, such as 20M (got {shorten(tokens)})")
    return expand_protocol(name, tokens, changes)


def scale_stages(stages: Sequence[Any], tokens: int) -> list[Any]:
    """Scales the tokens of all stages to a new budget.

    Args:
        stages: `HealStage`s.
        tokens: Token budget of all stages together.
    """
    total = sum(stage.tokens for stage in stages)
    return [stage.model_copy(update={"tokens": max(1, round(stage.tokens * tokens / total))}) for stage in stages]
