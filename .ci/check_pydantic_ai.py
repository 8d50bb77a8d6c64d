"""pydantic-ai against the shim: its models for Chat Completions, Responses and Anthropic."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
from anthropic import AsyncAnthropic
from harness import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SHIM,
    THINKING_TOKENS,
    TIMEOUT,
    check,
    run,
    same,
    upstream,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, BinaryContent, NativeOutput, PromptedOutput, ThinkingPart, ToolOutput
from pydantic_ai.exceptions import ModelAPIError, UnexpectedModelBehavior
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from samples import PNG_BASE64

EACH = ("chat", "responses", "anthropic")


class Person(BaseModel):
    """A person."""

    name: str = Field(min_length=2, description="the name")
    age: int = Field(ge=1, le=120)
    nick: str | None = None


class Number(BaseModel):
    answer: int


@contextlib.asynccontextmanager
async def model_of(api: str, name: str = "claude-sonnet-5-5") -> AsyncIterator[Model]:
    options: Any = {"api_key": "anything", "timeout": TIMEOUT, "max_retries": 0}
    if api == "anthropic":
        async with AsyncAnthropic(base_url=SHIM, **options) as native:
            yield AnthropicModel(name, provider=AnthropicProvider(anthropic_client=native))
        return
    async with AsyncOpenAI(base_url=SHIM + "/v1", **options) as client:
        kind = OpenAIResponsesModel if api == "responses" else OpenAIChatModel
        yield kind(name, provider=OpenAIProvider(openai_client=client))


def with_tools(agent: Agent[Any, Any]) -> None:
    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Tells the weather of a city."""
        return f"sunny in {len(city)}"

    @agent.tool_plain
    def get_time(zone: str = "UTC") -> str:
        """Tells the time."""
        return "noon"


def kinds(body: Any) -> list[list[str]]:
    """The types of the blocks of each assistant turn."""
    turns = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
    return [[block["type"] for block in turn] for turn in turns]


@check("text, stream and usage, by each")
async def text() -> None:
    for api in EACH:
        async with model_of(api) as model:
            agent: Agent[Any, str] = Agent(model, instructions="be kind")
            done = await agent.run("hello")
            same(done.output, "echo: hello", api)
            usage = done.usage
            same((usage.input_tokens, usage.output_tokens), (PROMPT_TOKENS, OUTPUT_TOKENS), api)
            same(usage.cache_read_tokens, 8000, api)
            async with agent.run_stream("hello") as stream:
                same("".join([d async for d in stream.stream_text(delta=True)]), "echo: hello", api)
        system = upstream.last.body["system"]
        same(system if isinstance(system, str) else system[0]["text"], "be kind", api)


@check("tools: a loop of three rounds, two calls at a time, by each")
async def tools() -> None:
    for api in EACH:
        async with model_of(api) as model:
            agent: Agent[Any, str] = Agent(model)
            with_tools(agent)
            done = await agent.run("[[tools-parallel x3]] go")
        same(done.output.count("noon"), 3, api)
        same(kinds(upstream.last.body), [["text", "tool_use", "tool_use"]] * 3, api)
        same(len(upstream.last.body["messages"]), 7, api)


@check("thinking: it is seen, counted, and goes back signed, by each")
async def thinking() -> None:
    for api in EACH:
        own: dict[str, Any] = {
            "chat": {"openai_reasoning_effort": "high"},
            "responses": {"openai_reasoning_effort": "high", "openai_reasoning_summary": "auto",
                          "openai_send_reasoning_ids": True},
            "anthropic": {"anthropic_thinking": {"type": "adaptive", "display": "summarized"}},
        }[api]  # fmt: skip
        async with model_of(api) as model:
            agent: Agent[Any, str] = Agent(model, model_settings=own)
            with_tools(agent)
            done = await agent.run("[[thinking redacted]] [[tool x3]] go")
            again = await agent.run("and?", message_history=done.all_messages())
        same(again.output, "echo: and?", api)
        signed = ["thinking", "redacted_thinking", "tool_use"]
        loop = next(r for r in reversed(upstream.messages) if b"and?" not in r.raw)
        same(kinds(loop.body), [signed] * 3, api)
        parts = [p for message in done.all_messages() for p in message.parts]
        shown = [p.content for p in parts if isinstance(p, ThinkingPart) and p.content]
        assert shown and shown[0].startswith("Let me think"), (api, shown)
        usage = done.usage
        if api != "anthropic":  # where pydantic-ai does not take it from the answer
            same(usage.details.get("reasoning_tokens"), 4 * THINKING_TOKENS, api)


@check("structured output by a forced tool, a schema and a prompt, by each")
async def structured() -> None:
    for api in EACH:
        for kind, asked in ((ToolOutput, "[[tool final_result]] x"), (NativeOutput, "x")):
            async with model_of(api, "claude-opus-4-6") as model:
                person = (await Agent(model, output_type=kind(Person)).run(asked)).output
            same((type(person), person.age), (Person, 3), f"{api} {kind}")
        same(upstream.last.body["output_config"]["format"]["type"], "json_schema", api)
        async with model_of(api) as model:
            loose: Agent[Any, Any] = Agent(model, output_type=PromptedOutput(Number))
            same((await loose.run("[[json]] x")).output, Number(answer=42), api)


@check("images, by each")
async def images() -> None:
    picture = BinaryContent.from_data_uri("data:image/png;base64," + PNG_BASE64)
    for api in EACH:
        async with model_of(api) as model:
            same((await Agent(model).run(["look", picture])).output, "echo: look", api)
        source = upstream.last.body["messages"][0]["content"][1]["source"]
        same((source["media_type"], source["data"]), ("image/png", PNG_BASE64), api)


@check("Responses: previous_response_id in place of the history")
async def previous_response() -> None:
    async with model_of("responses") as model:
        settings: Any = {"openai_previous_response_id": "auto", "openai_store": True}
        agent: Agent[Any, str] = Agent(model, model_settings=settings)
        with_tools(agent)
        first = await agent.run("[[thinking]] [[tool x3]] one")
        second = await agent.run("two", message_history=first.all_messages())
    same(second.output, "echo: two")
    roles = [message["role"] for message in upstream.last.body["messages"]]
    same(roles, ["user", "assistant"] * 4 + ["user"])


@check("a stream that breaks off raises, by each")
async def broken() -> None:
    for api in EACH:
        for mark in ("error-midstream", "cut", "cut-clean"):
            pieces: list[str] = []
            try:
                async with model_of(api) as model:
                    agent: Agent[Any, str] = Agent(model)
                    async with agent.run_stream(f"[[{mark}]] a longer text") as stream:
                        pieces.extend([d async for d in stream.stream_text(delta=True)])
            except (ModelAPIError, UnexpectedModelBehavior, openai.APIError, anthropic.APIError):
                continue
            raise AssertionError(f"{api} {mark}: no error, but {pieces}")


if __name__ == "__main__":
    sys.exit(run("pydantic_ai"))
