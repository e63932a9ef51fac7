"""Entry point of `python -m refold.cli`."""

from refold.cli import main

main()
