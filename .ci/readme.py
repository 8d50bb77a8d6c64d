"""The examples of README.md, as the check files run them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8765"


def example(name: str, url: str) -> str:
    """The code block below the comment that names it, with another address."""
    found = re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert len(found) == 1, f"README.md has {len(found)} examples named {name}"
    assert ADDRESS in found[0], found[0]
    return found[0].replace(ADDRESS, url)


def printed(name: str, url: str) -> str:
    """What a Python example prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(example(name, url), name, "exec"), {})
    return out.getvalue()
