"""Modules with an ``init_cfg``: ``BaseModule`` and the container modules derived from it."""

from __future__ import annotations

import copy
from abc import ABCMeta
from typing import Any

from torch import nn

from hookengine.model.loaded import LoadedTensors, forget_loaded, watch_loading
from hookengine.registry import MODELS


class BaseModule(nn.Module, metaclass=ABCMeta):
    """Base class for modules that initialize their weights as their ``init_cfg`` describes.

    Args:
        init_cfg: A dict or a list of dicts, ``dict(type=INITIALIZER, layer=...)``.

    Attributes:
        init_cfg: A copy of the argument.
        loaded_tensors: The parameters and buffers that a state dict was loaded into, except those
            that belong to a BaseModule inside this one.
    """

    def __init__(self, init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.init_cfg = copy.deepcopy(init_cfg)
        self._is_init = False
        self.loaded_tensors = LoadedTensors()
        watch_loading(self)

    @property
    def is_init(self) -> bool:
        """Whether ``init_weights`` was called.

        If you set it to False, the next call initializes this module and every BaseModule inside
        it again, including tensors that were loaded from a state dict.
        """
        return self._is_init

    @is_init.setter
    def is_init(self, value: bool) -> None:
        self.__dict__["_is_init"] = value  # nn.Module.__setattr__ searches the parameters first
        if not value:
            forget_loaded(self)
            for module in self.modules():
                if isinstance(module, BaseModule):
                    module._is_init = False

    def init_weights(self) -> None:
        """Initialize the weights of this module and its children as their ``init_cfg`` describes.

        Raises:
            RuntimeError: If no installed plugin provides the initializers.
        """
        if "init_weights" not in MODELS:
            raise RuntimeError(
                f"{type(self).__name__}.init_weights(): no installed plugin provides weight "
                "initialization (an entry point 'init_weights' in the group 'hookengine.model'). "
                "Install one, or override init_weights() and use torch.nn.init"
            )
        MODELS.own("init_weights")(self)

    def __repr__(self) -> str:
        text = super().__repr__()
        return f"{text}\ninit_cfg={self.init_cfg}" if self.init_cfg else text


class Sequential(BaseModule, nn.Sequential):
    """``nn.Sequential`` with an ``init_cfg``."""

    def __init__(self, *args: Any, init_cfg: Any = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.Sequential.__init__(self, *args)


class ModuleList(BaseModule, nn.ModuleList):
    """``nn.ModuleList`` with an ``init_cfg``."""

    def __init__(self, modules: Any = None, init_cfg: Any = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleList.__init__(self, modules)


class ModuleDict(BaseModule, nn.ModuleDict):
    """``nn.ModuleDict`` with an ``init_cfg``."""

    def __init__(self, modules: Any = None, init_cfg: Any = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleDict.__init__(self, modules)
