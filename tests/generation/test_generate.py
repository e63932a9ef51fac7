import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from refold.conversion.convert import convert
from refold.errors import RefoldError, SourceError
from refold.generation.generate import TextGenerator, generate
from refold.generation.prompts import encode_prompt, pad_left
from refold.generation.sampling import DEFAULT_NEW_TOKENS, Sampling
from refold.modeling.load import load_model, load_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "The sea was calm"
SHORT = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def source(make_model) -> Path:
    return make_model()


@pytest.fixture(scope="module")
def folded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folded") / "out"
    convert(source, folder, {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 5}})
    return folder


@pytest.fixture(scope="module")
def generator(folded: Path) -> TextGenerator:
    return TextGenerator(folded, device="cpu")


def _greedy(folder: Path, prompt: str, count: int) -> str:
    """Token by token without cache, batch or transformers' loop; text by decoding all at once."""
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    ids = encode_prompt(tokenizer, prompt, chat=False)
    begin = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[begin:], skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("which", ["source", "folded"])
def test_greedy_text_is_that_of_a_plain_loop(which: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(which)
    assert generate(folder, PROMPT, SHORT, device="cpu") == _greedy(folder, PROMPT, 24)


def test_prompts_in_a_batch_continue_as_they_do_alone(generator, sentences):
    prompts = [*sentences, "", "I"]
    together = generator.generate(prompts, SHORT)
    assert together == [generator.generate([prompt], SHORT)[0] for prompt in prompts]
    assert len(set(together)) > 3


def test_an_empty_prompt_starts_from_the_start_token(generator, folded):
    assert encode_prompt(generator.tokenizer, "", chat=False) == [generator.tokenizer.bos_token_id]
    assert generator.generate([""], SHORT)[0] == _greedy(folded, "", 24)


@pytest.mark.parametrize("adds", [False, True])
def test_a_prompt_has_the_special_tokens_that_the_tokenizer_adds(generator, adds: bool):
    tokenizer = copy.deepcopy(generator.tokenizer)
    start = tokenizer.bos_token
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
        )
    ids = encode_prompt(tokenizer, PROMPT, chat=False)
    assert ids == tokenizer(PROMPT)["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == adds
    assert encode_prompt(tokenizer, "", chat=False) == [tokenizer.bos_token_id]


def test_an_end_token_that_the_tokenizer_adds_does_not_end_a_prompt(generator):
    tokenizer = copy.deepcopy(generator.tokenizer)
    expected = encode_prompt(tokenizer, PROMPT, chat=False)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer(PROMPT)["input_ids"] == [*expected, tokenizer.eos_token_id]
    assert encode_prompt(tokenizer, PROMPT, chat=False) == expected
    assert encode_prompt(tokenizer, PROMPT + end, chat=False)[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("sampling", [SHORT, Sampling(max_new_tokens=40, temperature=3.0, seed=5)])
def test_streamed_pieces_are_the_text(generator, sampling: Sampling):
    pieces = list(generator.stream(PROMPT, sampling))
    assert "".join(pieces) == generator.generate([PROMPT], sampling)[0]
    assert len(pieces) > 5
    assert all(pieces)


def test_a_closed_stream_stops_the_model(generator):
    before = threading.active_count()
    stream = generator.stream(PROMPT, Sampling(max_new_tokens=200))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_in_the_model_reaches_whoever_reads_the_stream(folded, monkeypatch):
    generator = TextGenerator(folded, device="cpu")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(generator.model, "forward", fail)
    with pytest.raises(MemoryError, match="no room"):
        list(generator.stream(PROMPT))


def test_the_end_token_ends_the_text(folded):
    generator = TextGenerator(folded, device="cpu")
    free = generator.generate([PROMPT, "A"], SHORT)
    ids = encode_prompt(generator.tokenizer, PROMPT, chat=False)
    with torch.no_grad():
        model: Any = generator.model
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    place = next(index for index in range(3, 24) if tokens.index(tokens[index]) == index)
    model.generation_config.eos_token_id = [299, tokens[place]]
    ended = generator.generate([PROMPT, "A"], SHORT)
    assert ended[0] == generator.tokenizer.decode(tokens[:place], skip_special_tokens=True)
    assert 0 < len(ended[0]) < len(free[0])
    assert "".join(generator.stream(PROMPT, SHORT)) == ended[0]


def test_a_seed_repeats_itself_and_leaves_the_callers_generator_alone(generator):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    texts = [
        generator.generate([PROMPT], Sampling(max_new_tokens=20, temperature=1.5, seed=seed))[0] for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"min_p": 1.0}])
def test_a_draw_from_one_token_is_greedy(generator, narrow):
    settings = Sampling(**{"max_new_tokens": 16, "temperature": 2.0, **narrow})
    assert generator.generate([PROMPT], settings) == generator.generate([PROMPT], Sampling(max_new_tokens=16))


def test_a_stop_string_ends_the_text_before_it(generator, sentences):
    whole = generator.generate([PROMPT], SHORT)[0]
    stop = whole[len(whole) // 2 :][:3]
    settings = replace(SHORT, stop=["never there", stop])
    ended = whole[: whole.index(stop)]
    assert ended
    assert generator.generate([PROMPT], settings)[0] == ended
    assert "".join(generator.stream(PROMPT, settings)) == ended
    together = generator.generate([*sentences, PROMPT], settings)
    assert together == [generator.generate([prompt], settings)[0] for prompt in [*sentences, PROMPT]]
    assert together[-1] == ended


def test_a_stop_string_stops_the_model(generator, monkeypatch):
    calls: list[Any] = []
    handle = generator.model.register_forward_hook(lambda *each: calls.append(each[0]))
    text = generator.generate([PROMPT], Sampling(max_new_tokens=100))[0]
    calls.clear()
    generator.generate([PROMPT], Sampling(max_new_tokens=100, stop=text[5]))
    handle.remove()
    assert 0 < len(calls) < 20


def test_a_bias_chooses_and_forbids(generator):
    (token,) = generator.tokenizer("a", add_special_tokens=False)["input_ids"]
    always = Sampling(max_new_tokens=4, logit_bias={token: 100})
    assert generator.generate([PROMPT], always) == ["aaaa"]
    with pytest.raises(RefoldError, match=r"logit_bias: token 300 is out of range \(vocabulary of 300 tokens"):
        generator.generate([PROMPT], Sampling(logit_bias={300: 1}))


def test_a_penalty_is_the_same_in_a_batch_as_alone(generator, sentences):
    settings = replace(SHORT, repetition_penalty=3.0)
    together = generator.generate(list(sentences), settings)
    assert together == [generator.generate([prompt], settings)[0] for prompt in sentences]
    assert together != generator.generate(list(sentences), SHORT)


def test_end_tokens_may_be_ignored(folded):
    generator: Any = TextGenerator(folded, device="cpu")
    free = generator.generate([PROMPT], SHORT)[0]
    ids = encode_prompt(generator.tokenizer, PROMPT, chat=False)
    tokens = generator._run([ids], SHORT, generator._options([ids], SHORT))[0]
    generator.model.generation_config.eos_token_id = tokens[3]
    assert len(generator.generate([PROMPT], SHORT)[0]) < len(free)
    assert generator.generate([PROMPT], replace(SHORT, ignore_eos=True))[0] == free


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presence_penalty": 0.5}, r"presence_penalty: must be 0 where transformers generates \(got 0.5\)"),
        ({"frequency_penalty": 0.5}, r"frequency_penalty: must be 0 where transformers generates \(got 0.5\)"),
        ({"logprobs": 0}, r"logprobs: must be None where transformers generates \(got 0\); the engine takes it"),
        ({"n": 2}, r"n: must be 1 where transformers generates \(got 2\)"),
    ],
)
def test_settings_that_transformers_lacks_are_named(generator, settings: dict, message: str):
    with pytest.raises(RefoldError, match=message):
        generator.generate([PROMPT], Sampling(**settings))


def test_a_wide_draw_is_not_limited_to_transformers_default_of_50(generator, monkeypatch):
    seen: dict[str, Any] = {}
    generate_ = generator.model.generate

    def watched(*args: Any, **kwargs: Any):
        seen.update(kwargs["generation_config"].to_dict())
        return generate_(*args, **kwargs)

    monkeypatch.setattr(generator.model, "generate", watched)
    generator.generate([PROMPT], Sampling(max_new_tokens=2, temperature=1.0))
    assert (seen["top_k"], seen["top_p"], seen["do_sample"]) == (0, 1.0, True)


def test_leaving_early_is_a_shallower_model(generator, folded):
    texts = [generator.generate([PROMPT], replace(SHORT, exit_depth=depth))[0] for depth in (2, 4)]
    assert texts[0] != texts[1] == generator.generate([PROMPT], SHORT)[0]
    assert "".join(generator.stream(PROMPT, replace(SHORT, exit_depth=2))) == texts[0]


def test_leaving_early_needs_a_folded_model_and_a_depth_it_has(generator, source):
    with pytest.raises(RefoldError, match=r"exit_depth: must lie in 1..4 \(got 5\)"):
        generator.generate([PROMPT], Sampling(exit_depth=5))
    with pytest.raises(RefoldError, match=r"exit_depth: a folded model is required \(got a llama model, which always"):
        generate(source, PROMPT, Sampling(exit_depth=2), device="cpu")


def test_chat_goes_through_the_template(folded):
    generator = TextGenerator(folded, device="cpu")
    generator.tokenizer.chat_template = TEMPLATE
    rendered = f"<user>{PROMPT}\n<assistant>"
    expected = generator.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encode_prompt(generator.tokenizer, PROMPT, chat=True) == expected
    messages = [{"role": "user", "content": PROMPT}]
    text = generate(generator.model, messages, SHORT, tokenizer=generator.tokenizer)
    assert text == generate(generator.model, PROMPT, SHORT, tokenizer=generator.tokenizer, chat=True)


def test_chat_without_a_template_is_refused(generator):
    with pytest.raises(RefoldError, match=r"chat: a chat template is required \(the tokenizer has none\); use a plain"):
        generator.generate([PROMPT], chat=True)


def test_messages_the_template_refuses_are_named(folded):
    tokenizer = load_tokenizer(folded)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RefoldError, match=r"messages that the chat template takes are required \(roles must alternate"):
        encode_prompt(tokenizer, "hello", chat=True)


def test_a_prompt_that_fills_the_model_is_refused(generator):
    long = "q" * 256
    for call in (lambda: generator.generate([long]), lambda: generator.stream(long)):
        with pytest.raises(RefoldError, match=r"prompt: must be at most 255 tokens, .* \(got 256\); shorten it"):
            call()


def test_more_new_tokens_than_fit_are_refused_and_the_default_takes_what_fits(generator):
    with pytest.raises(RefoldError, match=r"max_new_tokens: must be at most 56 after a prompt of 200 tokens"):
        generator.generate(["q" * 200], Sampling(max_new_tokens=57))
    for prompt, room in (("q" * 200, 56), ("q", DEFAULT_NEW_TOKENS)):
        ids = encode_prompt(generator.tokenizer, prompt, chat=False)
        assert len(generator._run([ids], Sampling(), generator._options([ids], Sampling()))[0]) == room


def test_a_list_of_texts_gives_a_list_and_no_texts_none(generator):
    model, tokenizer = generator.model, generator.tokenizer
    assert generate(model, [PROMPT], SHORT, tokenizer=tokenizer) == [
        generate(model, PROMPT, SHORT, tokenizer=tokenizer)
    ]
    assert generate(model, [], SHORT, tokenizer=tokenizer) == []


def test_texts_and_messages_in_one_list_are_refused(generator):
    mixed: Any = [PROMPT, {"role": "user", "content": "hi"}]
    with pytest.raises(RefoldError, match=r"texts or the messages of one conversation are required .got both"):
        generate(generator.model, mixed, tokenizer=generator.tokenizer)


def test_nothing_to_begin_with_is_refused(make_model):
    tokenizer = load_tokenizer(make_model(start=False, bos_token_id=None, eos_token_id=None))
    with pytest.raises(RefoldError, match=r"prompt: some text is required \(got none, and the tokenizer has no start"):
        encode_prompt(tokenizer, "", chat=False)


def test_a_tokenizer_is_required(make_source, generator):
    with pytest.raises(SourceError, match="a tokenizer is required"):
        generate(make_source("llama"), PROMPT, device="cpu")
    with pytest.raises(RefoldError, match="tokenizer: one is required with a loaded model"):
        generate(generator.model, PROMPT)


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"device": "cpu"}])
def test_a_loaded_model_is_not_moved(generator, option):
    with pytest.raises(RefoldError, match="only a model loaded from a folder can be given one"):
        generate(generator.model, PROMPT, tokenizer=generator.tokenizer, **option)


def test_padding_stands_on_the_left():
    batch = pad_left([[5, 6, 7], [8]], 0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_real_model_continues_a_story_as_transformers_does(material: Path):
    folder = material / "models" / "stories260K"
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([encode_prompt(tokenizer, "Once upon a time", chat=False)])
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    text = generate(folder, "Once upon a time", Sampling(max_new_tokens=40), device="cpu")
    assert text.startswith(",")
    assert "Once upon a time" + text == str(expected).strip()
