"""Claude Code against the shim: `claude -p` works in a scratch folder, over /v1/messages."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from harness import (
    JSON,
    SHIM,
    UPSTREAM_KEY,
    Done,
    calls,
    check,
    finished,
    folders,
    node,
    node_module,
    run,
    same,
    upstream,
)

CLAUDE = (node(), node_module("@anthropic-ai", "claude-code", "cli-wrapper.cjs"))
TOOLS = "Read,Edit,Bash"
QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}


def claude(prompt: str, home: str, work: str, model: str = "sonnet") -> Done:
    options = ("--model", model, "--allowedTools", TOOLS)
    form = ("--output-format", "stream-json", "--verbose")
    return finished(
        [*CLAUDE, "-p", prompt, *options, *form], home, work, ANTHROPIC_BASE_URL=SHIM,
        ANTHROPIC_API_KEY="anything", **QUIET,
    )  # fmt: skip


def blocks(done: Done, kind: str) -> list[JSON]:
    """The blocks of that type that the client tells of."""
    messages = [event["message"] for event in done.events if "message" in event]
    lists = [m["content"] for m in messages if isinstance(m["content"], list)]
    return [block for one in lists for block in one if block["type"] == kind]


def work_to_do(notes: Path) -> str:
    path = str(notes)
    return calls(
        [("Read", {"file_path": path})],
        [("Edit", {"file_path": path, "old_string": "one", "new_string": "two \u2028\u00e9"})],
        [("Bash", {"command": "cp notes.txt copy.txt"}), ("Bash", {"command": "cat copy.txt"})],
    )


@check("a file is read, edited and copied in three turns, with signed thinking")
def tool_turns() -> None:
    for model in ("sonnet", "claude-opus-4-6"):
        upstream.reset()
        with folders() as (home, work):
            notes = Path(work, "notes.txt")
            notes.write_text("line one\n", encoding="utf-8")
            done = claude("[[thinking]] go " + work_to_do(notes), home, work, model)
            same((done.status, done.err), (0, ""), done.out[-500:])
            same(notes.read_text(encoding="utf-8"), "line two \u2028\u00e9\n")
            same(Path(work, "copy.txt").read_bytes(), notes.read_bytes())
        names = ["Read", "Edit", "Bash", "Bash"]
        same([block["name"] for block in blocks(done, "tool_use")], names)
        same([b.get("is_error", False) for b in blocks(done, "tool_result")], [False] * 4)
        last = done.events[-1]
        same((last["type"], last["is_error"], last["num_turns"]), ("result", False, 5))
        assert last["result"].startswith("results: 1\tline one"), last
        same_upstream(names)


def same_upstream(names: list[str]) -> None:
    """Four requests as Claude Code made them, all blocks of all turns in the last."""
    agentic = [r for r in upstream.messages if r.body.get("tools")]
    same(len(agentic), 4)
    for received in agentic:
        headers = received.headers
        assert headers["user-agent"].startswith("claude-cli/"), headers
        same((headers.get("x-api-key"), headers.get("authorization")), (UPSTREAM_KEY, None))
        assert "anthropic-beta" in headers and received.path.endswith("?beta=true"), received
    turns = [m["content"] for m in agentic[-1].body["messages"] if m["role"] == "assistant"]
    kinds = [[block["type"] for block in turn] for turn in turns]
    same(kinds, [["thinking", "tool_use"]] * 2 + [["thinking", "tool_use", "tool_use"]])
    same([b["name"] for turn in turns for b in turn if b["type"] == "tool_use"], names)


@check("an overloaded upstream is tried again, a refusal is told", refused=None)
def faults() -> None:
    with folders() as (home, work):
        done = claude("[[error 529 x1]] hi", home, work)
        same((done.status, done.events[-1]["result"][-3:]), (0, " hi"))
        same([r.status for r in upstream.messages], [529, 200])
        done = claude("[[error 400 a scripted refusal]] hi", home, work)
    last: Any = done.events[-1]
    same((done.status, last["is_error"]), (1, True))
    assert "a scripted refusal" in last["result"], last


@check("settings.json instead of variables, and a Bearer token")
def settings() -> None:
    with folders() as (home, work):
        variables = {"ANTHROPIC_BASE_URL": SHIM, "ANTHROPIC_AUTH_TOKEN": "anything"}
        os.mkdir(Path(home, ".claude"))
        text = json.dumps({"env": variables})
        Path(home, ".claude", "settings.json").write_text(text, encoding="utf-8")
        done = finished([*CLAUDE, "-p", "hi", "--model", "haiku"], home, work, **QUIET)
    same((done.status, done.out[-4:]), (0, " hi\n"), done.err)
    same(upstream.last.body["model"], "claude-haiku-5-5")


if __name__ == "__main__":
    sys.exit(run("claude_code"))
