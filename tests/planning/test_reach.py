"""Notes of a plan about depths with different windows that share a mixer."""

import pytest

from refold.families.arch import ArchSpec
from refold.families.registry import read_arch
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

GEMMA2_2B = read_arch(
    {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    }
)
GEMMA3_1B = read_arch(
    {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
    }
)


@pytest.mark.parametrize(
    ("arch", "recipe", "said"),
    [
        (
            GEMMA2_2B,
            "recursive",
            "a local and a global depth share weights in 13 of 13 tied mixers (depth 0 sees 4,096 tokens with rope "
            "base 10,000, depth 13 sees all tokens with rope base 10,000): each depth keeps its own window and rope",
        ),
        (GEMMA3_1B, "relaxed", "a local and a global depth share weights in 4 of 13 tied mixers (depth 4 sees 512 "),
        (GEMMA3_1B, "retnet", None),
        (GEMMA2_2B, {"fold": {"loops": 2, "tie": ["mlp"]}}, None),
        # Thirteen loops of two layers tie local to local and global to global.
        (GEMMA2_2B, {"fold": {"loops": 13}}, None),
        (
            GEMMA2_2B,
            {"fold": {"loops": 13}, "mixers": [{"type": "attention", "depths": [2], "window": 64}]},
            "depths of different reach share weights in 1 of 2 tied mixers (depth 0 sees 4,096 tokens with rope base "
            "10,000, depth 2 sees 64 tokens",
        ),
    ],
)
def test_a_line_says_where_local_and_global_depths_share_weights(arch: ArchSpec, recipe, said: str | None):
    built = build_blueprint(arch, load_recipe(recipe))
    found = [note for note in map(str, built.notes) if "share weights" in note]
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)
    for index, depth in enumerate(built.blueprint.depths):
        attends = depth.mixer is not None and built.blueprint.mixers[depth.mixer].mixer.type == "attention"
        if attends and isinstance(recipe, str):
            assert (depth.window, depth.rope) == (arch.layers[index].window, arch.layers[index].rope)
