from typing import Any

import pytest

from refold.errors import SourceError
from refold.families.reading import read_decoder, write_decoder
from refold.families.registry import read_arch

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}


@pytest.mark.parametrize(
    ("given", "defaults", "expected"),
    [
        ({}, {}, (8, 8)),
        ({}, {"kv_heads": 2, "head_dim": 32}, (2, 32)),
        ({"num_key_value_heads": 4, "head_dim": 16}, {"kv_heads": 2, "head_dim": 32}, (4, 16)),
        ({"num_key_value_heads": None}, {"kv_heads": 2}, (8, 8)),
        ({"num_key_value_heads": 4, "head_dim": 16}, {"is_grouped": False}, (8, 8)),
    ],
)
def test_heads_are_the_configs_or_the_familys(given: dict, defaults: dict, expected: tuple[int, int]):
    fields = read_decoder({**SIZES, **given}, max_positions=128, **defaults)
    assert (fields["num_key_value_heads"], fields["head_dim"]) == expected
    assert fields["attention_scale"] == expected[1] ** -0.5


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_familys_defaults_hold_only_where_the_config_is_silent(is_tied: bool):
    silent = read_decoder(SIZES, max_positions=128, is_tied=is_tied)
    told = read_decoder(
        {**SIZES, "tie_word_embeddings": not is_tied, "max_position_embeddings": 7}, max_positions=128, is_tied=is_tied
    )
    assert (silent["tied_head"], silent["max_position_embeddings"]) == (is_tied, 128)
    assert (told["tied_head"], told["max_position_embeddings"]) == (not is_tied, 7)


@pytest.mark.parametrize("missing", [key for key in SIZES if key != "num_hidden_layers"])
def test_a_missing_size_is_named(missing: str):
    config = {key: value for key, value in SIZES.items() if key != missing}
    with pytest.raises(SourceError, match=rf"config.json: `{missing}` is required .not there.; is this a complete"):
        read_decoder(config, max_positions=128)


@pytest.mark.parametrize("is_grouped", [True, False])
def test_what_is_written_reads_back(is_grouped: bool):
    config = {**SIZES, "model_type": "llama", "max_position_embeddings": 77, "tie_word_embeddings": True}
    arch = read_arch({**config, "num_key_value_heads": 2, "head_dim": 32} if is_grouped else config)
    written = write_decoder(arch, is_grouped=is_grouped)
    assert ("head_dim" in written, "num_key_value_heads" in written) == (is_grouped, is_grouped)
    read = read_decoder(written, max_positions=128, is_grouped=is_grouped)
    assert read == {name: getattr(arch, name) for name in read}
