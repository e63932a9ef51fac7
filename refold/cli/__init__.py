"""The command line: one thin file for each sub-command."""

import sys


def main() -> None:
    """Runs `refold`. The user's mistakes are one line on stderr and exit status 2."""
    from refold.cli.app import app
    from refold.errors import RefoldError

    try:
        app()
    except RefoldError as error:
        print(f"refold: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        print("refold: interrupted", file=sys.stderr)
        sys.exit(130)
