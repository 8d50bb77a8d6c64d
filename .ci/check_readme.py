"""The Python examples of README.md, run as they stand but for the address.

Those of DSPy, Codex and Node are run by check_litellm.py, check_codex.py and check_node.py.
"""

from __future__ import annotations

import sys

from harness import check, run, same, shim
from readme import printed


@check("README: OpenAI, and LangChain on it")
def openai_examples() -> None:
    with shim("--upstream", "echo") as url:
        same(printed("openai", url), "Say hello.\n" * 2)
        same(printed("langchain", url), "Say hello.\n")


@check("README: the Agents SDK and Anthropic")
def agents_example() -> None:
    with shim("--upstream", "echo") as url:
        same(printed("agents", url), "Say hello.\n")
        same(printed("anthropic", url), "Say hello.\n")


if __name__ == "__main__":
    sys.exit(run("readme"))
