"""`import refold` is fast, and transformers knows folded models after it in any order of imports."""

import subprocess
import sys

import pytest

ORDERS = {
    "refold first": "import refold\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "Auto classes first": "from transformers import AutoConfig, AutoModelForCausalLM\nimport refold",
    # This module's own imports load the Auto classes.
    "the model first": "import refold.modeling.depth\nfrom transformers import AutoConfig, AutoModelForCausalLM",
}


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_a_folded_model(fold, order):
    # The stack of a model with an untied head is a model too. TRL reads `auto_map` of configs whose class is not in
    # transformers' own namespace, so it must name no code.
    script = (
        "import sys\n" + ORDERS[order] + "\n"
        "from transformers import AutoModel\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "kinds = [each.from_pretrained(sys.argv[1]) for each in (AutoModelForCausalLM, AutoModel)]\n"
        "print(*(type(each).__name__ for each in (config, *kinds)), config.auto_map)"
    )
    folder = fold("llama")
    assert run(script, str(folder)) == "RefoldConfig RefoldForCausalLM RefoldModel {}"
    assert "auto_map" not in (folder / "config.json").read_text()


def test_importing_refold_imports_neither_torch_nor_transformers():
    found = run("import refold, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])")
    assert found == "[]"
