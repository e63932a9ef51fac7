"""vLLM's plugin: it finds `register` by the entry point `refold` of the group `vllm.general_plugins`."""

ARCHITECTURE = "RefoldForCausalLM"
MODEL = "refold.plugins.vllm.model:ServedForCausalLM"


def register() -> None:
    """Makes vLLM know folded folders. vLLM calls it in each of its processes, sometimes more than once."""
    from vllm import ModelRegistry  # pyright: ignore

    from refold.modeling.registration import register as register_classes

    register_classes()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
