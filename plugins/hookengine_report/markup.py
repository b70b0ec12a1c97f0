"""HTML that is safe by construction: anything but ``Markup`` is text and is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """A piece of HTML or SVG, which goes into the page unchanged."""

    __slots__ = ()


def element(name: str, /, *children: str | Iterable[str], **attributes: object) -> Markup:
    """Build one element.

    Args:
        name: The name of the tag.
        children: Texts, which are escaped, and ``Markup``; or lists of them.
        attributes: ``class_`` stands for ``class``, any other ``_`` for ``-``. None or False omits
            an attribute, True writes its name alone. Values are escaped.
    """
    told = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
        for key, value in ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items())
        if value is not None and value is not False
    )
    if name in ("img", "meta", "br"):
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{joined(*children)}</{name}>")


def joined(*children: str | Iterable[str]) -> Markup:
    """Join children, and escape texts."""
    return Markup("".join(_flat(children)))


def _flat(children: Iterable[str | Iterable[str]]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str):
            yield html.escape(child)
        else:
            yield from _flat(child)
