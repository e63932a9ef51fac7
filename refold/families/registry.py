"""The table of all families, by the source's `model_type`."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from refold.errors import SourceError
from refold.families import gemma, gemma2, gemma3, gemma3_text, gpt_neox, llama, mistral, olmo2, phi3, qwen2, qwen3
from refold.families.arch import ArchSpec, Family
from refold.families.reading import check_fields
from refold.families.unsupported import explain_unsupported
from refold.suggest import shorten

_MODULES = (llama, mistral, gpt_neox, qwen2, qwen3, gemma, gemma2, gemma3_text, gemma3, olmo2, phi3)
FAMILIES: Mapping[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def find_family(model_type: object, config: Mapping[str, Any] | None = None) -> Family:
    """Returns the family of a `model_type`.

    Args:
        model_type: The value in `config.json`.
        config: The whole of `config.json`, for the reason in an error message.

    Raises:
        SourceError: The family is not supported; the message lists the supported ones.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SourceError(f"config.json: model_type: {explain_unsupported(model_type, FAMILIES, config)}")
    return FAMILIES[model_type]


def read_arch(config: Mapping[str, Any]) -> ArchSpec:
    """Reads a raw `config.json` into an ArchSpec.

    Raises:
        SourceError: An unknown family, a missing field, or an unsupported value.
    """
    family = find_family(config.get("model_type"), config)
    check_fields(config)
    try:
        return family.read_config(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(key) for key in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise SourceError(
            f"config.json: {field}: {message} (got {shorten(first['input'])})" if field else f"config.json: {message}"
        ) from error
