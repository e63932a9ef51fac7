"""Fixtures for all tests, and shape annotations checked while tests run."""

import functools
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from importlib.machinery import ModuleSpec, PathFinder
from itertools import count
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import FunctionType
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Tiny tensors: threads that wait for each other cost far more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# Imports make millions of objects that stay: every pass of the garbage collector over them is in vain.
gc.disable()


def pytest_collection_finish() -> None:
    """Leaves modules and tests out of garbage collection from here on."""
    gc.freeze()
    gc.enable()


# A deadline for each example fails on a busy machine, and tests assert no time. The same examples every time, so that a
# change is blamed for what it broke; `make test-long` draws others.
hypothesis.settings.register_profile("refold", deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("refold")


class Unchecked(PathFinder):
    """Finds modules whose annotations stay unchecked: those that name no shape, and some others.

    Types without shapes are pyright's work, and checks of them took up to a fifth of the tests' time.

    transformers makes a config a dataclass whose `__init__` takes more than its fields, which jaxtyping does not know;
    and its outputs, until 5.17 at least, say `FloatTensor` where a tensor of any floating dtype is meant. Settings of
    sampling, which come from files of prompts too, check the types of their fields themselves.
    """

    NAMES = ("refold.modeling.configuration", "refold.modeling.outputs", "refold.generation.sampling")

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "refold" and not fullname.startswith("refold."):
            return None
        spec = super().find_spec(fullname, path, target)
        is_checked = fullname not in cls.NAMES and spec is not None and names_shapes(spec)
        return None if is_checked else spec


def names_shapes(spec: ModuleSpec) -> bool:
    """Says whether a module of Python code imports jaxtyping."""
    return spec.origin is not None and "jaxtyping" in Path(spec.origin).read_text(encoding="utf-8")


def checked_at_first(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyping's decorator for the first calls of a function and few later ones: a check takes up to a millisecond."""
    return functools.partial(sample, check=check_shapes(typechecker=typechecker))


def sample(function: Any, check: Callable[[Any], Any]) -> Any:
    if isinstance(function, type):
        # jaxtyping checks the `__init__` of a dataclass, and nothing else of a class.
        if is_dataclass(function) and isinstance(function.__dict__.get("__init__"), FunctionType):
            function.__init__ = sample(function.__init__, check)
        return function
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, FunctionType):
        return check(function)
    if "<locals>" in plain.__qualname__:
        return function
    calls = count()
    checked: Callable[..., Any] | None = None

    @functools.wraps(plain)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        call = next(calls)
        if call >= 40 and call % 199:
            return plain(*args, **kwargs)
        if checked is None:
            # Making a check takes longer than many calls, and most functions are never called in a process.
            checked = check(plain)
        made: Any = checked
        try:
            return made(*args, **kwargs)
        except jaxtyping.TypeCheckError:
            # A test that gives wrong input expects the function's own message.
            plain(*args, **kwargs)
            raise

    return sampled if plain is function else type(function)(sampled)


assert "refold" not in sys.modules, "refold was imported before its annotations could be checked"
check_shapes = jaxtyping.jaxtyped
# The import hook puts this name in front of every function.
jaxtyping.jaxtyped = checked_at_first
jaxtyping.install_import_hook(["refold"], "beartype.beartype")
sys.meta_path.insert(0, Unchecked)

ROOT = Path(__file__).parents[1]
LLAMA = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
V4_LINEAR = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0},
    "max_position_embeddings": 16,
}
HALF_SLIDING = {
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 2,
}
GEMMA = {"num_key_value_heads": 1, "head_dim": 16}
GEMMA_WINDOW = {**GEMMA, "sliding_window": 8}
LOCAL_FIRST = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_V4 = {
    "rope_theta": 50.0,
    "rope_local_base_freq": 5.0,
    "rope_scaling": {"rope_type": "linear", "factor": 3.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA},
    "llama-mha-bias": {"num_key_value_heads": 4, "attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "llama-mqa-mlp-bias": {"num_key_value_heads": 1, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-linear": {**LLAMA, "head_dim": 16, "rope_parameters": {"rope_type": "linear", "rope_theta": 9, "factor": 2}},
    "llama-llama3": {**LLAMA, "rope_parameters": LLAMA3, "tie_word_embeddings": True, "hidden_act": "gelu"},
    "llama-v4": {**LLAMA, "raw": V4_LINEAR, "attention_bias": True, "hidden_act": "relu"},
    "mistral-window": {"num_key_value_heads": 2, "sliding_window": 8},
    "mistral-full": {"num_key_value_heads": 4, "sliding_window": None, "hidden_act": "gelu_new"},
    "mistral-head-dim": {"num_key_value_heads": 1, "sliding_window": 5, "head_dim": 16, "tie_word_embeddings": True},
    "gpt_neox": {},
    "gpt_neox-sequential": {
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 1.0},
    },
    "gpt_neox-v4": {"raw": {"rotary_pct": 0.5, "rotary_emb_base": 500}, "hidden_act": "gelu_new"},
    "gpt_neox-tied": {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    "gpt_neox-yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "llama-yarn": {**LLAMA, "rope_parameters": YARN},
    "llama-dynamic": {**LLAMA, **DYNAMIC},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2-window": {**HALF_SLIDING, "tie_word_embeddings": True, "raw": {"rope_theta": 50.0}},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
    "qwen3-window": {**HALF_SLIDING, "head_dim": 8, "rope_parameters": YARN},
    "gemma": {**GEMMA},
    "gemma-bias": {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False},
    "gemma2": {
        **GEMMA_WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 9.0,
        "query_pre_attn_scalar": 3,
    },
    "gemma2-v4": {**GEMMA_WINDOW, "attn_logit_softcapping": None, "raw": {"rope_theta": 50.0}, "attention_bias": True},
    "gemma3_text": {**GEMMA_WINDOW, "query_pre_attn_scalar": 3, "sliding_window_pattern": 3},
    "gemma3_text-v4": {**GEMMA_WINDOW, "final_logit_softcapping": 9.0, "layer_types": LOCAL_FIRST, "raw": GEMMA3_V4},
    "olmo2": {},
    "olmo2-bias": {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True},
    "phi3": {"num_key_value_heads": 2},
    "phi3-window": {"sliding_window": 8, "raw": {"rope_theta": 50.0, "partial_rotary_factor": 0.5}},
}
"""Config fields of each kind of source, by a name that begins with its `model_type`; `raw` ones stand in the
`config.json` as transformers 4 wrote them, instead of `rope_parameters`."""

SENTENCES = (
    "The sea was calm that night, and the moon lay on it.",
    "Naïve cafés — €5 a cup — are dear: 北京 has cheaper ones. 🙂",
    "def add(a, b):\n    return a + b\n",
    "A short one.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
)


@pytest.fixture(scope="session")
def material() -> Path:
    """The folder with real models and texts; skips where there is none."""
    folder = Path(os.environ.get("REFOLD_MATERIAL") or ROOT.parent / "shared")
    if not (folder / "models").is_dir():
        pytest.skip(f"real models are required: set REFOLD_MATERIAL to a folder that has them (got {folder})")
    return folder


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that load torch once: a fork server does so, and has no threads whose locks a child inherits."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["refold.conversion.convert", "refold.healing.heal", "transformers.models.llama.modeling_llama"]
    )
    # The first child waits until the server has loaded everything; later ones start in milliseconds.
    child = context.Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
    return context


@pytest.fixture(scope="session")
def with_swapped_tokens() -> Callable[[Path, Path], Path]:
    """Copies a model folder and swaps two tokens in the copy's tokenizer."""

    def swap(model: Path, out: Path) -> Path:
        shutil.copytree(model, out)
        raw = json.loads((out / "tokenizer.json").read_text())
        vocab = raw["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (out / "tokenizer.json").write_text(json.dumps(raw))
        return out

    return swap


@pytest.fixture(scope="session")
def make_arch() -> Callable[..., Any]:
    """Makes a small architecture; any field of its config can be replaced."""
    from refold.families.registry import read_arch

    def make(num_layers: int = 8, model_type: str = "llama", **config: Any) -> Any:
        return read_arch(
            {
                "model_type": model_type,
                "vocab_size": 96,
                "hidden_size": 32,
                "intermediate_size": 80,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": num_layers,
                **config,
            }
        )

    return make


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes source folders as transformers does: 4 layers, hidden size 32, all weights at a standard deviation of 0.3.

    Norms and biases vary as well, so that no tensor can be lost or exchanged unseen. A folder made once is given again.
    """
    made: dict[str, Path] = {}

    def make(variant: str = "llama", dtype: str = "float32", **fields: Any) -> Path:
        key = json.dumps([variant, dtype, fields], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(variant)
            _write_source(made[key], variant.split("-")[0], dtype, {**VARIANTS[variant], **fields})
        return made[key]

    return make


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    """Short texts with code, accents, signs outside the basic plane and words that come back."""
    return SENTENCES


@pytest.fixture(scope="session")
def make_model(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a source of 300 tokens with a byte-level tokenizer, with or without a start token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )

    def make(variant: str = "llama", start: bool = True, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        for file in make_source(variant, vocab_size=300, **fields).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        named = {"bos_token": "<s>", "eos_token": "</s>"} if start else {}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[..., Any]:
    """Makes evaluations, with the fields that a test is about."""
    from refold.evaluation.result import Evaluation, Machine, ModelFacts, Seconds

    def make(**fields: Any) -> Evaluation:
        plain: dict[str, Any] = {
            "model": ModelFacts(name="m", model_type="refold", parameters=10, weight_bytes=40, dtype="float32"),
            "data": (),
            "is_whole_data": True,
            "max_tokens": None,
            "context": 16,
            "stride": 8,
            "batch_size": 2,
            "documents": 1,
            "tokens": 20,
            "bytes": 70,
            "bits_per_byte": 1.5,
            "bits_per_byte_error": None,
            "perplexity": 9.0,
            "accuracy": 0.5,
            "seconds": Seconds(load=1, tokenise=1, model=1, against=1, score=1),
            "tokens_per_second": 5,
            "machine": Machine(device="cpu", device_name="x86_64", cpus=2, torch_threads=1, system="Linux"),
            "versions": {},
            "time": "now",
        }
        return Evaluation(**{**plain, **fields})

    return make


def _write_source(folder: Path, model_type: str, dtype: str, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = fields.pop("raw", None)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        # Outside the vocabulary: generation never stops early.
        "eos_token_id": 96,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **fields}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = 0.3 * torch.randn(weight.shape, generator=generator)
            # Norms vary around what leaves a direction as it is, biases around zero.
            weight.copy_(noise + (weight if weight.ndim == 1 else 0.0))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if raw is not None:
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps({**config, **raw}))
