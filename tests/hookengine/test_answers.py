"""Tests of ``hookengine/answers.py``."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import pydantic
import pytest

from hookengine import Plugin, PluginManager
from hookengine.answers import answer, explain_arguments, explain_validation
from hookengine.registry import ANSWERS


class Options(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    interval: int = pydantic.Field(gt=0)
    by_epoch: bool = True


def explained(**given: object) -> str:
    with pytest.raises(pydantic.ValidationError) as caught:
        Options.model_validate(given)
    return explain_validation(caught.value, Options.model_fields)


class Silent(Plugin):
    def after_train_iter(self) -> None: ...

    def helper(self) -> None: ...


def lightning(name: str) -> str | None:
    """Answer as a plugin for users of another framework would."""
    return "'fast_dev_run' comes from Lightning. Use trial=True" if name == "fast_dev_run" else None


def test_a_name_of_mmengine_is_answered_and_an_unknown_one_is_not() -> None:
    text = answer("clip_grad")
    assert text is not None
    assert "dict(type='clip', max_norm=1.0)" in text
    assert answer("no_such_name") is None


def offer(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Let other distributions offer these entry points, besides hookengine's own."""
    others = [EntryPoint(name, value, ANSWERS.group) for name, value in points.items()]
    own = list(entry_points(group=ANSWERS.group))

    def found(group: str) -> list[EntryPoint]:
        return [*others, *own] if group == ANSWERS.group else list(entry_points(group=group))

    monkeypatch.setattr("hookengine.registry.entry_points", found)
    ANSWERS.entry_points()


def test_any_distribution_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        offer(patched, lightning=f"{__name__}:lightning")
        assert answer("fast_dev_run") == "'fast_dev_run' comes from Lightning. Use trial=True"
        assert answer("clip_grad") is not None
    ANSWERS.entry_points()


def test_an_answer_that_is_broken_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        offer(patched, a_missing="no_such_module:answer", a_raising=f"{__name__}:explained")
        PluginManager(
            [dict(type="clip", max_norm=1.0), Silent()], defaults=()
        )  # a correct plugin asks for no answer
        assert answer("clip_grad") is not None
        text = explain_arguments("Runner", {"plugin": []}, ["plugins"])
        assert text == "Runner: unknown argument 'plugin'. Did you mean 'plugins'? Known: plugins"
    ANSWERS.entry_points()


def test_each_argument_gets_its_replacement_or_the_known_names() -> None:
    text = explain_arguments("Runner", {"clip_grad": 1, "plugin": []}, ["plugins", "model"])
    assert text.startswith("Runner: 'clip_grad' comes from MMEngine. In hookengine, use plugins=")
    assert "unknown argument 'plugin'. Did you mean 'plugins'? Known: model, plugins" in text


def test_a_type_is_answered_by_its_value() -> None:
    text = explain_arguments("optim_wrapper", {"type": "AmpOptimWrapper"})
    assert text.startswith("optim_wrapper: 'AmpOptimWrapper' comes from MMEngine")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(interval=0), "interval=0: Input should be greater than 0"),
        (dict(), "interval=... is required"),
        (dict(interval=1, by_epochs=1), "unknown option 'by_epochs'. Did you mean 'by_epoch'?"),
        (dict(interval=1, clip_grad=1), "'clip_grad' comes from MMEngine"),
        (dict(interval=0, by_epoch="x"), "greater than 0; by_epoch='x': Input should be a valid"),
    ],
    ids=["a bad value", "a missing one", "an unknown one", "a foreign one", "two at once"],
)
def test_a_bad_option_is_explained_in_one_line(given: dict[str, object], text: str) -> None:
    line = explained(**given)
    assert text in line
    assert "\n" not in line
