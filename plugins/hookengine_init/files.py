"""Read weights from files without executing any of their content."""

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

from hookengine import MODELS, did_you_mean, load_safetensors
from hookengine_init.record import console

CONTAINERS = ("state_dict", "model", "model_state_dict", "module")
"""Keys that hold weights in checkpoints of hookengine, MMEngine, torchvision, timm and others."""

SUFFIXES = (".pth", ".pt", ".pkl", ".ckpt", ".bin", ".safetensors")


def read_weights(
    checkpoint: str | os.PathLike[str], map_location: Any = "cpu"
) -> Mapping[str, Any]:
    """Read the weights in a file or a checkpoint, by name, without executing anything in it.

    Args:
        checkpoint: A file written by ``torch.save`` or a ``.safetensors`` file, distinguished by
            content; a URL of one (``https://``), which is downloaded once; or
            ``torchvision://resnet50``. The weights may be the whole content, or be stored under
            one of the keys in ``CONTAINERS``. Or the folder of a checkpoint or of a run.
        map_location: Where to load the tensors.

    Raises:
        FileNotFoundError: The file does not exist, or the folder holds no checkpoint.
        ValueError: The file is damaged, holds no weights, or holds objects that only code could
            restore; or the device does not exist.
    """
    _check_device(map_location)
    path, url = _local(checkpoint)
    try:
        found = MODELS.get("find_weights")(path, console().info)
        if isinstance(found, Mapping):
            return found
        _compare_with_name(found, url)
        return weights_in(_read(found, map_location), str(found))
    except FileNotFoundError as error:
        if path.is_dir():
            raise FileNotFoundError(f"{error}{_contents(path)}") from error
        raise FileNotFoundError(f"checkpoint {path} does not exist{_neighbours(path)}") from error
    except ValueError as error:
        if url is not None:  # so that the next call downloads it again
            path.unlink()
            error.add_note(f"it was downloaded from {url}, and has been deleted")
        raise


def weights_in(content: Any, source: str) -> Mapping[str, Any]:
    """Return the tensors in the content of a checkpoint, by name.

    Args:
        content: The tensors by name, or a dict that holds them under a key in ``CONTAINERS``.
        source: Where the content comes from, for error messages.

    Raises:
        ValueError: The content holds no tensors by name.
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
            what += ", whose values include NumPy arrays or other objects instead of tensors"
    else:
        what = f"a {type(content).__name__}"
    raise ValueError(
        f"{source} holds no weights: it is {what}. Expected tensors by name, directly or under one "
        f"of the keys {', '.join(map(repr, CONTAINERS))}"
    )


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, Mapping) and _holds_tensors(value))
        for value in content.values()
    )


def _check_device(map_location: Any) -> None:
    """Raise an error for a missing device, for which torch would blame the file."""
    if not isinstance(map_location, (str, torch.device)):
        return
    try:
        device = torch.device(map_location)
    except RuntimeError as error:
        raise ValueError(f"map_location={map_location!r} is not a torch device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"map_location={str(map_location)!r}, but no CUDA device is available. Use 'cpu'"
        )


def _read(path: Path, map_location: Any) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":  # safetensors: the header's length, then the header, in JSON
        return _read_safetensors(path, map_location)
    return _read_torch(path, map_location, head)


def _compare_with_name(path: Path, url: str | None) -> None:
    """Compare a file with the hash in its name, ``NAME-HASH.pth``, as ``torch.hub`` does.

    A zip archive has its own checksums, so this is for other formats.

    Raises:
        ValueError: A download has another SHA-256. For other files, which may have been renamed,
            this is a warning.
    """
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    if named is None or named[1].isdecimal():  # rather a date
        return
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.startswith(named[1]):
        return
    text = (
        f"{path} is damaged, or {named[1]} in its name is no hash: its SHA-256 is {digest[:16]}..."
    )
    if url is None:
        console().warning(text)
        return
    raise ValueError(f"{text}. If it is no hash, download the file yourself and pass its path")


def _read_safetensors(path: Path, map_location: Any) -> Any:
    try:
        tensors = load_safetensors(path)
    except ValueError as error:
        raise ValueError(_damaged(path, error.__cause__ or error)) from error
    if isinstance(map_location, (str, torch.device)):
        tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
    return tensors


def _read_torch(path: Path, map_location: Any, head: bytes) -> Any:
    """Read a file written by ``torch.save`` with torch's weights-only unpickler."""
    try:
        with (
            path.open("rb") as file,  # for a path, torch would also interpret the suffix
            torch.serialization.safe_globals([(_Inert, name) for name in NO_WEIGHTS]),
        ):
            return torch.load(file, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a git-lfs pointer. Fetch the file with git lfs pull"
            ) from None
        if head.lstrip()[:1] == b"<":
            raise ValueError(f"{path} is a web page. Download the file itself") from None
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            # from None: the original message advises weights_only=False.
            raise ValueError(
                f"{path} holds more than weights: it refers to {named[1]}, which could run code. "
                "Nothing was loaded or run. If you trust its source, save the weights alone: "
                "torch.save(model.state_dict(), path)"
            ) from None
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0].split('. ')[0]}".rstrip(": .")
    size = path.stat().st_size
    return f"{path} ({size} bytes) is damaged or not a weights file: {reason}"


class _Inert:
    """Placeholder for an object in a checkpoint that is not a weight: stores and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


NO_WEIGHTS = (
    # MMEngine's loss history, and what pickle rebuilds it with
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    # NumPy scalars and arrays, such as losses and metrics
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    # the options of a script
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",  # Python 3.13's name
    "pathlib._local.WindowsPath",
)
"""Objects beside the weights in other projects' checkpoints; each is read as an ``_Inert``."""


# -- finding a file -----------------------------------------------------------------------------


def _local(checkpoint: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Return the path of a checkpoint, and the URL it was downloaded from, or None."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a path or a URL, got {checkpoint!r}")
    text = os.fspath(checkpoint)
    scheme, colon, rest = text.partition("://")
    if not colon:
        return Path(text).expanduser(), None
    if scheme == "torchvision":
        text = _torchvision_url(rest)
    elif scheme not in ("http", "https"):
        raise ValueError(
            f"cannot read {text}. Expected a path, a URL that starts with https://, or "
            "torchvision://NAME"
        )
    # Names such as model.pth are common, so the path contains a hash of the URL.
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = text.partition("?")[0].rpartition("/")[2] or "weights"
    path = Path(torch.hub.get_dir()) / "hookengine" / key / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(text, str(path), progress=False)
        except OSError as error:
            raise OSError(
                f"cannot download {text}: {error}. Download it yourself and pass the path"
            ) from error
    return path, text


def _torchvision_url(name: str) -> str:
    """Return the URL of torchvision weights: ``resnet50``, or ``resnet50.IMAGENET1K_V2``."""
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
        raise ValueError(
            f"torchvision has no weights {version!r} for {model}, which has {', '.join(weights)}"
        )
    return str(chosen.url)


def _neighbours(path: Path) -> str:
    """Describe what a user may have meant by a file that does not exist."""
    if not path.parent.is_dir():
        return f", nor does its folder {path.parent}"
    near = difflib.get_close_matches(path.name, _weights_files(path.parent), n=5, cutoff=0)
    return f". Its folder contains {', '.join(near)}" if near else ""


def _contents(folder: Path) -> str:
    """Describe what a user may have meant by a folder without a checkpoint."""
    files = sorted(_weights_files(folder))
    return f". Pass one of the files in it: {', '.join(files[:5])}" if files else ""


def _weights_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix in SUFFIXES]
