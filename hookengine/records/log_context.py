"""Add the run, epoch, iteration and plugin to each line of a run's log."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog
from structlog.typing import EventDict, Processor

from hookengine.events.plugin import FunctionPlugin

if TYPE_CHECKING:
    from hookengine.runner import Runner


def make_logger(runner: Runner) -> Any:
    """Return a structlog logger that wraps a standard logger used by this Runner only.

    Plugins may replace it.
    """
    logger = logging.Logger("hookengine", logging.INFO)
    logger.parent = logging.getLogger("hookengine")
    return structlog.wrap_logger(
        logger,
        processors=[
            structlog.stdlib.filter_by_level,
            log_context(runner),
            _add_details,
            structlog.stdlib.render_to_log_kwargs,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


_NO_DETAILS = {
    *("event", "level", "run", "epoch", "iteration", "plugin"),
    *("exc_info", "stack_info", "stacklevel", "extra"),
    *("run_log", "console", "record"),  # where a plugin writes the line
}


def _add_details(logger: Any, method: str, event: EventDict) -> EventDict:
    """Add the values of a line to its text, since a standard logger prints only that."""
    details = [f"  {name}={value}" for name, value in event.items() if name not in _NO_DETAILS]
    event["event"] = f"{event['event']}{''.join(details)}"
    return event


def log_context(runner: Runner) -> Processor:
    """Return a structlog processor that adds ``run``, ``epoch``, ``iteration`` and ``plugin``.

    The processor reads the values when a line is logged, and costs nothing otherwise. The plugin is
    the one whose method or function is running; lines logged by the kernel or by your own code
    have none. Values already bound to the line are kept.
    """

    def add(logger: Any, method: str, event: EventDict) -> EventDict:
        event.setdefault("run", runner.name)
        event.setdefault("epoch", runner.progress.current_epoch)
        event.setdefault("iteration", runner.progress.iter)
        if "plugin" not in event:
            name = running(runner.plugins.items(), sys._getframe(1))
            if name is not None:
                event["plugin"] = name
        return event

    return add


def running(plugins: Sequence[tuple[str, object]], frame: FrameType | None) -> str | None:
    """Return the name of the plugin whose code is running, or None.

    This is the plugin whose method or function owns the innermost matching frame.

    Args:
        plugins: (name, plugin) of each active plugin.
        frame: The innermost frame to look at; the search continues with its callers.
    """
    by_id = {id(plugin): name for name, plugin in plugins}
    by_code = {
        inspect.unwrap(plugin.function).__code__: name
        for name, plugin in plugins
        if isinstance(plugin, FunctionPlugin) and inspect.isfunction(plugin.function)
    }
    while frame is not None:
        code = frame.f_code
        if code in by_code:
            return by_code[code]
        if code.co_varnames[:1] == ("self",):
            name = by_id.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
        frame = frame.f_back
    return None
