"""The command line: one thin file for each sub-command."""

import sys


def main() -> None:
    """Runs `refold`: any exception becomes one line on stderr and an exit status (see `refold.cli.failures`)."""
    from refold.cli.failures import one_line_each

    with one_line_each():
        from refold.cli.app import app

        for stream in (sys.stdout, sys.stderr):
            # Names of files may hold bytes that are no text.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        sys.exit(app(args=sys.argv[1:] or ["--help"], prog_name="refold", standalone_mode=False) or 0)
