"""Entry point of `python -m refold`."""

from refold.cli import main

main()
