"""The base classes of models, and the names that plugins add to ``hookengine.model``.

``from hookengine.model import ImgDataPreprocessor`` looks the name up in the ``MODELS`` registry,
which imports the plugin that provides it through the entry-point group ``hookengine.model``. Type
checkers and editors read the same names from ``__init__.pyi``, which ``make docs`` generates.
"""

from typing import Any

from hookengine.model.base_model import BaseModel
from hookengine.model.modules import BaseModule, ModuleDict, ModuleList, Sequential
from hookengine.registry import MODELS

_BASES = (BaseModel, BaseModule, ModuleDict, ModuleList, Sequential)
_OWN = {cls.__name__ for cls in _BASES}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_OWN, *MODELS.own_entry_points()})
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        return MODELS.own(name)
    except KeyError as error:
        raise AttributeError(
            f"module 'hookengine.model' has no {name!r}; {error.args[0]}"
        ) from None


def __dir__() -> list[str]:
    return sorted({*_OWN, *MODELS.names()})
