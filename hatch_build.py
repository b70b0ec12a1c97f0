"""Make the README and the project's addresses fit for a package index, when a package is built.

The links in README.md are relative, which a package index cannot follow. If the checkout was cloned
from an address that is open to a browser, the links become absolute, and the metadata lists that
address. Otherwise the package lists no addresses, and the README keeps the words without the links.
"""

from __future__ import annotations

import re
import subprocess
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)")


class Metadata(MetadataHookInterface):
    """Set ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set them in ``metadata``, the table ``project`` of pyproject.toml."""
        root = Path(self.root)
        home = home_of(root)
        text = with_absolute_links((root / "README.md").read_text(encoding="utf-8"), home)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = addresses(home)


def home_of(root: Path) -> str | None:
    """Return the address of the repository, from an unpacked sdist or from git, or None."""
    if (info := root / "PKG-INFO").is_file():
        headers = HeaderParser().parsestr(info.read_text(encoding="utf-8"))
        urls = dict(line.split(", ", 1) for line in headers.get_all("Project-URL", ()))
        return urls.get("Repository")
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        remote = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    # A name or a token before the @ must not be published.
    address = re.fullmatch(
        r"(?:https://(?:[^@/]*@)?|ssh://(?:[^@/]*@)?|[^@/:]+@)([\w.-]+\.\w+)(?::\d+(?=/))?[:/]"
        r"(.+?)(?:\.git)?/?",
        remote,
    )
    return f"https://{address[1]}/{address[2]}" if address else None


def addresses(home: str | None) -> dict[str, str]:
    """Return the addresses that the metadata lists."""
    if home is None:
        return {}
    changelog = f"{home}/blob/HEAD/CHANGELOG.md"
    return {"Repository": home, "Documentation": f"{home}/tree/HEAD/docs", "Changelog": changelog}


def with_absolute_links(text: str, home: str | None) -> str:
    """Make the relative links and images of a Markdown text absolute, or keep only their words."""

    def replace(match: re.Match[str]) -> str:
        image, words, path = match.groups()
        if home is None:
            return words
        return f"{image}[{words}]({home}/{'raw' if image else 'blob'}/HEAD/{path})"

    return LINK.sub(replace, text)
