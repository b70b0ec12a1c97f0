"""Weights from outside: read without executing anything, and loaded whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine import BaseModule

CONTAINERS = ("state_dict", "model", "model_state_dict", "module")
"""Where checkpoints keep the weights: hookengine and MMEngine, torchvision and timm, others."""

LEADING = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
"""What DistributedDataParallel and torch.compile put before the names of all weights."""


class Mismatch(NamedTuple):
    """What does not fit between a module and the weights for it."""

    missing: list[str]
    """Names that the module has and the checkpoint lacks."""
    unexpected: list[str]
    """Names that the checkpoint has and the module lacks."""
    misshapen: list[str]
    """Names of both whose shapes differ, with the two shapes."""

    def __str__(self) -> str:
        labels = ("missing in the checkpoint", "unexpected in the checkpoint", "of another shape")
        texts = [
            f"{label} ({len(names)}): {', '.join(names)}"
            for label, names in zip(labels, self, strict=True)
            if names
        ]
        return "; ".join(texts) or "everything fits"


def load_weights(
    module: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str | None = None,
    map_location: Any = "cpu",
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    logger: Any = None,
) -> Mismatch:
    """Load weights into a module, all that fit or, with an error, none.

    Host memory for one more copy of the module is needed meanwhile.

    Args:
        module: Any module.
        checkpoint: Path or URL as ``read_weights`` takes it, or a state dict.
        prefix: Load what is below it in the checkpoint, as ``"backbone."`` of a detector.
        map_location: Where tensors are read to, as ``torch.load`` takes it.
        strict: Refuse names that one side lacks; else they are reported in a warning, as long as
            something fits.
        ignore_mismatched_sizes: Leave tensors whose shape differs as they are, a new head say.
        logger: Who gets the warning, by default structlog's.

    Returns:
        What did not fit.

    Raises:
        ValueError: the checkpoint does not fit, or cannot be read.
        FileNotFoundError: there is none.
    """
    source = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    weights = (
        _weights_in(checkpoint, source)
        if isinstance(checkpoint, Mapping)
        else read_weights(checkpoint, map_location)
    )
    own = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor) and not is_lazy(v)}
    state = _named_as(own, weights, prefix, source)
    differing = {
        name: f"{name} {list(own[name].shape)} here, {list(value.shape)} there"
        for name, value in state.items()
        if name in own and isinstance(value, Tensor) and value.shape != own[name].shape
    }
    undo = _snapshot(module, {name: tensor for name, tensor in own.items() if name in state})
    try:
        result = module.load_state_dict(state, strict=False)
        differing = {}  # else hooks of the module have made them fit
    except Exception as error:
        undo()
        if not isinstance(error, RuntimeError):
            raise
        if not (differing and ignore_mismatched_sizes):
            missing = [name for name in own if name not in state]
            unexpected = [name for name in state if name not in own]
            mismatch = Mismatch(missing, unexpected, list(differing.values()))
            advice = "Is it of another model? ignore_mismatched_sizes=True loads the others"
            advice = advice if differing else str(error)
            raise ValueError(_misfit(source, module, mismatch, advice)) from error
        for name in differing:
            del state[name]
        try:
            result = module.load_state_dict(state, strict=False)
        except Exception:
            undo()
            raise
    missing = [n for n in result.missing_keys if n not in differing and not _is_counter(n)]
    mismatch = Mismatch(missing, list(result.unexpected_keys), list(differing.values()))
    absent = set(result.missing_keys)
    loaded = [n for n in own if n in state or not (n in absent or _is_counter(n))]
    if not loaded or (strict and (mismatch.missing or mismatch.unexpected)):
        undo()
        advice = "strict=False loads what is there" if loaded else "Nothing fits: another model's?"
        raise ValueError(_misfit(source, module, mismatch, advice))
    if any(mismatch):
        logger = logger if logger is not None else structlog.get_logger("hookengine")
        logger.warning(
            f"{source} fits {type(module).__name__} in {len(loaded)} of {len(own)} tensors; "
            f"{mismatch}"
        )
    return mismatch


def _is_counter(name: str) -> bool:
    """Whether it counts a batch norm's batches: old checkpoints lack that, and torch makes it."""
    return name.endswith("num_batches_tracked")


def _misfit(source: str, module: nn.Module, mismatch: Mismatch, advice: str) -> str:
    return (
        f"{source} does not fit {type(module).__name__}, into which nothing was loaded: "
        + f"{mismatch}. " * any(mismatch)
        + advice
    )


def _snapshot(module: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """What gives the tensors their values back, and to BaseModules what they know as loaded."""
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    loaded = [(m, set(m.loaded)) for m in module.modules() if isinstance(m, BaseModule)]

    def undo() -> None:
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)
        for part, names in loaded:
            part.loaded = set(names)

    return undo


def _named_as(
    own: Mapping[str, Tensor], weights: Mapping[str, Any], prefix: str | None, source: str
) -> dict[str, Any]:
    """The weights below ``prefix``, under the module's names: without what wrappers prepend."""
    below = "" if not prefix else prefix.rstrip(".") + "."
    found = None
    for leading in LEADING:
        candidate = _below(weights, leading + below)
        if candidate.keys() & own.keys():
            return candidate
        found = found or candidate
    if not found:
        first = sorted({key.split(".")[0] for key in weights})
        raise ValueError(
            f"{source} has nothing below prefix={prefix!r}; its names begin with {', '.join(first)}"
        )
    return found


def _below(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What begins with ``prefix``, without it; the versions that modules save are kept."""
    state = OrderedDict((k[len(prefix) :], v) for k, v in weights.items() if k.startswith(prefix))
    metadata = getattr(weights, "_metadata", None)
    if metadata is not None:
        state._metadata = {  # type: ignore[attr-defined]
            f"{k}."[len(prefix) :].rstrip("."): v
            for k, v in metadata.items()
            if f"{k}.".startswith(prefix)
        }
    return state


# -- reading ------------------------------------------------------------------------------------


def read_weights(
    checkpoint: str | os.PathLike[str], map_location: Any = "cpu"
) -> Mapping[str, Any]:
    """The weights in a file, by name. Nothing in the file is executed.

    Args:
        checkpoint: A file of ``torch.save`` (``.pth``, ``.pt``, ...) or a ``.safetensors``; a URL
            of one (``https://``), downloaded once; or ``torchvision://resnet50``. The weights may
            be the whole of it, or stand in it as ``state_dict``, ``model``, ``model_state_dict``
            or ``module``.
        map_location: Where tensors are read to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds no weights, or objects that only code could restore.
    """
    path = _local(checkpoint)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file of the weights")
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else None
        there = sorted(p.name for p in folder.iterdir())[:10] if folder is not None else []
        what = f"{path.parent} has {', '.join(there) or 'no files'}" if folder else "nor its folder"
        raise FileNotFoundError(f"there is no checkpoint {path}: {what}")
    content = (
        _read_safetensors(path, map_location)
        if _is_safetensors(path)
        else _read_torch(path, map_location)
    )
    return _weights_in(content, str(path))


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _read_safetensors(path: Path, map_location: Any) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(map_location))
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error


def _read_torch(path: Path, map_location: Any) -> Any:
    """Read a file of ``torch.save`` by torch's unpickler of weights alone."""
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in NO_WEIGHTS]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in every way there is
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ValueError(_damaged(path, error)) from error
        raise ValueError(
            f"{path} holds more than weights: it refers to {named[1]}, which could run code. "
            "Nothing was loaded or run. If you know where it comes from, save its weights alone: "
            "torch.save(model.state_dict(), path)"
        ) from error


def _damaged(path: Path, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0].split('. ')[0]}".rstrip(": .")
    size = path.stat().st_size
    return f"{path} ({size} bytes) is damaged, or no checkpoint ({reason}); copy it again"


class _Inert:
    """Takes the place of an object in a checkpoint that is no weight: keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


NO_WEIGHTS = (
    # MMEngine's history of losses, and what pickle rebuilds it with
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    # numpy's scalars and arrays, as in losses and metrics
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    # options of a script
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)
"""Objects beside the weights in checkpoints of others; each is read as an ``_Inert``."""


def _weights_in(content: Any, source: str) -> Mapping[str, Any]:
    if isinstance(content, Mapping):
        for key in CONTAINERS:
            if isinstance(content.get(key), Mapping):
                return _weights_in(content[key], source)
        if any(isinstance(value, Tensor) for value in content.values()):
            return content
        what = f"a dict with {', '.join(map(repr, content)) or 'nothing'}"
    else:
        what = f"a {type(content).__name__}"
    raise ValueError(
        f"{source} holds no weights: it is {what}; expected tensors by name, by themselves or as "
        f"{', '.join(map(repr, CONTAINERS))}"
    )


def _local(checkpoint: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint; what is elsewhere is downloaded once."""
    text = os.fspath(checkpoint)
    scheme, colon, rest = text.partition("://")
    if not colon:
        return Path(text).expanduser()
    if scheme == "torchvision":
        text = _torchvision_url(rest)
    elif scheme not in ("http", "https"):
        raise ValueError(
            f"cannot read {text}: a checkpoint is a path, a URL that begins with https://, or "
            "torchvision://NAME"
        )
    # Names such as model.pth are common, so the URL is part of the path.
    folder = (
        Path(torch.hub.get_dir()) / "hookengine" / hashlib.sha256(text.encode()).hexdigest()[:16]
    )
    path = folder / (text.partition("?")[0].rpartition("/")[2] or "weights")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(text, str(path), progress=False)
        except OSError as error:
            raise OSError(
                f"cannot download {text}: {error}. Download it yourself, and give the path"
            ) from error
    return path


def _torchvision_url(name: str) -> str:
    """The URL of torchvision's weights: ``resnet50``, or ``resnet50.IMAGENET1K_V2``."""
    try:
        from torchvision.models import get_model_weights  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"torchvision://{name} needs torchvision: pip install torchvision"
        ) from error
    model, _, version = name.partition(".")
    weights = {w.name.casefold(): w for w in get_model_weights(model)}
    chosen = weights.get(version.casefold()) if version else next(iter(weights.values()), None)
    if chosen is None:
        raise ValueError(f"torchvision has no weights {version!r} of {model}: {', '.join(weights)}")
    return str(chosen.url)
