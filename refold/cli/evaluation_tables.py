"""Tables of an evaluation."""

from refold.cli.show import format_bytes, print_table, print_text
from refold.evaluation.result import Evaluation, ModelFacts


def with_error(value: float, error: float | None, sign: str = "", digits: int = 4) -> str:
    """Returns a value with its standard error, as `1.2345 ± 0.0051`."""
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def weights(model: ModelFacts) -> str:
    """Returns the weight bytes as `5.5 MB`, with the scheme if linears are quantised."""
    return format_bytes(model.weight_bytes) + ("" if model.quantised is None else f", linears in {model.quantised}")


def print_evaluation(found: Evaluation) -> None:
    """Prints the figures of one evaluation, with a column for the model it was compared with."""
    other = found.against
    rows = [
        ("bits per byte", with_error(found.bits_per_byte, found.bits_per_byte_error)),
        ("perplexity", f"{found.perplexity:.3f}"),
        ("accuracy", f"{found.accuracy:.2%}"),
        ("weights", weights(found.model)),
    ]
    if other is None:
        print_table(("", found.model.name), rows)
    else:
        others = (
            with_error(other.bits_per_byte, other.bits_per_byte_error),
            f"{other.perplexity:.3f}",
            f"{other.accuracy:.2%}",
            weights(other.model),
        )
        print_table(
            ("", found.model.name, other.model.name), [(*row, value) for row, value in zip(rows, others, strict=True)]
        )
        print()
        print_text(
            f"difference {with_error(other.difference, other.difference_error, '+')} bits per byte, same likeliest "
            f"token {other.agreement:.2%}, KL {other.kl:.4f} nats per token"
        )
        if other.kept_tokens is not None:
            print_text(
                f"the likeliest token and KL are over the {other.kept_tokens:,} tokens that {found.model.name} keeps; "
                f"the other figures of {other.model.name} are those of its own tokens and whole vocabulary"
            )
    if found.kinds:
        print()
        _print_kinds(found)
    if found.exits:
        print()
        rows = [
            (
                str(left.depths),
                f"{left.bits_per_byte:.4f}",
                f"{left.accuracy:.2%}",
                f"{left.agreement:.2%}",
                f"{left.kl:.4f}",
                "-" if left.gate_accuracy is None else f"{left.gate_accuracy:.2%}",
            )
            for left in found.exits
        ]
        names = ("exit after", "bits per byte", "accuracy", "agrees with full depth", "KL", "gate accuracy")
        print_table(names, rows)
    part = "" if found.is_whole_data else f", the first {found.max_tokens:,} tokens only"
    print()
    print_text(
        f"{found.documents:,} documents, {found.tokens:,} tokens, {found.bytes:,} bytes{part}; windows of "
        f"{found.context} tokens, stride {found.stride}; {found.tokens_per_second:,.0f} tokens/s"
    )


def _print_kinds(found: Evaluation) -> None:
    is_compared = found.against is not None
    columns = ("kind of text", "bits per byte", "accuracy", "tokens")
    rows = [
        (
            kind.name,
            with_error(kind.bits_per_byte, kind.bits_per_byte_error),
            f"{kind.accuracy:.2%}",
            f"{kind.tokens:,}",
            *(
                (with_error(kind.difference or 0.0, kind.difference_error, "+"), f"{kind.kl:.4f}")
                if is_compared
                else ()
            ),
        )
        for kind in found.kinds
    ]
    print_table((*columns, "difference", "KL") if is_compared else columns, rows)
