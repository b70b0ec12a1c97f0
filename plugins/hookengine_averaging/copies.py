"""Copying a model so that the copy calls its own layers, whatever functions the model holds."""

from __future__ import annotations

import copy
import dis
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_MOST = 1000
"""The size from which a container is data, in which no part of a model is looked for."""
_REGISTRIES = {"_parameters", "_buffers", "_modules"}


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model that uses nothing of the original.

    ``copy.deepcopy`` copies bound methods, but no functions: a ``forward`` or a hook that was set
    on an instance would use the original's layers. Functions that hold parts of the original
    are therefore replaced by functions that hold those of the copy.

    The copy is not compiled where the original is, as ``copy.deepcopy`` has it for most modules:
    torch compiles the code of a method at most 8 times (``recompile_limit``), which the original
    may need, and raises an error after that with ``fullgraph=True``.

    Raises:
        ValueError: A function uses a part of the original that cannot be replaced.
    """
    copied: nn.Module = copy.deepcopy(model)
    theirs = dict(copied.named_modules(remove_duplicate=False))
    pairs = {
        original: (name, theirs[name])
        for name, original in model.named_modules()
        if theirs.get(name, original) is not original
    }
    twins = _Twins((original, module) for original, (_, module) in pairs.items())
    for name, module in pairs.values():
        own = module.__dict__
        own.pop("_compiled_call_impl", None)  # parametrized modules copy it, with the original
        for key in own.keys() - _REGISTRIES:
            try:
                own[key] = twins.rebound(own[key])
            except _CannotRebindError as error:
                where = f"{name}.{key}" if name else key
                raise ValueError(
                    f"{where} {error}, so a copy of the model, whose weights are averaged, would "
                    "use the raw weights. Expected a function that receives its module as an "
                    "argument: a method of the class, types.MethodType(function, module), or a "
                    "hook that uses its first argument"
                ) from None
    return copied


class _CannotRebindError(Exception):
    """A function uses a part of the original in a way that cannot be replaced."""


class _Twins:
    """The modules and tensors of a model, each with its copy.

    Args:
        modules: The modules of the model, each with its copy.
    """

    def __init__(self, modules: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        self._twins: dict[int, Any] = {}
        self._kept: list[Any] = []  # an id belongs to an object only as long as the object exists
        for original, twin in modules:
            self._add(original, twin)
            for tensors, copies in (
                (original._parameters, twin._parameters),
                (original._buffers, twin._buffers),
            ):
                for name, tensor in tensors.items():
                    if tensor is not None and name in copies:
                        self._add(tensor, copies[name])
        self._made: dict[int, Any] = {}

    def _add(self, original: Any, twin: Any) -> None:
        self._twins[id(original)] = twin
        self._kept.append(original)

    def are_in(self, value: Any) -> bool:
        """Return whether a value, or what it holds, belongs to the original."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if id(value) in self._twins:
                return True
            if id(value) not in seen:
                seen.add(id(value))
                waiting.extend(_held(value))
        return False

    def rebound(self, value: Any) -> Any:
        """Return a value that holds the copies where the given one holds parts of the original.

        Raises:
            _CannotRebindError: They are in a global variable, or in an object of another kind.
        """
        if (twin := self._twins.get(id(value), self._made.get(id(value)))) is not None:
            return twin
        if not self.are_in(value):
            return value
        match value:
            case FunctionType() if hasattr(value, "get_compiler_config"):  # of torch.compile
                return self.rebound(value.__wrapped__)  # type: ignore[attr-defined]
            case FunctionType():
                return self._function(value)
            case MethodType():
                return MethodType(self.rebound(value.__func__), self.rebound(value.__self__))
            case partial():
                positional = [self.rebound(item) for item in value.args]
                named = {key: self.rebound(item) for key, item in value.keywords.items()}
                return type(value)(self.rebound(value.func), *positional, **named)
            case weakref.ref():
                return type(value)(self.rebound(value()))
            case dict():
                made = copy.copy(value)
                made.update((key, self.rebound(item)) for key, item in value.items())
                return made
            case list() | tuple() if type(value) in (list, tuple):
                return type(value)(self.rebound(item) for item in value)
        raise _CannotRebindError(f"holds a {type(value).__name__} that holds parts of the model")

    def _function(self, function: FunctionType) -> FunctionType:
        for name, value in _globals_of(function):
            if self.are_in(value):
                raise _CannotRebindError(
                    f"calls {function.__qualname__}, which reads a part of the model from the "
                    f"global variable {name!r}"
                )
        cells = tuple(CellType() for _ in function.__closure__ or ())
        made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self._made[id(function)] = made  # before its cells are filled: one may hold itself
        self._kept.append(function)
        for mine, its in zip(cells, function.__closure__ or (), strict=True):
            for content in _content(its):
                mine.cell_contents = self.rebound(content)
        made.__defaults__ = self.rebound(function.__defaults__)
        made.__kwdefaults__ = self.rebound(function.__kwdefaults__)
        made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
        made.__module__, made.__annotations__ = function.__module__, function.__annotations__
        vars(made).update((key, self.rebound(item)) for key, item in vars(function).items())
        return made


def _held(value: Any) -> Iterable[Any]:
    """Return what a function or a container holds; of other objects, what could be called."""
    match value:
        case FunctionType():
            cells = [content for cell in value.__closure__ or () for content in _content(cell)]
            defaults = (value.__defaults__, value.__kwdefaults__)
            return [*cells, *defaults, *vars(value).values(), *(v for _, v in _globals_of(value))]
        case MethodType():
            return value.__func__, value.__self__
        case partial():
            return value.func, *value.args, *value.keywords.values()
        case weakref.ref():
            return (value(),)
        case dict() | list() | tuple() | set() | frozenset():
            items = value.values() if isinstance(value, dict) else value
            return items if len(value) <= _MOST else ()
        case nn.Module() | Tensor() | ModuleType() | type():
            return ()
    held = getattr(value, "__dict__", {}).values()
    return [item for item in held if isinstance(item, (nn.Module, MethodType, FunctionType))]


def _content(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the global variables that a function reads, but only functions of the same file."""
    known = function.__globals__
    for name in sorted({*_names(function.__code__)} & known.keys()):
        value = known[name]
        if not isinstance(value, FunctionType) or value.__globals__ is known:
            yield name, value


def _names(code: CodeType) -> Iterator[str]:
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
