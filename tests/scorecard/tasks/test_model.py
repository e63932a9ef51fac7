"""lm-eval's class for models of refold, beside lm-eval's own `hf` on the same weights."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import RefoldError
from refold.exporting.export import export
from refold.modeling.load import load_model, load_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import Registry, get_model
from lm_eval.models import huggingface

from refold.scorecard.tasks.__main__ import main
from refold.scorecard.tasks.model import RefoldLM

HFLM: Any = huggingface.HFLM

PAIRS = (
    ("The sea was calm", " that night, and the moon"),
    ("The sea was calm", " that day"),
    ("The sea was calm", " that"),
    ("The sea was calm ", "that"),
    ("", "It was the best of times"),
    ("", "A short one."),
    ("<s>It was the age", " of wisdom"),
    ("Naïve cafés — €5 a cup", " — are dear: 北京"),
    ("def add(a, b):\n   ", " return a + b\n"),
    ("It was the best of times, it was the worst of times, it was the age", " of wisdom, it was the age"),
)
BEGINNINGS: dict[str, dict[str, Any]] = {
    "as the tokenizer does": {},
    "with a start token": {"add_bos_token": True},
    "without a start token": {"add_bos_token": False},
    "another prefix": {"prefix_token_id": 7},
    "cut": {"max_length": 18},
}


def requests(kind: str, arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # type: ignore[arg-type]


def both(model: Any, tokenizer: Any, **options: Any) -> tuple[RefoldLM, Any]:
    return RefoldLM(model, tokenizer, **options), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)


@pytest.fixture(scope="module")
def source(make_model) -> Path:
    return make_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def starting(source) -> Any:
    """A tokenizer that puts the start token before a text, as Gemma's does."""
    tokenizer: Any = load_tokenizer(source)
    start = [("<s>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
    return tokenizer


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("starts", [False, True], ids=["plain tokenizer", "tokenizer with a start token"])
def test_log_likelihoods_are_those_of_hf(source, starting, beginning, starts):
    tokenizer = starting if starts else load_tokenizer(source)
    ours, theirs = both(load_model(source, device="cpu"), tokenizer, **BEGINNINGS[beginning])
    found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def test_start_tokens_change_the_figures(source, starting):
    found = []
    for options in BEGINNINGS.values():
        model = RefoldLM(load_model(source, device="cpu"), starting, **options)
        found.append(tuple(score for score, _ in model.loglikelihood(requests("loglikelihood", PAIRS), True)))
    assert found[0] == found[1]
    assert len(set(found)) == len(found) - 1


def test_a_fold_scores_as_its_dense_export_in_hf(source, tmp_path):
    recipe = {"fold": {"loops": 2}, "relax": {"rank": 3, "init": "svd"}}
    convert(source, tmp_path / "fold", recipe, options=ConvertOptions(allow_larger=True))
    export(tmp_path / "fold", tmp_path / "dense")
    ours = RefoldLM(str(tmp_path / "fold"), device="cpu")
    theirs = HFLM(pretrained=str(tmp_path / "dense"), device="cpu", batch_size=4)
    texts = [(pair[0] + pair[1],) for pair in PAIRS]
    for kind, arguments in (("loglikelihood", PAIRS), ("loglikelihood_rolling", texts)):
        found: Any = getattr(ours, kind)(requests(kind, arguments), disable_tqdm=True)
        expected: Any = getattr(theirs, kind)(requests(kind, arguments), disable_tqdm=True)
        if kind == "loglikelihood":
            found, expected = ([score for score, _ in each] for each in (found, expected))
        assert found == pytest.approx(expected, rel=1e-4)


def test_generated_texts_are_those_of_hf(source):
    ours, theirs = both(load_model(source, device="cpu"), load_tokenizer(source))
    options = {"until": [" the"], "max_gen_toks": 12}
    arguments = [(text, dict(options)) for text in ("The sea was calm", "A short", "It was the best of")]
    found = ours.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert found == theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert len(set(found)) == 3


def test_lm_eval_finds_the_class_by_its_name():
    assert get_model("refold") is RefoldLM
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    names = Registry("model")
    # lm-eval's registry takes entry points, and imports a class when its name is asked for.
    names.register(
        "refold", target=EntryPoint("refold", project["entry-points"]["lm_eval.models"]["refold"], "lm_eval.models")
    )
    assert names.get("refold") is RefoldLM


def test_arguments_of_the_command_line_are_taken(source, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # lm-eval's command line passes these.
    defaults = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    model = get_model("refold").create_from_arg_obj({"pretrained": str(source), "dtype": "bfloat16"}, defaults)
    assert isinstance(model, RefoldLM)
    assert (str(model.model.dtype), model.device.type, model.batch_size) == ("torch.bfloat16", "cpu", 1)
    assert model.get_model_info()["model_num_parameters"] == model.model.num_parameters()


def test_an_unknown_argument_is_refused(source):
    with pytest.raises(RefoldError, match=r"model_args: .* \(got 'dtyp'\); did you mean 'dtype'\?"):
        RefoldLM(str(source), dtyp="float32")
    with pytest.raises(RefoldError, match="nowhere"):
        RefoldLM("nowhere/at-all", device="cpu")


def test_a_model_without_tokenizer_is_refused(make_source):
    with pytest.raises(RefoldError, match="a tokenizer is required"):
        RefoldLM(str(make_source("llama")), device="cpu")


def test_lm_evals_command_line_starts_with_the_class_registered(monkeypatch, capsys):
    started: list[Any] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: started.append(get_model("refold")))
    main()
    assert started == [RefoldLM]
    monkeypatch.setattr("refold.scorecard.tasks.harness.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: tasks: lm-eval is required (not installed); `pip install refold[eval]`\n"
