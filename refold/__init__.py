"""refold: fold a pretrained language model into one that is cheaper to store and to run."""

from refold.modeling.registration import register_when_imported
from refold.version import __version__

register_when_imported()

__all__ = ["__version__"]
