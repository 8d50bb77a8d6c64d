"""LangChain's two chat models against the shim: ChatOpenAI and ChatAnthropic."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import openai
from harness import OUTPUT_TOKENS, PROMPT_TOKENS, SHIM, TIMEOUT, check, run, same, upstream
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
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


def by_anthropic(model: str = "claude-opus-5-5", **options: Any) -> ChatAnthropic:
    options = {"max_tokens": 4000, "max_retries": 0, "timeout": TIMEOUT, **options}
    return ChatAnthropic(model=model, base_url=SHIM, api_key=SecretStr("x"), **options)


BOTH = (by_openai, by_anthropic)


@check("text, stream, async and usage, by both")
def text() -> None:
    for make in BOTH:
        model = make()
        answer = model.invoke([SystemMessage("be kind"), HumanMessage("hello")])
        same(answer.text, "echo: hello")
        same(answer.usage_metadata["input_tokens"], PROMPT_TOKENS)
        same(answer.usage_metadata["output_tokens"], OUTPUT_TOKENS)
        same(answer.usage_metadata["input_token_details"]["cache_read"], 8000)
        whole: Any = None
        for chunk in model.stream("hello"):
            whole = chunk if whole is None else whole + chunk
        same(whole.text, "echo: hello")
        same(asyncio.run(model.ainvoke("hello")).text, "echo: hello")


@check("stream usage is counted once")
def stream_usage() -> None:
    chunks = list(by_openai(stream_usage=True).stream("hello"))
    same(sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks), OUTPUT_TOKENS)


@check("tools: a loop of three turns, two calls at a time, by both")
def tools() -> None:
    for make in BOTH:
        model = make().bind_tools([get_weather, get_time])
        messages: list[Any] = [HumanMessage("[[thinking]] [[tools-parallel x3]] go")]
        for _ in range(4):
            answer: Any = None
            for chunk in model.stream(messages):
                answer = chunk if answer is None else answer + chunk
            messages.append(answer)
            for call in answer.tool_calls:
                chosen = {"get_weather": get_weather, "get_time": get_time}[call["name"]]
                messages.append(chosen.invoke(call))
        results = [m.content for m in messages if isinstance(m, ToolMessage)]
        same((len(results), answer.text), (6, "results: " + "; ".join(results)))


@check("tools: a forced tool, by name and `any`")
def forced() -> None:
    for choice in ("get_weather", "any"):
        model = by_openai("opus").bind_tools([get_weather], tool_choice=choice)
        same([c["name"] for c in model.invoke("[[tool]] hi").tool_calls], ["get_weather"])


@check("structured output by each method")
def structured() -> None:
    for method, mark in (("json_schema", "[[json]]"), ("function_calling", "[[tool]]")):
        model = by_openai("opus").with_structured_output(Person, method=method)
        person = model.invoke(mark + " somebody")
        assert isinstance(person, Person) and person.age == 3, (method, person)
        older = by_openai("claude-opus-4-6").with_structured_output(Person, method=method)
        same(older.invoke("x").age, 3, method)
    loose = by_openai(temperature=0.2).with_structured_output(None, method="json_mode")
    same(loose.invoke("[[fenced]] as JSON"), {"answer": 42})
    native = by_anthropic().with_structured_output(Person, method="json_schema")
    same(native.invoke("somebody").age, 3)


@check("images, by both")
def images() -> None:
    image = {"type": "image", "base64": PNG_BASE64, "mime_type": "image/png"}
    for make in BOTH:
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


@check("errors keep their class and text")
def errors() -> None:
    for mark, kind in (("429", openai.RateLimitError), ("529", openai.InternalServerError)):
        try:
            by_openai().invoke(f"[[error {mark}]]")
        except kind:
            continue
        raise AssertionError(f"{mark} was no {kind}")


if __name__ == "__main__":
    sys.exit(run("langchain"))
