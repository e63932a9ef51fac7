"""A saved state of a prompt gives the same continuation as reading the prompt again."""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import FolderError, RefoldError
from refold.generation.generate import TextGenerator
from refold.generation.prompts import encode_continuation, encode_prompt
from refold.generation.sampling import Sampling
from refold.generation.state import PromptState, fingerprint, require_free
from refold.modeling.load import load_tokenizer

BEGIN = "The sea was calm that night, and the moon lay on it."
MORE = (" It was the best of times", "", " A", " def add(a, b): return")
SHORT = Sampling(max_new_tokens=12)
RETENTION = {"type": "retention", "transfer": "all"}
MODELS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "source": ("llama", None),
    "source with a window": ("mistral-window", None),
    "folded": ("llama", {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 5}}),
    "folded with a window": ("mistral-window", {"fold": {"loops": 2}}),
    "dropped first": ("llama", {"drop": {"attention": {"layers": [0]}}}),
    "prefixes": ("mistral-window", {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 3}}),
    "keys of the first loop": ("llama", {"fold": {"loops": 2}, "share_kv": {"from": "first_loop"}}),
    "some heads' keys": ("mistral-window", {"share_kv": {"from": {"back": 1}, "heads": [0]}}),
    "retention": ("llama", {"mixers": [RETENTION]}),
    "gated_deltanet": ("llama", {"mixers": [{"type": "gated_deltanet", "transfer": "all"}]}),
    "windowed": ("llama", {"mixers": [{"type": "linear_attention", "window": 5}]}),
    "hybrid": ("llama", {"mixers": [{**RETENTION, "except": [1]}]}),
    "hybrid with a window": ("mistral-window", {"mixers": [{**RETENTION, "except": [2]}]}),
}


@pytest.fixture(scope="session")
def open_model(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TextGenerator]:
    """Loads a kind of model, each once."""
    made: dict[str, TextGenerator] = {}

    def make(kind: str) -> TextGenerator:
        if kind not in made:
            variant, recipe = MODELS[kind]
            folder = make_model(variant)
            if recipe is not None:
                folder, source = tmp_path_factory.mktemp("folded") / "out", folder
                convert(source, folder, recipe, options=ConvertOptions(allow_larger=True))
            made[kind] = TextGenerator(folder, device="cpu")
        return made[kind]

    return make


@pytest.fixture
def generator(open_model: Callable[[str], TextGenerator]) -> TextGenerator:
    return open_model("hybrid")


@pytest.fixture(params=MODELS)
def any_model(request: pytest.FixtureRequest, open_model: Callable[[str], TextGenerator]) -> TextGenerator:
    return open_model(request.param)


def ids_at_once(generator: TextGenerator, more: str) -> list[int]:
    """Greedy ids after the joined prompt, by transformers alone."""
    ids = encode_prompt(generator.tokenizer, BEGIN, chat=False) + encode_continuation(generator.tokenizer, more)
    model: Any = generator.model
    given = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(given), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(given, **options)[0, len(ids) :].tolist()


def test_going_on_is_reading_at_once(any_model, tmp_path):
    state = any_model.read_prompt(BEGIN)
    state.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    loaded = any_model.load_state(tmp_path / "state")
    expected = [any_model._text([], ids_at_once(any_model, more), Sampling()) for more in MORE]
    assert len(set(expected)) == len(MORE)
    for used in (state, loaded, loaded):
        # Batched, with texts of different lengths; one by one; and once more, to see that nothing was changed.
        assert any_model.generate(MORE, SHORT, state=used) == expected
        assert [any_model.generate([more], SHORT, state=used)[0] for more in MORE] == expected
    assert "".join(any_model.stream(MORE[0], SHORT, state=loaded)) == expected[0]
    assert (tmp_path / "state").read_bytes() == before


def test_logits_after_a_state_are_those_of_reading_at_once(any_model):
    model: Any = any_model.model
    state, other = any_model.read_prompt(BEGIN), any_model.read_prompt(BEGIN[:-6] + " by me.")
    more = encode_continuation(any_model.tokenizer, MORE[2])

    def last_logits(used: PromptState) -> torch.Tensor:
        cache = used.open(model, [[*used.token_ids, *more]])
        return model(torch.tensor([more[-1:]]), past_key_values=cache).logits[0, -1]

    with torch.no_grad():
        whole = model(torch.tensor([[*state.token_ids, *more]])).logits[0, -1]
        scale = whole.abs().max()
        assert (last_logits(state) - whole).abs().max() < 1e-5 * scale
        # Control: what was read shows.
        assert (last_logits(other) - whole).abs().max() > 1e-4 * scale


def test_a_state_can_be_read_on(any_model):
    further = any_model.read_prompt(MORE[0], state=any_model.read_prompt(BEGIN))
    assert any_model.generate([""], SHORT, state=further) == [
        any_model._text([], ids_at_once(any_model, MORE[0]), Sampling())
    ]


def test_long_prompts_are_read_in_pieces(any_model, monkeypatch):
    monkeypatch.setattr("refold.generation.state._CHUNK", 7)
    told: list[tuple[int, int]] = []
    state = any_model.read_prompt(BEGIN, on_progress=lambda done, total: told.append((done, total)))
    length = len(state.token_ids) - 1
    assert told == [*((done, length) for done in range(7, length, 7)), (length, length)]
    assert any_model.generate([MORE[0]], SHORT, state=state) == [
        any_model._text([], ids_at_once(any_model, MORE[0]), Sampling())
    ]


@pytest.mark.parametrize("kind", ["source", "retention"])
def test_a_prompt_of_one_token_can_be_gone_on_from(kind, open_model, tmp_path):
    generator = open_model(kind)
    state = generator.read_prompt("q")
    assert (len(state.token_ids), state.num_bytes) == (1, 0)
    state.save(tmp_path / "state")
    loaded = generator.load_state(tmp_path / "state")
    assert generator.generate(["qq", ""], SHORT, state=loaded) == generator.generate(["qqq", "q"], SHORT)


@pytest.mark.parametrize("kind", ["retention", "gated_deltanet", "windowed"])
def test_a_recurrent_state_does_not_grow(kind, open_model):
    generator = open_model(kind)
    sizes = {generator.read_prompt(BEGIN * times).num_bytes for times in (1, 3)}
    assert len(sizes) == 1
    assert open_model("source").read_prompt(BEGIN * 3).num_bytes > 2 * open_model("source").read_prompt(BEGIN).num_bytes


def test_leaving_early_goes_on_from_a_state_too(generator):
    state = generator.read_prompt(BEGIN)
    expected = generator.generate([BEGIN + MORE[0], BEGIN + MORE[2]], replace(SHORT, exit_depth=2))
    assert generator.generate([MORE[0], MORE[2]], replace(SHORT, exit_depth=2), state=state) == expected


def test_the_end_and_the_seed_are_as_without_a_state(generator):
    drawn = Sampling(max_new_tokens=12, temperature=2.0, seed=4)
    state = generator.read_prompt(BEGIN)
    assert generator.generate([MORE[0]], drawn, state=state) == generator.generate([BEGIN + MORE[0]], drawn)


def test_a_recurrent_model_reads_past_its_sources_positions(open_model):
    long = Sampling(max_new_tokens=3)
    generator = open_model("retention")
    assert generator.generate(["q" * 400], long) == generator.generate(
        ["q" * 200], long, state=generator.read_prompt("q" * 200)
    )
    for kind in ("source", "hybrid", "folded"):
        with pytest.raises(RefoldError, match=r"prompt: must be at most 255 tokens"):
            open_model(kind).read_prompt("q" * 400)
    state = generator.read_prompt("q" * 400)
    assert len(state.token_ids) == 400


def test_the_state_counts_against_the_positions(generator):
    state = generator.read_prompt("q" * 200)
    with pytest.raises(RefoldError, match=r"prompt: must be at most 255 tokens, .* \(got 260\)"):
        generator.generate(["q" * 60], state=state)


def test_the_file_says_what_it_is(generator, tmp_path):
    state = generator.read_prompt(BEGIN)
    state.save(tmp_path / "new" / "state")
    with safe_open(tmp_path / "new" / "state", "pt") as file:
        said = json.loads(file.metadata()["refold_state"])
        names = set(file.keys())
    assert said["format"] == 1
    assert said["tokens_seen"] == len(state.token_ids) - 1
    assert said["fingerprint"] == fingerprint(generator.model)
    assert said["dtype"] == "float32"
    assert {"token_ids", "layers.0.recurrent", "layers.0.inputs", "layers.1.keys", "layers.1.values"} <= names
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]
    assert stat.S_IMODE((tmp_path / "new" / "state").stat().st_mode) & stat.S_IRUSR
    (tmp_path / "other").touch()
    assert (tmp_path / "other").stat().st_mode == (tmp_path / "new" / "state").stat().st_mode


def test_what_stands_there_is_not_overwritten(generator, tmp_path):
    state, place = generator.read_prompt(BEGIN), tmp_path / "state"
    state.save(place)
    before = place.read_bytes()
    with pytest.raises(
        RefoldError, match=r"state: a new file is required \(it exists\); choose another or pass --over"
    ):
        generator.read_prompt("other").save(place)
    assert place.read_bytes() == before
    generator.read_prompt("other").save(place, overwrite=True)
    assert place.read_bytes() != before
    (tmp_path / "thesis.txt").write_text("mine, and long enough to hold a length")
    with pytest.raises(RefoldError, match=r"thesis.txt: a state file is required to be overwritten .got another file"):
        state.save(tmp_path / "thesis.txt", overwrite=True)
    with pytest.raises(RefoldError, match=r"a file name is required \(got a folder\)"):
        require_free(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(generator, tmp_path, monkeypatch):
    place = tmp_path / "state"
    generator.read_prompt(BEGIN).save(place)
    before = place.read_bytes()

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refold.generation.state.save_file", fail)
    with pytest.raises(FolderError, match=r"state: a writable place is required \(No space left on device\)"):
        generator.read_prompt("other").save(place, overwrite=True)
    assert place.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_of_another_model_is_refused(open_model, tmp_path):
    generator = open_model("hybrid")
    state = generator.read_prompt(BEGIN)
    state.save(tmp_path / "state")
    with pytest.raises(RefoldError, match=r"state: a state of this model is required .got that of another"):
        open_model("retention").load_state(tmp_path / "state")
    with pytest.raises(RefoldError, match=r"state: a state of this model is required .got that of another"):
        open_model("retention").generate(["x"], state=state)


def test_one_changed_weight_makes_another_model(open_model, make_model, tmp_path):
    generator = TextGenerator(make_model(), device="cpu")
    state = generator.read_prompt(BEGIN)
    assert fingerprint(generator.model) == fingerprint(open_model("source").model)
    weight = generator.model.get_parameter("model.layers.2.mlp.up_proj.weight")
    with torch.no_grad():
        weight[3, 5] += 1e-3
    with pytest.raises(RefoldError, match=r"or of this one before its weights changed"):
        generator.generate(["x"], state=state)


def test_weights_that_changed_places_make_another_model(make_model):
    model = TextGenerator(make_model(), device="cpu").model
    before = fingerprint(model)
    weight = model.get_parameter("model.layers.2.mlp.up_proj.weight")
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    assert fingerprint(model) != before


def test_where_weights_lie_in_memory_does_not_matter(make_model):
    model = TextGenerator(make_model(), device="cpu").model
    before = fingerprint(model)
    norm = model.get_submodule("model.norm")
    weight = model.get_parameter("model.norm.weight").detach()
    norm.weight = torch.nn.Parameter(torch.cat((weight[:1], weight))[1:])
    assert fingerprint(model) == before


def test_a_state_in_another_dtype_is_refused(make_model, tmp_path):
    folder = make_model()
    TextGenerator(folder, device="cpu").read_prompt(BEGIN).save(tmp_path / "state")
    half = TextGenerator(folder, device="cpu", dtype="bfloat16")
    with pytest.raises(
        RefoldError, match=r"a state in bfloat16, as the model is, is required \(got float32\); load the"
    ):
        half.load_state(tmp_path / "state")
    own = half.read_prompt(BEGIN)
    assert half.generate([MORE[0]], SHORT, state=own) == half.generate([BEGIN + MORE[0]], SHORT)


def test_what_is_no_state_is_refused(generator, make_model, tmp_path):
    generator.read_prompt(BEGIN).save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    torn = tmp_path / "torn"
    for length in (0, 5, 200, len(whole) - 1):
        torn.write_bytes(whole[:length])
        with pytest.raises(RefoldError, match=r"torn: a whole state file is required .*; write it again with --save"):
            generator.load_state(torn)
    with pytest.raises(RefoldError, match=r"nowhere: a state file is required \(no such file\); write one"):
        generator.load_state(tmp_path / "nowhere")
    with pytest.raises(RefoldError, match=r"a state file is required \(got safetensors of another kind\)"):
        generator.load_state(make_model() / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"state format 1 is required \(got 2\); use the refold that wrote it"),
        ({"tokens_seen": "many"}, r"fingerprint, dtype, tokens_seen are required in its header"),
    ],
)
def test_another_header_is_refused(change, message, generator, tmp_path):
    place = tmp_path / "state"
    generator.read_prompt(BEGIN).save(place)
    with safe_open(place, "pt") as file:
        said = json.loads(file.metadata()["refold_state"])
    save_file(load_file(place), place, {"refold_state": json.dumps({**said, **change})})
    with pytest.raises(RefoldError, match=message):
        generator.load_state(place)


def test_a_missing_layer_is_named(generator, tmp_path):
    place = tmp_path / "state"
    generator.read_prompt(BEGIN).save(place)
    with safe_open(place, "pt") as file:
        said = file.metadata()
    tensors = load_file(place)
    del tensors["layers.2.recurrent"]
    save_file(tensors, place, said)
    with pytest.raises(
        RefoldError, match=r"the tensors of this model's layers are required \(see layers.2.recurrent\)"
    ):
        generator.load_state(place)


def test_a_conversation_does_not_go_on_from_a_state(generator):
    state = generator.read_prompt(BEGIN)
    with pytest.raises(RefoldError, match=r"chat: plain text is required after a state .got a conversation"):
        generator.generate(["hello"], chat=True, state=state)


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K", "books-10m"])
@pytest.mark.parametrize("more", [" time there", "me", "", "\n\nThe end"])
def test_no_space_is_put_before_what_goes_on(name: str, more: str, material: Path):
    tokenizer = load_tokenizer(material / "models" / name)
    begin = tokenizer("Once upon a ti", add_special_tokens=False)["input_ids"]
    ids = encode_continuation(tokenizer, more)
    assert str(tokenizer.decode(begin + ids, clean_up_tokenization_spaces=False)).endswith("a ti" + more)
