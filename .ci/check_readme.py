"""The Python examples of README.md, run as they stand but for the address.

Those of DSPy, Codex and Node are run by check_litellm.py, check_codex.py and check_node.py.
"""

from __future__ import annotations

import sys

from harness import check, run, same
from readme import printed


@check("README: the OpenAI example")
def openai_example() -> None:
    same(printed("openai"), "Say hello.\n" * 2)


@check("README: the Anthropic example")
def anthropic_example() -> None:
    same(printed("anthropic"), "Say hello.\n")


@check("README: the Agents SDK")
def agents_example() -> None:
    same(printed("agents"), "Say hello.\n")


@check("README: LangChain")
def langchain_example() -> None:
    same(printed("langchain"), "Say hello.\n")


if __name__ == "__main__":
    sys.exit(run("readme"))
