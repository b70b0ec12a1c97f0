"""Plugins that several tests of events use."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hookengine import Plugin


class Note(Plugin):
    """A plugin that notes the events that it receives."""

    size: int = Field(default=1, gt=0)

    def __post_init__(self) -> None:
        self.log: list[str] = []

    def configure(self) -> None:
        self.log.append("configure")

    def before_run(self) -> None:
        self.log.append("before_run")

    def before_train(self) -> None:
        self.log.append("before_train")

    def before_train_epoch(self) -> None:
        self.log.append("before_train_epoch")

    def after_train_iter(self) -> None:
        self.log.append("after_train_iter")

    def unconfigure(self) -> None:
        self.log.append("unconfigure")


def named(name: str, **methods: Any) -> Any:
    plugin = type("Some", (), methods or {"after_run": lambda self: None})()
    plugin.plugin_name = name
    return plugin
