"""Numbers, times and names in readable form."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

NOTHING = "\N{EN DASH}"
"""The placeholder for a missing value."""
MINUS = "\N{MINUS SIGN}"
"""A minus as wide as a plus sign, unlike a hyphen."""


def number(value: float) -> str:
    """Format with four significant digits and separated thousands."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", MINUS)
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:.4g}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """Format with at most two units: ``1.4 s``, ``3 min 20 s``, ``5 h 2 min``, ``2 d 3 h``."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + f" {rest} {smaller}" * bool(rest)
    return f"{whole // 60} min" + f" {whole % 60} s" * bool(whole % 60)


def memory(megabytes: float) -> str:
    """Format as ``774 MB`` or ``12.3 GB``."""
    if not math.isfinite(megabytes):
        return NOTHING
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"


def counted(number: int, noun: str) -> str:
    """Format as ``1 epoch`` or ``8 epochs``."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def moment(seconds: float) -> str:
    """Format seconds since 1970 as local date and time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return NOTHING


def tick_texts(ticks: Sequence[float], log: bool = False) -> list[str]:
    """Format the ticks of an axis, with only as many digits as tell them apart.

    Args:
        ticks: The values.
        log: Whether to choose the unit of each tick by its own size, not by that of the largest.
    """
    if log:
        return [tick_texts([tick])[0] for tick in ticks]
    largest = max((abs(tick) for tick in ticks), default=0.0)
    for limit, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= largest < 1e12:
            return [_short(tick / size, unit) for tick in ticks]
    if largest >= 1e12 or largest < 1e-3:
        return [_power(tick) for tick in ticks]
    return [_short(tick, "") for tick in ticks]


def iteration_texts(ticks: Sequence[float]) -> list[str]:
    """Format the iterations below an axis, rounded if they are large."""
    if max(ticks, default=0.0) < 1e5:
        return [f"{tick:,.0f}" for tick in ticks]
    rough = [f"{tick / 1e6:.2f}M" if tick >= 1e6 else f"{tick / 1e3:.1f}k" for tick in ticks]
    return [text[:-1].rstrip("0").rstrip(".") + text[-1] for text in rough]


def _short(value: float, unit: str) -> str:
    text = f"{value:.10f}".rstrip("0").rstrip(".")
    return (text + unit if float(text) else "0").replace("-", MINUS)


def _power(value: float) -> str:
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    if not exponent and value:
        mantissa, _, exponent = f"{value:e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    text = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return text.replace("-", MINUS)
