"""Node's clients against the shim: the Vercel AI SDK by each of its providers, and openai-node."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Callable

from harness import (
    JSON,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    THINKING_TOKENS,
    calls,
    check,
    each,
    finished,
    folders,
    node,
    run,
    same,
    shim,
    upstream,
)
from readme import example

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "node_clients.mjs")
APIS = ("responses", "chat", "compatible", "anthropic")
BOTH = ("generate", "stream")
HIGH = {"reasoningEffort": "high", "reasoningSummary": "auto", "forceReasoning": True}
THINKING = {"thinking": {"type": "adaptive", "display": "summarized"}}


def does(task: str, **given: Any) -> Any:
    """What that task of node_clients.mjs comes to."""
    return does_all([(task, given)])[0]


def does_all(tasks: list[tuple[str, JSON]]) -> list[Any]:
    """The same for several, at once and in one process."""
    with folders() as (home, work):
        done = finished([node(), SCRIPT, json.dumps(tasks)], home, work)
    assert done.status == 0, done.err
    return json.loads(done.out)


def each_of(rows: list[JSON], tasks: tuple[str, ...], seen: Callable[[Any], None]) -> None:
    """Does each task for each row, and has `seen` look at (task, row, outcome)."""
    pairs = [(task, row) for row in rows for task in tasks]
    outcomes = does_all(pairs)
    each([(*pair, outcome) for pair, outcome in zip(pairs, outcomes)], seen)


def roles(body: JSON) -> list[str]:
    return [message["role"] for message in body["messages"]]


def kinds(body: JSON) -> list[list[str]]:
    """The types of the blocks of each assistant turn."""
    turns = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
    return [[block["type"] for block in turn] for turn in turns]


# --- Vercel AI SDK --------------------------------------------------------------------------------


@check("Vercel: text and usage, generated and streamed, by each provider")
def text() -> None:
    each_of([{"api": api, "prompt": "hello \u2028\u00e9"} for api in APIS], BOTH, one_text)


def one_text(row: Any) -> None:
    done = row[-1]
    same((done["text"], done["finishReason"]), ("echo: hello \u2028\u00e9", "stop"))
    usage = done["usage"]
    same((usage["inputTokens"], usage["outputTokens"]), (PROMPT_TOKENS, OUTPUT_TOKENS))
    same(usage["inputTokenDetails"]["cacheReadTokens"], 8000)


@check("Vercel: a tool loop of three rounds, two calls at a time, by each provider")
def tools() -> None:
    use = ["get_weather", "get_time"]
    rows: list[JSON] = [{"api": api, "use": use, "prompt": f"[[tools-parallel x3]] go {api}"}
                        for api in APIS]  # fmt: skip
    for task in BOTH:
        upstream.reset()
        each_of(rows, (task,), one_loop)


def one_loop(row: Any) -> None:
    _, given, done = row
    same(done["calls"], ["get_weather", "get_time"] * 3)
    same(done["text"], "results: " + "; ".join(["sunny in 13", "noon"] * 3))
    requests = upstream.told(f"go {given['api']}")
    same(kinds(requests[-1].body), [["text", "tool_use", "tool_use"]] * 3)
    same([len(r.body["messages"]) for r in requests], [1, 3, 5, 7])


@check("Vercel: reasoning is shown and goes back signed, stored or not")
def reasoning() -> None:
    own = {"by items": {**HIGH, "store": False}, "by reference": HIGH, "natively": THINKING}
    rows: list[JSON] = [
        {"api": "anthropic" if how == "natively" else "responses", "use": ["get_weather"],
         "prompt": f"[[thinking redacted]] [[tool x3]] {how}", "provider": provider}
        for how, provider in own.items()
    ]  # fmt: skip
    for task in BOTH:
        upstream.reset()
        each_of(rows, (task,), one_reasoning)


def one_reasoning(row: Any) -> None:
    _, given, done = row
    same(done["text"], "results: " + "; ".join(["sunny in 13"] * 3))
    assert done["reasoning"].startswith("Let me think"), done["reasoning"]
    signed = ["thinking", "redacted_thinking", "tool_use"]
    told = " ".join(given["prompt"].split()[-2:])
    same(kinds(upstream.told(told)[-1].body), [signed] * 3)
    same(done["usage"]["outputTokenDetails"]["reasoningTokens"], 4 * THINKING_TOKENS)


@check("Vercel: the messages of one run go on in the next, as item references or whole")
def references() -> None:
    for provider in (HIGH, {**HIGH, "store": False}, {}):
        asked = {"role": "user", "content": "[[thinking]] [[tool x2]] one"}
        fields: Any = {"api": "responses", "use": ["get_weather"], "provider": provider}
        first = does("generate", messages=[asked], **fields)
        after = [asked, *first["messages"], {"role": "user", "content": "two"}]
        second = does("stream", messages=after, **fields)
        same(second["text"], "echo: two", str(provider))
        same(roles(upstream.last.body), ["user", "assistant"] * 3 + ["user"], str(provider))
        last = upstream.last.body["messages"]
        same([b["text"] for b in last[5]["content"] if b["type"] == "text"],
             ["results: sunny in 13; sunny in 13"])  # fmt: skip


@check("Vercel: generateObject and streamObject, by each provider")
def objects() -> None:
    models = ("claude-sonnet-5-5", "claude-opus-4-6")
    rows: list[JSON] = [{"api": api, "prompt": f"[[json]] {api} {model}", "model": model}
                        for api in APIS for model in models]  # fmt: skip
    each_of(rows, ("object", "objectStream"), one_object)


def one_object(row: Any) -> None:
    _, given, done = row
    if given["api"] == "compatible":  # it asks for json_object: the words of the fake fit no schema
        return same(done["error"]["name"], "AI_NoObjectGeneratedError")
    same((done["object"]["age"], sorted(done["object"])), (3, ["age", "name", "nick"]))
    schema = upstream.told(given["prompt"])[-1].body["output_config"]["format"]["schema"]
    return same(sorted(schema["properties"]), ["age", "name", "nick"])


@check("Vercel: a custom tool with a grammar")
def custom_tool() -> None:
    code = "print(1)\n\u2028"
    prompt = "go " + calls([("run_code", {"input": code})])
    given: JSON = {"api": "responses", "prompt": prompt, "use": ["run_code"]}
    for done in does_all([(task, given) for task in BOTH]):
        same((done["calls"], done["text"]), (["run_code"], "results: ran 10"))
    same(kinds(upstream.last.body), [["tool_use"]])
    same(upstream.last.body["messages"][1]["content"][0]["input"], {"input": code})


@check("Vercel: web search is Claude's own, its citations are sources")
def web_search() -> None:
    given = {"api": "responses", "prompt": "[[citations]] weather", "use": ["web_search"]}
    each_of([given], BOTH, one_search)


def one_search(row: Any) -> None:
    done = row[-1]
    same((done["urls"], done["finishReason"]), (["https://w.example"], "stop"))
    same(done["text"], "I look it up. 21C.")


@check("Vercel: errors keep their status, a stream that breaks off is an error")
def errors() -> None:
    marks = ("error 400 scripted", "error 429", "error-midstream", "cut", "cut-clean")
    rows: list[JSON] = [{"api": api, "prompt": f"[[{mark}]] a longer text"}
                        for api in APIS for mark in marks]  # fmt: skip
    each_of(rows, ("stream",), one_error)


def one_error(row: Any) -> None:
    _, given, done = row
    assert "error" in done, done
    status = re.match(r"\[\[error (\d+)", given["prompt"])
    if status:
        same(done["error"].get("status"), int(status[1]))


@check("README: the Vercel AI SDK")
def vercel_example() -> None:
    with folders() as (home, work), shim("--upstream", "echo") as url:
        os.symlink(os.environ["NODE_MODULES"], os.path.join(work, "node_modules"))
        path = os.path.join(work, "example.mjs")
        with open(path, "w", encoding="utf-8") as file:
            file.write(example("vercel", url))
        done = finished([node(), path], home, work)
    same((done.out, done.err), ("Say hello.\n", ""))


# --- openai-node ----------------------------------------------------------------------------------

FUNCTION = {"type": "function", "name": "get_weather", "strict": True,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                           "required": ["city"], "additionalProperties": False}}  # fmt: skip


@check("openai-node: responses.stream with reasoning, two calls and a result")
def helper() -> None:
    asked = {"role": "user", "content": "[[thinking]] [[tools-parallel]] go"}
    body: JSON = {"input": [asked], "tools": [FUNCTION], "store": False,
                  "reasoning": {"effort": "low", "summary": "auto"}}  # fmt: skip
    first = does("helper", body=body)["response"]
    same([item["type"] for item in first["output"]],
         ["reasoning", "message", "function_call", "function_call"])  # fmt: skip
    found = [i["call_id"] for i in first["output"] if i["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": i, "output": "sunny"} for i in found]
    body["input"] = [asked, *first["output"], *results]
    second = does("helper", body=body)
    same(second["response"]["output_text"], "results: sunny; sunny")
    same(second["kinds"][0], "response.created")
    same(second["kinds"][-1], "response.completed")
    same(kinds(upstream.last.body), [["thinking", "text", "tool_use", "tool_use"]])


@check("openai-node: responses.create and chat.completions.stream")
def create() -> None:
    same(does("create", body={"input": "hello"})["response"]["output_text"], "echo: hello")
    asked = {"role": "user", "content": "[[tools-parallel]] go"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    done = does("chatHelper", body={"messages": [asked], "tools": [tool]})
    choice = done["completion"]["choices"][0]
    same([c["function"]["name"] for c in choice["message"]["tool_calls"]], ["f", "f"])


@check("openai-node: a stream that breaks off raises")
def broken() -> None:
    marks = ("error-midstream", "cut", "cut-clean")
    rows = [("helper", {"body": {"input": f"[[{mark}]] a longer text"}}) for mark in marks]
    for done in does_all(rows):
        same(done.get("error", {}).get("name"), "Error", str(done))


if __name__ == "__main__":
    sys.exit(run("node"))
