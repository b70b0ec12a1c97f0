"""``runner.logger``: a structlog logger with a level for each plugin."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from hookengine import PLUGINS, did_you_mean
from hookengine_logging.output import Output


class _Logger:
    """Write events: structlog calls the method named after the level."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def _write(self, **event: Any) -> None:
        self._output.line(event)

    debug = info = warning = warn = error = err = critical = fatal = exception = msg = _write


def _add_timestamp(logger: Any, method: str, event: EventDict) -> EventDict:
    event["timestamp"] = time.strftime("%Y-%m-%d %H:%M:%S")  # a tenth of TimeStamper's time
    return event


def check_levels(levels: Iterable[str], plugins: Iterable[str]) -> None:
    """Check that levels are set for plugins that exist.

    Args:
        levels: The names of the plugins that have levels.
        plugins: The names of the plugins of this run; any installed plugin will do, too.

    Raises:
        ValueError: There is no plugin of that name.
    """
    for name in levels:
        if name not in (known := [*plugins, *PLUGINS.names()]):
            hint = did_you_mean(name, known)
            raise ValueError(f"logging: levels names {name!r}, which is not a plugin.{hint}")


def make_logger(output: Output, context: Processor, level: str, levels: Mapping[str, str]) -> Any:
    """Create a structlog logger that writes to ``output``.

    Args:
        output: Where the lines go.
        context: Adds run, epoch, iteration and plugin to each line.
        level: The lowest level written.
        levels: The lowest level for lines of a plugin, by plugin name.
    """
    number = logging.getLevelName(level)
    numbers = {name: logging.getLevelName(own) for name, own in levels.items()}

    def filter_by_plugin(logger: Any, method: str, event: EventDict) -> EventDict:
        at_least = numbers.get(event.get("plugin", ""), number)
        if logging.getLevelName(event["level"].upper()) < at_least:
            raise structlog.DropEvent
        return event

    return structlog.wrap_logger(
        _Logger(output),
        processors=[
            structlog.processors.add_log_level,
            context,
            filter_by_plugin,
            _add_timestamp,
            structlog.processors.format_exc_info,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(min([number, *numbers.values()])),
    ).bind()  # once here, otherwise for each line
