"""The process that speaks with W&B, told what to do by lines of JSON on its standard input.

W&B's client costs training more, in its own process, than all the rest of a record: it runs in
another one. This file imports neither hookengine nor torch, and is run by its path.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import PIL.Image
import wandb
from wandb.proto import wandb_internal_pb2
from wandb.sdk.lib.runid import generate_id

PHASES = ("train", "val", "test")
FIELDS = ("phase", "epoch", "iter", "step", "timestamp", "media")


class Session:
    """One run of W&B, from its beginning, or its going on, to its end.

    Args:
        run: One that is open already; it is left open.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = run
        self._adopted = run is not None
        self._rows: int | None = None  # None: as W&B counts them

    def begin(
        self,
        folder: str,
        continues: bool,
        mode: str | None,
        by_epoch: bool,
        options: dict[str, Any],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """Begin the run, or go on with it.

        Args:
            folder: Where W&B's local files go, and the run's id is kept.
            continues: Whether to go on with the run whose id is kept there.
            mode: ``online``, ``offline``, ``disabled``, or None for that of the environment.
            by_epoch: Whether evaluations are drawn over epochs.
            options: Of ``wandb.init``.
            settings: Of ``wandb.Settings``.

        Returns:
            ``held``, the last iteration that is there by phase; ``where`` the run is; and a
            ``warning``, where it had to go offline.
        """
        answer: dict[str, Any] = {"held": {}, "warning": None}
        home = Path(folder)
        if self._adopted:
            self.run.config.update(options["config"], allow_val_change=True)
        else:
            home.mkdir(parents=True, exist_ok=True)
            known = home / "run_id"
            goes_on = continues and known.exists()
            run_id = known.read_text().strip() if goes_on else generate_id()
            self.run, answer["warning"] = _init(mode, run_id, options, settings)
            if not self.run.disabled:
                known.write_text(self.run.id)
            self._rows = 0
            if goes_on and not self.run.disabled:
                answer["held"], self._rows = _held(self.run, home)
        self._home = home
        for phase in PHASES:
            epochwise = by_epoch and phase != "train"
            self.run.define_metric(f"{phase}/iter", hidden=True)
            self.run.define_metric(f"{phase}/*", step_metric="epoch" if epochwise else "iter")
        where = self.run.dir if self.run.offline or self.run.disabled else self.run.url
        return {**answer, "id": self.run.id, "where": where}

    def log(self, line: str) -> None:
        """Add a row: ``PHASE/NAME``, and where the run stood.

        Args:
            line: Of ``metrics.jsonl``, with its images in it as data URLs.
        """
        record = json.loads(line)
        phase = record["phase"]
        named: dict[str, Any] = {
            name.removeprefix("value/") if name.removeprefix("value/") in FIELDS else name: float(v)
            for name, v in record.items()
            if name not in FIELDS
        }
        named |= {name: medium(one) for name, one in record.get("media", {}).items()}
        row = {
            **{f"{phase}/{name}": value for name, value in named.items()},
            f"{phase}/iter": record["iter"],
            **{name: record[name] for name in ("iter", "epoch", "step")},
            "_timestamp": record["timestamp"],
        }
        self.run.log(row, step=self._rows, commit=True)
        if self._rows is not None:
            self._rows += 1

    def summarize(self, values: dict[str, Any]) -> None:
        """Put values into the summary of the run."""
        self.run.summary.update(values)

    def upload(self, path: str, aliases: list[str], metadata: dict[str, Any]) -> None:
        """Make an artifact of a checkpoint."""
        artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={**metadata})
        artifact.add_dir(path)
        self.run.log_artifact(artifact, aliases=aliases)

    def finish(self, exit_code: int, files: list[str]) -> dict[str, Any]:
        """End the run.

        Args:
            exit_code: 0, or that of what ended it.
            files: What is kept with it.

        Returns:
            ``unsynced``: the folders that ``wandb sync`` has to upload.
        """
        run, self.run = self.run, None
        if run is None or self._adopted:
            return {"unsynced": []}
        for file in files:
            if os.path.exists(file) and not run.disabled:
                run.save(shutil.copy(file, run.dir), base_path=run.dir, policy="now")
        run.finish(exit_code=exit_code)
        offline = run.offline and not run.disabled
        return {"unsynced": _unsynced(self._home, run.id) if offline else []}


def _init(
    mode: str | None, run_id: str, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Any, str | None]:
    """(the run, why it is offline although nobody asked for that)."""
    given = wandb.setup().settings  # of WANDB_PROJECT and the other variables
    chosen: dict[str, Any] = {
        **options,
        "project": options["project"] or given.project or "hookengine",
        "name": options["name"] or given.run_name or options["default_name"],
        "settings": wandb.Settings(**settings),
    }
    del chosen["default_name"]
    mode = mode or str(given.mode)
    warning = None
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode, warning = "offline", "there is no key (WANDB_API_KEY, or `wandb login`)"
    try:
        run: Any = wandb.init(mode=mode, id=run_id, resume="allow", **chosen)  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise
        warning = f"online it failed: {type(error).__name__}: {error}"
        run = wandb.init(mode="offline", id=run_id, resume="allow", **chosen)
    return run, warning


def _held(run: Any, home: Path) -> tuple[dict[str, int], int]:
    """(the last iteration by phase, the number of rows) that the run has already.

    Online the server tells; offline the local files of all the times that it was started do.
    """
    if not run.offline:
        return _iterations(dict(run.summary)), int(run.starting_step)
    held: dict[str, int] = {}
    count = 0
    for file in segments(home, run.id):
        if file.parent.resolve() == Path(run.dir).parent.resolve():
            continue
        empty = True
        for record in records(file.read_bytes()):
            empty = False
            if record.HasField("history"):
                row = _row(record.history)
                held |= _iterations(row)
                count = max(count, int(row["_step"]) + 1)
        if empty:  # killed before anything was written: `wandb sync` would stop at it
            file.rename(file.with_suffix(".wandb.empty"))
    return held, count


def _iterations(row: Mapping[str, Any]) -> dict[str, int]:
    return {p: int(row[f"{p}/iter"]) for p in PHASES if f"{p}/iter" in row}


def segments(home: Path, run_id: str) -> list[Path]:
    """The local files of a run, one for each time that it was started, oldest first."""
    files = home.glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def _unsynced(home: Path, run_id: str) -> list[str]:
    """The folders since the run was last online whose rows the server has not got."""
    waiting: list[str] = []
    for file in segments(home, run_id):
        if not file.parent.name.startswith("offline-"):
            waiting.clear()
        elif not file.with_suffix(".wandb.synced").exists():
            waiting.append(str(file.parent))
    return waiting


def records(data: bytes) -> Iterator[Any]:
    """The records of a ``.wandb`` file, as far as it is whole.

    It is a log of LevelDB's kind: seven bytes that say what it is, then blocks of 32 KiB, in which
    each piece of a record has a header of seven bytes, checksum, length and type.
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    header, block = struct.Struct("<IHB"), 32768
    full, first, last = 1, 2, 4
    position, pieces = 7, b""
    while position + header.size <= len(data):
        if block - position % block < header.size:  # no header fits: the rest is padding
            position += block - position % block
            continue
        checksum, length, kind = header.unpack_from(data, position)
        position += header.size
        piece = data[position : position + length]
        position += length
        if len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return  # a kill has cut it short
        pieces = piece if kind in (full, first) else pieces + piece
        if kind in (full, last):
            yield wandb_internal_pb2.Record.FromString(pieces)  # type: ignore[attr-defined]


def _row(history: Any) -> dict[str, Any]:
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item
    }


def medium(packed: Mapping[str, Any]) -> Any:
    """An image, a histogram, a table or a text, as ``metrics.jsonl`` has it."""
    if "image" in packed:
        data = base64.b64decode(packed["image"].partition(",")[2])
        with PIL.Image.open(io.BytesIO(data)) as picture:
            return wandb.Image(picture.copy(), caption=packed.get("caption"))
    if "histogram" in packed:
        counts, edges = packed["histogram"]["counts"], packed["histogram"]["edges"]
        return wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
    if "table" in packed:
        columns, rows = packed["table"]["columns"], packed["table"]["rows"]
        return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
    return packed["text"]


def serve(commands: TextIO, answers: TextIO) -> None:
    """Do what the lines say. ``begin`` and ``finish`` are answered, and so is what fails."""
    session = Session()
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = getattr(session, name)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        if answer is not None:
            with suppress(BrokenPipeError):  # the training has gone meanwhile
                print(json.dumps(answer), file=answers, flush=True)
    if session.run is not None:  # the training has been killed
        session.finish(1, [])


if __name__ == "__main__":
    answers_ = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what W&B prints is no answer
    serve(sys.stdin, answers_)
    with suppress(BrokenPipeError):
        answers_.close()
