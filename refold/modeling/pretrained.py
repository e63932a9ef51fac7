"""The base class of folded models: loading, initial weights, and the transformers features they support."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from refold.blueprint.former import former_patterns
from refold.errors import FolderError, RefoldError
from refold.modeling.cache_name import CACHE_NAMES
from refold.modeling.configuration import COUNTING, RECURRENT, RefoldConfig
from refold.modeling.depth import Depth
from refold.nn.exits import HeadLora
from refold.nn.mixers.attention import AttentionView
from refold.nn.mixers.registry import MIXERS
from refold.nn.part import StoredPart
from refold.nn.quantised import QuantisedEmbedding, QuantisedLinear, prepare_integers, restore_integers
from refold.nn.stored_integers import SCALE, settle_scales

WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that select the place from which a config is read."""


class RefoldPreTrainedModel(PreTrainedModel):
    """Base class of the stack and the language model: loading, initial weights, supported transformers features."""

    config: RefoldConfig
    is_packed: bool = False
    """Whether `pack_model` replaced the linears."""
    config_class = RefoldConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Depth", "Mlp", *(mixer.__name__ for mixer in MIXERS.values())]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Depth, "attentions": AttentionView}  # noqa: RUF012

    @property
    def _supports_sdpa(self) -> bool:
        # scaled_dot_product_attention has no soft-cap, so a soft-capped model falls to eager by itself.
        return self.config.read_blueprint().arch.attention_softcap is None

    @property
    def _supports_flash_attn(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Masks of this back-end and the next cannot be widened by a prefix.
        return not any(depth.prefix for depth in self.config.read_blueprint().depths)

    @property
    def _supports_flex_attn(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._supports_flash_attn

    @property
    def _is_stateful(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        # A state cannot be rolled back, so drafted tokens cannot be rejected.
        return bool({RECURRENT, COUNTING} & set(self.config.layer_types or ()))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset", None)):
            reset()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads as transformers does, but raises where tensors are missing, unknown or of another shape.

        Raises:
            FolderError: The weights are not exactly those of the blueprint.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        former = former_patterns(_read_config(pretrained_model_name_or_path, kwargs).read_blueprint())
        if former:
            kwargs["key_mapping"] = {**former, **(kwargs.get("key_mapping") or {})}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if former:
            # Otherwise saving would write tensor names of the earlier version beside a config of this version.
            vars(model).pop("_weight_conversions", None)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(str(name) for name in info[problem])
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise FolderError(
                    f"{pretrained_model_name_or_path}: weights must be those of its blueprint "
                    f"({len(names)} {problem.replace('_', ' ')}: {shown}); convert the source again"
                )
        model.settle_integers()
        return (model, info) if wants_info else model

    @property
    def dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The dtype of the tensors of floats; scales of integers have their own."""
        floats = ((name, each.dtype) for name, each in self.named_parameters() if each.is_floating_point())
        return next((dtype for name, dtype in floats if not name.endswith(SCALE)), torch.get_default_dtype())

    def settle_integers(self) -> None:
        """Lets quantised linears of a loaded model choose kernels; see `refold.nn.quantised`."""
        settle_scales(self)
        if self.device.type in ("cpu", "cuda"):
            prepare_integers(self)
            self._share_head()

    def hold_integers(self) -> None:
        """Holds quantised weights as they are stored, so that they can be saved, moved and trained through."""
        if restore_integers(self):
            self.tie_weights()

    def _share_head(self) -> None:
        """Lets a tied embedding read the rows of the head's product, so that they are in memory once."""
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embedding, QuantisedEmbedding) or not isinstance(head, QuantisedLinear):
            return
        if self.config.tie_word_embeddings and head.product is not None:
            embedding.share(head.product)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.hold_integers()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """Sets training or evaluation.

        Raises:
            RefoldError: A packed model shall train.
        """
        if mode:
            self._require_weights("train")
            self.hold_integers()
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does.

        Raises:
            RefoldError: The model is packed.
        """
        self._require_weights("save")
        self.hold_integers()
        super().save_pretrained(*args, **kwargs)

    def _require_weights(self, task: str) -> None:
        if self.is_packed:
            raise RefoldError(
                f"{task}: a model with its weights is required (got one packed for inference); load it anew"
            )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the vocabulary as transformers does, in the blueprint and in the adapters on the head as well.

        Raises:
            RefoldError: Embedding or head are stored as integers.
        """
        if self.config.read_blueprint().quantised:
            raise RefoldError(
                "resize_token_embeddings: an embedding and a head of floats are required (got integers); resize the "
                "model before it is quantised"
            )
        embedding: Any = super().resize_token_embeddings(*args, **kwargs)
        self.config.resize_vocabulary(embedding.num_embeddings)
        for module in self.modules():
            if isinstance(module, HeadLora):
                module.resize(embedding.num_embeddings)
        return embedding

    def compile_parts(self) -> None:
        """Compiles each stored part once; all depths that run it share the compiled code.

        Adapters are arguments, so depths of equal ranks share a graph. The cache and the attention back-end stay eager.
        """
        for module in self.modules():
            if isinstance(module, StoredPart):
                module.compile_regions()


def _read_config(model: Any, arguments: Mapping[str, Any]) -> RefoldConfig:
    """Returns the config given to `from_pretrained`, or the config that `from_pretrained` will read."""
    config = arguments.get("config")
    if isinstance(config, RefoldConfig):
        return config
    where = {name: arguments[name] for name in WHERE if name in arguments}
    return RefoldConfig.from_pretrained(config or model, **where)
