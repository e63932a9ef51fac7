"""The typer application with all sub-commands, in the order of a user's work."""

from typing import Any

import typer
from typer.core import TyperGroup

from refold.cli import (
    analyse,
    bench,
    calibrate,
    chat,
    claims,
    compare,
    convert,
    demo,
    evaluate,
    export,
    fit,
    generate,
    heal,
    inspect,
    plan,
    push,
    quantise,
    recipes,
    report,
    run,
    serve,
    worker,
)
from refold.cli.failures import one_line_each
from refold.version import __version__


class _Commands(TyperGroup):
    """A group of commands that reports exceptions before typer, because typer prints nothing on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        with one_line_each():
            return super().invoke(ctx)


app = typer.Typer(
    name="refold",
    cls=_Commands,
    help="Fold a pretrained language model into one that is cheaper to store and run, heal it, measure it, export it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"refold {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of `refold` itself."""


for command in (
    demo,
    fit,
    analyse,
    plan,
    recipes,
    convert,
    heal,
    quantise,
    evaluate,
    compare,
    calibrate,
    run,
    report,
    inspect,
    generate,
    serve,
    chat,
    bench,
    claims,
    worker,
    export,
    push,
):
    app.command(command.__name__.rsplit(".", 1)[-1])(command.command)
