"""The process that speaks with W&B, told what to do by lines of JSON on its standard input.

W&B's client costs training more, in its own process, than all the rest of a record: it runs in
another one. This file imports neither hookengine nor torch, and is run by its path.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose names are not to stand for other modules

import base64
import io
import json
import os
import shutil
import signal
import struct
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
        self._held = 0  # of the rows, those that were there when it went on

    def begin(self, how: dict[str, Any]) -> dict[str, Any]:
        """Begin the run, or go on with it.

        Args:
            how: ``folder``, where W&B's local files go and the run's id is kept; ``continues``,
                whether to go on with the run whose id is kept there; ``mode``: ``online``,
                ``offline``, ``disabled``, or None for that of the environment; ``by_epoch``,
                whether evaluations are drawn over epochs; ``options`` of ``wandb.init``;
                ``settings`` of ``wandb.Settings``.

        Returns:
            ``held``, the last iteration that is there by phase; ``where`` the run is; and a
            ``warning``, where it had to go offline.
        """
        options, continues = how["options"], how["continues"]
        answer: dict[str, Any] = {"held": {}, "warning": None}
        home = Path(how["folder"])
        if self._adopted:
            self.run.config.update(options["config"], allow_val_change=True)
            if continues and not self.run.disabled:
                held, _ = _held(self.run, Path(self.run.dir).parents[1])
                answer["held"] = {**held, **_iterations(dict(self.run.summary))}
        else:
            home.mkdir(parents=True, exist_ok=True)
            known = home / "run.json"
            goes_on = continues and known.exists()
            run = json.loads(known.read_text()) if goes_on else {"id": generate_id()}
            given = {name: value for name, value in options.items() if value is not None}
            self.run, answer["warning"] = _init(how["mode"], {**run, **given}, how["settings"])
            if not self.run.disabled:
                names = ("id", "project", "entity")
                temporary = known.with_suffix(".tmp")
                temporary.write_text(json.dumps({n: getattr(self.run, n) for n in names}))
                temporary.replace(known)
            self._rows = 0
            _set_empty_ones_aside(self.run, home)
            if goes_on and not self.run.disabled:
                answer["held"], self._rows = _held(self.run, home)
                self._held = self._rows
        self._home = home
        for phase in PHASES:
            epochwise = how["by_epoch"] and phase != "train"
            self.run.define_metric(f"{phase}/iter", hidden=True)
            self.run.define_metric(f"{phase}/*", step_metric="epoch" if epochwise else "iter")
        local = self.run.offline or self.run.disabled
        where = str(Path(self.run.dir).parent) if local else self.run.url
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
        row = {
            **{f"{phase}/{name}": value for name, value in named.items()},
            f"{phase}/iter": record["iter"],
            **{name: record[name] for name in ("iter", "epoch", "step")},
        }
        if "timestamp" in record:
            row["_timestamp"] = record["timestamp"]
        packed = {f"{phase}/{name}": one for name, one in record.get("media", {}).items()}
        try:
            self._add({**row, **{name: medium(one) for name, one in packed.items()}})
        except Exception:
            if packed:  # the numbers at least
                self._add(row)
            raise

    def _add(self, row: dict[str, Any]) -> None:
        self.run.log(row, step=self._rows, commit=True)
        if self._rows is not None:
            self._rows += 1

    def summarize(self, values: dict[str, Any]) -> None:
        """Put values into the summary of the run."""
        self.run.summary.update(values)

    def upload(self, path: str, aliases: list[str], metadata: dict[str, Any]) -> None:
        """Make an artifact of a checkpoint, and remove the folder that it is in."""
        name = f"checkpoint-{self.run.id}"
        try:
            artifact = wandb.Artifact(name, type="model", metadata={**metadata})
            artifact.add_dir(path)
            self.run.log_artifact(artifact, aliases=aliases)
        finally:
            shutil.rmtree(Path(path).parent, ignore_errors=True)

    def abort(self) -> None:
        """Let go of the run."""
        self.run = None

    def finish(self, exit_code: int, files: list[str]) -> dict[str, Any]:
        """End the run.

        Args:
            exit_code: 0, or that of what ended it.
            files: What is kept with it.

        Returns:
            ``unsynced``: the folders that ``wandb sync`` has to upload; ``failures``: what went
            wrong before and was not told yet; ``timed_out``: whether the upload was given up.
        """
        run, self.run = self.run, None
        if run is None or self._adopted:
            return {"unsynced": [], "failures": [], "timed_out": False}
        for file in files:
            if os.path.exists(file) and not run.disabled:
                run.save(shutil.copy(file, run.dir), base_path=run.dir, policy="now")
        timed_out = False
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            timed_out = True
        offline = run.offline and not run.disabled
        if offline and 0 < self._held == self._rows:  # nothing was missing
            shutil.rmtree(Path(run.dir).parent, ignore_errors=True)
        unsynced = _unsynced(self._home, run.id) if offline else []
        return {"unsynced": unsynced, "failures": [], "timed_out": timed_out}


def _init(
    mode: str | None, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Any, str | None]:
    """(the run, why it is offline although nobody asked for that)."""
    given = wandb.setup().settings  # of WANDB_PROJECT and the other variables
    chosen: dict[str, Any] = {
        "project": given.project or "hookengine",
        "name": given.run_name or options["default_name"],
        **options,
        "settings": wandb.Settings(**settings),
        "resume": "allow",
    }
    del chosen["default_name"]
    mode = mode or str(given.mode)
    warning = None
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode, warning = "offline", "there is no key (WANDB_API_KEY, or `wandb login`)"
    try:
        run: Any = wandb.init(mode=mode, **chosen)  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise
        warning = f"online it failed: {type(error).__name__}: {error}"
        wandb.teardown()  # else the run's id is still in use
        run = wandb.init(mode="offline", **chosen)
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
        for row in rows(file):
            held |= _iterations(row)
            count = max(count, int(row["_step"]) + 1)
    return held, count


def _set_empty_ones_aside(run: Any, home: Path) -> None:
    """Files without a row: of a start that failed, or was killed; ``wandb sync`` may stop at it."""
    for file in segments(home, run.id):
        if not file.parent.samefile(Path(run.dir).parent) and not any(rows(file)):
            file.rename(file.with_suffix(".wandb.empty"))


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


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of history in a ``.wandb`` file."""
    for record in records(file.read_bytes()):
        if record.HasField("history"):
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
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
    """Do what the lines say.

    ``begin`` and ``finish`` are answered, by ``{"answer": ...}`` or ``{"error": ...}``; another
    command only if it fails, by ``{"failed": ...}``.
    """
    session = Session()
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        asks = name in ("begin", "finish")
        try:
            result = getattr(session, name)(**command)
            answer = {"answer": result} if asks else None
        except Exception as error:
            answer = {"error" if asks else "failed": f"{type(error).__name__}: {error}"}
        if answer is not None:
            with suppress(BrokenPipeError):  # the training has gone meanwhile
                print(json.dumps(answer), file=answers, flush=True)
        if name == "finish":  # forked workers of a dataloader may still hold the pipe open
            return
    if session.run is not None:  # the training has been killed
        session.finish(1, [])


if __name__ == "__main__":
    for quiet in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(quiet, signal.SIG_IGN)  # the training says when it is over
    os.nice(10)  # the training, and what feeds it, come first
    answers_ = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what W&B prints is no answer
    serve(sys.stdin, answers_)
    with suppress(BrokenPipeError):
        answers_.close()
