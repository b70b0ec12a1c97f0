"""The process that logs to W&B, as commands in lines of JSON on its standard input say.

Within the training process, W&B's client would cost more than everything else that is done with a
record, so it runs in another process. This file imports neither hookengine nor torch, and is run by
its path.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder must not shadow other modules

import base64
import io
import json
import os
import queue
import shutil
import signal
import struct
import threading
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
    """One W&B run, from its start or continuation to its end.

    Args:
        run: A W&B run that is already open; it is left open.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = run
        self._adopted = run is not None
        self._rows: int | None = None  # None: W&B counts them
        self._held = 0  # how many of the rows the continued run already had

    def begin(self, how: dict[str, Any]) -> dict[str, Any]:
        """Start the W&B run, or continue it.

        Args:
            how: ``folder``, where W&B's local files and the run's id are kept; ``continues``,
                whether to continue the run whose id is kept there; ``left``, which is None or the
                iteration up to which the new run has the records of the run whose id is kept there,
                since W&B cannot remove the later ones; ``mode``, which is ``online``,
                ``offline``, ``disabled``, or None for that of the environment; ``by_epoch``,
                whether evaluations are plotted over epochs; ``options`` of ``wandb.init``; and
                ``settings`` of ``wandb.Settings``.

        Returns:
            ``held``, the last iteration of each phase that the run holds; ``values``, the numbers
            of that record; ``id`` of the run; ``left``, the id of the run that it replaces;
            ``where``, its URL or folder; and ``warning``, the reason if it had to go offline.
        """
        options, continues = how["options"], how["continues"]
        answer: dict[str, Any] = {"held": {}, "values": {}, "warning": None, "left": None}
        home = Path(how["folder"])
        if self._adopted:
            self.run.config.update(options["config"], allow_val_change=True)
            if continues and not self.run.disabled:
                held, values, _ = _held(self.run, Path(self.run.dir).parents[1])
                summary = dict(self.run.summary)
                answer["held"] = {**held, **_iterations(summary)}
                answer["values"] = {**values, **_values(summary)}
        else:
            home.mkdir(parents=True, exist_ok=True)
            known = home / "run.json"
            goes_on = continues and known.exists()
            run = json.loads(known.read_text()) if goes_on else {"id": generate_id()}
            given = {name: value for name, value in options.items() if value is not None}
            if how["left"] is not None and known.exists():
                answer["left"] = json.loads(known.read_text())["id"]
                _note_left(given, answer["left"], how["left"])
            self.run, answer["warning"] = _init(how["mode"], {**run, **given}, how["settings"])
            if not self.run.disabled:
                names = ("id", "project", "entity")
                temporary = known.with_suffix(".tmp")
                temporary.write_text(json.dumps({n: getattr(self.run, n) for n in names}))
                temporary.replace(known)
            self._rows = 0
            _set_empty_ones_aside(self.run, home)
            if goes_on and not self.run.disabled:
                answer["held"], answer["values"], self._rows = _held(self.run, home)
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
        """Log a row: values named ``PHASE/NAME``, and the position of the run.

        Args:
            line: A line of ``metrics.jsonl`` that contains its images as data URLs.
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
            if packed:  # log the numbers at least
                self._add(row)
            raise

    def _add(self, row: dict[str, Any]) -> None:
        self.run.log(row, step=self._rows, commit=True)
        if self._rows is not None:
            self._rows += 1

    def summarize(self, values: dict[str, Any]) -> None:
        """Update the summary of the run."""
        self.run.summary.update(values)

    def upload(self, path: str, aliases: list[str], metadata: dict[str, Any]) -> None:
        """Upload a checkpoint as an artifact, and remove the folder that contains it."""
        name = f"checkpoint-{self.run.id}"
        try:
            artifact = wandb.Artifact(name, type="model", metadata={**metadata})
            artifact.add_dir(path)
            self.run.log_artifact(artifact, aliases=aliases)
        finally:
            shutil.rmtree(Path(path).parent, ignore_errors=True)

    def rest(self, seconds: float, exit_code: int, files: list[str]) -> None:
        """Do nothing, because no process is running. See ``serve``."""

    def wake(self) -> dict[str, Any]:
        """Confirm that the run is still open."""
        return {}

    def abort(self) -> None:
        """Drop the run without finishing it."""
        self.run = None

    def finish(self, exit_code: int, files: list[str]) -> dict[str, Any]:
        """Finish the run.

        Args:
            exit_code: 0, or the exit code for what ended the run.
            files: Files to save with the run.

        Returns:
            ``unsynced``, the folders that ``wandb sync`` has to upload; ``failures``, the earlier
            errors that were not raised yet; and ``timed_out``, whether the upload timed out.
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
        if offline and 0 < self._held == self._rows:  # nothing was added
            shutil.rmtree(Path(run.dir).parent, ignore_errors=True)
        unsynced = _unsynced(self._home, run.id) if offline else []
        return {"unsynced": unsynced, "failures": [], "timed_out": timed_out}


def _init(
    mode: str | None, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Any, str | None]:
    """Return the run, and the reason if it is offline although that was not requested."""
    given = wandb.setup().settings  # from WANDB_PROJECT and the other variables
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
        mode, warning = "offline", "there is no API key (set WANDB_API_KEY, or run `wandb login`)"
    try:
        run: Any = wandb.init(mode=mode, **chosen)  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise
        warning = f"starting it online failed: {type(error).__name__}: {error}"
        wandb.teardown()  # otherwise the run's id stays in use
        run = wandb.init(mode="offline", **chosen)
    return run, warning


def _note_left(options: dict[str, Any], left: str, iteration: int) -> None:
    """Note in the options of a W&B run which other one it replaces."""
    text = (
        f"Continues the W&B run {left} from iteration {iteration}. That run holds the later "
        "records of an attempt that was left"
    )
    options["notes"] = "\n\n".join(filter(None, (options.get("notes"), text)))
    options["config"] = {**options["config"], "continues": {"run": left, "iter": iteration}}


def _held(run: Any, home: Path) -> tuple[dict[str, int], dict[str, dict[str, float]], int]:
    """Return what the run already holds.

    Online, the server reports it. Offline, it is read from the local files of all its starts.

    Returns:
        The last iteration of each phase, the numbers of that record, and the number of rows.
    """
    if not run.offline:
        summary = dict(run.summary)
        return _iterations(summary), _values(summary), int(run.starting_step)
    held: dict[str, int] = {}
    values: dict[str, dict[str, float]] = {}
    count = 0
    for file in segments(home, run.id):
        for row in rows(file):
            held |= _iterations(row)
            values |= _values(row)
            count = max(count, int(row["_step"]) + 1)
    return held, values, count


def _set_empty_ones_aside(run: Any, home: Path) -> None:
    """Rename files without rows, of failed or killed starts; ``wandb sync`` may stop at them."""
    for file in segments(home, run.id):
        if not file.parent.samefile(Path(run.dir).parent) and not any(rows(file)):
            file.rename(file.with_suffix(".wandb.empty"))


def _iterations(row: Mapping[str, Any]) -> dict[str, int]:
    return {p: int(row[f"{p}/iter"]) for p in PHASES if f"{p}/iter" in row}


def _values(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers of a row by phase and name, for phases that it holds."""
    found: dict[str, dict[str, float]] = {phase: {} for phase in _iterations(row)}
    for key, value in row.items():
        phase, _, name = str(key).partition("/")
        with suppress(TypeError, ValueError):
            if phase in found and name != "iter" and not isinstance(value, bool):
                found[phase][name] = float(value)
    return found


def segments(home: Path, run_id: str) -> list[Path]:
    """Return the local files of a run, one for each start, oldest first."""
    files = home.glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def _unsynced(home: Path, run_id: str) -> list[str]:
    """Return the folders since the run was last online whose rows the server does not have."""
    waiting: list[str] = []
    for file in segments(home, run_id):
        if not file.parent.name.startswith("offline-"):
            waiting.clear()
        elif not file.with_suffix(".wandb.synced").exists():
            waiting.append(str(file.parent))
    return waiting


def records(data: bytes) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file up to the first damaged one.

    The file is a log as in LevelDB: seven bytes that identify it, then blocks of 32 KiB, in which
    each piece of a record has a header of seven bytes: checksum, length and type.
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
            return  # truncated by a kill
        pieces = piece if kind in (full, first) else pieces + piece
        if kind in (full, last):
            yield wandb_internal_pb2.Record.FromString(pieces)  # type: ignore[attr-defined]


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the history in a ``.wandb`` file."""
    for record in records(file.read_bytes()):
        if record.HasField("history"):
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def medium(packed: Mapping[str, Any]) -> Any:
    """Convert an image, a histogram, a table or a text of ``metrics.jsonl`` for W&B."""
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
    """Execute commands, one per line.

    ``begin``, ``wake`` and ``finish`` are answered with ``{"answer": ...}`` or ``{"error": ...}``;
    any other command only if it fails, with ``{"failed": ...}``.

    After ``rest``, the next command is ``wake``. If it does not come within that time, the run is
    finished, which ``{"rested": ...}`` reports, and this function returns.
    """
    session = Session()
    lines: queue.Queue[str | None] = queue.Queue(1)  # a full pipe tells training to wait
    threading.Thread(target=_read, args=(commands, lines), daemon=True).start()
    resting: dict[str, Any] = {}
    while (line := _next(lines, resting.get("seconds"))) is not None:
        command = json.loads(line)
        name = command.pop("do")
        resting = command if name == "rest" else {}
        asks = name in ("begin", "wake", "finish")
        try:
            result = getattr(session, name)(**command)
            answer = {"answer": result} if asks else None
        except Exception as error:
            answer = {"error" if asks else "failed": f"{type(error).__name__}: {error}"}
        if answer is not None:
            _answer(answers, answer)
        if name == "finish":  # forked workers of a dataloader may still hold the pipe open
            return
    if session.run is not None:  # training was killed, or needs the run no longer
        end = session.finish(resting.get("exit_code", 1), resting.get("files", []))
        _answer(answers, {"rested": end})


def _read(commands: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in commands:
        lines.put(line)
    lines.put(None)


def _next(lines: queue.Queue[str | None], timeout: float | None) -> str | None:
    """Return the next command; None at the end, or if none has come within ``timeout`` seconds."""
    try:
        return lines.get(timeout=timeout)
    except queue.Empty:
        return None


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # training may have ended
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    for quiet in [getattr(signal, name) for name in names if hasattr(signal, name)]:
        signal.signal(quiet, signal.SIG_IGN)  # training says when to finish
    if hasattr(os, "nice"):
        os.nice(10)  # training and its data loading come first
    answers_ = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what W&B prints is not an answer
    serve(sys.stdin, answers_)
    with suppress(BrokenPipeError):
        answers_.close()
