"""Folded models on SGLang's transformers back-end, which replaces attention and linears of refold's own stack."""

# pyright: reportMissingImports=false
from functools import partial
from typing import Any

from sglang.srt.models.transformers import TransformersForCausalLM

from refold.modeling.registration import register
from refold.plugins.limits import require_servable

register()


def _init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    require_servable(config.read_blueprint(), "sglang")
    TransformersForCausalLM.__init__(self, config, *args, **kwargs)
    # Requests lie side by side and SGLang keeps them apart; a look for documents would wait for the device.
    self.model.forward = partial(self.model.forward, is_packed=False)


# SGLang registers a class under its name, which must be the architecture's.
EntryClass = type("RefoldForCausalLM", (TransformersForCausalLM,), {"__init__": _init})
