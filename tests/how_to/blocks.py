"""The files that a page of docs/how-to shows."""

import re

from places import ROOT

BLOCK = re.compile(r"^`([^`\n]+)`:\n+```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> dict[str, str]:
    """File name -> content of each code block of docs/how-to/PAGE.md that follows a line "`NAME`:"."""
    return dict(BLOCK.findall((ROOT / "docs/how-to" / f"{page}.md").read_text()))
