"""LangChain's chat models against the shim: ChatOpenAI on both its APIs, and ChatAnthropic."""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
import sys
from typing import Any

import anthropic
import openai
from harness import OUTPUT_TOKENS, PROMPT_TOKENS, SHIM, TIMEOUT, calls, check, run, same, upstream
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, custom_tool
from pydantic import BaseModel, Field, SecretStr
from samples import PNG_BASE64


@tool
def get_weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"sunny in {len(city)}"


@tool
def get_time(zone: str = "UTC") -> str:
    """Tells the time."""
    return "noon"


class Person(BaseModel):
    """A person."""

    name: str = Field(min_length=2, description="the name")
    age: int = Field(ge=1, le=120)
    nick: str | None = None


def by_openai(model: str = "sonnet", **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=model, base_url=SHIM + "/v1", api_key=SecretStr("x"), max_retries=0, timeout=TIMEOUT,
        **options,
    )  # fmt: skip


def by_responses(model: str = "sonnet", **options: Any) -> ChatOpenAI:
    return by_openai(model, use_responses_api=True, **options)


def by_anthropic(model: str = "claude-opus-5-5", **options: Any) -> ChatAnthropic:
    options = {"max_tokens": 4000, "max_retries": 0, "timeout": TIMEOUT, **options}
    return ChatAnthropic(model=model, base_url=SHIM, api_key=SecretStr("x"), **options)


EACH = (by_openai, by_responses, by_anthropic)


def whole_of(chunks: Any) -> Any:
    """The chunks of a stream put together as LangChain does it."""
    return functools.reduce(operator.add, chunks)


@check("text, stream, async and usage, by each")
def text() -> None:
    for make in EACH:
        model = make()
        answer = model.invoke([SystemMessage("be kind"), HumanMessage("hello")])
        same(answer.text, "echo: hello")
        same(answer.usage_metadata["input_tokens"], PROMPT_TOKENS)
        same(answer.usage_metadata["output_tokens"], OUTPUT_TOKENS)
        same(answer.usage_metadata["input_token_details"]["cache_read"], 8000)
        same(whole_of(model.stream("hello")).text, "echo: hello")
    same([answer.text for answer in asyncio.run(all_at_once())], ["echo: hello"] * len(EACH))


async def all_at_once() -> list[Any]:
    """An answer by each; in one loop, as LangChain shares the connections of its models."""
    return await asyncio.gather(*(make().ainvoke("hello") for make in EACH))


@check("stream usage is counted once")
def stream_usage() -> None:
    for make in (by_openai, by_responses):
        chunks = list(make(stream_usage=True).stream("hello"))
        same(sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks), OUTPUT_TOKENS)


@check("tools: a loop of three turns, two calls at a time, by each")
def tools() -> None:
    for make in EACH:
        model = make().bind_tools([get_weather, get_time])
        messages: list[Any] = [HumanMessage("[[thinking]] [[tools-parallel x3]] go")]
        for _ in range(4):
            answer = whole_of(model.stream(messages))
            messages.append(answer)
            for call in answer.tool_calls:
                chosen = {"get_weather": get_weather, "get_time": get_time}[call["name"]]
                messages.append(chosen.invoke(call))
        results = [m.content for m in messages if isinstance(m, ToolMessage)]
        same((len(results), answer.text), (6, "results: " + "; ".join(results)))


@check("tools: a forced tool, by name and `any`")
def forced() -> None:
    for make, choice in itertools.product((by_openai, by_responses), ("get_weather", "any")):
        model = make("opus").bind_tools([get_weather], tool_choice=choice)
        same([c["name"] for c in model.invoke("[[tool]] hi").tool_calls], ["get_weather"])


@check("structured output by each method")
def structured() -> None:
    methods = (("json_schema", "[[json]]"), ("function_calling", "[[tool]]"))
    for make, (method, mark) in itertools.product((by_openai, by_responses), methods):
        model = make("opus").with_structured_output(Person, method=method)
        person = model.invoke(mark + " somebody")
        assert isinstance(person, Person) and person.age == 3, (method, person)
        older = make("claude-opus-4-6").with_structured_output(Person, method=method)
        same(older.invoke("x").age, 3, method)
    for make in (by_openai, by_responses):
        loose = make(temperature=0.2).with_structured_output(None, method="json_mode")
        same(loose.invoke("[[fenced]] as JSON"), {"answer": 42})
    native = by_anthropic().with_structured_output(Person, method="json_schema")
    same(native.invoke("somebody").age, 3)


@check("images, by each")
def images() -> None:
    image = {"type": "image", "base64": PNG_BASE64, "mime_type": "image/png"}
    for make in EACH:
        content: list[Any] = [{"type": "text", "text": "look"}, image]
        make().invoke([HumanMessage(content=content)])
        source = upstream.last.body["messages"][0]["content"][1]["source"]
        same((source["media_type"], source["data"]), ("image/png", PNG_BASE64))


@check("reasoning: effort by ChatOpenAI, signed thinking by ChatAnthropic")
def reasoning() -> None:
    same(by_openai("opus", reasoning_effort="low").invoke("hi").text, "echo: hi")
    same(upstream.last.body["output_config"]["effort"], "low")
    model = by_anthropic(thinking={"type": "adaptive", "display": "summarized"})
    first = model.invoke("[[thinking]] hi")
    assert any(b["type"] == "reasoning" and b["reasoning"] for b in first.content_blocks), first
    model.invoke([HumanMessage("[[thinking]] hi"), first, HumanMessage("and?")])


@check("Responses: signed thinking comes back in a tool loop, by items or by previous_response_id")
def responses_reasoning() -> None:
    options = {"reasoning": {"effort": "high", "summary": "auto"}}
    for own in ({"store": False, "include": ["reasoning.encrypted_content"]},
                {"use_previous_response_id": True}):  # fmt: skip
        model = by_responses(**options, **own).bind_tools([get_weather])
        messages: list[Any] = [HumanMessage("[[thinking redacted]] [[tool x3]] go")]
        for _ in range(4):
            answer = whole_of(model.stream(messages))
            messages += [answer, *(get_weather.invoke(call) for call in answer.tool_calls)]
        same(answer.text, "results: " + "; ".join(["sunny in 13"] * 3), str(own))
        turns = [m["content"] for m in upstream.last.body["messages"] if m["role"] == "assistant"]
        signed = ["thinking", "redacted_thinking", "tool_use"]
        same([[block["type"] for block in turn] for turn in turns], [signed] * 3, str(own))
        shown = [b for b in messages[1].content_blocks if b["type"] == "reasoning"]
        assert shown[0]["reasoning"].startswith("Let me think"), shown


@check("Responses: a custom tool is called with its text")
def custom_tools() -> None:
    @custom_tool(format={"type": "grammar", "syntax": "lark", "definition": "start: /.+/"})
    def run_code(text: str) -> str:
        """Runs code."""
        return f"ran {len(text)}"

    model = by_responses().bind_tools([run_code])
    asked: Any = HumanMessage("go " + calls([("run_code", {"input": "print(1)\n\u2028"})]))
    for answer in (model.invoke([asked]), whole_of(model.stream([asked]))):
        same(answer.tool_calls[0]["args"], {"__arg1": "print(1)\n\u2028"})
        result = run_code.invoke(answer.tool_calls[0])
        same(model.invoke([asked, answer, result]).text, "results: ran 10")
    turn = upstream.last.body["messages"][1]["content"]
    same([(b["name"], b["input"]) for b in turn], [("run_code", {"input": "print(1)\n\u2028"})])


@check("errors keep their class and text")
def errors() -> None:
    kinds = (("429", openai.RateLimitError), ("529", openai.InternalServerError))
    for make, (mark, kind) in itertools.product((by_openai, by_responses), kinds):
        try:
            make().invoke(f"[[error {mark}]]")
        except kind:
            continue
        raise AssertionError(f"{mark} was no {kind}")


@check("a stream that breaks off raises, by each")
def broken() -> None:
    for make, mark in itertools.product(EACH, ("error-midstream", "cut", "cut-clean")):
        chunks: list[Any] = []
        try:
            chunks.extend(make().stream(f"[[{mark}]] a longer text"))
        except (openai.APIError, anthropic.AnthropicError):
            continue
        raise AssertionError(f"{mark}: no error, but {chunks}")


if __name__ == "__main__":
    sys.exit(run("langchain"))
