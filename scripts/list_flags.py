"""Prints the flags of all sub-commands, one command a line: `python scripts/list_flags.py > tests/cli/flags.txt`."""

import typer.main

from refold.cli.app import app


def list_flags() -> str:
    """Returns `command: flag flag ...` lines, commands in the order of the help, flags sorted."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    lines = []
    for name, command in commands.items():
        flags = sorted(flag for parameter in command.params for flag in parameter.opts if flag.startswith("-"))
        lines.append(f"{name}: {' '.join(flags)}\n")
    return "".join(lines)


if __name__ == "__main__":
    print(list_flags(), end="")
