"""Generation of text by a model, folded or not, through transformers' `generate`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from refold.data.tokens import require_known_tokens
from refold.errors import RefoldError, given_or_default
from refold.generation.limits import end_tokens, listed, new_tokens_room, position_limit, require_known_biases
from refold.generation.prompts import Messages, encode_continuation, encode_prompt, pad_left
from refold.generation.sampling import Sampling
from refold.generation.state import PromptState, load_state, read_state
from refold.generation.stop_search import StopSearch
from refold.generation.stream import Detokeniser, TokenStream
from refold.modeling.cache_name import CACHE_NAME
from refold.modeling.configuration import MODEL_TYPE
from refold.modeling.load import ModelLike, load_model, load_tokenizer

Prompt = str | Messages


class TextGenerator:
    """A model with its tokenizer, ready to continue prompts.

    Args:
        model: Folder, hub id, or a loaded model.
        tokenizer: Tokenizer of a loaded model; None: the folder's own.
        dtype: Dtype of the weights when a folder is loaded; None: the stored dtype, or float32 if that is slow.
        device: Device to load a folder to; None: the best one of the machine.

    Raises:
        SourceError: The model or its tokenizer is missing or broken.
        FolderError: The folder is torn.
        RefoldError: There is no such device or dtype, or a loaded model comes without a tokenizer.
    """

    def __init__(
        self,
        model: ModelLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ):
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise RefoldError("tokenizer: one is required with a loaded model (got none); load_tokenizer(folder)")
            for name, value in (("dtype", dtype), ("device", device)):
                if value is not None:
                    raise RefoldError(
                        f"{name}: only a model loaded from a folder can be given one (got {value} for a loaded model); "
                        f"call model.to(...) before"
                    )
            self.model, self.tokenizer = model, tokenizer
        else:
            self.tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
            self.model = load_model(model, dtype=dtype, device=device)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        chat: bool = False,
        state: PromptState | None = None,
    ) -> list[str]:
        """Continues a batch of prompts and returns the new text of each; arguments as for `generate`, and:

        Args:
            state: State of a prompt that was read before. Each prompt continues it independently and may be empty. The
                state does not change.
        """
        if not prompts:
            return []
        ids = self._encode(prompts, chat, state)
        sampling = given_or_default(sampling, Sampling, "sampling")
        # transformers' repetition penalty counts padding as a token, so prompts run one by one.
        batches = [ids] if sampling.repetition_penalty == 1 else [[each] for each in ids]
        options = [self._options(batch, sampling, state) for batch in batches]
        new = [row for batch, each in zip(batches, options, strict=True) for row in self._run(batch, sampling, each)]
        return [self._text(prompt, row, sampling) for prompt, row in zip(ids, new, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        chat: bool = False,
        state: PromptState | None = None,
    ) -> Iterator[str]:
        """Continues one prompt and yields pieces of text at once; joined they equal the result of `generate`.

        The call itself raises errors of its arguments. Closing the iterator stops the model.
        """
        sampling = given_or_default(sampling, Sampling, "sampling")
        ids = self._encode([prompt], chat, state)[0]
        options = self._options([ids], sampling, state)
        return self._pieces(ids, sampling, options)

    def read_prompt(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        state: PromptState | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PromptState:
        """Reads a prompt once; `generate` and `stream` can continue its state any number of times.

        Args:
            prompt: As for `generate`.
            chat: As for `generate`.
            state: State that the prompt continues.
            on_progress: Called with the number of tokens read and of all tokens.

        Raises:
            RefoldError: The prompt does not fit the model, or the model's cache cannot be kept.
        """
        ids = self._encode([prompt], chat, state)[0]
        new_tokens_room(len(ids), position_limit(self.model), Sampling())
        return read_state(self.model, ids, state, on_progress)

    def load_state(self, path: str | Path) -> PromptState:
        """Reads a state file that `PromptState.save` wrote.

        Raises:
            RefoldError: The file is missing, damaged, of another format, or of another model.
        """
        return load_state(path, self.model)

    def _encode(self, prompts: Sequence[Prompt], chat: bool, state: PromptState | None) -> list[list[int]]:
        """Returns the token ids of prompts, after those of the state that they continue; all are in the vocabulary."""
        ids = self._token_ids(prompts, chat, state)
        for each in ids:
            require_known_tokens("prompt", each, cast("nn.Embedding", self.model.get_input_embeddings()).num_embeddings)
        return ids

    def _token_ids(self, prompts: Sequence[Prompt], chat: bool, state: PromptState | None) -> list[list[int]]:
        if state is None:
            return [encode_prompt(self.tokenizer, prompt, chat) for prompt in prompts]
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if chat or len(texts) < len(prompts):
            raise RefoldError(
                "chat: plain text is required after a state (got a conversation, whose template begins it anew); read "
                "the conversation into the state instead"
            )
        state.require_model(self.model)
        return [[*state.token_ids, *encode_continuation(self.tokenizer, text)] for text in texts]

    def _pieces(self, ids: list[int], sampling: Sampling, options: dict[str, Any]) -> Iterator[str]:
        detokeniser, search = Detokeniser(self.tokenizer, ids), StopSearch(tuple(sampling.stop))
        tokens = TokenStream(lambda streamer, stop: self._run([ids], sampling, options, streamer, stop))
        ends = listed(options["generation_config"].eos_token_id)
        with tokens:
            for token in tokens:
                if token in ends:
                    break
                piece = search.add(detokeniser.add(token))
                if piece:
                    yield piece
                if search.found is not None:
                    break
        rest = search.add(detokeniser.finish()) + search.finish()
        if rest:
            yield rest

    def _run(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        options: dict[str, Any],
        streamer: BaseStreamer | None = None,
        stop: StoppingCriteria | None = None,
    ) -> list[list[int]]:
        """Returns the new token ids of each prompt, without padding and without tokens after the end token."""
        config: GenerationConfig = options["generation_config"]
        assert isinstance(config.pad_token_id, int)
        batch = pad_left(prompts, config.pad_token_id)
        device = self.model.device
        devices = [device.index or 0] if device.type == "cuda" else []
        stops = [] if stop is None else [stop]
        if sampling.stop:
            stops.append(_StopStrings(self.tokenizer, prompts, sampling))
        extra = {"stopping_criteria": stops} if stops else {}
        # The seed is for these draws only; the caller's random generators keep their state.
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(sampling.seed)
            model: Any = self.model
            output = model.generate(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                streamer=streamer,
                logits_processor=LogitsProcessorList([_FiniteLogits(str(model.config._name_or_path))]),
                **options,
                **extra,
            )
        ends = listed(config.eos_token_id)
        return [_until_end(row, ends) for row in output[:, batch.input_ids.shape[1] :].tolist()]

    def _text(self, prompt: list[int], new: list[int], sampling: Sampling) -> str:
        detokeniser, search = Detokeniser(self.tokenizer, prompt), StopSearch(tuple(sampling.stop))
        text = "".join(map(detokeniser.add, new)) + detokeniser.finish()
        return search.add(text) + search.finish()

    def _options(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        state: PromptState | None = None,
    ) -> dict[str, Any]:
        """Returns the arguments of transformers' `generate` beside the prompt.

        Raises:
            RefoldError: The prompt is too long, a setting does not fit the model, or transformers has none like it.
        """
        _require_supported(sampling)
        ends = end_tokens(self.model, self.tokenizer)
        # Padding is masked, but the model embeds it, so it must be in the vocabulary.
        embedding: Any = self.model.get_input_embeddings()
        vocab_size = embedding.num_embeddings
        require_known_biases(sampling, vocab_size)
        fitting = [token for token in (*listed(self.tokenizer.pad_token_id), *ends) if token < vocab_size]
        draws = sampling.temperature > 0
        config = GenerationConfig(
            max_new_tokens=new_tokens_room(max(map(len, prompts)), position_limit(self.model), sampling),
            do_sample=draws,
            num_beams=1,
            # Without draws these are transformers' defaults, because it warns of other values.
            temperature=sampling.temperature if draws else 1.0,
            top_p=sampling.top_p if draws else 1.0,
            top_k=sampling.top_k if draws else 50,
            min_p=sampling.min_p if draws else None,
            repetition_penalty=sampling.repetition_penalty,
            sequence_bias=[[[token], bias] for token, bias in sampling.biases.items()] or None,
            # None would mean the folder's; a token outside the vocabulary never comes.
            eos_token_id=vocab_size if sampling.ignore_eos else ends or None,
            pad_token_id=fitting[0] if fitting else 0,
            use_cache=True,
        )
        options: dict[str, Any] = {"generation_config": config}
        exit_depth = sampling.exit_depth
        if exit_depth is not None:
            if self.model.config.model_type != MODEL_TYPE:
                raise RefoldError(
                    f"exit_depth: a folded model is required (got a {self.model.config.model_type} model, which always "
                    f"runs all its layers)"
                )
            num_depths = self.model.config.num_hidden_layers
            if not 1 <= exit_depth <= num_depths:
                raise RefoldError(f"exit_depth: must lie in 1..{num_depths} (got {exit_depth})")
            options["exit_depth"] = exit_depth
        if state is not None:
            # `generate` gets whole prompts with their mask, and runs only the tokens after the cache's length.
            options[CACHE_NAME] = state.open(self.model, prompts)
        return options


@overload
def generate(
    model: ModelLike,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> str: ...


@overload
def generate(
    model: ModelLike,
    prompt: Sequence[str] | Messages,
    sampling: Sampling | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> str | list[str]: ...


def generate(
    model: ModelLike,
    prompt: str | Sequence[str] | Messages,
    sampling: Sampling | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> str | list[str]:
    """Continues a prompt and returns the new text.

    Generation stops at the model's end token. Settings of the folder's generation config that `sampling` lacks apply.

    Args:
        model: Folder, hub id, or a loaded model, folded or not.
        prompt: A text, several texts (the result is then a list), or the messages of one conversation.
        sampling: Settings of the choice of tokens; None: greedy, at most 128 tokens.
        tokenizer: Needed with a loaded model; else the folder's own.
        chat: Apply the tokenizer's chat template to a text; to messages it always applies.
        dtype: Of the weights of a model that is loaded here; None: as stored, or float32 where that is slow.
        device: Where it is loaded to; None: the best there is.

    Raises:
        SourceError: The model or its tokenizer is missing or broken.
        FolderError: The folder is torn.
        RefoldError: A prompt is too long, or empty without a start token; there is no chat template; or a setting is
            out of range.
    """
    generator = TextGenerator(model, tokenizer, dtype=dtype, device=device)
    if isinstance(prompt, str):
        return generator.generate([prompt], sampling, chat=chat)[0]
    texts = [each for each in prompt if isinstance(each, str)]
    if len(texts) == len(prompt):
        return generator.generate(texts, sampling, chat=chat)
    messages = [each for each in prompt if not isinstance(each, str)]
    if texts:
        raise RefoldError("prompt: texts or the messages of one conversation are required (got both in one list)")
    return generator.generate([messages], sampling, chat=True)[0]


_ENGINE_ALONE = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": None,
    "n": 1,
    "exit_tolerance": None,
    "prompt_logprobs": None,
    "constraint": None,
}
"""Settings that transformers' `generate` lacks, or that a text alone cannot show, with the values it is used with."""


def _require_supported(sampling: Sampling) -> None:
    for name, usual in _ENGINE_ALONE.items():
        value = getattr(sampling, name)
        if value != usual:
            raise RefoldError(
                f"{name}: must be {usual} where transformers generates (got {value}); the engine takes it: use "
                f"refold.Engine, or drop --reference or --state"
            )


class _StopStrings(StoppingCriteria):
    """Ends each row of a batch after its stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], sampling: Sampling):
        self._rows = [(Detokeniser(tokenizer, prompt), StopSearch(tuple(sampling.stop))) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        for token, (detokeniser, search) in zip(input_ids[:, -1].tolist(), self._rows, strict=True):
            if search.found is None:
                search.add(detokeniser.add(token))
        return torch.tensor([search.found is not None for _, search in self._rows], device=input_ids.device)


class _FiniteLogits(LogitsProcessor):
    """Checks that the largest logit of each row is finite; NaN and overflow raise."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        largest = scores.max(dim=-1).values  # NaN where a row holds one
        if not bool(torch.isfinite(largest).all()):
            value = float(largest[~torch.isfinite(largest)][0])
            raise RefoldError(
                f"{self._name}: finite predictions are required (got {value} for token {input_ids.shape[1]}); the "
                f"weights are broken, or the dtype is too narrow: try float32"
            )
        return scores


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    last = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:last]
