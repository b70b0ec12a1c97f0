"""Whether anything makes records, which sinks and whoever logs values depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookengine.events.plugin import DEFAULT_PLUGINS
from hookengine.registry import PLUGINS

if TYPE_CHECKING:
    from hookengine.runner import Runner


def missing_records(runner: Runner) -> str:
    """Return a sentence for a warning if no plugin makes records of what is logged, else ``""``.

    The plugin that does implements the event ``log``. Call this in ``before_run`` or later.
    """
    if "log" in runner.plugins.calls():
        return ""
    makers = [name for name in DEFAULT_PLUGINS if hasattr(PLUGINS.own(name), "log")]
    return (
        "no enabled plugin makes records of losses, metrics and logged values (event 'log'), so "
        f"they go nowhere. Enable {' or '.join(map(repr, makers))}"
    )
