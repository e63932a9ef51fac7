"""Constraints compiled with llguidance, which says after each token which tokens may follow."""

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from refold.errors import RefoldError
from refold.generation.constraint import Constraint
from refold.suggest import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT = 16
"""Compiled constraints that are kept."""
_LIMITS = {
    "max_items_in_row": 500,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Bounds of one grammar: a step takes at most some tens of milliseconds, its states some tens of megabytes."""
_JSON_OPTIONS = {
    # Without a bound, likely tokens of white space may follow for ever.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,16}",
    "coerce_one_of": False,
    "lenient": False,
}
_COMPILE_SECONDS = 0.25
_CHECK_SECONDS = 2
_CHECK_BYTES = 1 << 30
_WALL_SECONDS = 30.0
_TOO_COSTLY = "a form that is quick to compile is required (this one takes too long); simplify it"


class GrammarState:
    """The constraint of one choice, after some tokens.

    Args:
        matcher: llguidance's, which no other state uses.
        end_tokens: Tokens that end a text; as text of a choice they would end it early.
    """

    def __init__(self, matcher: Any, end_tokens: Sequence[int]):
        self._matcher, self._end_tokens = matcher, end_tokens

    def allowed(self, vocab_size: int) -> Bool[np.ndarray, " N"]:
        """Returns for each token whether it may come next; an end token may where the text is whole."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        found = np.pad(found, (0, vocab_size - len(found)))
        if not self._matcher.is_accepting():
            found[self._end_tokens] = False
        return found

    def advance(self, token: int) -> None:
        """Takes the next token."""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether no more text may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def fault(self) -> str | None:
        """Why it cannot go on, in one sentence; None: it can."""
        return f"constraint: {_sentence(self._matcher.get_error())}" if self._matcher.is_error() else None


class Grammar:
    """A compiled constraint.

    Args:
        matcher: llguidance's, before the first token.
        end_tokens: As for `GrammarState`.
    """

    def __init__(self, matcher: Any, end_tokens: Sequence[int] = ()):
        self._matcher, self._end_tokens = matcher, list(end_tokens)

    def begin(self) -> GrammarState:
        """Returns the state before the first token."""
        return GrammarState(self._matcher.deep_copy(), self._end_tokens)


class Grammars:
    """Compiles constraints for one tokenizer, whose table is made with the first of them.

    Args:
        tokenizer: Tokenizer of the model; None: there is no text to constrain.
        vocab_size: Number of logits.
        end_tokens: The model's end tokens; empty: the tokenizer's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int, end_tokens: Collection[int] = ()):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_tokens = [token for token in end_tokens if token < vocab_size]
        self._table: Any = None
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint) -> Grammar:
        """Returns the compiled constraint.

        A constraint from someone who is not trusted is given to `check_constraint` before, which bounds the time.

        Raises:
            RefoldError: llguidance is missing or refuses the constraint, or it cannot read the tokenizer.
        """
        library = _library()
        with self._lock:
            found = self._kept.get(constraint)
            if found is None:
                if self._table is None:
                    self._table = self._make_table()
                matcher = _compile(library, self._table, write_grammar(constraint))
                found = Grammar(matcher, self._end_tokens)
                self._kept[constraint] = found
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(constraint)
            return found

    def _make_table(self) -> Any:
        if self._tokenizer is None:
            raise RefoldError("constraint: a tokenizer is required (got none)")
        from llguidance import hf

        size = max(self._vocab_size, len(self._tokenizer))
        try:
            return hf.from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._end_tokens or None)  # pyright: ignore[reportArgumentType]
        except (ValueError, RuntimeError, TypeError) as error:
            raise RefoldError(
                f"constraint: a tokenizer that llguidance reads is required ({_sentence(str(error))})"
            ) from None


def write_grammar(constraint: Constraint) -> str:
    """Returns a constraint in llguidance's language.

    Raises:
        RefoldError: It cannot be written so.
    """
    matcher = _library().LLMatcher
    if constraint.kind == "regex":
        return matcher.grammar_from_regex(constraint.text)
    if constraint.kind == "strings":
        return matcher.grammar_from_regex("|".join(map(_escape, constraint.strings)))
    schema = constraint.text if constraint.kind == "schema" else '{"type": "object"}'
    try:
        return matcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise RefoldError(f"constraint: {_sentence(str(error))}") from None


def check_constraint(constraint: Constraint) -> None:
    """Checks in a process of its own that a constraint compiles, with bounds on its time and memory.

    Some schemas take hours to compile, which nothing can interrupt. The call blocks for some tenths of a second; call
    it in a thread beside an event loop, and keep the constraints that passed.

    Raises:
        RefoldError: llguidance is missing or refuses the constraint, or compiling costs too much.
    """
    _library()
    given = json.dumps({"kind": constraint.kind, "text": constraint.text})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "refold.engine.grammars"],
            input=given.encode(),
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RefoldError(f"constraint: {_TOO_COSTLY}") from None
    if done.returncode:
        raise RefoldError(f"constraint: {_TOO_COSTLY}")
    if message := done.stdout.decode("utf-8", "replace"):
        raise RefoldError(message)


def main() -> None:
    """Compiles the constraint on standard input, and writes why it is refused, if it is."""
    import resource

    library = _library()
    resource.setrlimit(resource.RLIMIT_CPU, (_CHECK_SECONDS, _CHECK_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_CHECK_BYTES, _CHECK_BYTES))
    began = time.process_time()
    try:
        grammar = write_grammar(Constraint.read(json.load(sys.stdin)))
        # Tokens of one byte each: the table of a model's tokenizer takes longer than most forms.
        _compile(library, library.LLTokenizer("byte"), grammar)
        if time.process_time() - began > _COMPILE_SECONDS:
            raise RefoldError(f"constraint: {_TOO_COSTLY}")
    except RefoldError as error:
        sys.stdout.write(str(error))


def _compile(library: Any, table: Any, grammar: str) -> Any:
    """Returns llguidance's matcher, which lets some token come first."""
    matcher = library.LLMatcher(table, grammar, log_level=0, limits=library.LLParserLimits(**_LIMITS))
    matcher.compute_bitmask()
    if matcher.is_error() or matcher.is_stopped():
        raise RefoldError(f"constraint: {_sentence(matcher.get_error() or 'no text has this form')}")
    return matcher


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RefoldError("constraint: the package llguidance is required; install refold[serve]") from None
    return llguidance


_SPECIAL = frozenset("\\.+*?()|[]{}^$#&-~/")


def _escape(text: str) -> str:
    return "".join(f"\\{each}" if each in _SPECIAL else each for each in text)


def _sentence(message: str) -> str:
    """Returns a message of the library in one line of bounded length."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    # A message about an expression shows it, and tells the reason at its end.
    reason = next((line for line in lines[1:] if line.startswith("error:")), None)
    told = lines[0] if reason is None else f"{lines[0]} {reason}"
    return f"a form that llguidance takes is required ({shorten(told)})"


if __name__ == "__main__":
    main()
