"""A plugin that several tests of events use."""

from __future__ import annotations

from pydantic import Field

from hookengine import Plugin


class Noise(Plugin):
    """A plugin with options."""

    eta: float = Field(default=0.01, gt=0, description="noise scale")
    names: tuple[str, ...] = ()

    def before_optim_step(self, optim_wrapper: object) -> None:
        self.last = optim_wrapper
