"""refold: fold a pretrained language model into one that is cheaper to store and to run."""

from refold.version import __version__

__all__ = ["__version__"]
