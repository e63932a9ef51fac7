"""`RefoldConfig`: a transformers config that holds a blueprint."""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from refold.blueprint.part_sizes import widest_arch
from refold.blueprint.schema import Blueprint
from refold.errors import RecipeError
from refold.modeling.registration import register, register_model_if_loaded

MODEL_TYPE = "refold"
RECURRENT = "linear_attention"
COUNTING = "hybrid_sliding"
"""transformers' names for a layer with a state, and for one with a state and a window, which counts tokens."""


class RefoldConfig(PreTrainedConfig):
    """Configuration of a folded model.

    The blueprint is the only source of truth. The usual fields (`hidden_size`, `num_hidden_layers` = number of depths,
    `layer_types`, `sliding_window`, ...) are derived from it for caches, masks, generation and other tools.

    Args:
        blueprint: The blueprint as plain data.
    """

    model_type = MODEL_TYPE
    # Empty, because a folder holds no code. TRL reads this attribute if transformers lacks the config's class.
    auto_map: ClassVar[dict[str, str]] = {}
    # A list, because transformers' Trainer concatenates it with another list.
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    blueprint: dict[str, Any] | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int | None = None
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs: Any):
        if self.blueprint is not None:
            blueprint = self.read_blueprint()
            # Converts a blueprint that an earlier version wrote to the form of this version.
            self.blueprint = blueprint.model_dump(mode="json")
            self._derive(blueprint)
        super().__post_init__(**kwargs)
        register_model_if_loaded()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a config from the content of `config.json`, and registers the model with the Auto classes."""
        register()
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `config.json`, with `auto_map` only if this class comes from the code of a folder."""
        found = super().to_dict()
        if self._auto_class is None:
            found.pop("auto_map", None)
        return found

    def read_blueprint(self) -> Blueprint:
        """Returns the blueprint as a checked object."""
        if self.blueprint is None:
            raise RecipeError("config.json: `blueprint` is required (not there); is this a refold folder?")
        return Blueprint.model_validate(self.blueprint)

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Sets the size of the vocabulary, here and in the blueprint."""
        blueprint = self.read_blueprint()
        resized = blueprint.model_copy(update={"arch": blueprint.arch.model_copy(update={"vocab_size": vocab_size})})
        self.blueprint, self.vocab_size = resized.model_dump(mode="json"), vocab_size

    def _derive(self, blueprint: Blueprint) -> None:
        arch = widest_arch(blueprint)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            setattr(self, name, getattr(arch, name))
        self.head_dim, self.max_position_embeddings = arch.head_dim, arch.max_position_embeddings
        self.initializer_range, self.tie_word_embeddings = arch.initializer_range, arch.tied_head
        # Engines read soft-caps from the config.
        self.attn_logit_softcapping, self.final_logit_softcapping = arch.attention_softcap, arch.logit_softcap
        # Early-exit drafting lowers this number temporarily, so a number that is already set is kept.
        if self.num_hidden_layers is None:
            self.num_hidden_layers = blueprint.num_depths
        self.layer_types = layer_types(blueprint)[: self.num_hidden_layers]
        windows = {depth.window for depth in blueprint.depths if depth.mixer is not None and depth.window is not None}
        if len(windows) > 1:
            raise RecipeError(f"depths: at most one window size is supported in one model (got {sorted(windows)})")
        self.sliding_window = windows.pop() if windows else None
        if COUNTING in self.layer_types:
            # With a window of 2 transformers' layer keeps one token; with a window of 1 it would keep every token.
            self.sliding_window = 2


def layer_types(blueprint: Blueprint) -> list[str]:
    """Returns transformers' layer type for the cache of each depth.

    `moe` is the only name that transformers accepts for a layer without a cache. A depth gets this name if it has no
    mixer, or makes no keys and values of its own. A cache must hold at least one layer of another type, so in a stack
    without any mixer every depth has an empty attention cache. Recurrent layers do not count tokens. If all layers with
    a cache are recurrent, the first also has a window of one token, and this window counts tokens.
    """
    nothing = "full_attention" if all(depth.mixer is None for depth in blueprint.depths) else "moe"
    types = [
        _layer_type(blueprint, index) if blueprint.made_heads(index) else nothing
        for index in range(blueprint.num_depths)
    ]
    if RECURRENT in types and not {"full_attention", "sliding_attention"} & set(types):
        types[types.index(RECURRENT)] = COUNTING
    return types


def _layer_type(blueprint: Blueprint, index: int) -> str:
    if blueprint.keeps_state(index):
        return RECURRENT
    return "full_attention" if blueprint.depths[index].window is None else "sliding_attention"
