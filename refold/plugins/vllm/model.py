"""A folded model on vLLM's layers: refold's own stack, with attention, linears and vocabulary replaced by vLLM's."""

# pyright: reportMissingImports=false
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from refold.blueprint.former import former_patterns
from refold.blueprint.part_sizes import widest_arch
from refold.blueprint.schema import Blueprint, Pool, depth_coefficients, depth_linears
from refold.errors import FolderError, RefoldError
from refold.modeling.depth import Depth
from refold.modeling.owned_tensors import Owned, OwnedVectors
from refold.modeling.stack import RefoldModel
from refold.nn.lora import Coefficients, LoraPairs
from refold.nn.mixers.attention import AttentionMixer, AttentionView
from refold.nn.mixers.batch import Batch
from refold.nn.mixers.store import NOTHING_KEPT, Appended, Memory, Store
from refold.nn.part import StoredPart
from refold.nn.rotary import Rotary
from refold.plugins.limits import require_servable, require_split, shared_depth
from refold.plugins.vllm.linears import FUSED, DepthAdapter, ParallelLinears, ParallelPart
from refold.plugins.vllm.shares import COLUMN_PARALLEL, Shares, TensorPlaces, empty

logger = init_logger("vllm.refold")


class EngineMemory(Memory):
    """One depth's keys and values in vLLM's cache.

    Args:
        attention: vLLM's layer of the depth.
    """

    attends = True

    def __init__(self, attention: nn.Module):
        self._attention = attention
        self._made: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor, extra: Mapping[str, Any]) -> Appended:
        self._made = key, value
        return Appended(key, value, extra)

    def attend(self, view: nn.Module, query: Tensor) -> Tensor:
        batch, heads, tokens, size = query.shape
        made = (None, None) if self._made is None else tuple(_by_token(each) for each in self._made)
        return self._attention(_by_token(query), *made).view(batch, tokens, heads, size)

    def state(self) -> Tensor | None:
        raise RefoldError("vllm: attention is required (got a mixer with a state); serve it with refold")

    def keep_state(self, state: Tensor) -> None:
        self.state()

    def exchange(self, inputs: Tensor, width: int, resets: Tensor | None) -> Tensor | None:
        return self.state()

    def once(self, make: Any) -> Any:
        return make()


def _by_token(states: Tensor) -> Tensor:
    """Returns `[B, H, T, K]` as `[B T, H K]`."""
    return states.transpose(1, 2).flatten(0, 1).flatten(1)


class EngineStore(Store):
    """The attention layers of all depths as the store of a forward pass.

    Args:
        attentions: By depth.
    """

    def __init__(self, attentions: Mapping[int, nn.Module]):
        self._attentions = attentions

    def memory(self, depth: int) -> Memory:
        attention = self._attentions.get(depth)
        return NOTHING_KEPT if attention is None else EngineMemory(attention)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class ServedStack(nn.Module):
    """Embedding, stored parts, depths and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        blueprint: Blueprint = config.read_blueprint()
        arch, size = widest_arch(blueprint), get_tensor_model_parallel_world_size()
        _check(blueprint, vllm_config, size)
        self.places, quantisation = TensorPlaces(), vllm_config.quant_config
        self.shares = Shares(arch, get_tensor_model_parallel_rank(), size)
        with torch.device("meta"):
            self.stack = RefoldModel(config)
        self.stack.exits = nn.ModuleDict()
        self.stack.embed_tokens = VocabParallelEmbedding(arch.vocab_size, arch.hidden_size, quant_config=quantisation)
        for pool, modules in (("mixer", self.stack.mixers), ("mlp", self.stack.mlps)):
            for index, module in enumerate(modules):
                self._replace_linears(cast("StoredPart", module), quantisation, f"model.{pool}s.{index}")
        self.adapters = nn.ModuleList(self._own(cast("Depth", depth), blueprint) for depth in self.stack.depths)
        cached = vllm_config.cache_config
        # Depths without a window of their own must not take the window of others.
        cached = None if cached is None else replace(cached, sliding_window=None)
        self.attentions = nn.ModuleDict()
        for index, depth in enumerate(blueprint.depths):
            if depth.mixer is not None:
                self.attentions[str(index)] = self._attention(blueprint, index, cached, quantisation, prefix)
        self._by_depth = {int(index): layer for index, layer in self.attentions.items()}
        _allocate(self.stack)
        self.place_rest()
        for depth, adapters in zip(self.stack.depths, self.adapters, strict=True):
            _finish(cast("Depth", depth), cast("nn.ModuleList", adapters))

    def _replace_linears(self, part: StoredPart, quantisation: Any, prefix: str) -> None:
        if isinstance(part, AttentionMixer):
            part.num_heads = [self.shares.num_heads, self.shares.num_key_value_heads]
        packed = ParallelPart(part, part.input_groups, self.shares, self.places, quantisation, prefix)
        part.leave_out(packed.names)
        part.add_module("parallel", packed)
        # Past torch's own method, which would hide the module behind the attribute of the class.
        object.__setattr__(part, "packed", packed)

    def _own(self, depth: Depth, blueprint: Blueprint) -> nn.ModuleList:
        """Replaces the adapters and biases of a depth by the shares of this process, and returns the adapters."""
        prefix, shapes = f"model.depths.{depth.index}", depth_linears(blueprint, depth.index)
        coefficients = depth_coefficients(blueprint, depth.index)
        parts = self.stack.parts_of(depth)
        adapters = nn.ModuleList()
        for part in (parts.mixer, parts.mlp):
            for group in () if part is None else cast("Any", part.packed).groups:
                names = [name for name in cast("ParallelLinears", group).names if name in shapes]
                if any(name in depth.spec.ranks or name in coefficients for name in names):
                    sizes = (depth.spec.ranks, coefficients, shapes)
                    adapters.append(DepthAdapter(group.key, names, sizes, self.shares, self.places, prefix))
        depth.lora, depth.coefficients = LoraPairs({}), Coefficients({}, depth.std)
        for pool, vectors in depth.vectors.items():
            for name in cast("OwnedVectors", vectors).names:
                owner, _, kind = name.rpartition(".")
                if kind == "bias" and owner in COLUMN_PARALLEL:
                    rows = self.shares.wide(owner)
                    share = vectors._parameters[name] = empty(rows.stop - rows.start)
                    self.places.allot(f"{prefix}.vectors.{pool}.{name}", share, (rows,))
        return adapters

    def _attention(self, blueprint: Blueprint, index: int, cached: Any, quantisation: Any, prefix: str) -> nn.Module:
        view = cast("AttentionView", cast("Depth", self.stack.depths[index]).view)
        path = f"{prefix}.layers.{{}}.self_attn.attn" if prefix else "layers.{}.self_attn.attn"
        source = shared_depth(blueprint, index)
        return Attention(
            self.shares.num_heads,
            view.head_dim,
            view.scaling,
            num_kv_heads=self.shares.num_key_value_heads,
            cache_config=cached,
            quant_config=quantisation,
            logits_soft_cap=view.softcap,
            per_layer_sliding_window=view.sliding_window,
            prefix=path.format(index),
            kv_sharing_target_layer_name=None if source is None else path.format(source),
        )

    def place_rest(self) -> None:
        """Adds places for all tensors that no process splits: norms, vectors and gains; and for the embedding."""
        known = self.places.names()
        embedding: Any = self.stack.embed_tokens.weight
        self.places.put("model.embed_tokens.weight", lambda tensor: embedding.weight_loader(embedding, tensor))
        for name, parameter in self.stack.named_parameters():
            is_own = ".parallel." in name or name.startswith("embed_tokens.")
            if not is_own and f"model.{name}" not in known:
                self.places.allot(f"model.{name}", parameter, ())

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Returns the embeddings of tokens, scaled as the architecture does."""
        hidden_states = self.stack.embed_tokens(input_ids)
        scale = self.stack.embedding_scale
        return hidden_states if scale == 1.0 else hidden_states * torch.tensor(scale, dtype=hidden_states.dtype)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Returns the normed hidden states `[tokens, D]` of the tokens of several requests."""
        hidden_states = self.embed_input_ids(cast("Tensor", input_ids)) if inputs_embeds is None else inputs_embeds
        hidden_states, positions = hidden_states.unsqueeze(0), positions.unsqueeze(0)
        rotaries = cast("Iterable[Rotary]", self.stack.rotaries)
        rotations = tuple(rotary(positions, hidden_states.dtype) for rotary in rotaries)
        store = EngineStore(self._by_depth)
        depths = range(len(self.stack.depths))
        ran = self.stack.run(depths, hidden_states, Batch(rotations=rotations), cast("Any", store))
        return self.stack.norm(ran.hidden_states).squeeze(0)


class ServedForCausalLM(nn.Module):
    """A folded model as vLLM runs it; registered for the architecture of folded folders."""

    packed_modules_mapping = FUSED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        blueprint: Blueprint = config.read_blueprint()
        arch = blueprint.arch
        self.former = former_patterns(blueprint)
        self.model = ServedStack(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        if arch.tied_head:
            self.lm_head = self.model.stack.embed_tokens
        else:
            given = {"quant_config": vllm_config.quant_config, "prefix": f"{prefix}.lm_head" if prefix else "lm_head"}
            self.lm_head = ParallelLMHead(arch.vocab_size, arch.hidden_size, **given)
            head: Any = self.lm_head.weight
            self.model.places.put("lm_head.weight", lambda tensor: head.weight_loader(head, tensor))
        self.logits_processor = LogitsProcessor(arch.vocab_size, soft_cap=arch.logit_softcap)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Returns the embeddings of tokens."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Returns the normed hidden states `[tokens, D]`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Returns the logits of normed hidden states."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads the tensors of a folder and returns the names of the parameters.

        Raises:
            FolderError: Tensors are missing or unknown.
            RefoldError: Weights are stored as integers.
        """
        missing = self.model.places.names()
        for given, tensor in weights:
            name = given
            for pattern, replacement in self.former.items():
                name = re.sub(pattern, replacement, name)
            if name.startswith("model.exits.") or (name == "lm_head.weight" and name not in missing):
                continue
            if name.endswith("_packed"):
                raise RefoldError(
                    f"vllm: float weights are required (got {name}, stored as integers); serve the folder it was "
                    f"quantised from"
                )
            if name not in missing:
                raise FolderError(f"weights: tensors of the blueprint are required (got {name}); convert again")
            self.model.places.load(name, tensor)
            missing.discard(name)
        if missing:
            shown = ", ".join(sorted(missing)[:5])
            raise FolderError(f"weights: {len(missing)} tensors are missing ({shown}); convert the source again")
        return {name for name, _ in self.named_parameters()}


def _check(blueprint: Blueprint, vllm_config: VllmConfig, size: int) -> None:
    require_servable(blueprint)
    require_split(blueprint, size)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise RefoldError(
            f"pipeline_parallel_size: 1 is required, because depths share stored parts (got {stages}); use "
            f"tensor_parallel_size"
        )
    exits = [str(index) for index, depth in enumerate(blueprint.depths) if depth.exit is not None]
    if exits:
        logger.warning("Exits after depths %s are ignored: vLLM runs every depth.", ", ".join(exits))


def _allocate(stack: nn.Module) -> None:
    """Gives memory to all tensors that are still without, on the default device."""
    for module in stack.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                share = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                module._parameters[name] = share
        if isinstance(module, Rotary):
            module.inv_freq = torch.empty(module.inv_freq.shape, dtype=module.inv_freq.dtype)
            module.reset()


def _finish(depth: Depth, adapters: nn.ModuleList) -> None:
    """Lets a depth use its adapters of this process."""
    found = {each.key: each for each in cast("Iterable[DepthAdapter]", adapters)}
    gains = cast("dict[Pool, Tensor]", {pool: cast("Any", gain).weight for pool, gain in depth.gain.items()})
    depth.packed = Owned(found, depth.own_vectors("mixer"), depth.own_vectors("mlp"), gains)
