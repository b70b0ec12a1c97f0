"""Weight initialization: initializers, ``init_cfg``, weights from files, the plugin ``init``."""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from hookengine import (
    BaseModule,
    Plugin,
    Runner,
    dist,
    loaded_tensors,
    preserved_random_state,
)
from hookengine_init.files import read_weights
from hookengine_init.functions import (
    caffe2_xavier_init,
    constant_init,
    kaiming_init,
    normal_init,
    trunc_normal_init,
    uniform_init,
    xavier_init,
)
from hookengine_init.init_cfg import as_list, initialize, names_weights
from hookengine_init.initializers import (
    BaseInit,
    Caffe2XavierInit,
    ConstantInit,
    KaimingInit,
    NormalInit,
    TruncNormalInit,
    UniformInit,
    XavierInit,
    bias_init_with_prob,
)
from hookengine_init.pretrained import PretrainedInit
from hookengine_init.record import InitRecord, named_tensors, update_init_info
from hookengine_init.tree import init_model, init_weights
from hookengine_init.weights import load_weights

__all__ = [
    "BaseInit",
    "Caffe2XavierInit",
    "ConstantInit",
    "Init",
    "KaimingInit",
    "NormalInit",
    "PretrainedInit",
    "TruncNormalInit",
    "UniformInit",
    "XavierInit",
    "bias_init_with_prob",
    "caffe2_xavier_init",
    "constant_init",
    "init_weights",
    "initialize",
    "kaiming_init",
    "load_weights",
    "normal_init",
    "read_weights",
    "trunc_normal_init",
    "uniform_init",
    "update_init_info",
    "xavier_init",
]


def _as_tuple(names: Any) -> Any:
    return (names,) if isinstance(names, str) else names


class Init(Plugin, name="init"):
    """Initialize the weights of a ``BaseModule`` before training, as its ``init_cfg`` says.

    This happens once, on the CPU, before the model is converted, wrapped or loaded. Nothing is
    initialized if the model already was, if it is a plain ``nn.Module``, or if the Runner does not
    train. With several ranks, all of them receive rank 0's weights.

    Tensors into which a state dict was loaded are left unchanged. ``init_weights()`` of modules
    that are no ``BaseModule``, such as a backbone of timm or transformers, is not called unless you
    ask for it.
    """

    keep: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="names of submodules to leave unchanged, such as a pretrained backbone",
    )
    init_foreign: bool | None = Field(
        default=None,
        description="whether to call init_weights() of direct children that are no BaseModules; "
        "by default it is not called, and the log says so",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="makes the weights depend on this seed alone, not on earlier random draws",
    )

    def initialize_model(self, runner: Runner, model: nn.Module) -> None:
        """Call the model's ``init_weights()``, and log how each parameter was initialized."""
        if not isinstance(model, BaseModule):
            self._tell_of_parts(runner, model)
            return
        if runner.train_cfg is None:
            return
        if not model.is_init:
            self._initialize(runner, model)
        # Even if the model was already initialized: each rank may have drawn other weights.
        dist.broadcast_tensors(tensor for _, tensor in named_tensors(model))

    def _initialize(self, runner: Runner, model: BaseModule) -> None:
        with preserved_random_state() if self.seed is not None else nullcontext():
            if self.seed is not None:
                _seed_all(self.seed)
            foreign = bool(self.init_foreign)
            record = init_model(model, self.keep, runner.logger, True, foreign)
        if record.changed:
            runner.logger.info(record.summary(), run_log=record.table())
        for module, before, direct in record.foreign:
            self._tell_of_foreign(runner, module, before, record, direct)

    def _tell_of_foreign(
        self,
        runner: Runner,
        module: nn.Module,
        before: dict[str, str],
        record: InitRecord,
        direct: bool,
    ) -> None:
        """Log that ``init_weights()`` of a module was not called, and what has changed in it."""
        name = record.name_of(module)
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        after = record.written(module)
        drawn = [key for key, info in before.items() if after.get(key) == info]
        if drawn:
            runner.logger.warning(
                f"init: an init_cfg around {name!r} ({cls}) has initialized {len(drawn)} of its "
                f"parameters ({drawn[0]}, ...). If they were pretrained, keep them with "
                f"dict(type='init', keep=({name!r},))"
            )
        elif direct and self.init_foreign is None and len(after) < len([*module.parameters()]):
            runner.logger.warning(
                f"init: init_weights() of {name!r} ({cls}) was not called, because it is not a "
                "BaseModule: its weights are those from its construction. To call it, use "
                "dict(type='init', init_foreign=True); False hides this message"
            )

    def _tell_of_parts(self, runner: Runner, model: nn.Module) -> None:
        """Warn about the first part of a plain module whose ``init_cfg`` is not applied."""
        for name, part in model.named_modules():
            if isinstance(part, BaseModule) and part.init_cfg and not part.is_init:
                runner.logger.warning(
                    f"the model is a plain {type(model).__name__}, which is not initialized: the "
                    f"init_cfg of {name!r} takes effect only if you call its init_weights()"
                )
                return

    def before_run(self, runner: Runner) -> None:
        """Warn if pretrained weights that the model asks for were never loaded."""
        if runner.train_cfg is not None:
            return
        for name, part in runner.bare_model.named_modules():
            if not isinstance(part, BaseModule) or part.is_init:
                continue
            asked = any(map(names_weights, as_list(part.init_cfg or [], "init_cfg")))
            if asked and not loaded_tensors(part):
                where = f" of {name!r}" if name else ""
                runner.logger.warning(
                    f"the init_cfg{where} names pretrained weights, which only a Runner that "
                    "trains loads. Load weights, or call the model's init_weights() first"
                )
                return


def _seed_all(seed: int) -> None:
    """Seed the random number generators that ``init_weights`` may use."""
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
