"""The command line, with one thin file per sub-command."""

import io
import sys


def main() -> None:
    """Runs `refold` and turns any exception into one line on stderr and an exit status (see `refold.cli.failures`)."""
    from refold.cli.failures import one_line_each
    from refold.healing.interruption import stop_on_signals

    with one_line_each(), stop_on_signals():
        from refold.cli.app import app
        from refold.cli.removed import refuse_removed_flags

        for stream in (sys.stdout, sys.stderr):
            # File names may contain bytes that are not valid text.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        refuse_removed_flags(sys.argv[1:])
        sys.exit(app(args=sys.argv[1:] or ["--help"], prog_name="refold", standalone_mode=False) or 0)
