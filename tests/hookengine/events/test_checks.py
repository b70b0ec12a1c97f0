"""Tests of ``hookengine/events/checks.py``."""

from __future__ import annotations

import pytest

from hookengine import Plugin
from hookengine.events.checks import check_methods


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("after_train_itr(self)", "Did you mean 'after_train_iter'"),
        ("on_error(self)", "unknown event 'on_error'"),
        ("after_train_iter(self, output)", "Did you mean 'outputs'"),
        ("after_train_iter(self, ouputs=None)", "Did you mean 'outputs'"),
        ("after_train_iter(self, *args)", "instead of *args"),
        ("after_train_iter(self, **kwargs)", "instead of *kwargs"),
    ],
)
def test_misspelled_events_and_arguments_are_refused(method: str, message: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"class Misspelt:\n    def {method}: pass", namespace)
    plugin = namespace["Misspelt"]()  # type: ignore[operator]
    with pytest.raises(TypeError) as caught:
        check_methods("misspelled", plugin, "a module")
    assert message in str(caught.value)
    assert "'misspelled'" in str(caught.value)


def test_properties_options_and_private_methods_are_no_events() -> None:
    class Careful(Plugin):
        resume: str = "auto"
        on_error: str = "warn"

        def _before_anything(self) -> None: ...

        def after_run(self) -> None: ...

        @property
        def after_all(self) -> None:
            raise AssertionError("evaluated")

    check_methods("careful", Careful(), "a module")
