"""``python -m hookengine_checkpoint CHECKPOINT FILE``: write its weights as one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hookengine_checkpoint.export import export_weights


def main(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or the folder of a run")],
    path: Annotated[Path, typer.Argument(help="the file to write, .safetensors or .pth")],
    weights: Annotated[
        str, typer.Option(help="which weights: state_dict, ema_state_dict or swa_state_dict")
    ] = "state_dict",
) -> None:
    """Write the weights of a checkpoint as one file."""
    try:
        written = export_weights(checkpoint, path, weights)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(str(error.args[0] if isinstance(error, KeyError) else error))
    print(f"{written}: {written.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
