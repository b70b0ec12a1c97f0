"""What every line of a run's log is bound with: run, epoch, iteration, plugin."""

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
    """A structlog logger over a standard one, which nobody else shares; plugins replace it."""
    logger = logging.Logger("hookengine", logging.INFO)
    logger.parent = logging.getLogger("hookengine")
    return structlog.wrap_logger(
        logger,
        processors=[
            structlog.stdlib.filter_by_level,
            log_context(runner),
            structlog.stdlib.render_to_log_kwargs,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def log_context(runner: Runner) -> Processor:
    """A structlog processor that adds ``run``, ``epoch``, ``iteration`` and ``plugin``.

    They are read at the moment of the line, and nothing happens between lines. The plugin is the
    one whose method, or function, is running; the kernel and the user's own code have none. What
    the line was bound with before stays.
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
    """The plugin of the innermost frame that is a method, or the function, of one.

    Args:
        plugins: (name, plugin) of all that are on.
        frame: Where to begin.
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
