"""Weights & Biases: one W&B run that follows the run, even offline and after a kill."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from hookengine import Image, Record, RunFolder, RunInfo, Runner, Sink, dist, greater_is_better
from hookengine_wandb.process import SessionLike, SessionProcess

__all__ = ["Wandb"]

_spec = importlib.util.find_spec("wandb")
if _spec is None or _spec.origin is None:  # or a mere folder; another process imports it
    raise ModuleNotFoundError("No module named 'wandb'", name="wandb")

_MOST_UPLOADS = 8  # that may wait; each keeps its checkpoint on disk


class Wandb(Sink, name="wandb"):
    """Log to W&B from rank 0, in one W&B run per job, from another process.

    Each record is a row with values named ``PHASE/NAME``. Values of training are plotted over
    ``iter``; those of evaluations over ``epoch`` if the run counts epochs. The configuration is the
    content of ``run.json``. Without an API key, or if the server cannot be reached, the W&B run is
    offline, and the log says how to upload it. A resumed run continues the same W&B run, which
    holds each record exactly once, whatever was lost or is repeated. W&B cannot remove rows, so a
    run that resumes from an older checkpoint and then differs from the records that W&B has
    continues as a new W&B run, which has the whole history and names the other one in its notes.

    If the script has called ``wandb.init`` itself, that W&B run is used and left open.
    """

    project: str | None = Field(
        default=None, description="by default WANDB_PROJECT, or 'hookengine'"
    )
    entity: str | None = Field(
        default=None, description="user or team; by default that of the API key"
    )
    name: str | None = Field(
        default=None, description="by default WANDB_NAME, or the Runner's name"
    )
    group: str | None = Field(default=None, description="runs of the same group are shown together")
    job_type: str | None = Field(default=None, description="such as 'train' or 'eval'")
    tags: list[str] = Field(default_factory=list)
    notes: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None, description="by default WANDB_MODE, or online; offline without an API key"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="additional values of the configuration"
    )
    checkpoints: Literal["best", "all"] | None = Field(
        default=None, description="which checkpoints to upload as artifacts"
    )
    init_timeout: float = Field(
        default=30.0, gt=0, description="seconds to wait for the server at the start"
    )
    finish_timeout: float = Field(
        default=30.0,
        gt=0,
        description="seconds to wait for the upload at the end; the log tells how to add the rest",
    )

    idle_timeout: float = Field(
        default=60.0,
        ge=0,
        description="seconds after a run until the process that logs to W&B ends; a later record "
        "continues the same W&B run in another process",
    )

    cuts_late = True

    def configure(self, runner: Runner) -> None:
        """Reset the state, and let the end take as long as the upload may."""
        self.flush_timeout = self.finish_timeout + 5
        self._session: SessionLike | None = None
        self._exit_code = 0
        self._best: dict[str, float] = {}
        self._uploads: set[Path] = set()  # waiting to be uploaded

    # -- on the sink's thread -------------------------------------------------------------------

    def open(self, runner: RunInfo) -> None:
        """Start the W&B run, or continue it."""
        answer = self._begin(runner, continues=self.continues)
        self.held.update(answer["held"])
        self.held_values.update(answer["values"])

    def _begin(
        self, runner: RunInfo, *, continues: bool, left: int | None = None
    ) -> dict[str, Any]:
        """Start or continue a W&B run.

        Args:
            runner: The Runner.
            continues: Whether to continue the W&B run that the folder of the run names.
            left: The iteration up to which a new W&B run repeats that one, if it replaces it.

        Returns:
            What ``Session.begin`` returns.
        """
        folder = runner.run_dir / "wandb"
        description = runner.describe()
        options = {
            "project": self.project,
            "entity": self.entity,
            "name": self.name,
            "default_name": runner.name,
            "group": self.group,
            "job_type": self.job_type,
            "tags": self.tags or None,
            "notes": self.notes,
            "config": json.loads(json.dumps({**description, **self.config}, default=str)),
            "dir": str(runner.run_dir),
        }
        settings = {
            "silent": True,
            "console": "off",
            "init_timeout": self.init_timeout,
            "finish_timeout": self.finish_timeout,
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 1,
        }
        how = {
            "folder": str(folder),
            "continues": continues,
            "left": left,
            "mode": self.mode,
            "by_epoch": (description.get("train_cfg") or {}).get("by_epoch", False),
            "options": options,
            "settings": settings,
        }
        session = _own_session()
        if session is None:
            folder.mkdir(parents=True, exist_ok=True)
            session = SessionProcess(folder / "process.log")
        try:
            answer = session.begin(how)
        except Exception:
            session.abort()
            raise
        self._session = session
        if answer["warning"]:
            runner.logger.warning(f"wandb: the run is offline, since {answer['warning']}")
        if answer["left"]:
            holds = "the whole history" if self.continues else "the records from now on"
            runner.logger.warning(
                f"wandb: the W&B run {answer['left']} holds records after iteration {left}, which "
                f"this run has left and W&B cannot remove. A new W&B run has {holds}"
            )
        runner.logger.info(f"wandb: run {answer['id']}: {answer['where']}")
        return answer

    def cut(self, runner: RunInfo, kept: Mapping[str, int]) -> None:
        """Continue in a new W&B run, which receives the history again."""
        if _own_session() is not None:  # the script's; another one cannot take its place
            super().cut(cast(Runner, runner), kept)
            return
        try:
            self._finish(runner, exit_code=0)
        finally:
            self.held.clear()
            self._best.clear()
            self._begin(runner, continues=False, left=max(kept.values(), default=0))

    def _woken(self, runner: RunInfo) -> SessionLike:
        """Return the session; continue the W&B run in another process if the one before ended."""
        if self._session is not None and not self._session.wake():
            try:
                self._finish(runner, self._exit_code)
            except RuntimeError as error:  # of an earlier record; this one is still to be written
                runner.logger.warning(f"wandb: {error}")
            self._begin(runner, continues=True)
        if self._session is None:
            raise RuntimeError("no W&B run is open to write to")
        return self._session

    def _rest(self, runner: RunInfo) -> None:
        if self._session is not None:
            self._session.rest(self.idle_timeout, self._exit_code, _files(runner))

    def write(self, runner: RunInfo, record: Record) -> None:
        """Log a record as a row."""
        images = {n: one for n, one in record.media.items() if isinstance(one, Image)}
        self._woken(runner).log(
            record.to_line({n: _data_url(image) for n, image in images.items()})
        )
        self._note_best(runner, record)

    def skip(self, runner: RunInfo, record: Record) -> None:
        """Skip a record that W&B already holds; only note the best values."""
        self._note_best(runner, record)

    def _note_best(self, runner: RunInfo, record: Record) -> None:
        """Update the best value of each metric, and its epoch, in the summary."""
        if record.phase == "train":
            return
        for name, value in record.scalars.items():
            greater = greater_is_better(name)
            key = f"best/{record.phase}/{name}"
            better = value if greater else -value
            if greater is None or not better > self._best.get(key, -math.inf):
                continue
            self._best[key] = better
            self._woken(runner).summarize({key: value, f"{key}/epoch": record.epoch})

    def close(self, runner: RunInfo) -> None:
        """Finish the W&B run, with the exit code of the run."""
        self._finish(runner, self._exit_code)

    def _finish(self, runner: RunInfo, exit_code: int) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        answer = session.finish(exit_code, _files(runner))
        if answer["timed_out"]:
            folder = RunFolder(runner.run_dir)
            run_dir = shlex.quote(str(folder.path))
            fix = "Set a longer finish_timeout"
            if folder.metrics.is_file() and folder.description.is_file():
                replay = f"python -m hookengine_logging.replay {run_dir} --to wandb"
                fix = f"To upload the rest: {replay}"
            runner.logger.warning(
                f"wandb: not everything was uploaded within {self.finish_timeout:g} s. {fix}"
            )
        if unsynced := answer["unsynced"]:
            runner.logger.info(f"wandb: to upload the run: wandb sync {shlex.join(unsynced)}")
        if failures := answer["failures"]:
            raise RuntimeError("; ".join(failures))

    # -- on the main thread ---------------------------------------------------------------------

    def before_run(self, runner: Runner) -> None:
        """Reset the exit code, and remove the uploads that a killed run has left."""
        self._exit_code = 0
        self._check_checkpoints(runner)
        if self._session is None and not self._uploads and dist.is_main_process():
            for left in (runner.run_dir / "wandb").glob("upload-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _check_checkpoints(self, runner: Runner) -> None:
        """Warn if there will be no checkpoint to upload."""
        if self.checkpoints is None or runner.train_cfg is None or not dist.is_main_process():
            return
        fix = ""
        if "checkpoint" not in runner.plugins:
            fix = "none is saved unless another plugin does it. Enable 'checkpoint'"
        elif self.checkpoints == "best" and runner.plugins["checkpoint"].keep_best is None:
            fix = "none is chosen as the best. Set dict(type='checkpoint', keep_best=METRIC)"
        if fix:
            runner.logger.warning(f"wandb: checkpoints={self.checkpoints!r} uploads nothing: {fix}")

    def after_run(self, runner: Runner) -> None:
        """Let the process end, unless another run follows soon."""
        if self.begun:
            self.enqueue(lambda: self._rest(runner))

    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """Record the exception that ended the run."""
        self._exit_code = _exit_code(error)
        if dist.is_main_process():
            text = f"{type(error).__name__}: {error}"
            self.enqueue(lambda: self._woken(runner).summarize({"exception": text}))

    def after_save_checkpoint(self, runner: Runner, path: Path, best: bool) -> None:
        """Upload a checkpoint, if ``checkpoints`` includes it."""
        if self.checkpoints == "all" or (self.checkpoints == "best" and best):
            if len(self._uploads) >= _MOST_UPLOADS:
                runner.logger.warning(
                    f"wandb: {path.name} is not uploaded: earlier uploads are still waiting"
                )
                return
            copy = _linked(path, runner.run_dir / "wandb")  # the original may be deleted by then
            self._uploads.add(copy)
            self.enqueue(lambda: self._upload(runner, copy, ["best"] * best))

    def _upload(self, runner: RunInfo, path: Path, aliases: list[str]) -> None:
        self._uploads.discard(path)
        manifest = json.loads(RunFolder.manifest(path).read_text())
        metadata = {key: manifest.get(key) for key in ("progress", "metrics", "best")}
        self._woken(runner).upload(str(path), ["latest", path.name, *aliases], metadata)


def _files(runner: RunInfo) -> list[str]:
    """Return the files that are saved with a W&B run."""
    folder = RunFolder(runner.run_dir)
    return [str(folder.description), str(folder.log)]


def _linked(folder: Path, parent: Path) -> Path:
    """Link or copy the files of a folder into a new folder below ``parent``, and return it."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    parent.mkdir(parents=True, exist_ok=True)
    there = Path(tempfile.mkdtemp(prefix="upload-", dir=parent)) / folder.name
    shutil.copytree(folder, there, copy_function=link)
    return there


def _data_url(image: Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.png).decode()}"


def _own_session() -> SessionLike | None:
    """Return a session for the W&B run that the script has opened itself, or None."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is None:
        return None
    from hookengine_wandb.session import Session

    session: SessionLike = Session(run)
    return session


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1
