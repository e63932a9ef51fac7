"""Makes `AutoModelForCausalLM.from_pretrained` know refold's models after a plain `import refold`.

Importing transformers takes seconds, so `import refold` does not. The config registers at once where transformers has
its AutoConfig loaded, otherwise, by an import hook, as soon as it has. The model registers when a config is made, which
every way to a model goes through: transformers' own modules import the Auto classes, so a hook on those would import
the model in the middle of its own imports.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

CONFIG_MODULE = "transformers.models.auto.configuration_auto"
MODEL_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Registers config and model now, importing transformers if need be. Calling it again does nothing."""
    importlib.import_module(MODEL_MODULE)
    _register_config()
    _register_model()


def register_when_imported() -> None:
    """Registers the config now if transformers has AutoConfig loaded, else as soon as it has."""
    if CONFIG_MODULE in sys.modules:
        _register_config()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register_model_if_loaded() -> None:
    """Registers the model if transformers has the Auto classes of models loaded."""
    if MODEL_MODULE in sys.modules:
        _register_model()


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from refold.modeling.configuration import MODEL_TYPE, RefoldConfig

    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, RefoldConfig)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from refold.modeling.configuration import RefoldConfig
    from refold.modeling.model import RefoldForCausalLM
    from refold.modeling.stack import RefoldModel

    AutoModel.register(RefoldConfig, RefoldModel, exist_ok=True)
    AutoModelForCausalLM.register(RefoldConfig, RefoldForCausalLM, exist_ok=True)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the module of AutoConfig as usual, and registers after the module has run."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != CONFIG_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    """A module's own loader, followed by the registration."""

    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register_config()
