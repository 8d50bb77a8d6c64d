"""The Python examples of README.md, run as they stand but for the address.

Those of DSPy, Codex and Node are run by check_litellm.py, check_codex.py and check_node.py.
"""

from __future__ import annotations

import sys

from harness import check, run, same, shim
from readme import printed


@check("README: the examples of OpenAI, Anthropic, the Agents SDK and LangChain")
def examples() -> None:
    with shim("--upstream", "echo") as url:
        same(printed("openai", url), "Say hello.\n" * 2)
        for name in ("anthropic", "agents", "langchain"):
            same(printed(name, url), "Say hello.\n", name)


if __name__ == "__main__":
    sys.exit(run("readme"))
