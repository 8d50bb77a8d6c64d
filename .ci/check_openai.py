"""The official openai SDK against the shim: what it sees, and what upstream received."""

from __future__ import annotations

import contextlib
import datetime
import enum
import functools
import importlib.util
import json
import os
import sys
import time
from typing import Annotated, Any, Literal, Optional

import harness
import httpx2
import openai
from harness import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SHIM,
    THINKING_TOKENS,
    TIMEOUT,
    check,
    each,
    run,
    same,
    shim,
    translated,
    upstream,
)
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import completion_create_params
from pydantic import BaseModel, Field
from samples import PDF_BASE64, PNG_BASE64

JSON = dict[str, Any]
raised = functools.partial(harness.raised, openai.OpenAIError)


def client_of(url: str, **options: Any) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="anything", timeout=TIMEOUT, **options)


client = client_of(SHIM)
later = AsyncOpenAI(base_url=SHIM + "/v1", api_key="anything", timeout=TIMEOUT)


def user(*content: Any) -> JSON:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def ask(text: str, model: str = "sonnet", **fields: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[user(text)], **fields)


def streamed(text: str, model: str = "sonnet", **fields: Any) -> list[Any]:
    return list(ask(text, model, stream=True, **fields))


def deltas(chunks: list[Any], name: str) -> list[Any]:
    found = [getattr(c.choices[0].delta, name, None) for c in chunks if c.choices]
    return [value for value in found if value]


def finish_reasons(chunks: list[Any]) -> list[str]:
    found = [choice.finish_reason for c in chunks for choice in c.choices]
    return [reason for reason in found if reason]


def function(name: str, strict: Optional[bool] = None, **properties: Any) -> JSON:
    parameters = {"type": "object", "properties": properties, "required": list(properties),
                  "additionalProperties": False}  # fmt: skip
    made = {"name": name, "description": f"calls {name}", "parameters": parameters}
    return {"type": "function", "function": {**made, **({"strict": True} if strict else {})}}


CITY = {"type": "string", "description": "a city"}
WEATHER, TIME, NOW = function("get_weather", city=CITY), function("get_time", zone=CITY), \
    function("now")  # fmt: skip
ARGUMENTS = {"city": "some city \u2028\u00e9\U0001f600"}  # what the fake fills in
MODELS = (
    "opus", "sonnet", "haiku", "claude-fable-5-2", "claude-opus-5", "claude-sonnet-5",
    "claude-opus-4-8", "claude-opus-4-6", "claude-sonnet-4-6", "claude-opus-4-5",
    "claude-haiku-4-5", "claude-sonnet-4-5",
)  # fmt: skip


# --- text and usage -------------------------------------------------------------------------------


@check("text")
def text() -> None:
    answer = client.chat.completions.create(
        model="sonnet", messages=[{"role": "system", "content": "be kind"}, user("hello")]
    )
    same(answer.choices[0].message.content, "echo: hello")
    same((answer.choices[0].message.role, answer.choices[0].finish_reason), ("assistant", "stop"))
    same((answer.object, answer.model), ("chat.completion", "claude-sonnet-5-5"))
    assert abs(answer.created - time.time()) < 60, answer.created
    same(answer._request_id, upstream.last.request_id)
    body = upstream.last.body
    same((body["model"], body["max_tokens"]), ("claude-sonnet-5-5", 128_000))
    system = body["system"] if isinstance(body["system"], str) else body["system"][0]["text"]
    same((len(upstream.messages), system), (1, "be kind"))


def same_usage(usage: Any) -> None:
    same(usage.prompt_tokens, PROMPT_TOKENS, "prompt = input + cache reads + cache writes")
    same(usage.completion_tokens, OUTPUT_TOKENS)
    same(usage.total_tokens, PROMPT_TOKENS + OUTPUT_TOKENS)
    same(usage.prompt_tokens_details.cached_tokens, 8000)
    same(usage.prompt_tokens_details.cache_write_tokens, 1500)


@check("usage with cache and reasoning tokens")
def usage() -> None:
    answer = ask("[[thinking]] hello", reasoning_effort="high")
    same_usage(answer.usage)
    same(answer.usage.completion_tokens_details.reasoning_tokens, THINKING_TOKENS)


@check("stream: role first, dense pieces, one finish, no usage unless asked")
def stream() -> None:
    chunks = streamed("a longer text \u2028 with \u00e9\U0001f600")
    same("".join(deltas(chunks, "content")), "echo: a longer text \u2028 with \u00e9\U0001f600")
    same([c.choices[0].delta.role for c in chunks if c.choices[0].delta.role], ["assistant"])
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    same(finish_reasons(chunks), ["stop"])
    same(len({(c.id, c.created, c.model, c.object) for c in chunks}), 1)
    same([c for c in chunks if c.usage], [])
    assert len(deltas(chunks, "content")) > 1, "the pieces of upstream"


@check("stream: include_usage gives one last chunk without choices")
def stream_usage() -> None:
    chunks = streamed("hello", stream_options={"include_usage": True})
    same([bool(c.usage) for c in chunks], [False] * (len(chunks) - 1) + [True])
    same(chunks[-1].choices, [])
    same_usage(chunks[-1].usage)


@check("stream: the bytes are ASCII lines of `data:` and end with one [DONE]")
def stream_bytes() -> None:
    with client.chat.completions.with_streaming_response.create(
        model="sonnet", messages=[user("\u2028 \u00e9 \U0001f600")], stream=True
    ) as response:
        same(response.headers["content-type"].split(";")[0], "text/event-stream")
        same(response.headers["x-request-id"], upstream.last.request_id)
        lines = list(response.iter_lines())
    assert all(line.isascii() for line in lines), lines
    others = [line for line in lines if line and not line.startswith((": ", "data: "))]
    same(others, [], "other lines")
    written = [line for line in lines if line.startswith("data: ")]
    same((written[-1], written.count("data: [DONE]")), ("data: [DONE]", 1))


@check("with_streaming_response and with_raw_response without a stream")
def raw_response() -> None:
    body: Any = {"model": "sonnet", "messages": [user("hello")]}
    with client.chat.completions.with_streaming_response.create(**body) as response:
        same(response.parse().choices[0].message.content, "echo: hello")
    raw = client.chat.completions.with_raw_response.create(**body)
    same(raw.headers["x-request-id"], upstream.last.request_id)
    same(raw.headers["content-type"].split(";")[0], "application/json")
    assert "x-ratelimit-remaining-requests" in raw.headers, dict(raw.headers)


@check("stream helper: chat.completions.stream()")
def stream_helper() -> None:
    with client.chat.completions.stream(
        model="opus", messages=[user("[[thinking]] hello")], reasoning_effort="low"
    ) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    same(final.choices[0].message.content, "echo: hello")
    same((final.choices[0].finish_reason, final.model), ("stop", "claude-opus-5-5"))


@check("async: text, stream and tools")
async def asynchronous() -> None:
    answer = await later.chat.completions.create(model="sonnet", messages=[user("hello")])
    same(answer.choices[0].message.content, "echo: hello")
    stream = await later.chat.completions.create(
        model="sonnet", messages=[user("[[tool]] hello")], tools=[WEATHER], stream=True
    )
    chunks = [chunk async for chunk in stream]
    same(finish_reasons(chunks), ["tool_calls"])
    async with later.chat.completions.stream(model="sonnet", messages=[user("hello")]) as events:
        final = await events.get_final_completion()
    same(final.choices[0].message.content, "echo: hello")
    await later.close()


@check("the stream is the same however upstream's bytes are cut")
def framing() -> None:
    for mark in ("bytes", "lump", "crlf"):
        chunks = streamed(f"[[{mark}]] cut \u2028\u00e9\U0001f600 up")
        same("".join(deltas(chunks, "content")), "echo: cut \u2028\u00e9\U0001f600 up", mark)
        same(finish_reasons(chunks), ["stop"], mark)


@check("events, deltas and blocks nobody knows yet are skipped")
def unknown_events() -> None:
    same(ask("[[unknown]] hello").choices[0].message.content, "echo: hello")
    same("".join(deltas(streamed("[[unknown]] hello"), "content")), "echo: hello")


@check("stop reasons")
def stop_reasons() -> None:
    rows = {
        "[[max_tokens]]": "length", "[[context]]": "length", "[[refusal]]": "content_filter",
        "[[refusal-midstream]]": "content_filter", "[[stop END]]": "stop",
    }  # fmt: skip
    for mark, reason in rows.items():
        same(ask(mark, stop=["END", "\n"]).choices[0].finish_reason, reason, mark)
        same(finish_reasons(streamed(mark, stop=["END", "\n"])), [reason], mark)
    same(upstream.last.body["stop_sequences"], ["END"], "whitespace is refused upstream")


# --- tools ----------------------------------------------------------------------------------------


@check("tools: one call, stream and not")
def one_tool() -> None:
    answer = ask("[[tool]] weather", tools=[WEATHER])
    call = answer.choices[0].message.tool_calls[0]
    same((call.type, call.function.name), ("function", "get_weather"))
    same(json.loads(call.function.arguments), ARGUMENTS)
    same((answer.choices[0].finish_reason, answer.choices[0].message.content), ("tool_calls", None))
    sent = upstream.last.body["tools"][0]
    same({k: sent[k] for k in ("name", "description", "input_schema")},
         {"name": "get_weather", "description": "calls get_weather",
          "input_schema": WEATHER["function"]["parameters"]})  # fmt: skip
    chunks = streamed("[[tool]] weather", tools=[WEATHER])
    pieces = [call for calls in deltas(chunks, "tool_calls") for call in calls]
    same([p.index for p in pieces], [0] * len(pieces))
    same([(p.type, p.function.name) for p in pieces if p.id], [("function", "get_weather")])
    same(json.loads("".join(p.function.arguments or "" for p in pieces)), ARGUMENTS)
    assert len(pieces) > 3, "arguments are streamed as they come"


@check("tools: two at once, with text before them")
def parallel_tools() -> None:
    answer = ask("[[tools-parallel]]", tools=[WEATHER, TIME])
    message = answer.choices[0].message
    same([c.function.name for c in message.tool_calls], ["get_weather", "get_time"])
    same(message.content, "Okay, let's check:")
    chunks = streamed("[[tools-parallel]]", tools=[WEATHER, TIME])
    pieces = [call for calls in deltas(chunks, "tool_calls") for call in calls]
    same([(p.index, p.function.name) for p in pieces if p.id],
         [(0, "get_weather"), (1, "get_time")])  # fmt: skip
    same(len({p.id for p in pieces if p.id}), 2)
    same({c.index for chunk in chunks for c in chunk.choices}, {0}, "choices[].index")
    single = ask("[[tools-parallel]]", tools=[WEATHER, TIME], parallel_tool_calls=False)
    same(len(single.choices[0].message.tool_calls), 1)
    same(upstream.last.body["tool_choice"], {"type": "auto", "disable_parallel_tool_use": True})


@check("tools: a call without arguments has the arguments {}")
def tool_without_arguments() -> None:
    answer = ask("[[tool-no-args]]", tools=[NOW])
    same(answer.choices[0].message.tool_calls[0].function.arguments, "{}")
    chunks = streamed("[[tool-no-args]]", tools=[NOW])
    pieces = [call for calls in deltas(chunks, "tool_calls") for call in calls]
    same("".join(p.function.arguments or "" for p in pieces), "{}")
    bare = {"type": "function", "function": {"name": "bare"}}
    same(ask("[[tool]]", tools=[bare]).choices[0].message.tool_calls[0].function.arguments, "{}")


def tool_loop(turns: int, backwards: bool = False, **fields: Any) -> tuple[list[Any], Any]:
    """Plays the loop with the stream helper until the model answers with text."""
    messages: list[Any] = [user(f"[[tools-parallel x{turns}]] go")]
    for _ in range(turns + 1):
        with client.chat.completions.stream(
            model="sonnet", messages=messages, tools=[WEATHER, TIME], **fields
        ) as events:
            message = events.get_final_completion().choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        calls = message.tool_calls or []
        for call in reversed(calls) if backwards else calls:
            result = f"{call.function.name} of {len(messages)}"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not calls:
            break
    return messages, message


@check("tools: a loop of three turns with the stream helper")
def three_turns() -> None:
    messages, final = tool_loop(3)
    results = [m["content"] for m in messages if m["role"] == "tool"]
    same((len(results), final.content), (6, "results: " + "; ".join(results)))
    same(len(upstream.messages), 4)
    sent = upstream.last.body["messages"]
    same([m["role"] for m in sent], ["user", "assistant"] * 3 + ["user"])
    same([b["type"] for b in sent[1]["content"]], ["text", "tool_use", "tool_use"])
    same([b["type"] for b in sent[2]["content"]], ["tool_result"] * 2)


@check("tools: results out of order and images between them make one user turn")
def scattered_results() -> None:
    _, final = tool_loop(1, backwards=True)
    assert final.content.startswith("results: "), final
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG_BASE64}}
    calls = [
        {"id": f"call:{n}", "type": "function", "function": {"name": "f.g", "arguments": "{}"}}
        for n in (1, 2)
    ]
    tool = {"role": "tool", "tool_call_id": "call:1", "content": [picture]}
    messages: list[Any] = [
        user("look"), {"role": "assistant", "content": "", "tool_calls": calls},
        tool, user(picture), {**tool, "tool_call_id": "call:2", "content": "two"}, user(picture),
    ]  # fmt: skip
    client.chat.completions.create(model="sonnet", messages=messages)
    turn = upstream.last.body["messages"][-1]["content"]
    kinds = [block["type"] for block in turn]
    same(kinds, ["tool_result", "tool_result", "image", "image"])
    same(turn[0]["content"][0]["type"], "image")


@check("tools: names that upstream refuses go there and back")
def tool_names() -> None:
    odd = "files.read/" + "x" * 120
    answer = ask("[[tool]]", tools=[function(odd, path=CITY)])
    same(answer.choices[0].message.tool_calls[0].function.name, odd)
    chunks = streamed("[[tool]]", tools=[function(odd, path=CITY)])
    names = [c.function.name for calls in deltas(chunks, "tool_calls") for c in calls if c.id]
    same(names, [odd])


@check("tools: schemas that upstream refuses are made acceptable")
def tool_schemas() -> None:
    odd: list[Any] = [
        None, {}, {"properties": {}}, {"type": "object", "properties": {}, "$schema":
        "http://json-schema.org/draft-07/schema#"}, {"anyOf": [{"type": "object"}]},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0,
        "exclusiveMinimum": True}}}, {"type": "object", "properties": {"a": {"$ref":
        "#/definitions/n"}}, "definitions": {"n": {"type": "string"}}},
    ]  # fmt: skip
    for parameters in odd:
        bare = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        ask("hello", tools=[bare])


@check("tools: three dialects in one body, legacy functions, custom tools")
def tool_dialects() -> None:
    flat = {"type": "function", "name": "flat", "parameters": {"type": "object", "properties": {}}}
    native = {"name": "native", "input_schema": {"type": "object", "properties": {}}}
    custom = {"type": "custom", "custom": {"name": "patch", "description": "applies it"}}
    every: Any = [WEATHER, flat, native, custom]
    for name in ("flat", "native"):
        answer = ask(f"[[tool {name}]]", tools=every)
        same(answer.choices[0].message.tool_calls[0].function.name, name)
    call = ask("[[tool patch]]", tools=every).choices[0].message.tool_calls[0]
    same((call.type, call.custom.name), ("custom", "patch"))
    assert call.custom.input.startswith("some input"), call
    legacy = ask("[[tool]]", functions=[WEATHER["function"]])
    same(legacy.choices[0].finish_reason, "function_call")
    same(legacy.choices[0].message.function_call.name, "get_weather")
    same(json.loads(legacy.choices[0].message.function_call.arguments), ARGUMENTS)


@check("tool_choice in all its forms on all models")
def tool_choices() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for model in MODELS:
        for choice in ("auto", "none", "required", named, allowed):
            answer = ask("[[tool]] hi", model, tools=[WEATHER, TIME], tool_choice=choice)
            called = answer.choices[0].message.tool_calls or []
            same([c.function.name for c in called], [] if choice == "none" else ["get_weather"],
                 f"{model} {choice}")  # fmt: skip


# --- images, documents ----------------------------------------------------------------------------


@check("images: a PNG whose data URL says JPEG, and an https URL")
def images() -> None:
    urls = ("data:image/jpg;base64," + PNG_BASE64, "https://example.org/a.png")
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}} for url in urls]
    client.chat.completions.create(
        model="sonnet", messages=[user({"type": "text", "text": "look"}, *parts)]
    )
    same(upstream.last.body["messages"][0]["content"][1:],
         [{"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                       "data": PNG_BASE64}},
          {"type": "image", "source": {"type": "url", "url": urls[1]}}])  # fmt: skip


@check("documents: a PDF as file part")
def documents() -> None:
    for data in ("data:application/pdf;base64," + PDF_BASE64, PDF_BASE64):
        part = {"type": "file", "file": {"filename": "a.pdf", "file_data": data}}
        client.chat.completions.create(
            model="sonnet", messages=[user(part, {"type": "text", "text": "read"})]
        )
        block = upstream.last.body["messages"][0]["content"][0]
        same((block["type"], block["source"]),
             ("document", {"type": "base64", "media_type": "application/pdf",
                           "data": PDF_BASE64}))  # fmt: skip
        same(block.get("title"), "a.pdf")


# --- structured outputs ---------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Child(BaseModel):
    name: Annotated[str, Field(min_length=2, max_length=80)]
    age: Annotated[int, Field(ge=1, le=10)]


class Report(BaseModel):
    """Constraints that upstream's subset of JSON Schema does not know."""

    title: Annotated[str, Field(min_length=2, max_length=80, description="a title")]
    score: Annotated[float, Field(gt=0, lt=10)]
    children: Annotated[list[Child], Field(min_length=1, max_length=5)]
    first: Child
    colour: Colour
    kind: Literal["a", "b"]
    when: datetime.date
    note: Optional[str]
    either: int | str


def same_report(parsed: Any) -> None:
    assert isinstance(parsed, Report), parsed
    same((parsed.colour, parsed.children[0].age), (Colour.RED, 3))


@check("json_schema: parse() of a pydantic model with constraints")
def parse() -> None:
    answer = client.chat.completions.parse(
        model="sonnet", messages=[user("[[json]] report")], response_format=Report
    )
    same_report(answer.choices[0].message.parsed)
    same(answer.choices[0].finish_reason, "stop")
    chosen = upstream.last.body["output_config"]["format"]
    same((chosen["type"], set(chosen["schema"]["required"])),
         ("json_schema", set(Report.model_fields)))  # fmt: skip
    with client.chat.completions.stream(
        model="sonnet", messages=[user("[[json]] report")], response_format=Report
    ) as events:
        same_report(events.get_final_completion().choices[0].message.parsed)


@check("json_schema: a refusal and a cut text raise what the SDK has for them")
def parse_refused() -> None:
    rows = {"[[refusal]]": openai.ContentFilterFinishReasonError,
            "[[max_tokens]]": openai.LengthFinishReasonError}  # fmt: skip
    for mark, wanted in rows.items():
        try:
            client.chat.completions.parse(
                model="sonnet", messages=[user(mark)], response_format=Child
            )
        except wanted:
            continue
        raise AssertionError(f"{mark} did not raise {wanted}")


@check("json_schema: plain dictionaries, loose and recursive")
def loose_schemas() -> None:
    schemas: list[Any] = [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}},
        {"type": "object", "properties": {"a": {"oneOf": [{"type": "string"}, {"type": "null"}]}},
         "$schema": "http://json-schema.org/draft-07/schema#"},
        {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"},
         "minItems": 2, "maxItems": 4, "uniqueItems": True}}, "required": ["tags"]},
    ]  # fmt: skip
    for schema in schemas:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = ask("go", response_format=wanted)
        assert isinstance(json.loads(answer.choices[0].message.content), dict), answer


@check("json_object: one code fence is taken away, stream and not")
def json_object() -> None:
    wanted: Any = {"type": "json_object"}
    for mark in ("[[json]]", "[[fenced]]"):
        content = ask(mark + " as JSON", response_format=wanted).choices[0].message.content
        same(json.loads(content), {"answer": 42}, mark)
        chunks = streamed(mark + " as JSON", response_format=wanted)
        same(json.loads("".join(deltas(chunks, "content"))), {"answer": 42}, mark)


# --- reasoning ------------------------------------------------------------------------------------


@check("reasoning: effort goes up, reasoning_content and signed blocks come back")
def reasoning() -> None:
    message = ask("[[thinking]] hi", "opus", reasoning_effort="high").choices[0].message
    body = upstream.last.body
    same(body["output_config"]["effort"], "high")
    same(body["thinking"], {"type": "adaptive", "display": "summarized"})
    assert "1071" in message.reasoning_content, message
    assert message.thinking_blocks[0]["signature"], message
    chunks = streamed("[[thinking redacted]] hi", "opus", reasoning_effort="high")
    same("".join(deltas(chunks, "reasoning_content")), message.reasoning_content)
    blocks = [b for blocks in deltas(chunks, "thinking_blocks") for b in blocks]
    assert any(b.get("signature") for b in blocks), blocks


@check("reasoning: every effort on every model is taken upstream")
def efforts() -> None:
    for model in MODELS:
        for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max"):
            answer = ask("[[thinking]] hi", model, reasoning_effort=effort)
            same(answer.choices[0].message.content, "echo: hi", f"{model} {effort}")


def thinking_loop(keep: bool, model: str = "opus", **fields: Any) -> list[JSON]:
    """One tool turn with thinking; the blocks that upstream got back in the second request."""
    options: Any = {"model": model, "tools": [WEATHER], "reasoning_effort": "high", **fields}
    asked = user("[[thinking redacted]] [[tool]] weather")
    message = client.chat.completions.create(messages=[asked], **options).choices[0].message
    kept = message.model_dump(exclude_none=True)
    for name in () if keep else ("reasoning_content", "thinking_blocks", "reasoning_details"):
        kept.pop(name, None)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18C"}
    client.chat.completions.create(messages=[asked, kept, result], **options)
    return upstream.last.body["messages"][1]["content"]


@check("reasoning: signed blocks that the client returns go back unchanged")
def returned_thinking() -> None:
    blocks = thinking_loop(keep=True)
    same([b["type"] for b in blocks], ["thinking", "redacted_thinking", "tool_use"])


@check("reasoning: blocks that the client drops are restored by tool_use id")
def restored_thinking() -> None:
    blocks = thinking_loop(keep=False)
    same([b["type"] for b in blocks], ["thinking", "redacted_thinking", "tool_use"])


@check("reasoning: budgets of older models survive a tool loop")
def budget_thinking() -> None:
    blocks = thinking_loop(keep=True, model="claude-haiku-4-5")
    same(blocks[0]["type"], "thinking")
    same(upstream.last.body["thinking"]["type"], "enabled")


@check("reasoning: blocks bound to another conversation are stripped, once", refused=1)
def foreign_thinking() -> None:
    message = ask("[[thinking]] hi", "opus", reasoning_effort="high").choices[0].message
    kept = message.model_dump(exclude_none=True)
    answer = client.chat.completions.create(
        model="opus", messages=[user("something else"), kept, user("and now?")]
    )
    same(answer.choices[0].message.content, "echo: and now?")


# --- model rules ----------------------------------------------------------------------------------


@check("sampling, prefill and mid-conversation system on all models")
def model_rules() -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"}, user("hi"),
        {"role": "assistant", "content": "yes?"}, {"role": "system", "content": "be long"},
        user("again"), {"role": "assistant", "content": "I think "},
    ]  # fmt: skip
    for model in MODELS:
        for options in ({"temperature": 1.7, "top_p": 0.5}, {"top_p": 0.9}, {"temperature": 0}):
            client.chat.completions.create(model=model, messages=messages, **options)
        client.chat.completions.create(model=model, messages=messages[:3])
    client.chat.completions.create(
        model="claude-opus-4-6", messages=messages[1:2], temperature=0.3, max_tokens=100
    )
    same([upstream.last.body[k] for k in ("temperature", "max_tokens")], [0.3, 100])


@check("a parameter that upstream names in a 400 is dropped, once, and remembered", refused=3)
def dropped_parameter() -> None:
    rows: list[JSON] = [
        {"temperature": 0.3},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}, "reasoning_effort": "low"},
    ]
    for n, fields in enumerate(rows):
        upstream_before = len(upstream.messages)
        for _ in range(2):
            answer = ask("[[tool]] hi", "claude-haiku-4-5-20991231", **fields)
            assert answer.choices[0].finish_reason in ("stop", "tool_calls"), answer
        same(len(upstream.messages) - upstream_before, 3, str(rows[n]))
    same(ask("hi", "claude-opus-9").choices[0].message.content, "echo: hi")


@check("fields that have no place upstream are named, not dropped in silence")
def ignored_fields() -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="sonnet", messages=[user("hi")], seed=5, logit_bias={"1": 2}, user="u@example.org",
        metadata={"a": "b"}, store=True, max_completion_tokens=77,
    )  # fmt: skip
    ignored = raw.headers["x-claude-shim-ignored"]
    assert "seed" in ignored and "logit_bias" in ignored, ignored
    same(upstream.last.body["max_tokens"], 77)
    with shim("--strict") as url:
        try:
            client_of(url).chat.completions.create(model="sonnet", messages=[user("hi")], seed=5)
        except openai.BadRequestError as error:
            same(error.param, "seed")
        else:
            raise AssertionError("--strict let an ignored field pass")
    same(len(upstream.messages), 1)


@check("a body full of fields, from every client at once")
def many_fields() -> None:
    mark = {"type": "ephemeral"}
    messages: list[Any] = [
        {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": mark}]},
        {"role": "user", "content": "a", "cache_control": mark, "name": "bob"},
        {"role": "assistant", "content": "b", "refusal": None, "reasoning_content": ""},
        user({"type": "text", "text": "c", "cache_control": mark}),
    ]  # fmt: skip
    client.chat.completions.create(
        model="anthropic/claude-sonnet-5-5", messages=messages, n=1, presence_penalty=0,
        frequency_penalty=0, logprobs=False, modalities=["text"], service_tier="auto",
        response_format={"type": "text"}, verbosity="low", prompt_cache_key="k", tools=[],
        tool_choice="auto", extra_body={"enable_thinking": True, "usage": {"include": True}},
    )  # fmt: skip


@check("n=2 gives two choices, or a 400")
def two_choices() -> None:
    try:
        answer = ask("hi", n=2)
    except openai.BadRequestError as error:
        same(error.param, "n")
        return
    same([c.message.content for c in answer.choices], ["echo: hi"] * 2)
    same([c.index for c in answer.choices], [0, 1])
    same(len(upstream.messages), 2)


@check("web search: citations become annotations, a pause is continued")
def web_search() -> None:
    message = ask("[[citations]] w", web_search_options={}).choices[0].message
    same(message.content, "I look it up. 21C.")
    cited = message.annotations[0].url_citation
    same((cited.url, cited.title), ("https://w.example", "W"))
    same(message.content[cited.start_index : cited.end_index], "21C.")
    chunks = streamed("[[citations]] w", web_search_options={})
    same("".join(deltas(chunks, "content")), "I look it up. 21C.")
    same(len(deltas(chunks, "annotations")), 1)
    same(deltas(chunks, "tool_calls"), [], "server tools are not the client's")
    upstream.reset()
    answer = ask("[[pause]] w", web_search_options={})
    same((answer.choices[0].message.content, answer.choices[0].finish_reason),
         ("Before. After.", "stop"))  # fmt: skip
    same((len(upstream.messages), answer.usage.completion_tokens), (2, 2 * OUTPUT_TOKENS))
    chunks = streamed("[[pause]] w", web_search_options={})
    same("".join(deltas(chunks, "content")), "Before. After.")
    same(finish_reasons(chunks), ["stop"])


# --- errors ---------------------------------------------------------------------------------------

ERRORS = [
    # mark, class, status, type, code, words of the message
    ("400", openai.BadRequestError, 400, "invalid_request_error", None, "a scripted refusal"),
    ("400 prompt is too long: 5 tokens > 4 maximum", openai.BadRequestError, 400,
     "invalid_request_error", "context_length_exceeded", "prompt is too long"),
    ("401", openai.AuthenticationError, 401, "invalid_request_error", "invalid_api_key", "api-key"),
    ("402", openai.RateLimitError, 429, "insufficient_quota", "insufficient_quota", "billing"),
    ("403", openai.PermissionDeniedError, 403, "invalid_request_error", "permission_denied",
     "permission"),
    ("404", openai.NotFoundError, 404, "invalid_request_error", "model_not_found", "scripted"),
    ("413", openai.APIStatusError, 413, "invalid_request_error", "request_too_large", ""),
    ("413 html", openai.APIStatusError, 413, "invalid_request_error", "request_too_large", ""),
    ("429 retry-after=1", openai.RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded",
     "rate limit"),
    ("429", openai.RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded", "rate limit"),
    ("500", openai.InternalServerError, 500, "server_error", None, ""),
    ("504", openai.InternalServerError, 504, "server_error", "timeout", ""),
    ("529", openai.InternalServerError, 503, "server_error", "server_is_overloaded", "verloaded"),
]  # fmt: skip


@check("errors: class, status, type, code, message, request id; no attempt too many")
def errors() -> None:
    each([(s, *row) for s in (False, True) for row in ERRORS], one_error, at_once=8)


def one_error(row: Any) -> None:
    streaming, mark, kind, status, error_type, code, words = row
    text = f"[[error {mark}]] stream={streaming}"
    error = raised(lambda: ask(text, stream=streaming))
    assert isinstance(error, kind), f"{type(error)} {error}"
    same((error.status_code, error.type, error.code), (status, error_type, code))
    assert words in str(error), error
    requests = upstream.told(text)
    same(len(requests), 1 + 2 * (mark in RETRIED), "1 + --retries, none more by the SDK")
    same(error.request_id, requests[-1].request_id)
    wait = error.response.headers.get("retry-after")
    same(wait, "1" if "retry-after" in mark else None)


RETRIED = ("429 retry-after=1", "500", "504", "529")  # by the shim


@check("errors: the shim tries again before the first byte")
def retries() -> None:
    for mark in ("[[error 529 x1]]", "[[error 500 x2]]"):
        same(ask(mark + " hi").choices[0].message.content, "echo: hi", mark)


@check("errors: a fault in the middle of a stream is an APIError")
def midstream() -> None:
    for tools in ([], [WEATHER]):
        text = "[[error-midstream]] " + ("[[tool]]" if tools else "a longer text")
        error = raised(lambda text=text, tools=tools: streamed(text, tools=tools))
        assert isinstance(error, openai.APIError) and "verloaded" in str(error), repr(error)
        error = raised(lambda text=text, tools=tools: ask(text, tools=tools))
        same((error.status_code, error.code), (503, "server_is_overloaded"))


@check("errors: a stream that is cut never finishes")
def cut() -> None:
    each(("[[cut]]", "[[cut-clean]]", "[[cut]] [[tool]]", "[[cut]] [[thinking]]"), one_cut)


def one_cut(mark: str) -> None:
    body: Any = {"model": "opus", "messages": [user(mark + " a longer text")],
                 "tools": [WEATHER], "reasoning_effort": "high"}  # fmt: skip
    error = raised(lambda: unfinished(body))
    assert isinstance(error, openai.APIError), repr(error)
    lines: list[str] = []
    short = contextlib.suppress(httpx2.RemoteProtocolError)  # the body may end short as well
    request = client.chat.completions.with_streaming_response.create(stream=True, **body)
    with request as raw, short:
        lines.extend(line for line in raw.iter_lines() if line)
    assert not any("[DONE]" in line for line in lines), lines
    assert not any(reason in line for line in lines for reason in FINISHES), lines
    assert '"error"' in lines[-1], lines
    error = raised(lambda: client.chat.completions.create(**body))
    assert error.status_code >= 500, error
    same((error.type, error.response.headers.get("x-should-retry")), ("server_error", "false"))


FINISHES = ('"finish_reason":"', '"finish_reason": "')


def unfinished(body: JSON) -> None:
    for chunk in client.chat.completions.create(stream=True, **body):
        assert not chunk.choices or not chunk.choices[0].finish_reason, chunk


@check("errors: silence before and within the answer ends in time")
def silence() -> None:
    limits = ("--retries", "0", "--first-byte-timeout", "1", "--silence-timeout", "1")
    with shim(*limits) as url:
        each((False, True), lambda streaming: one_silence(client_of(url), streaming))


def one_silence(direct: OpenAI, streaming: bool) -> None:
    upstream.reset()
    body: Any = {"model": "sonnet", "messages": [user("[[hang]]")], "stream": streaming}
    error = raised(lambda: direct.chat.completions.create(**body))
    same((error.status_code, error.type, error.code), (504, "server_error", "timeout"))
    same(len(upstream.messages), 1, "the SDK must not start it anew")
    body = {"model": "sonnet", "messages": [user("[[stall]] a longer text")]}
    error = raised(lambda: list(direct.chat.completions.create(stream=True, **body)))
    assert isinstance(error, openai.APIError), repr(error)


@check("errors: bad input is a 400 that names its place; upstream is not called")
def bad_input() -> None:
    hi = user("hi")
    rows: list[Any] = [
        ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages"),
        ({"messages": [hi], "n": 0}, "n"), ({"messages": [hi], "max_tokens": 0}, "max_tokens"),
        ({"messages": [hi], "max_tokens": "5"}, "max_tokens"),
        ({"messages": [hi], "temperature": "hot"}, "temperature"),
        ({"messages": [hi], "tools": {}}, "tools"), ({"messages": [hi], "stream": "yes"}, "stream"),
        ({"messages": [hi], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [hi], "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": [hi], "modalities": ["audio"]}, "modalities"),
    ]  # fmt: skip
    each(rows, one_bad_input)
    same(upstream.messages, [])


def one_bad_input(row: Any) -> None:
    body = {"model": "sonnet", **row[0]}
    error = raised(lambda: client.post("/chat/completions", cast_to=object, body=body))
    same((type(error), error.type), (openai.BadRequestError, "invalid_request_error"))
    assert (error.param or "").startswith(row[1]), f"param {error.param!r}"


@check("errors: a model that is not Claude's is a 404, told by the shim")
def unknown_model() -> None:
    error = raised(lambda: ask("hi", "gpt-4o"))
    assert isinstance(error, openai.NotFoundError), repr(error)
    same((error.code, error.param), ("model_not_found", "model"))
    same(upstream.messages, [])


@check("errors: unknown paths and wrong methods are JSON")
def unknown_paths() -> None:
    error = raised(lambda: client.embeddings.create(model="x", input="y"))
    assert isinstance(error, openai.NotFoundError) and error.body["message"], repr(error)
    error = raised(lambda: client.get("/chat/completions/", cast_to=object))
    assert error.status_code in (404, 405) and error.body["message"], repr(error)
    error = raised(lambda: client.delete("/chat/completions", cast_to=object))
    same((error.status_code, error.response.headers["allow"].split(", ")[0]), (405, "POST"))


@check("client keys: the wrong one is a 401 before upstream, the right one passes")
def client_keys() -> None:
    with shim(CLAUDE_SHIM_API_KEY="let-me-in") as url:
        error = raised(client_of(url).models.list)
        assert isinstance(error, openai.AuthenticationError), repr(error)
        same((error.code, upstream.received()), ("invalid_api_key", []))
        right = OpenAI(base_url=url + "/v1", api_key="let-me-in")
        right.chat.completions.create(model="sonnet", messages=[user("hi")])
        azure = openai.AzureOpenAI(
            azure_endpoint=url, api_key="let-me-in", api_version="2024-10-21"
        )
        azure.chat.completions.create(model="sonnet", messages=[user("hi")])


@check("a client that hangs up ends the upstream request")
def hang_up() -> None:
    chunks = ask("[[slow]] " + "a long text " * 20, stream=True)
    next(iter(chunks))
    chunks.close()
    same(upstream.last.aborted, True)


@check("sixteen clients at once, some of whom hang up: each gets its own answer")
def many_at_once() -> None:
    marks = ("", "[[pause]]", "[[citations]]", "[[thinking]]", "[[bytes]]", "[[error 529 x1]]",
             "[[error 400]]", "[[cut]]")  # fmt: skip
    each([(n, marks[n % len(marks)]) for n in range(160)], one_of_many, at_once=16)


def one_of_many(row: tuple[int, str]) -> None:
    number, mark = row
    fields: JSON = {"web_search_options": {}} if mark in ("[[pause]]", "[[citations]]") else {}
    text = f"{mark} I am number {number}."
    if mark in ("[[error 400]]", "[[cut]]"):
        raised(lambda: ask(text))
        return
    stream = ask(text, stream=True, **fields)
    if number % 3 == 0:
        next(iter(stream))
        stream.close()
    answer = ask(text, **fields).choices[0].message.content
    wanted = {"[[pause]]": "Before. After.", "[[citations]]": "I look it up. 21C."}
    same(answer, wanted.get(mark, f"echo: I am number {number}."))
    if number % 3:
        same("".join(deltas(list(stream), "content")), answer)


# --- models, legacy completions, tables -----------------------------------------------------------


@check("errors: what breaks before the answer begins is told in the dialect, once")
def broken_before() -> None:
    error = raised(lambda: ask("[[cut-head]]"))
    same((error.status_code, error.type), (502, "server_error"))
    assert "Connection" in error.message or "upstream" in error.message, error
    same(error.response.headers.get("x-should-retry"), "false")


@check("models: list, retrieve, 404")
def models() -> None:
    listed = client.models.list().data
    found = {m.id: m for m in listed}
    assert {"claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"} <= set(found), found
    one = client.models.retrieve("claude-opus-5-5")
    same((one.object, one.owned_by, type(one.created)), ("model", "anthropic", int))
    error = raised(lambda: client.models.retrieve("gpt-4o"))
    same((type(error), error.code), (openai.NotFoundError, "model_not_found"))


@check("legacy completions, stream and not")
def completions() -> None:
    answer = client.completions.create(model="sonnet", prompt="hello", max_tokens=50)
    same((answer.object, answer.choices[0].text), ("text_completion", "echo: hello"))
    same((answer.choices[0].finish_reason, answer.usage.prompt_tokens), ("stop", PROMPT_TOKENS))
    several = client.completions.create(model="sonnet", prompt=["a", "b"], max_tokens=50)
    same([c.text for c in several.choices], ["echo: a", "echo: b"])
    chunks = list(client.completions.create(model="sonnet", prompt="hello", stream=True))
    same("".join(c.choices[0].text for c in chunks if c.choices), "echo: hello")
    same({c.object for c in chunks}, {"text_completion"})
    error = raised(lambda: client.completions.create(model="sonnet", prompt=[1, 2, 3]))
    same(error.status_code, 400)


@check("each field of the SDK's parameters is in exactly one of the shim's tables")
def tables() -> None:
    spec = importlib.util.spec_from_file_location("claude_shim", os.environ["SHIM_FILE"])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["claude_shim"] = module
    spec.loader.exec_module(module)
    tables = {name: set(getattr(module, name))
              for name in ("CHAT_REQUEST", "CHAT_IGNORED", "CHAT_REJECTED")}  # fmt: skip
    fields: set[str] = set()
    for kind in ("Base", "NonStreaming", "Streaming"):
        parameters = getattr(completion_create_params, f"CompletionCreateParams{kind}")
        fields |= set(parameters.__annotations__)
    wrong = {f: [name for name, table in tables.items() if f in table] for f in sorted(fields)}
    same({f: names for f, names in wrong.items() if len(names) != 1}, {})


if __name__ == "__main__":
    sys.exit(run("openai", translated))
