"""Weights & Biases: a run there that follows the run here, also offline, also after a kill."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any, Literal

import wandb
from pydantic import Field
from wandb.sdk.lib.runid import generate_id

from hookengine import Record, Sink, dist, greater_is_better
from hookengine_wandb.media import row
from hookengine_wandb.segments import rows, segments

__all__ = ["Wandb"]


class Wandb(Sink, name="wandb"):
    """Log to W&B: one run per job, from rank 0.

    Each record is a row, whose values are ``PHASE/NAME``; those of training are drawn over
    ``iter``, those of evaluations over ``epoch`` where the run counts epochs. The configuration is
    what ``run.json`` holds. Without a key, or where the server cannot be reached, the run is
    offline, and the log says how to upload it. A run that goes on continues the same run there:
    each record is in it once, whatever was lost or is repeated.

    A ``wandb.init`` of the script's own, before the run begins, is used and left open.
    """

    project: str | None = Field(None, description="by default WANDB_PROJECT, or 'hookengine'")
    entity: str | None = Field(None, description="user or team; by default the key's own")
    name: str | None = Field(None, description="of the run; by default that of the Runner")
    group: str | None = Field(None, description="by which runs are put together")
    job_type: str | None = Field(None, description="such as 'train' or 'eval'")
    tags: list[str] = Field(default_factory=list)
    notes: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="by default WANDB_MODE, or online if there is a key, else offline"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="more of the configuration")
    checkpoints: Literal["best", "all"] | None = Field(
        None, description="which checkpoints become artifacts"
    )
    init_timeout: float = Field(30.0, gt=0, description="seconds to reach the server at the start")
    finish_timeout: float = Field(
        30.0, gt=0, description="seconds for the upload at the end; then `wandb sync` does the rest"
    )

    _exit_code = 0

    def configure(self, runner: Any) -> None:
        """Nothing is open yet; the end may take as long as the upload may."""
        self.run: Any = None
        self.flush_timeout = self.finish_timeout + 5
        self._exit_code = 0
        self._best: dict[str, float] = {}

    # -- on the sink's thread -------------------------------------------------------------------

    def open(self, runner: Any) -> None:
        """Begin the run, or go on with it."""
        self._adopted = wandb.run is not None
        self._rows: int | None = None
        self._folder = runner.run_dir / "wandb"
        description = runner.describe()
        if self._adopted:
            self.run = wandb.run
            self.run.config.update({**description, **self.config}, allow_val_change=True)
        else:
            self.run = self._begin(runner, {**description, **self.config})
            self._hold(runner)
        by_epoch = description.get("train_cfg", {}).get("by_epoch", False)
        for phase in ("train", "val", "test"):
            self.run.define_metric(f"{phase}/iter", hidden=True)
            epochwise = by_epoch and phase != "train"
            self.run.define_metric(f"{phase}/*", step_metric="epoch" if epochwise else "iter")

    def _begin(self, runner: Any, config: dict[str, Any]) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        known = self._folder / "run_id"
        goes_on = self.continues and known.exists()
        given = wandb.setup().settings  # of WANDB_PROJECT and the other variables
        options: dict[str, Any] = {
            "project": self.project or given.project or "hookengine",
            "entity": self.entity,
            "name": self.name or given.run_name or runner.name,
            "group": self.group,
            "job_type": self.job_type,
            "tags": self.tags or None,
            "notes": self.notes,
            "id": known.read_text().strip() if goes_on else generate_id(),
            "resume": "allow",
            "config": config,
            "dir": str(runner.run_dir),
            "reinit": "create_new",
            "settings": settings,
        }
        mode: Any = self.mode or given.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode, reason = "offline", "there is no key (WANDB_API_KEY, or `wandb login`)"
            runner.logger.warning(f"wandb: {reason}: the run is offline")
        try:
            run = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode != "online":
                raise
            reason = f"{type(error).__name__}: {error}"
            runner.logger.warning(f"wandb: the run is offline, since online failed: {reason}")
            run = wandb.init(mode="offline", **options)
        if not run.disabled:
            known.write_text(run.id)
            where = Path(run.dir).parent if run.offline else run.url
            runner.logger.info(f"wandb: run {run.id}{' goes on' * goes_on}: {where}")
        return run

    def _hold(self, runner: Any) -> None:
        """Find out what the run has already: from the server, or offline from its local files."""
        if self.run.disabled or not self.continues:
            self._rows = 0
        elif self.run.offline:
            held = [r for file in segments(self._folder, self.run.id) for r in rows(file)]
            for one in held:
                self._hold_row(one)
            self._rows = 1 + max((int(one["_step"]) for one in held), default=-1)
        else:
            self._hold_row(dict(self.run.summary))
            self._rows = self.run.step

    def _hold_row(self, one: dict[str, Any]) -> None:
        for phase in ("train", "val", "test"):
            if f"{phase}/iter" in one:
                self.held[phase] = max(int(one[f"{phase}/iter"]), self.held.get(phase, -1))

    def write(self, runner: Any, record: Record) -> None:
        """Add a row."""
        if self.run is None:
            raise RuntimeError("there is no W&B run to write to")
        self.run.log(row(record), step=self._rows, commit=True)
        if self._rows is not None:
            self._rows += 1
        self._note_best(record)

    def skip(self, runner: Any, record: Record) -> None:
        """It is there; the best values are found anew."""
        self._note_best(record)

    def _note_best(self, record: Record) -> None:
        """The summary tells the best value of each metric, and its epoch."""
        if record.phase == "train":
            return
        for name, value in record.scalars.items():
            better = greater_is_better(name)
            key = f"best/{record.phase}/{name}"
            sign = 1 if better else -1
            if better is None or value != value or sign * value <= self._best.get(key, -math.inf):
                continue
            self._best[key] = sign * value
            self.run.summary.update({key: value, f"{key}/epoch": record.epoch})

    def close(self, runner: Any) -> None:
        """End the run there, with the exit code of the run here."""
        run, self.run = self.run, None
        if run is None or self._adopted:
            return
        for file in ("run.json", "run.log"):
            if (runner.run_dir / file).exists() and not run.disabled:
                copy = shutil.copy(runner.run_dir / file, run.dir)
                run.save(copy, base_path=run.dir, policy="now")
        run.finish(exit_code=self._exit_code)
        if run.offline and not run.disabled:
            files = shlex.join(str(file.parent) for file in segments(self._folder, run.id))
            runner.logger.info(f"wandb: to upload the run: wandb sync {files}")

    # -- on the main thread ---------------------------------------------------------------------

    def before_run(self, runner: Any) -> None:
        """What is running has not failed."""
        self._exit_code = 0

    def on_exception(self, error: BaseException) -> None:
        """Record what ended the run."""
        self._exit_code = _exit_code(error)
        if dist.is_main_process():
            text = f"{type(error).__name__}: {error}"
            self.enqueue(lambda: self.run.summary.update({"exception": text}))

    def after_save_checkpoint(self, path: Path) -> None:
        """Upload a checkpoint, if asked for."""
        best = (path.parent / "best").resolve() == path.resolve()
        if self.checkpoints == "all" or (self.checkpoints == "best" and best):
            self.enqueue(lambda: self._upload(path, ["best"] * best))

    def _upload(self, path: Path, aliases: list[str]) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        metadata = {key: manifest.get(key) for key in ("progress", "metrics", "best")}
        artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata=metadata)
        artifact.add_dir(str(path))
        self.run.log_artifact(artifact, aliases=["latest", path.name, *aliases])


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1
