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
    script = (
        "import sys\n" + ORDERS[order] + "\n"
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__,"
        " type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    assert run(script, str(fold("llama"))) == "RefoldConfig RefoldForCausalLM"


def test_a_config_names_no_code_for_libraries_that_ask(fold):
    # TRL reads `auto_map` of every config whose class is not in transformers' own namespace.
    folder = fold("llama")
    ask = "print(AutoConfig.from_pretrained(sys.argv[1]).auto_map)"
    assert run(f"import sys, refold\nfrom transformers import AutoConfig\n{ask}", str(folder)) == "{}"
    assert "auto_map" not in (folder / "config.json").read_text()


def test_importing_refold_imports_neither_torch_nor_transformers():
    found = run("import refold, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])")
    assert found == "[]"


def test_auto_model_loads_the_stack_of_a_model_with_an_untied_head(fold):
    script = "import sys, refold\nfrom transformers import AutoModel\n"
    script += "print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)"
    assert run(script, str(fold("llama"))) == "RefoldModel"
