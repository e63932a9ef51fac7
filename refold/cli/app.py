"""All sub-commands, in the order a user meets them."""

import typer

from refold.cli import analyse, convert, demo, evaluate, export, generate, heal, inspect, plan, recipes, run
from refold.version import __version__

app = typer.Typer(
    name="refold",
    help="Fold a pretrained language model into one that is cheaper to store and run, heal it, measure it, export it.",
    no_args_is_help=True,
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


for command in (demo, analyse, plan, recipes, convert, heal, evaluate, run, inspect, generate, export):
    app.command(command.__name__.rsplit(".", 1)[-1])(command.command)
