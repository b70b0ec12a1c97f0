"""Files with weights: read without executing anything of what is in them."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookengine import did_you_mean

CONTAINERS = ("state_dict", "model", "model_state_dict", "module")
"""Where checkpoints keep the weights: hookengine and MMEngine, torchvision and timm, others."""

SUFFIXES = (".pth", ".pt", ".pkl", ".ckpt", ".bin", ".safetensors")


def read_weights(
    checkpoint: str | os.PathLike[str], map_location: Any = "cpu"
) -> Mapping[str, Any]:
    """The weights in a file, by name. Nothing in the file is executed.

    Args:
        checkpoint: A file of ``torch.save`` or a ``.safetensors``, told apart by what is in it; a
            URL of one (``https://``), downloaded once; or ``torchvision://resnet50``. The weights
            may be the whole of it, or stand in it as one of ``CONTAINERS``.
        map_location: Where tensors are read to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds no weights, or objects that only code could restore;
            or there is no such device.
    """
    _check_device(map_location)
    path, url = _local(checkpoint)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file of the weights")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}{_neighbours(path)}")
    try:
        return weights_in(_read(path, map_location), str(path))
    except ValueError as error:
        if url is not None:  # so that the next try downloads it anew
            path.unlink()
            error.add_note(f"it came from {url}, and is deleted")
        raise


def weights_in(content: Any, source: str) -> Mapping[str, Any]:
    """The tensors by name in what a checkpoint holds.

    Args:
        content: The tensors by name, or a dict that holds them as one of ``CONTAINERS``.
        source: Where it comes from, for messages.

    Raises:
        ValueError: there are none.
    """
    if isinstance(content, Mapping):
        for key in CONTAINERS:
            if isinstance(inner := content.get(key), Mapping) and _holds_tensors(inner):
                return weights_in(inner, source)
        named = all(isinstance(name, str) for name in content)
        if named and any(isinstance(value, Tensor) for value in content.values()):
            return content
        what = f"a dict with {', '.join(map(repr, content)) or 'nothing'}"
        if any(isinstance(value, _Inert) for value in content.values()):
            what += ", whose values are numpy's or other objects"
    else:
        what = f"a {type(content).__name__}"
    raise ValueError(
        f"{source} holds no weights: it is {what}; expected tensors by name, by themselves or as "
        f"{', '.join(map(repr, CONTAINERS))}"
    )


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, Mapping) and _holds_tensors(value))
        for value in content.values()
    )


def _check_device(map_location: Any) -> None:
    """Refuse a device that is not there, before torch takes the file for the culprit."""
    if not isinstance(map_location, (str, torch.device)):
        return
    try:
        device = torch.device(map_location)
    except RuntimeError as error:
        raise ValueError(f"map_location={map_location!r} is no device of torch: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"map_location={str(map_location)!r}: no CUDA device is here; use 'cpu'")


def _read(path: Path, map_location: Any) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":  # the length of the header, and the header, which is JSON
        return _read_safetensors(path, map_location)
    return _read_torch(path, map_location, head)


def _read_safetensors(path: Path, map_location: Any) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error
    if isinstance(map_location, (str, torch.device)):
        tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
    return tensors


def _read_torch(path: Path, map_location: Any, head: bytes) -> Any:
    """Read a file of ``torch.save`` by torch's unpickler of weights alone."""
    try:
        with (
            path.open("rb") as file,  # of a path torch would read more into the suffix
            torch.serialization.safe_globals([(_Inert, name) for name in NO_WEIGHTS]),
        ):
            return torch.load(file, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in every way there is
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a pointer of git-lfs: fetch it with git lfs pull"
            ) from None
        if head.lstrip()[:1] == b"<":
            raise ValueError(f"{path} is a web page: download the file itself") from None
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            # Without the original, which advises to load it by weights_only=False.
            raise ValueError(
                f"{path} holds more than weights: it refers to {named[1]}, which could run code. "
                "Nothing was loaded or run. Where you know where it comes from, save its weights "
                "alone: torch.save(model.state_dict(), path)"
            ) from None
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0].split('. ')[0]}".rstrip(": .")
    size = path.stat().st_size
    return f"{path} ({size} bytes) is damaged, or no file of weights: {reason}"


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
    "pathlib._local.PosixPath",  # Python 3.13's name
    "pathlib._local.WindowsPath",
)
"""Objects beside the weights in checkpoints of others; each is read as an ``_Inert``."""


# -- where it is --------------------------------------------------------------------------------


def _local(checkpoint: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The path of a checkpoint; of one from elsewhere, which is downloaded once, also the URL."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"a checkpoint is a path or a URL, got {checkpoint!r}")
    text = os.fspath(checkpoint)
    scheme, colon, rest = text.partition("://")
    if not colon:
        return Path(text).expanduser(), None
    if scheme == "torchvision":
        text = _torchvision_url(rest)
    elif scheme not in ("http", "https"):
        raise ValueError(
            f"cannot read {text}: a checkpoint is a path, a URL that begins with https://, or "
            "torchvision://NAME"
        )
    # Names such as model.pth are common, so the URL is part of the path.
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = text.partition("?")[0].rpartition("/")[2] or "weights"
    path = Path(torch.hub.get_dir()) / "hookengine" / key / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(text, str(path), progress=False)
        except OSError as error:
            raise OSError(
                f"cannot download {text}: {error}. Download it yourself, and give the path"
            ) from error
    return path, text


def _torchvision_url(name: str) -> str:
    """The URL of torchvision's weights: ``resnet50``, or ``resnet50.IMAGENET1K_V2``."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"torchvision://{name} needs torchvision: pip install torchvision"
        ) from error
    model, _, version = name.partition(".")
    if model not in (known := models.list_models()):
        raise ValueError(f"torchvision has no model {model!r}.{did_you_mean(model, known)}")
    weights = {w.name.casefold(): w for w in models.get_model_weights(model)}
    chosen = weights.get(version.casefold()) if version else next(iter(weights.values()), None)
    if chosen is None:
        raise ValueError(f"torchvision has no weights {version!r} of {model}: {', '.join(weights)}")
    return str(chosen.url)


def _neighbours(path: Path) -> str:
    """What a user may have meant by a file that does not exist."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    there = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES]
    near = difflib.get_close_matches(path.name, there, n=5, cutoff=0)
    return f"; there are {', '.join(near)}" if near else ""
