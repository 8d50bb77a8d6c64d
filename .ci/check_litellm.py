"""LiteLLM against the shim, as an OpenAI-compatible endpoint and as Anthropic's."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm
from harness import OUTPUT_TOKENS, PROMPT_TOKENS, SHIM, TIMEOUT, check, each, run, same, upstream
from pydantic import BaseModel, Field
from readme import printed
from samples import PNG_BASE64

litellm.suppress_debug_info = True
litellm.telemetry = False
ROUTES = (
    {"model": "openai/sonnet", "api_base": SHIM + "/v1"},
    {"model": "litellm_proxy/claude-opus-5-5", "api_base": SHIM},
    {"model": "anthropic/claude-opus-4-6", "api_base": SHIM},
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                       "required": ["city"]},
    },
}  # fmt: skip
TIME = {**WEATHER, "function": {**WEATHER["function"], "name": "get_time"}}


class Person(BaseModel):
    name: str = Field(min_length=2)
    age: int = Field(ge=1, le=120)


def ask(route: dict[str, str], content: Any, **fields: Any) -> Any:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    options = {"api_key": "x", "num_retries": 0, "max_retries": 0, "timeout": TIMEOUT, **fields}
    return litellm.completion(messages=messages, **route, **options)


@check("text, stream, async and usage, by each route")
def text() -> None:
    for route in ROUTES:
        answer = ask(route, "hello")
        same(answer.choices[0].message.content, "echo: hello", str(route))
        same((answer.usage.prompt_tokens, answer.usage.completion_tokens),
             (PROMPT_TOKENS, OUTPUT_TOKENS), str(route))  # fmt: skip
        same(answer.usage.prompt_tokens_details.cached_tokens, 8000, str(route))
        chunks = list(ask(route, "hello", stream=True, stream_options={"include_usage": True}))
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        same("".join(pieces), "echo: hello", str(route))
        same([c.usage.prompt_tokens for c in chunks if getattr(c, "usage", None)],
             [PROMPT_TOKENS], str(route))  # fmt: skip
        later = litellm.acompletion(
            messages=[{"role": "user", "content": "hello"}], api_key="x", **route
        )
        same(asyncio.run(later).choices[0].message.content, "echo: hello")


@check("tools: a loop of three turns, two calls at a time, by each route")
def tools() -> None:
    for route in ROUTES:
        messages: list[Any] = [{"role": "user", "content": "[[tools-parallel x3]] go"}]
        for _ in range(4):
            message = ask(route, messages, tools=[WEATHER, TIME]).choices[0].message
            messages.append(message.model_dump())
            for call in message.tool_calls or []:
                name = call.function.name
                messages.append({"role": "tool", "tool_call_id": call.id, "content": name})
        results = [m["content"] for m in messages if m["role"] == "tool"]
        same((len(results), message.content), (6, "results: " + "; ".join(results)), str(route))


@check("tools: streamed calls are put together, the required one is called")
def streamed_tools() -> None:
    for route in ROUTES[:2]:
        chunks = list(ask(route, "[[tools-parallel]]", tools=[WEATHER, TIME], stream=True,
                          tool_choice="required"))  # fmt: skip
        whole = litellm.stream_chunk_builder(chunks)
        calls = whole.choices[0].message.tool_calls
        same([c.function.name for c in calls], ["get_weather", "get_time"])
        assert [json.loads(c.function.arguments)["city"] for c in calls], calls
        same(whole.choices[0].finish_reason, "tool_calls")


@check("structured output from a pydantic model, by each route")
def structured() -> None:
    for route in ROUTES:
        answer = ask(route, "[[json]] somebody", response_format=Person)
        same(Person.model_validate_json(answer.choices[0].message.content).age, 3, str(route))


@check("reasoning: content and signed blocks, sent back in a tool loop")
def reasoning() -> None:
    for route in ROUTES[:2]:
        asked = {"role": "user", "content": "[[thinking]] [[tool]] go"}
        options: Any = {"tools": [WEATHER], "reasoning_effort": "low"}
        options["allowed_openai_params"] = ["reasoning_effort"]
        message = ask(route, [asked], **options).choices[0].message
        assert "1071" in (message.reasoning_content or ""), message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18C"}
        ask(route, [asked, message.model_dump(), result], **options)
        kinds = [block["type"] for block in upstream.last.body["messages"][1]["content"]]
        same(kinds, ["thinking", "tool_use"], str(route))


@check("images, by each route")
def images() -> None:
    url = "data:image/png;base64," + PNG_BASE64
    part = {"type": "image_url", "image_url": {"url": url}}
    for route in ROUTES:
        ask(route, [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}])
        source = upstream.last.body["messages"][0]["content"][-1]["source"]
        same((source["media_type"], source["data"]), ("image/png", PNG_BASE64), str(route))


ERRORS = (
    ("400", litellm.BadRequestError),
    ("400 prompt is too long: 5 tokens > 4 maximum", litellm.ContextWindowExceededError),
    ("401", litellm.AuthenticationError),
    ("404", litellm.NotFoundError),
    ("429 retry-after=1", litellm.RateLimitError),
    ("529", (litellm.ServiceUnavailableError, litellm.InternalServerError)),
)


@check("errors are LiteLLM's own classes")
def errors() -> None:
    each(ERRORS, one_error, at_once=6)


def one_error(row: Any) -> None:
    mark, kinds = row
    try:
        ask(ROUTES[0], f"[[error {mark}]]")
    except kinds:
        return
    raise AssertionError("no error")


@check("Responses: text, a stream, a tool loop by previous_response_id, the bridge from chat")
def responses() -> None:
    options: Any = {"model": "openai/sonnet", "api_base": SHIM + "/v1", "api_key": "x"}
    same(litellm.responses(input="hello", **options).output[0].content[0].text, "echo: hello")
    kinds = [e.type.value for e in litellm.responses(input="hello", stream=True, **options)]
    same((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    tool = {"type": "function", **WEATHER["function"]}
    fields: Any = {"tools": [tool], "reasoning": {"effort": "high", "summary": "auto"}, **options}
    answer = litellm.responses(input="[[thinking]] [[tool x2]] go", **fields)
    for _ in range(2):
        same([item.type for item in answer.output], ["reasoning", "function_call"])
        result = {"type": "function_call_output", "call_id": answer.output[1].call_id}
        given = [{**result, "output": "18C"}]
        answer = litellm.responses(input=given, previous_response_id=answer.id, **fields)
    same(answer.output[-1].content[0].text, "results: 18C; 18C")
    asked = [{"role": "user", "content": "hello"}]
    bridged = litellm.completion(messages=asked, **{**options, "model": "openai/responses/sonnet"})
    same(bridged.choices[0].message.content, "echo: hello")


@check("README: DSPy, which calls by LiteLLM")
def dspy_example() -> None:
    same(printed("dspy", SHIM), "echo: Say hello.\n")


if __name__ == "__main__":
    sys.exit(run("litellm"))
