"""Who initialised each parameter: the record that is kept while ``init_weights`` runs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine import dist

ATTRIBUTE = "_params_init_info"
"""Where each module of the model finds the record meanwhile; MMEngine's name for it."""

NARROW = 40
"""Parameters up to which the console shows each; beyond, one line for each way."""


Write = Callable[[Tensor, float | None], None]
"""Told a tensor that was written, and the constant that it was filled with."""


@dataclass(slots=True)
class _Entry:
    """What was last seen of a parameter."""

    parameter: Tensor
    info: str | None
    constant: float | None
    version: int
    checksum: int | None


class InitRecord:
    """Who changed each parameter of a model last.

    Our initializers say what they write. Of code of others it is found out: from the version that
    torch counts up at each change in place, and from a sum, since ``parameter.data`` has a version
    of its own.

    Args:
        root: The model.
        modules: All of its modules by name.
        kept: The parameters and buffers to leave as they are: by ``id``, the reason.
        logger: Who is told what happens.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: dict[str, nn.Module],
        kept: dict[int, str],
        logger: Any = None,
    ) -> None:
        self.root = root
        self.modules = modules
        self.kept = kept
        self.logger = logger if logger is not None else console()
        self.notes: dict[str, list[str]] = {}
        self.title = f"weights of {type(root).__name__}, {{}} parameters"
        self._entries: dict[int, _Entry] = {}
        self._watching: list[str] = []

    def keeps_all_of(self, module: nn.Module) -> bool:
        """Whether ``module`` has tensors, none of which is to be initialised."""
        tensors = [tensor for _, tensor in named_tensors(module)] if self.kept else []
        return bool(tensors) and all(id(tensor) in self.kept for tensor in tensors)

    def note(self, text: str, module: nn.Module) -> None:
        """Add to the report what holds for modules of one kind, each of which is then named."""
        names = self.notes.setdefault(text, [])
        if (name := self.name_of(module)) not in names:
            names.append(name)

    def name_of(self, module: nn.Module) -> str:
        """The module's name within the model."""
        return next((name for name, m in self.modules.items() if m is module), "")

    def wrote(self, tensor: Tensor, constant: float | None, info: str) -> None:
        """Note that ``tensor`` was initialised; a constant that it had already changes nothing."""
        if tensor.is_meta:  # nothing is there to be written
            return
        entry = self._entries.get(id(tensor))
        if entry is None or constant is None or entry.constant != constant:
            entry = _Entry(tensor, info, constant, 0, None)
            self._entries[id(tensor)] = entry
        entry.version = version_of(tensor)
        entry.checksum = _checksum(tensor) if self._watching else None

    @contextmanager
    def watching(self, module: nn.Module, info: str) -> Iterator[None]:
        """Run code of others, and find out which parameters it changed."""
        if self._watching:  # what the code around it did so far is not this code's
            self.update(module, self._watching[-1])
        for parameter in module.parameters():
            entry = self._entries.get(id(parameter))
            if entry is None:
                entry = _Entry(parameter, None, None, version_of(parameter), None)
                self._entries[id(parameter)] = entry
            if entry.checksum is None:
                entry.checksum = _checksum(parameter)
        self._watching.append(info)
        try:
            yield
        finally:
            self._watching.pop()
            self.modules = dict(self.root.named_modules())  # which it may have changed
        self.update(module, info)

    def update(self, module: nn.Module, info: str) -> None:
        """Note ``info`` for the parameters of ``module`` that changed since they were last seen."""
        for parameter in module.parameters():
            entry = self._entries.get(id(parameter))
            if (
                entry is None
                or entry.version != version_of(parameter)
                or (entry.checksum is not None and entry.checksum != _checksum(parameter))
            ):
                self.wrote(parameter, None, info)

    # -- the report -----------------------------------------------------------------------------

    @property
    def changed(self) -> bool:
        """Whether anything was initialised, or kept from it."""
        return bool(self.kept) or any(e.info is not None for e in self._entries.values())

    def rows(self) -> list[tuple[str, Tensor, str]]:
        """Name, parameter, and by whom it was initialised."""
        same = (
            "The value is the same before and after calling `init_weights` of "
            f"{type(self.root).__name__}"
        )
        rows: dict[int, tuple[str, Tensor, str]] = {}
        for path, module in self.modules.items():
            for name, parameter in module._parameters.items():
                key = id(parameter)
                if parameter is not None and key not in rows:
                    entry = self._entries.get(key)
                    info = self.kept.get(key) or (entry.info if entry is not None else None)
                    rows[key] = (f"{path}.{name}" if path else name, parameter, info or same)
        return list(rows.values())

    def table(self) -> str:
        """Every parameter with its shape, and how it was initialised."""
        rows = [(name, _shape(p), info) for name, p, info in self.rows()]
        return "\n".join([self.title.format(len(rows)), *_aligned(rows), *self._footer()])

    def summary(self) -> str:
        """The table where it is short, else one line for each way of initialization."""
        rows = self.rows()
        if len(rows) <= NARROW:
            return self.table()
        ways: dict[str, list[tuple[str, Tensor]]] = {}
        for name, parameter, info in rows:
            ways.setdefault(info, []).append((name, parameter))
        lines = [
            (f"{len(those)} x {_span([name for name, _ in those])}", _size(those), info)
            for info, those in ways.items()
        ]
        title = self.title.format(len(rows)) + ", one by one in run.log"
        return "\n".join([title, *_aligned(lines), *self._footer()])

    def _footer(self) -> list[str]:
        return [f"  {_span(names)}: {text}" for text, names in self.notes.items()]


def console() -> Any:
    """Structlog's logger on rank 0, and on the others one that says nothing but errors."""
    logger = structlog.get_logger("hookengine")
    if dist.is_main_process():
        return logger
    silent = structlog.make_filtering_bound_logger(logging.ERROR)
    return structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=silent)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count."""
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version


def _checksum(parameter: Tensor) -> int | None:
    """The sum of its words of 64 bits, which nearly every change shows; None without values."""
    if is_lazy(parameter) or parameter.is_meta:
        return None
    try:
        octets = parameter.detach().contiguous().view(-1).view(torch.uint8)
        whole = octets.numel() // 8 * 8
        return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())
    except (RuntimeError, NotImplementedError, TypeError):  # the report is not worth a run
        return None


def _shape(parameter: Tensor) -> str:
    return "lazy" if is_lazy(parameter) else str(list(parameter.shape))


def _size(those: list[tuple[str, Tensor]]) -> str:
    count = sum(0 if is_lazy(p) else p.numel() for _, p in those)
    return f"{count:,} values"


def _span(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]}, ..., {names[-1]}"


def _aligned(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    """Rows of three columns as lines of text."""
    first = max((len(row[0]) for row in rows), default=0)
    second = max((len(row[1]) for row in rows), default=0)
    for a, b, c in rows:
        yield f"  {a:<{first}}  {b:<{second}}  {c}"


def record_of(module: nn.Module) -> InitRecord | None:
    """The record of the ``init_weights`` that runs over ``module``, or None."""
    return module.__dict__.get(ATTRIBUTE)


def ignore(tensor: Tensor, constant: float | None) -> None:
    """Note nothing, where no record is kept."""


def writing(module: nn.Module, info: str) -> Write:
    """What notes each tensor that is written as ``info``."""
    record = record_of(module)
    if record is None:
        return ignore
    return functools.partial(record.wrote, info=info)


def update_init_info(module: nn.Module, init_info: str) -> None:
    """Say, within ``init_weights``, how the parameters that have just changed were initialised.

    For initializers of one's own. Parameters of ``module`` that are as they were keep what the
    report says of them.

    Raises:
        RuntimeError: no ``init_weights`` runs over ``module``.
    """
    record = record_of(module)
    if record is None:
        raise RuntimeError(
            f"update_init_info: no init_weights() runs over this {type(module).__name__}, so there "
            "is no report to add to"
        )
    record.update(module, init_info)


@contextmanager
def recording(
    root: nn.Module, modules: dict[str, nn.Module], kept: dict[int, str], logger: Any = None
) -> Iterator[InitRecord]:
    """Keep a record while ``init_weights`` runs over ``root``, and what is kept as it is.

    Args:
        root: The model.
        modules: All of its modules by name.
        kept: By ``id``, parameters and buffers that get their values back afterwards, and why.
        logger: See ``InitRecord``.
    """
    record = InitRecord(root, modules, kept, logger)
    values = {
        name: tensor.detach().clone()
        for name, tensor in (named_tensors(root) if kept else ())
        if id(tensor) in kept and not is_lazy(tensor)
    }
    for module in modules.values():
        module.__dict__[ATTRIBUTE] = record
    try:
        yield record
    finally:
        for module in modules.values():
            module.__dict__.pop(ATTRIBUTE, None)
        if values:
            tensors = dict(named_tensors(root))
            with torch.no_grad():
                for name, value in values.items():
                    if name in tensors and tensors[name].shape == value.shape:
                        tensors[name].copy_(value)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()
