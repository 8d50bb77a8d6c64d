"""The official openai SDK's `responses` against the shim, and what upstream received.

Every stream is read event by event as well: `whole` holds it to the order that the SDKs, Codex and
the Vercel AI SDK rely on.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import os
import sys
import tempfile
from typing import Any
from urllib.parse import urlsplit

import harness
import httpx2
import openai
from harness import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SHIM,
    THINKING_TOKENS,
    TIMEOUT,
    calls,
    check,
    each,
    run,
    same,
    shim,
    translated,
    upstream,
)
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import response_create_params
from pydantic import BaseModel, Field
from samples import PDF_BASE64, PNG_BASE64

JSON = dict[str, Any]
raised = functools.partial(harness.raised, openai.OpenAIError)
PNG_URL = "data:image/png;base64," + PNG_BASE64
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
HIGH = {"effort": "high", "summary": "auto"}


def client_of(url: str, **options: Any) -> OpenAI:
    options = {"api_key": "anything", "timeout": TIMEOUT, **options}
    return OpenAI(base_url=url + "/v1", **options)


client = client_of(SHIM)


def ask(given: Any, model: str = "sonnet", by: OpenAI = client, **fields: Any) -> Any:
    return by.responses.create(model=model, input=given, **fields)


def streamed(given: Any, model: str = "sonnet", **fields: Any) -> list[Any]:
    return whole(list(ask(given, model, stream=True, **fields)))


def user(*content: Any) -> JSON:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def function(name: str, **properties: Any) -> JSON:
    parameters = {"type": "object", "properties": properties, "required": list(properties),
                  "additionalProperties": False}  # fmt: skip
    return {"type": "function", "name": name, "description": f"calls {name}", "strict": True,
            "parameters": parameters}  # fmt: skip


CITY = {"type": "string", "description": "a city"}
WEATHER, TIME, NOW = function("get_weather", city=CITY), function("get_time", zone=CITY), \
    function("now")  # fmt: skip
ARGUMENTS = {"city": "some city \u2028\u00e9\U0001f600"}  # what the fake fills in
LARK = {"type": "grammar", "syntax": "lark", "definition": "start: /(.|\\n)+/"}
PATCH = {"type": "custom", "name": "patch", "description": "applies", "format": LARK}


class Person(BaseModel):
    name: str = Field(min_length=2)
    age: int = Field(ge=1, le=120)
    nick: str | None


def types(items: Any) -> list[str]:
    return [item.type for item in items]


def blocks(role: str = "assistant", body: JSON | None = None) -> list[list[str]]:
    """The types of the blocks of each such turn that upstream received last."""
    turns = [m for m in (body or upstream.last.body)["messages"] if m["role"] == role]
    return [[block["type"] for block in turn["content"]] for turn in turns]


def output_of(call: Any, output: Any = "18C") -> JSON:
    kind = call.type.replace("_call", "_call_output")
    return {"type": kind, "call_id": call.call_id, "output": output}


def dumped(items: Any) -> list[JSON]:
    """Output items as a client sends them back."""
    return [item.model_dump(exclude_none=True, warnings=False) for item in items]


# --- the order of events --------------------------------------------------------------------------


def whole(events: list[Any]) -> list[Any]:
    """The events as they are, once they are seen to keep all rules of a stream."""
    same([e.sequence_number for e in events], list(range(len(events))), "sequence numbers")
    same(types(events[:2]), ["response.created", "response.in_progress"])
    same([e.type for e in events if e.type in TERMINAL], [events[-1].type], "one terminal event")
    responses = [e.response for e in events if hasattr(e, "response")]
    same(len({(r.id, r.created_at, r.model) for r in responses}), 1, "one response throughout")
    same([(r.status, r.output, r.usage) for r in responses[:-1]], [("in_progress", [], None)] * 2)
    added = [e for e in events if e.type == "response.output_item.added"]
    done = [e for e in events if e.type == "response.output_item.done"]
    same([e.output_index for e in added], list(range(len(added))), "dense output indexes")
    same([(e.output_index, e.item.id, e.item.type) for e in done],
         [(e.output_index, e.item.id, e.item.type) for e in added])  # fmt: skip
    same(len({e.item.id for e in added}), len(added), "an id for each item")
    same(dumped(events[-1].response.output), dumped(e.item for e in done), "the items at the end")
    for one in added:
        within(one, [e for e in events if getattr(e, "output_index", None) == one.output_index])
    return events


def within(added: Any, events: list[Any]) -> None:
    """The events of one item: its own id, opened and closed, deltas that make the whole."""
    same([events[0].type, events[-1].type], ["response.output_item.added",
                                             "response.output_item.done"])  # fmt: skip
    inner = events[1:-1]
    same({e.item_id for e in inner} - {added.item.id}, set(), "item_id")
    for name, field in DELTAS.items():
        pieces: dict[Any, str] = {}
        for event in inner:
            place = (getattr(event, "content_index", 0), getattr(event, "summary_index", 0))
            if event.type == f"response.{name}.delta":
                pieces[place] = pieces.get(place, "") + event.delta
            elif event.type == f"response.{name}.done":
                same(getattr(event, field), pieces.pop(place, ""), name)
        same(pieces, {}, f"{name}.done")
    opened = [e.type for e in inner if e.type.endswith("part.added")]
    closed = [e.type.replace("done", "added") for e in inner if e.type.endswith("part.done")]
    same(opened, closed, "parts")


DELTAS = {
    "output_text": "text", "refusal": "refusal", "function_call_arguments": "arguments",
    "custom_tool_call_input": "input", "reasoning_summary_text": "text",
}  # fmt: skip


# --- text -----------------------------------------------------------------------------------------

KEYS = set(
    "id object created_at status background completed_at error incomplete_details instructions "
    "max_output_tokens max_tool_calls model output parallel_tool_calls previous_response_id "
    "prompt_cache_key reasoning safety_identifier service_tier store temperature text tool_choice "
    "tools top_logprobs top_p truncation usage user metadata".split()
)


@check("text: the whole response object, and the request that made it")
def text() -> None:
    raw = client.responses.with_raw_response.create(
        model="sonnet", input="hello", instructions="be kind", metadata={"a": "b"},
        max_output_tokens=777,
    )  # fmt: skip
    answer, body = raw.parse(), json.loads(raw.text if isinstance(raw.text, str) else raw.text())
    same(answer.output_text, "echo: hello")
    same((answer.object, answer.status, answer.model), ("response", "completed",
                                                        "claude-sonnet-5-5"))  # fmt: skip
    same(KEYS - set(body), set(), "missing keys")
    same((body["instructions"], body["metadata"], body["max_output_tokens"], body["error"]),
         ("be kind", {"a": "b"}, 777, None))  # fmt: skip
    same([(i["type"], i["role"], i["status"]) for i in body["output"]],
         [("message", "assistant", "completed")])  # fmt: skip
    same(body["output"][0]["content"][0]["annotations"], [])
    assert answer.id.startswith("resp_") and answer.output[0].id.startswith("msg_"), answer
    same(answer._request_id, upstream.last.request_id)
    sent = upstream.last.body
    same((sent["max_tokens"], sent["system"][0]["text"]), (777, "be kind"))
    same(sent["messages"], [{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    same_usage(answer.usage)


def same_usage(usage: Any) -> None:
    same((usage.input_tokens, usage.output_tokens), (PROMPT_TOKENS, OUTPUT_TOKENS))
    same(usage.total_tokens, PROMPT_TOKENS + OUTPUT_TOKENS)
    details = usage.input_tokens_details
    same((details.cached_tokens, details.cache_write_tokens), (8000, 1500))


@check("text: its events, one by one")
def text_events() -> None:
    events = streamed("a longer text \u2028\u00e9\U0001f600")
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    same("".join(deltas), "echo: a longer text \u2028\u00e9\U0001f600")
    assert len(deltas) > 1, "the pieces of upstream"
    others = [e.type for e in events if e.type != "response.output_text.delta"]
    same(others, [f"response.{name}" for name in (
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    )])  # fmt: skip
    same_usage(events[-1].response.usage)


@check("text: the lines of the stream are ASCII, named as their data, without empty data")
def stream_bytes() -> None:
    with client.responses.with_streaming_response.create(
        model="sonnet", input="\u2028 \u00e9", stream=True
    ) as response:
        same(response.headers["content-type"].split(";")[0], "text/event-stream")
        same(response.headers["x-request-id"], upstream.last.request_id)
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert all(line.isascii() for line in lines), lines
    names = [line.removeprefix("event: ") for line in lines[::2]]
    same([json.loads(line.removeprefix("data: "))["type"] for line in lines[1::2]], names)


@check("the stream is the same however upstream's bytes are cut, and skips what nobody knows")
def framing() -> None:
    for mark in ("bytes", "lump", "crlf", "unknown"):
        same(streamed(f"[[{mark}]] cut \u2028 up")[-1].response.output_text, "echo: cut \u2028 up")
        same(ask(f"[[{mark}]] cut \u2028 up").output_text, "echo: cut \u2028 up", mark)


@check("stream and parse helpers, sync and async")
async def helpers() -> None:
    body: Any = {"model": "sonnet", "input": "[[thinking]] hello", "reasoning": HIGH}
    with client.responses.stream(**body) as events:
        kinds = [event.type for event in events]
        same(events.get_final_response().output_text, "echo: hello")
    same((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    person: Any = {"model": "opus", "input": "somebody", "text_format": Person}
    same(client.responses.parse(**person).output_parsed.age, 3)
    with client.responses.stream(**person) as events:
        same(events.get_final_response().output_parsed.age, 3)
    async with AsyncOpenAI(base_url=SHIM + "/v1", api_key="x", timeout=TIMEOUT) as later:
        same((await later.responses.create(**body)).output_text, "echo: hello")
        async with later.responses.stream(**body) as running:
            same((await running.get_final_response()).output_text, "echo: hello")
        same((await later.responses.parse(**person)).output_parsed.age, 3)
        async with later.responses.stream(**person) as running:
            same((await running.get_final_response()).output_parsed.age, 3)
    chosen = upstream.last.body["output_config"]["format"]
    same((chosen["type"], chosen["schema"]["required"]), ("json_schema", ["name", "age", "nick"]))


@check("JSON: a flat json_schema, and json_object without its fence")
def json_formats() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 2}}}
    chosen: Any = {"type": "json_schema", "name": "x", "schema": schema}
    same(json.loads(ask("x", text={"format": chosen}).output_text), {"n": 3})
    loose: Any = {"format": {"type": "json_object"}}
    same(ask("[[fenced]] as JSON", text=loose).output_text, '{"answer": 42}')
    same(streamed("[[fenced]] as JSON", text=loose)[-1].response.output_text, '{"answer": 42}')


@check("input: every form of a message, images and files")
def inputs() -> None:
    said = {"type": "output_text", "text": "yes", "annotations": []}
    given: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": "one"},
        {"role": "assistant", "content": [said]},
        user({"type": "input_text", "text": "look"},
             {"type": "input_image", "image_url": PNG_URL, "detail": "auto"},
             {"type": "image_url", "image_url": {"url": PNG_URL}},
             {"type": "input_file", "filename": "a.pdf",
              "file_data": "data:application/pdf;base64," + PDF_BASE64}),
    ]  # fmt: skip
    same(ask(given).output_text, "echo: look")
    body = upstream.last.body
    same(body["system"][0]["text"], "be brief")
    same(blocks("user"), [["text"], ["text", "image", "image", "document"]])
    same(blocks("assistant"), [["text"]])


# --- reasoning ------------------------------------------------------------------------------------


@check("reasoning: the summary's events, the tokens, the sealed blocks")
def reasoning() -> None:
    events = streamed("[[thinking]] hello", reasoning=HIGH)
    kinds = [k for k, _ in itertools.groupby(e.type for e in events)][2:9]
    same(kinds, [f"response.{name}" for name in (
        "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
        "output_item.added",
    )])  # fmt: skip
    for response in (events[-1].response, ask("[[thinking]] hello", reasoning=HIGH)):
        same(types(response.output), ["reasoning", "message"])
        item = response.output[0]
        assert item.id.startswith("rs_") and item.encrypted_content, item
        assert item.summary[0].text.startswith("Let me think"), item
        same(response.usage.output_tokens_details.reasoning_tokens, THINKING_TOKENS)
    thinking = upstream.last.body["thinking"]
    same((thinking["display"], upstream.last.body["output_config"]["effort"]),
         ("summarized", "high"))  # fmt: skip
    silent = ask("[[thinking]] hello")
    same([i.summary for i in silent.output if i.type == "reasoning"], [[]])
    same(ask("[[thinking]] hello", reasoning={"effort": "none"}).output_text, "echo: hello")


@check("reasoning: five tool turns, nothing stored, a new shim for each: every block comes back")
def sealed() -> None:
    given: list[Any] = [user("[[thinking redacted]] [[tool x5]] go")]
    fields: Any = {"tools": [WEATHER], "reasoning": HIGH, "store": False,
                   "include": ["reasoning.encrypted_content"]}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(folder, "config.ini")
        with open(config, "w", encoding="utf-8") as file:
            file.write("[claude_shim]\n")
        for turn in range(6):
            with shim("--config", config) as url:
                body: Any = {"model": "sonnet", "input": given, **fields}
                if turn % 2:
                    answer = client_of(url).responses.create(**body)
                else:
                    stream = client_of(url).responses.create(stream=True, **body)
                    answer = whole(list(stream))[-1].response
            found = [item for item in answer.output if item.type == "function_call"]
            given += [*dumped(answer.output), *(output_of(call) for call in found)]
    same(answer.output_text, "results: " + "; ".join(["18C"] * 5))
    same(blocks(), [["thinking", "redacted_thinking", "tool_use"]] * 5)


@check("reasoning: what is not the shim's own seal is dropped, and said so")
def tampered() -> None:
    first = ask("[[thinking]] [[tool]] go", tools=[WEATHER], reasoning=HIGH)
    items = dumped(first.output)
    sealing = items[0]["encrypted_content"]
    middle = len(sealing) // 2
    other = "A" if sealing[middle] != "A" else "B"
    for bad in (sealing[:middle] + other + sealing[middle + 1 :], "gAAAAABforeign", ""):
        items[0]["encrypted_content"] = bad
        given = [user("[[thinking]] [[tool]] go"), *items, output_of(first.output[-1])]
        with shim() as url:  # which remembers nothing of that call
            raw = client_of(url).responses.with_raw_response.create(
                model="sonnet", input=given, tools=[WEATHER], store=False
            )
        same(raw.parse().output_text, "results: 18C")
        same(blocks(), [["tool_use"]], bad)
        if bad:
            assert "encrypted_content" in raw.headers.get("x-claude-shim-ignored", ""), raw.headers


# --- tools ----------------------------------------------------------------------------------------


@check("tools: a call, its events, and its result")
def one_tool() -> None:
    for events in (None, streamed("[[tool]] weather", tools=[WEATHER])):
        answer = events[-1].response if events else ask("[[tool]] weather", tools=[WEATHER])
        (call,) = answer.output
        same((call.type, call.name, call.status), ("function_call", "get_weather", "completed"))
        same(json.loads(call.arguments), ARGUMENTS)
        assert call.call_id.startswith("toolu_") and call.id.startswith("fc_"), call
        same(answer.status, "completed")
    deltas = [e for e in events or [] if e.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 2, "arguments are streamed as they come"
    sent = upstream.last.body["tools"][0]
    same((sent["name"], sent["input_schema"]), ("get_weather", WEATHER["parameters"]))
    output: Any = [{"type": "input_text", "text": "18C"},
                   {"type": "input_image", "image_url": PNG_URL, "detail": "high"}]  # fmt: skip
    given = [user("[[tool]] weather"), *dumped([call]), output_of(call, output)]
    same(ask(given, tools=[WEATHER]).output_text, "results: 18C <image>")


@check("tools: two at once after text, one if so asked, none without arguments lost")
def parallel_tools() -> None:
    fields: Any = {"tools": [WEATHER, TIME]}
    for answer in (ask("[[tools-parallel]]", **fields),
                   streamed("[[tools-parallel]]", **fields)[-1].response):  # fmt: skip
        same(types(answer.output), ["message", "function_call", "function_call"])
        found = answer.output[1:]
        same([call.name for call in found], ["get_weather", "get_time"])
    given = [user("[[tools-parallel]]"), *dumped(answer.output), *map(output_of, reversed(found))]
    same(ask(given, **fields).output_text, "results: 18C; 18C")
    same(blocks("user"), [["text"], ["tool_result", "tool_result"]])
    single = ask("[[tools-parallel]]", parallel_tool_calls=False, **fields)
    same([i.name for i in single.output if i.type == "function_call"], ["get_weather"])
    for answer in (ask("[[tool-no-args]]", tools=[NOW]),
                   streamed("[[tool-no-args]]", tools=[NOW])[-1].response):  # fmt: skip
        same(answer.output[0].arguments, "{}")


@check("tools: a custom one gets its text, and its grammar is told")
def custom_tool() -> None:
    patch = '*** Begin Patch\n*** Update File: "a\u2028.txt"\n+\u00e9\U0001f600\n*** End Patch\n'
    prompt = "go " + calls([("patch", {"input": patch})])
    for answer in (ask(prompt, tools=[PATCH]), streamed(prompt, tools=[PATCH])[-1].response):
        (call,) = answer.output
        same((call.type, call.name, call.input), ("custom_tool_call", "patch", patch))
    assert LARK["definition"] in upstream.last.body["tools"][0]["description"], upstream.last.body
    given = [user(prompt), *dumped([call]), output_of(call, "done")]
    same(ask(given, tools=[PATCH]).output_text, "results: done")
    same(upstream.last.body["messages"][1]["content"][0]["input"], {"input": patch})


def space(name: str, *tools: JSON) -> JSON:
    return {"type": "namespace", "name": name, "description": f"the {name}", "tools": list(tools)}


@check("tools: calls into a namespace come back by name and namespace")
def namespaces() -> None:
    tools: Any = [space("mcp__maps", WEATHER, PATCH), space("mcp__clock", WEATHER)]
    seen = ask("hi", tools=tools)
    names = [tool["name"] for tool in upstream.last.body["tools"]]
    same((len(names), len(set(names)), seen.output_text), (3, 3, "echo: hi"))
    for name, (place, kind) in zip(names, (
        ("mcp__maps", "function_call"), ("mcp__maps", "custom_tool_call"),
        ("mcp__clock", "function_call"),
    )):  # fmt: skip
        prompt = "go " + calls([(name, {"input": "x"} if kind[0] == "c" else {"city": "x"})])
        for answer in (ask(prompt, tools=tools), streamed(prompt, tools=tools)[-1].response):
            (call,) = answer.output
            wanted = "patch" if kind[0] == "c" else "get_weather"
            same((call.type, call.namespace, call.name), (kind, place, wanted))
        given = [user(prompt), *dumped([call]), output_of(call)]
        same(ask(given, tools=tools).output_text, "results: 18C")
        same(upstream.last.body["messages"][1]["content"][0]["name"], name)


@check("tools: additional_tools items and tool_search, as Codex uses them")
def later_tools() -> None:
    item: Any = {"type": "additional_tools", "role": "developer", "tools": [WEATHER, PATCH]}
    answer = ask([item, user("[[tool]] hi")])
    same([call.name for call in answer.output], ["get_weather"])
    same([tool["name"] for tool in upstream.last.body["tools"]], ["get_weather", "patch"])
    search: Any = {"type": "tool_search", "execution": "client", "description": "finds tools",
                   "parameters": function("f", query=CITY)["parameters"]}  # fmt: skip
    prompt = "go " + calls([("tool_search", {"query": "maps"})])
    for answer in (ask(prompt, tools=[search]), streamed(prompt, tools=[search])[-1].response):
        (call,) = answer.output
        same((call.type, call.execution, call.arguments), ("tool_search_call", "client",
                                                           {"query": "maps"}))  # fmt: skip
    loaded = space("maps", {**WEATHER, "defer_loading": True})
    found = {"type": "tool_search_output", "call_id": call.call_id, "execution": "client",
             "status": "completed", "tools": [loaded]}  # fmt: skip
    same(ask([user(prompt), *dumped([call]), found], tools=[search]).status, "completed")
    same(len(upstream.last.body["tools"]), 2, "what was found can be called")


@check("tool_choice: each form")
def tool_choices() -> None:
    tools: Any = [WEATHER, TIME]
    allowed = {"type": "allowed_tools", "mode": "required",
               "tools": [{"type": "function", "name": "get_time"}]}  # fmt: skip
    rows: list[Any] = [
        ("auto", ["message"]), ("none", ["message"]), ("required", ["get_weather"]),
        ({"type": "function", "name": "get_time"}, ["get_time"]), (allowed, ["get_time"]),
    ]  # fmt: skip
    for choice, wanted in rows:
        answer = ask("hi", "claude-opus-4-6", tools=tools, tool_choice=choice)
        found = [getattr(item, "name", item.type) for item in answer.output]
        same(found, wanted, str(choice))


@check("web search: calls and citations; not where only cached pages are wanted")
def web_search() -> None:
    tools: Any = [{"type": "web_search", "filters": {"allowed_domains": ["w.example"]}}]
    for answer in (ask("[[citations]] w", tools=tools),
                   streamed("[[citations]] w", tools=tools)[-1].response):  # fmt: skip
        assert "web_search_call" in types(answer.output), answer.output
        same(answer.output_text, "I look it up. 21C.")
        parts = [p for i in answer.output if i.type == "message" for p in i.content]
        ((part, note),) = [(p, a) for p in parts for a in p.annotations]
        same((note.type, note.url, note.title), ("url_citation", "https://w.example", "W"))
        same(part.text[note.start_index : note.end_index], "21C.")
    sent = upstream.last.body["tools"][0]
    same((sent["name"], sent["allowed_domains"]), ("web_search", ["w.example"]))
    given = [user("[[citations]] w"), *dumped(answer.output), user("and?")]
    same(ask(given, tools=tools).output_text, "echo: and?")
    cached: Any = [{"type": "web_search", "external_web_access": False}, WEATHER]
    ask("hi", tools=cached)
    same([t["name"] for t in upstream.last.body["tools"]], ["get_weather"])
    for answer in (ask("[[pause]] w", tools=tools),
                   streamed("[[pause]] w", tools=tools)[-1].response):  # fmt: skip
        same((answer.output_text, answer.status), ("Before. After.", "completed"))


@check("hosted tools that Claude has not are named, and refused if forced")
def hosted_tools() -> None:
    tools: Any = [WEATHER, {"type": "code_interpreter", "container": {"type": "auto"}},
                  {"type": "mcp", "server_label": "m", "server_url": "https://m.example"},
                  ]  # fmt: skip
    raw = client.responses.with_raw_response.create(model="sonnet", input="hi", tools=tools)
    ignored = raw.headers["x-claude-shim-ignored"]
    assert "code_interpreter" in ignored and "mcp" in ignored, ignored
    same([t["name"] for t in upstream.last.body["tools"]], ["get_weather"])
    error = raised(lambda: ask("hi", tools=tools, tool_choice={"type": "code_interpreter"}))
    same(error.status_code, 400)
    assert (error.param or "").startswith("tool"), error


# --- endings and errors ---------------------------------------------------------------------------


@check("endings: incomplete for a limit, a refusal is completed")
def endings() -> None:
    for mark in ("[[max_tokens]]", "[[context]]"):
        for answer in (ask(mark + " hi"), streamed(mark + " hi")[-1].response):
            reason = answer.incomplete_details.reason
            same((answer.status, reason), ("incomplete", "max_output_tokens"), mark)
            same([i.status for i in answer.output], ["incomplete"], mark)
    for mark in ("[[refusal]]", "[[refusal-midstream]]"):
        for answer in (ask(mark), streamed(mark)[-1].response):
            same((answer.status, answer.incomplete_details), ("completed", None), mark)
            parts = [part for item in answer.output for part in item.content]
            same(parts[-1].type, "refusal", mark)
            assert "declined" in parts[-1].refusal, parts


ERRORS = [
    # mark, class, status, type, code, words of the message
    ("400", openai.BadRequestError, 400, "invalid_request_error", None, "a scripted refusal"),
    ("400 prompt is too long: 5 tokens > 4 maximum", openai.BadRequestError, 400,
     "invalid_request_error", "context_length_exceeded", "prompt is too long"),
    ("401", openai.AuthenticationError, 401, "invalid_request_error", "invalid_api_key", "api-key"),
    ("402", openai.RateLimitError, 429, "insufficient_quota", "insufficient_quota", "billing"),
    ("429 retry-after=1", openai.RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded",
     "rate limit"),
    ("429", openai.RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded", "rate limit"),
    ("529", openai.InternalServerError, 503, "server_error", "server_is_overloaded", "verloaded"),
]  # fmt: skip


@check("errors: class, status, type, code and message before the answer begins")
def errors() -> None:
    each(itertools.product((False, True), ERRORS), one_error, at_once=8)


def one_error(row: Any) -> None:
    streaming, (mark, kind, status, error_type, code, words) = row
    text = f"[[error {mark}]] stream={streaming}"
    error = raised(lambda: ask(text, stream=streaming))
    assert isinstance(error, kind), f"{type(error)} {error}"
    same((error.status_code, error.type, error.code), (status, error_type, code))
    assert words in str(error), error
    same(error.request_id, upstream.told(text)[-1].request_id)
    wait = error.response.headers.get("retry-after")
    same(wait, "1" if "retry-after" in mark else None)


@check("errors: a stream that breaks off ends in `error` and `response.failed`, never completed")
def broken() -> None:
    marks = ("error-midstream", "cut", "cut-clean", "cut]] [[tool", "cut]] [[thinking",
             "error-midstream]] [[tool")  # fmt: skip
    each(marks, one_break)


def one_break(mark: str) -> None:
    given = f"[[{mark}]] a longer text"
    fields: Any = {"tools": [WEATHER], "reasoning": HIGH}
    error = raised(lambda: list(ask(given, stream=True, **fields)))
    assert isinstance(error, openai.APIError), repr(error)
    lines: list[str] = []
    request = client.responses.with_streaming_response.create(
        model="sonnet", input=given, stream=True, **fields
    )
    with request as response, contextlib.suppress(httpx2.RemoteProtocolError):
        lines.extend(response.iter_lines())
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    same([e["type"] for e in events[-2:]], ["error", "response.failed"], mark)
    same([e["sequence_number"] for e in events], list(range(len(events))))
    told, failed = events[-2]["error"], events[-1]["response"]
    same((failed["status"], failed["error"]["message"]), ("failed", told["message"]))
    assert {"type", "code", "message", "param"} <= set(told), told
    assert "response.completed" not in "".join(lines), lines
    calls_done = [i for i in failed["output"] if i["type"] == "function_call"]
    same([i for i in calls_done if i["status"] == "completed"], [], "a call that was cut")
    error = raised(lambda: ask(given, **fields))
    assert error.status_code >= 500, error
    if "cut" in mark:  # the other one may be tried again
        same(error.response.headers.get("x-should-retry"), "false")


@check("errors: bad input is a 400 that names its place; upstream is not called")
def bad_input() -> None:
    rows: list[Any] = [
        ({}, "input"), ({"input": 5}, "input"), ({"input": [5]}, "input"),
        ({"input": [{"type": "message", "role": "human", "content": "a"}]}, "input"),
        ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "hi", "tools": {}}, "tools"), ({"input": "hi", "stream": "yes"}, "stream"),
        ({"input": "hi", "text": {"format": {"type": "xml"}}}, "text"),
        ({"input": "hi", "background": True}, "background"),
        ({"input": "hi", "conversation": "conv_1"}, "conversation"),
        ({"input": "hi", "prompt": {"id": "pmpt_1"}}, "prompt"),
    ]  # fmt: skip
    each(rows, one_bad_input)
    same(upstream.messages, [])


def one_bad_input(row: Any) -> None:
    body = {"model": "sonnet", **row[0]}
    error = raised(lambda: client.post("/responses", cast_to=object, body=body))
    same((type(error), error.type), (openai.BadRequestError, "invalid_request_error"))
    assert (error.param or "").startswith(row[1]), f"param {error.param!r}"


@check("fields without effect are named, not dropped in silence")
def ignored_fields() -> None:
    raw = client.responses.with_raw_response.create(
        model="sonnet", input="hi", max_tool_calls=5, service_tier="flex", truncation="auto",
        top_logprobs=3, user="u@example.org", prompt_cache_key="k", temperature=0.3,
    )  # fmt: skip
    ignored = raw.headers["x-claude-shim-ignored"]
    assert "max_tool_calls" in ignored and "top_logprobs" in ignored, ignored
    with shim("--strict") as url:
        error = raised(lambda: ask("hi", by=client_of(url), max_tool_calls=5))
        same((error.status_code, error.param), (400, "max_tool_calls"))


@check("a client that hangs up ends the upstream request")
def hang_up() -> None:
    events = ask("[[slow]] " + "a long text " * 20, stream=True)
    next(iter(events))
    events.close()
    same(upstream.last.aborted, True)


# --- state ----------------------------------------------------------------------------------------


@check("state: retrieve, input_items, delete, and what store:false leaves out")
def stored() -> None:
    answer = ask([user("[[thinking]] one")], reasoning=HIGH, metadata={"a": "b"})
    again = client.responses.retrieve(answer.id)
    same(again.model_dump(), answer.model_dump())
    (item,) = client.responses.input_items.list(answer.id).data
    same((item.type, item.role, item.content[0].text), ("message", "user", "[[thinking]] one"))
    client.responses.delete(answer.id)
    unstored = ask("two", store=False)
    for gone in (answer.id, unstored.id, "resp_unknown"):
        error = raised(lambda gone=gone: client.responses.retrieve(gone))
        same(type(error), openai.NotFoundError, gone)
    error = raised(lambda: ask("x", previous_response_id=unstored.id))
    same((error.status_code, error.code, error.param),
         (400, "previous_response_not_found", "previous_response_id"))  # fmt: skip
    streaming = streamed("three")[-1].response
    same(client.responses.retrieve(streaming.id).output_text, "echo: three")


@check("state: previous_response_id through a tool loop; instructions are not inherited")
def previous() -> None:
    fields: Any = {"tools": [WEATHER], "reasoning": HIGH}
    answer = ask("[[thinking]] [[tool x3]] go", **fields)
    while answer.output[-1].type == "function_call":
        results = [output_of(c) for c in answer.output if c.type == "function_call"]
        answer = ask(results, previous_response_id=answer.id, **fields)
    same(answer.output_text, "results: 18C; 18C; 18C")
    same(blocks(), [["thinking", "tool_use"]] * 3)
    first = ask("one", instructions="be kind")
    same(ask("two", previous_response_id=first.id).output_text, "echo: two")
    same((blocks("user"), "system" in upstream.last.body), ([["text"]] * 2, False))


@check("state: items by reference, from the store and from an earlier answer")
def references() -> None:
    first = ask("[[thinking]] [[tool]] go", tools=[WEATHER], reasoning=HIGH)
    refer: list[Any] = [{"type": "item_reference", "id": item.id} for item in first.output]
    given = [user("[[thinking]] [[tool]] go"), *refer, output_of(first.output[-1])]
    same(ask(given, tools=[WEATHER], reasoning=HIGH).output_text, "results: 18C")
    same(blocks(), [["thinking", "tool_use"]])
    lost = {"type": "item_reference", "id": "msg_unknown"}
    error = raised(lambda: ask([user("hi"), lost]))
    same(error.status_code in (400, 404), True, str(error))
    assert "msg_unknown" in str(error), error
    same(ask([user("hi"), {"type": "item_reference", "id": "rs_unknown"}]).output_text, "echo: hi")


@check("state: each client key sees its own; off keeps nothing; a file outlives the shim")
def stores() -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = os.path.join(folder, "keys")
        with open(keys, "w", encoding="utf-8") as file:
            file.write("one-client-key-0001\ntwo-client-key-0002\n")
        os.chmod(keys, 0o600)
        path = os.path.join(folder, "responses.db")
        with shim("--client-key-file", keys, "--responses-store", path) as url:
            answer = ask("one", by=client_of(url, api_key="one-client-key-0001"))
            other = client_of(url, api_key="two-client-key-0002")
            same(type(raised(lambda: other.responses.retrieve(answer.id))), openai.NotFoundError)
            error = raised(lambda: ask("x", by=other, previous_response_id=answer.id))
            same(error.code, "previous_response_not_found")
        with shim("--client-key-file", keys, "--responses-store", path) as url:
            own = client_of(url, api_key="one-client-key-0001")
            same(own.responses.retrieve(answer.id).output_text, "echo: one")
            same(ask("two", by=own, previous_response_id=answer.id).output_text, "echo: two")
            same(blocks("user"), [["text"], ["text"]])
    with shim("--responses-store", "off") as url:
        kept_not = ask("one", by=client_of(url))
        error = raised(lambda: client_of(url).responses.retrieve(kept_not.id))
        same(type(error), openai.NotFoundError)


@check("input_tokens, compact, and what is refused: cancel, background")
def other_paths() -> None:
    counted = client.responses.input_tokens.count(model="sonnet", input="hello")
    assert counted.object == "response.input_tokens" and counted.input_tokens > 10, counted
    same(upstream.received()[-1].path.split("?")[0], "/v1/messages/count_tokens")
    history: list[Any] = [user("one"), {"role": "assistant", "content": "two"}, user("three")]
    compacted = client.responses.compact(model="sonnet", input=history)
    same(compacted.object, "response.compaction")
    assert "compaction" in types(compacted.output), compacted
    kept = [item for item in dumped(compacted.output) if item["type"] == "compaction"]
    same(ask([*kept, user("four")]).output_text.endswith("four"), True)
    assert "echo:" in json.dumps(upstream.last.body["messages"]), "the summary goes on"
    answer = ask("hello")
    same(raised(lambda: client.responses.cancel(answer.id)).status_code, 400)


@check("compaction_trigger: exactly one compaction item")
def compaction() -> None:
    asked = [user("one"), {"role": "assistant", "content": "two"}, {"type": "compaction_trigger"}]
    for answer in (ask(asked, tools=[WEATHER]), streamed(asked, tools=[WEATHER])[-1].response):
        same((types(answer.output), answer.status), (["compaction"], "completed"))
    same(ask([*dumped(answer.output), user("four")]).status, "completed")


@check("a WebSocket is refused at once, /v1/models is Codex's catalogue as well")
def codex_paths() -> None:
    line = http.client.HTTPConnection(urlsplit(SHIM).netloc, timeout=TIMEOUT)
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    line.request("GET", "/v1/responses", headers={**headers, "Sec-WebSocket-Key": "eA=="})
    same(line.getresponse().status, 426)
    line.close()
    catalogue: Any = client.get("/models?client_version=0.169.0", cast_to=object)
    required = set("slug display_name supported_reasoning_levels shell_type visibility "
                   "supported_in_api priority base_instructions support_verbosity "
                   "truncation_policy experimental_supported_tools".split())  # fmt: skip
    missing = {m.get("slug"): required - set(m) for m in catalogue["models"]}
    same({slug: names for slug, names in missing.items() if names}, {})
    assert "claude-sonnet-5-5" in missing, missing
    same({m.id for m in client.models.list().data} - set(missing), set())


@check("each field of the SDK's parameters is in exactly one of the shim's tables")
def tables() -> None:
    spec = importlib.util.spec_from_file_location("claude_shim", os.environ["SHIM_FILE"])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["claude_shim"] = module
    spec.loader.exec_module(module)
    names = ("RESPONSES_REQUEST", "RESPONSES_IGNORED", "RESPONSES_REJECTED")
    tables = {name: set(getattr(module, name)) for name in names}
    fields: set[str] = set()
    for kind in ("Base", "NonStreaming", "Streaming"):
        parameters = getattr(response_create_params, f"ResponseCreateParams{kind}")
        fields |= set(parameters.__annotations__)
    found = {f: [name for name, table in tables.items() if f in table] for f in sorted(fields)}
    same({f: where for f, where in found.items() if len(where) != 1}, {})


MODELS = (
    "opus", "sonnet", "haiku", "claude-fable-5-2", "claude-opus-5", "claude-sonnet-5",
    "claude-opus-4-8", "claude-opus-4-6", "claude-sonnet-4-6", "claude-opus-4-5",
    "claude-haiku-4-5", "claude-sonnet-4-5",
)  # fmt: skip


@check("every model, with every effort, a forced tool, a schema, sampling and a limit")
def every_model() -> None:
    each(itertools.product(MODELS, ("none", "minimal", "low", "high", "max")), one_model, at_once=4)


def one_model(row: Any) -> None:
    model, effort = row
    fields: Any = {"reasoning": {"effort": effort, "summary": "auto"}, "temperature": 0.3,
                   "top_p": 0.9}  # fmt: skip
    given: list[Any] = [user("[[thinking]] [[tool x2]] go")]
    for _ in range(3):
        answer = ask(given, model, tools=[WEATHER, PATCH], max_output_tokens=500, **fields)
        given += dumped(answer.output)
        given += [output_of(item) for item in answer.output if item.type == "function_call"]
    same(answer.output_text, "results: 18C; 18C")
    ask("[[tool]] go", model, tools=[WEATHER], tool_choice="required", **fields)
    schema = {"type": "json_schema", "name": "x", "schema": WEATHER["parameters"]}
    same(json.loads(ask("x", model, text={"format": schema}, **fields).output_text), ARGUMENTS)


@check("twelve clients at once, some of whom hang up: each gets its own answer")
def many_at_once() -> None:
    each(range(96), one_of_many, at_once=12)


def one_of_many(number: int) -> None:
    text = f"[[thinking]] I am number {number}."
    if number % 3 == 0:
        stream = ask(text, stream=True)
        next(iter(stream))
        stream.close()
    first = streamed(text)[-1].response if number % 2 else ask(text)
    same(first.output_text, f"echo: I am number {number}.")
    second = ask("And now?", previous_response_id=first.id)
    same(second.output_text, "echo: And now?")
    turns = [m["content"][-1]["text"] for m in upstream_body(f"echo: I am number {number}.")]
    same(turns, [text, first.output_text, "And now?"])


def upstream_body(words: str) -> list[JSON]:
    (received,) = upstream.told(words)
    return received.body["messages"]


@check("errors: silence before and within the answer ends in time")
def silence() -> None:
    limits = ("--retries", "0", "--first-byte-timeout", "1", "--silence-timeout", "1")
    with shim(*limits) as url:
        direct = client_of(url, max_retries=0)
        for streaming in (False, True):
            error = raised(lambda streaming=streaming: ask("[[hang]]", by=direct, stream=streaming))
            same((error.status_code, error.type, error.code), (504, "server_error", "timeout"))
        error = raised(lambda: list(ask("[[stall]] a longer text", by=direct, stream=True)))
        assert isinstance(error, openai.APIError), repr(error)


if __name__ == "__main__":
    sys.exit(run("responses", translated))
