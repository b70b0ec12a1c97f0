"""The record of who initialized each parameter, kept while ``init_weights`` runs."""

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
"""The attribute of each module that holds the record during that time; named as in MMEngine."""

NARROW = 40
"""Up to this many parameters, the console shows each; above, one line per way of initialization."""


Write = Callable[[Tensor, float | None], None]
"""Called with a tensor that was written, and the constant that fills it or None."""


@dataclass(slots=True)
class _Entry:
    """The last known state of a parameter."""

    parameter: Tensor
    info: str | None
    constant: float | None
    version: int
    checksum: int | None


class InitRecord:
    """Record who last changed each parameter of a model.

    The initializers of this package report what they write. Changes by other code are detected:
    from the version that torch increments at each in-place change, and from a checksum, since
    ``parameter.data`` has its own version.

    Args:
        root: The model.
        modules: All of its modules by name.
        kept: The reason by ``id`` for each parameter and buffer to leave unchanged.
        logger: Where to log messages, by default structlog's logger.

    Attributes:
        init_foreign: Whether to call ``init_weights()`` of modules that are no BaseModules.
        foreign: Those for which it was therefore not called, and how their parameters were
            initialized by the ``init_cfg`` of modules around them.
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
        self.init_foreign = True
        self.foreign: list[tuple[nn.Module, dict[str, str], bool]] = []
        self.notes: dict[str, list[str]] = {}
        self.title = f"weights of {type(root).__name__}, {{}} parameters"
        self._entries: dict[int, _Entry] = {}
        self._watching: list[str] = []

    def keeps_all_of(self, module: nn.Module) -> bool:
        """Return whether ``module`` has tensors and all of them are left unchanged."""
        tensors = [tensor for _, tensor in named_tensors(module)] if self.kept else []
        return bool(tensors) and all(id(tensor) in self.kept for tensor in tensors)

    def note(self, text: str, module: nn.Module) -> None:
        """Add a note to the report; it lists every module that the same note was added for."""
        names = self.notes.setdefault(text, [])
        if (name := self.name_of(module)) not in names:
            names.append(name)

    def name_of(self, module: nn.Module) -> str:
        """Return the module's name within the model."""
        return next((name for name, m in self.modules.items() if m is module), "")

    def wrote(self, tensor: Tensor, constant: float | None, info: str) -> None:
        """Record that ``tensor`` was initialized; a constant that it already had is no change."""
        if tensor.is_meta:  # it has no values to write
            return
        entry = self._entries.get(id(tensor))
        if entry is None or constant is None or entry.constant != constant:
            entry = _Entry(tensor, info, constant, 0, None)
            self._entries[id(tensor)] = entry
        entry.version = version_of(tensor)
        entry.checksum = _checksum(tensor) if self._watching else None

    @contextmanager
    def watching(self, module: nn.Module, info: str) -> Iterator[None]:
        """Run other code, and detect which parameters it changed."""
        if self._watching:  # changes so far are those of the code around it
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
            self.modules = dict(self.root.named_modules())  # the code may have changed them
        self.update(module, info)

    def update(self, module: nn.Module, info: str) -> None:
        """Record ``info`` for the parameters of ``module`` that changed since the last look."""
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
        """Whether anything was initialized, or deliberately left unchanged."""
        return bool(self.kept) or any(e.info is not None for e in self._entries.values())

    def written(self, module: nn.Module) -> dict[str, str]:
        """Return how the parameters of a module were initialized, those that were, by name."""
        infos = {key: entry.info for key, entry in self._entries.items() if key not in self.kept}
        named = {name: infos.get(id(p)) for name, p in module.named_parameters()}
        return {name: info for name, info in named.items() if info is not None}

    def rows(self) -> list[tuple[str, Tensor, str]]:
        """Return for each parameter its name, the parameter, and how it was initialized."""
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
        """Return a line for every parameter with its shape and how it was initialized."""
        rows = [(name, _shape(p), info) for name, p, info in self.rows()]
        return "\n".join([self.title.format(len(rows)), *_aligned(rows), *self._footer()])

    def summary(self) -> str:
        """Return the table if it is short, else one line for each way of initialization."""
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
        return "\n".join([self.title.format(len(rows)), *_aligned(lines), *self._footer()])

    def _footer(self) -> list[str]:
        return [f"  {_span(names)}: {text}" for text, names in self.notes.items()]


def console() -> Any:
    """Return structlog's logger on rank 0, and on other ranks one that logs only errors."""
    logger = structlog.get_logger("hookengine")
    if dist.is_main_process():
        return logger
    silent = structlog.make_filtering_bound_logger(logging.ERROR)
    return structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=silent)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; 0 for lazy and inference tensors."""
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version


def _checksum(parameter: Tensor) -> int | None:
    """Return the sum of its 64-bit words, which nearly every change alters; None without values."""
    if is_lazy(parameter) or parameter.is_meta:
        return None
    try:
        octets = parameter.detach().contiguous().view(-1).view(torch.uint8)
        whole = octets.numel() // 8 * 8
        return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())
    except (RuntimeError, NotImplementedError, TypeError):  # the report must not fail a run
        return None


def _shape(parameter: Tensor) -> str:
    return "lazy" if is_lazy(parameter) else str(list(parameter.shape))


def _size(those: list[tuple[str, Tensor]]) -> str:
    count = sum(0 if is_lazy(p) else p.numel() for _, p in those)
    return f"{count:,} values"


def _span(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]}, ..., {names[-1]}"


def _aligned(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    """Yield rows of three columns as lines of text."""
    first = max((len(row[0]) for row in rows), default=0)
    second = max((len(row[1]) for row in rows), default=0)
    for a, b, c in rows:
        yield f"  {a:<{first}}  {b:<{second}}  {c}"


def record_of(module: nn.Module) -> InitRecord | None:
    """Return the record of the ``init_weights`` that is running over ``module``, or None."""
    return module.__dict__.get(ATTRIBUTE)


def ignore(tensor: Tensor, constant: float | None) -> None:
    """Do nothing; used if no record is kept."""


def writing(module: nn.Module, info: str) -> Write:
    """Return a function that records ``info`` for each tensor that is written."""
    record = record_of(module)
    if record is None:
        return ignore
    return functools.partial(record.wrote, info=info)


def update_init_info(module: nn.Module, init_info: str) -> None:
    """Report, within ``init_weights``, how the parameters that just changed were initialized.

    Call it from your own initializers. Parameters of ``module`` that have not changed keep their
    description in the report.

    Raises:
        RuntimeError: No ``init_weights`` is running over ``module``.
    """
    record = record_of(module)
    if record is None:
        raise RuntimeError(
            f"update_init_info: no init_weights() is running over this {type(module).__name__}, so "
            "there is no report to add to. Call it within init_weights()"
        )
    record.update(module, init_info)


@contextmanager
def recording(
    root: nn.Module, modules: dict[str, nn.Module], kept: dict[int, str], logger: Any = None
) -> Iterator[InitRecord]:
    """Keep a record while ``init_weights`` runs over ``root``, and restore what must not change.

    Args:
        root: The model.
        modules: All of its modules by name.
        kept: The reason by ``id`` for each parameter and buffer that is restored afterwards.
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
    """Yield the parameters and buffers of a module by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()
