"""Codex against the shim: `codex exec` works in a scratch folder, over /v1/responses."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

from harness import (
    JSON,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SHIM,
    Done,
    calls,
    check,
    finished,
    folders,
    node,
    node_module,
    run,
    same,
    shim,
    translated,
    upstream,
)
from readme import example
from samples import PNG_BASE64

CODEX = (node(), node_module("@openai", "codex", "bin", "codex.js"))
FLAGS = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json")
RESUMED = ("resume", "--last")
PATCH = """\
*** Begin Patch
*** Update File: notes.txt
@@
-line one
+line two \u00e9\U0001f600
*** End Patch
"""


def configure(home: str, url: str = SHIM, more: str = "") -> Path:
    """Writes README.md's configuration, after more lines of the top level."""
    config = Path(home, ".codex", "config.toml")
    os.makedirs(config.parent, exist_ok=True)
    config.write_text(f"{more}\n{example('codex', url)}", encoding="utf-8")
    return config


def codex(prompt: str, home: str, work: str, *options: str, **variables: str) -> Done:
    return finished([*CODEX, "exec", *options, *FLAGS, prompt], home, work, **variables)


def items(done: Done) -> list[JSON]:
    return [e["item"] for e in done.events if e["type"] == "item.completed"]


def said(done: Done) -> str:
    """All messages; complains where there is none."""
    texts = [item["text"] for item in items(done) if item["type"] == "agent_message"]
    assert texts, f"{done.status} {done.out[-1500:]} {done.err[-500:]}"
    return "".join(texts)


def failure(done: Done) -> str:
    return str([event for event in done.events if event["type"] == "turn.failed"])


def kinds(body: JSON) -> list[list[str]]:
    """The types of the blocks of each assistant turn."""
    turns = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
    return [[block["type"] for block in turn] for turn in turns]


@check("a file is read, patched and copied in three turns, with signed thinking")
def tool_turns() -> None:
    for model in ("claude-sonnet-5-5", "claude-opus-4-6"):
        upstream.reset()
        work_to_do = calls(
            [("exec_command", {"cmd": "cat notes.txt"})],
            [("apply_patch", {"input": PATCH})],
            [("exec_command", {"cmd": "cp notes.txt copy.txt"}),
             ("exec_command", {"cmd": "cat notes.txt"})],
        )  # fmt: skip
        with folders() as (home, work):
            configure(home, more='model_reasoning_effort = "high"')
            notes = Path(work, "notes.txt")
            notes.write_text("line one\n", encoding="utf-8")
            done = codex("[[thinking]] go " + work_to_do, home, work, "--model", model)
            same(said(done)[:9], "results: ")
            same(notes.read_text(encoding="utf-8"), "line two \u00e9\U0001f600\n")
            same(Path(work, "copy.txt").read_bytes(), notes.read_bytes())
        same_client(done)
        same_upstream()


def same_client(done: Done) -> None:
    """No warning of missing metadata, all that was done, the usage of all turns."""
    same([item["message"] for item in items(done) if item["type"] == "error"], [])
    ran = [i for i in items(done) if i["type"] == "command_execution"]
    same([i["exit_code"] for i in ran], [0, 0, 0])
    changes = [i["changes"] for i in items(done) if i["type"] == "file_change"]
    same([[change["kind"] for change in one] for one in changes], [["update"]])
    assert any(item["type"] == "reasoning" for item in items(done)), done.out
    usage = done.events[-1]["usage"]
    same((usage["input_tokens"], usage["output_tokens"]), (4 * PROMPT_TOKENS, 4 * OUTPUT_TOKENS))
    same(usage["cached_input_tokens"], 4 * 8000)


def same_upstream() -> None:
    """Four requests, all blocks of all turns in the last, and the tools that Claude can have."""
    same(len(upstream.messages), 4)
    body = upstream.last.body
    same(kinds(body), [["thinking", "tool_use"]] * 2 + [["thinking", "tool_use", "tool_use"]])
    same(body["output_config"]["effort"], "high")
    tools = {tool["name"]: tool for tool in body["tools"]}
    assert {"exec_command", "write_stdin", "apply_patch", "view_image"} <= set(tools), set(tools)
    assert "begin_patch" in tools["apply_patch"]["description"], tools["apply_patch"]
    patched = [b["input"] for m in body["messages"] if m["role"] == "assistant"
               for b in m["content"] if b.get("name") == "apply_patch"]  # fmt: skip
    same(patched, [{"input": PATCH}])


@check("a tool in a namespace is called, and answers")
def namespace() -> None:
    with folders() as (home, work):
        configure(home)
        name = "multi_agent_v1__close_agent"
        done = codex("go " + calls([(name, {"target": "nobody"})]), home, work)
    assert said(done).startswith("results: "), done.out
    assert "unsupported" not in done.out + done.err, done.out + done.err


@check("pictures: given with the question, and looked at by a tool")
def pictures() -> None:
    with folders() as (home, work):
        configure(home)
        Path(work, "a.png").write_bytes(base64.b64decode(PNG_BASE64))
        look = calls([("view_image", {"path": str(Path(work, "a.png"))})])
        done = codex("go " + look, home, work, "--image=a.png")
    assert "results: " in said(done), done.out
    shown = [block for message in upstream.last.body["messages"] for block in message["content"]]
    results = [block["content"] for block in shown if block["type"] == "tool_result"]
    kinds = [block["type"] for block in [*shown, *(b for r in results for b in r)]]
    same(kinds.count("image"), 2, str(kinds))


@check("OpenAI's own models of Codex, by an alias: tool_search, and tools within the input")
def openai_models() -> None:
    with shim("--alias", "gpt-*=sonnet") as url, folders() as (home, work):
        config = configure(home, url)
        lines = config.read_text(encoding="utf-8").split("\n")
        kept = "\n".join(line for line in lines if not line.startswith("model_catalog_url"))
        config.write_text(kept, encoding="utf-8")
        notes = Path(work, "notes.txt")
        for model, tool in (("gpt-5.5", "apply_patch"), ("gpt-6-sol", EXEC)):
            upstream.reset()
            notes.write_text("line one\n", encoding="utf-8")
            script = f"await tools.apply_patch({json.dumps(PATCH)})"
            given = {"input": PATCH if tool == "apply_patch" else script}
            done = codex("[[thinking]] go " + calls([(tool, given)]), home, work, "-m", model)
            same(said(done)[:9], "results: ", model)
            same(notes.read_text(encoding="utf-8"), "line two \u00e9\U0001f600\n", model)
            same(kinds(upstream.last.body), [["thinking", "tool_use"]], model)


EXEC = "functions__exec"  # JavaScript that calls the tools


@check("resume: the conversation goes on with its signed thinking")
def resume() -> None:
    with folders() as (home, work):
        configure(home)
        reads = calls([("exec_command", {"cmd": "cat notes.txt"})])
        Path(work, "notes.txt").write_text("line one\n", encoding="utf-8")
        codex("[[thinking]] one " + reads, home, work)
        done = codex("two", home, work, *RESUMED)
    same(said(done), "echo: two")
    same(kinds(upstream.last.body), [["thinking", "tool_use"], ["thinking", "text"]])


@check("--output-schema: the answer fits it")
def output_schema() -> None:
    properties = {"n": {"type": "integer"}, "word": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["n", "word"],
              "additionalProperties": False}  # fmt: skip
    with folders() as (home, work):
        configure(home)
        Path(work, "schema.json").write_text(json.dumps(schema), encoding="utf-8")
        done = codex("go", home, work, "--output-schema", "schema.json")
    same(json.loads(said(done))["n"], 3)
    same(upstream.last.body["output_config"]["format"]["schema"]["required"], ["n", "word"])


@check("live web search is Claude's own")
def web_search() -> None:
    with folders() as (home, work):
        configure(home, more='web_search = "live"')
        done = codex("[[citations]] weather", home, work)
    same(said(done), "I look it up. 21C.")
    assert any(item["type"] == "web_search" for item in items(done)), done.out
    assert "web_search" in [tool["name"] for tool in upstream.last.body["tools"]]


@check("compaction: Codex's own summary, in place of the history", refused=1)
def local_compaction() -> None:
    with folders() as (home, work):
        configure(home)
        Path(work, "notes.txt").write_text("line one\n", encoding="utf-8")
        codex("[[thinking]] one " + calls([("exec_command", {"cmd": "cat notes.txt"})]), home, work)
        configure(home, more="model_auto_compact_token_limit = 5000")
        done = codex("two " + calls(), home, work, *RESUMED)
    same(said(done)[-3:], "two")
    bound, summary, after = (r.body for r in upstream.messages[-3:])
    same(kinds(bound)[0], ["thinking", "tool_use"], "the history is there, the tools are not")
    same(kinds(summary)[0], ["tool_use"], "thinking is bound to the tools, so it is left out")
    same(kinds(after), [], "the summary in place of the history")


@check("compaction: by the shim, for Codex's built-in provider; and no WebSocket")
def remote_compaction() -> None:
    with folders() as (home, work):
        config = configure(home)
        plain = f'model = "claude-sonnet-5-5"\nopenai_base_url = "{SHIM}/v1"\n'
        config.write_text(plain, encoding="utf-8")
        key = {"CODEX_API_KEY": "anything"}
        same(said(codex("one", home, work, **key))[-4:], " one")
        config.write_text(plain + "model_auto_compact_token_limit = 5000\n", encoding="utf-8")
        done = codex("two", home, work, *RESUMED, **key)
    same(said(done)[-3:], "two")
    same(len(upstream.messages), 3)


FAULTS = (
    # mark, words that the user sees, requests upstream at most
    ("error 400 a scripted refusal", "a scripted refusal", 1),
    ("error 400 prompt is too long: 5 tokens > 4 maximum", "ran out of room", 1),
    ("error 402", "Quota exceeded", 1),
    ("error 529", "at capacity", 5),
    ("max_tokens", "max_output_tokens", 1),
)


@check("faults: the user is told, and no retries are burnt")
def faults() -> None:
    with shim("--retries", "0") as url, folders() as (home, work):
        configure(home, url)
        for mark, words, most in FAULTS:
            upstream.reset()
            done = codex(f"[[{mark}]] hi", home, work)
            assert words in failure(done) + done.out, (mark, done.out[-1500:])
            assert 1 <= len(upstream.messages) <= most, (mark, len(upstream.messages))


@check("a refusal is shown once; a stream that breaks off is tried again, and never an answer")
def endings() -> None:
    with folders() as (home, work):
        configure(home)
        said_so: Any = said(codex("[[refusal]] hi", home, work))
        assert "declined" in said_so, said_so
        same(len(upstream.messages), 1)
        with open(configure(home), "a", encoding="utf-8") as config:
            config.write("stream_max_retries = 1\n")
        for mark in ("cut", "error-midstream"):
            done = codex(f"[[{mark}]] a longer text", home, work)
            assert failure(done) != "[]" and done.status != 0, done.out[-1500:]


if __name__ == "__main__":
    sys.exit(run("codex", translated))
