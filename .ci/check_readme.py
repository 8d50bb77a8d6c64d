"""The client examples of README.md, run as they stand but for the address."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

from harness import check, run, same, shim

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    """The code block below the comment that names it."""
    found = re.findall(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(found) == 1, f"README.md has {len(found)} examples named {name}"
    return found[0]


def printed(name: str) -> str:
    with shim("--upstream", "echo") as url, contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(example(name).replace("http://127.0.0.1:8765", url), name, "exec"), {})
    return out.getvalue()


@check("README: the OpenAI example")
def openai_example() -> None:
    same(printed("openai"), "Say hello.\n")


@check("README: the Anthropic example")
def anthropic_example() -> None:
    same(printed("anthropic"), "Say hello.\n")


if __name__ == "__main__":
    sys.exit(run("readme"))
