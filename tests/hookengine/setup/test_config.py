"""Tests of ``hookengine/setup/config.py``."""

from __future__ import annotations

import pytest

from hookengine import EvalCfg, TrainCfg
from hookengine.setup.arguments import parse


def test_train_cfg_is_checked() -> None:
    assert parse(TrainCfg, dict(max_epochs=3), "train_cfg").by_epoch
    assert parse(TrainCfg, dict(max_iters=3), "train_cfg").val_interval == 1000
    for bad, message in [
        (dict(max_epoch=3), "Did you mean 'max_epochs'"),
        (dict(max_epochs=0), "max_epochs=0: Input should be greater than 0"),
        (dict(), "needs max_epochs"),
        (dict(max_epochs=1, max_iters=1), "max_epochs=1 and max_iters=1 are both set"),
        (dict(by_epoch=True, max_iters=3), "by_epoch=True needs max_epochs"),
        (dict(max_epochs=3, val_interval=0), "val_interval=0"),
    ]:
        with pytest.raises(ValueError, match=f"^train_cfg: .*{message}"):
            parse(TrainCfg, bad, "train_cfg")
    with pytest.raises(TypeError, match="train_cfg must be a dict"):
        parse(TrainCfg, 3, "train_cfg")  # type: ignore[arg-type]


def test_the_types_of_mmengines_loops_are_translated() -> None:
    assert parse(TrainCfg, dict(type="IterBasedTrainLoop", max_iters=3), "cfg").by_epoch is False
    assert parse(TrainCfg, dict(type="EpochBasedTrainLoop", max_epochs=3), "cfg").by_epoch
    assert parse(EvalCfg, dict(type="ValLoop", loss=True), "cfg").loss
    with pytest.raises(ValueError, match="type"):
        parse(EvalCfg, dict(type="MyLoop"), "cfg")
