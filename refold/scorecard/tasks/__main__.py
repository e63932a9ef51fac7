"""lm-eval's command line with refold's model class, for releases of lm-eval that do not read entry points.

`python -m refold.scorecard.tasks run --model refold ...` takes the arguments of `lm_eval run`.
"""

import sys

from refold.errors import RefoldError
from refold.scorecard.tasks.harness import require_harness


def main() -> None:
    """Registers the model class and hands over to lm-eval's command line."""
    try:
        require_harness()
        from lm_eval.__main__ import cli_evaluate

        import refold.scorecard.tasks.model  # noqa: F401

        cli_evaluate()
    except RefoldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
