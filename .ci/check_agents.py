"""OpenAI's Agents SDK against the shim, over Responses (its default) and Chat Completions."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    WebSearchTool,
    function_tool,
    set_tracing_disabled,
)
from harness import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SHIM,
    TIMEOUT,
    check,
    run,
    same,
    translated,
    upstream,
)
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from pydantic import BaseModel, Field

set_tracing_disabled(True)
logging.getLogger("openai.agents").setLevel(logging.CRITICAL)
Api = Literal["responses", "chat"]
APIS: tuple[Api, ...] = ("responses", "chat")


@function_tool
def get_weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"sunny in {len(city)}"


@function_tool
def get_time(zone: str = "UTC") -> str:
    """Tells the time."""
    return "noon"


class Person(BaseModel):
    name: str = Field(min_length=2)
    age: int = Field(ge=1, le=120)
    nick: str | None


@contextlib.asynccontextmanager
async def model_of(api: Api, name: str = "sonnet") -> AsyncIterator[Model]:
    client = AsyncOpenAI(base_url=SHIM + "/v1", api_key="anything", timeout=TIMEOUT, max_retries=0)
    async with client:
        if api == "chat":
            yield OpenAIChatCompletionsModel(name, client)
        else:
            yield OpenAIResponsesModel(name, client)


def roles(body: Any) -> list[str]:
    return [message["role"] for message in body["messages"]]


def kinds(body: Any) -> list[list[str]]:
    """The types of the blocks of each assistant turn."""
    turns = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
    return [[block["type"] for block in turn] for turn in turns]


@check("text, usage and instructions")
async def text() -> None:
    for api in APIS:
        async with model_of(api) as model:
            done = await Runner.run(Agent("a", instructions="be kind", model=model), "hello")
        same(done.final_output, "echo: hello", api)
        usage = done.context_wrapper.usage
        same((usage.input_tokens, usage.output_tokens), (PROMPT_TOKENS, OUTPUT_TOKENS), api)
        same(usage.input_tokens_details.cached_tokens, 8000, api)
        same(upstream.last.body["system"][0]["text"], "be kind", api)


@check("tools: a loop of three rounds, two calls at a time, streamed and not")
async def tools() -> None:
    for api in APIS:
        for streamed in (False, True):
            async with model_of(api) as model:
                agent = Agent("a", model=model, tools=[get_weather, get_time])
                done = await completed(agent, "[[tools-parallel x3]] go", streamed)
            outputs = [i.output for i in done.new_items if i.type == "tool_call_output_item"]
            same(len(outputs), 6)
            same(done.final_output, "results: " + "; ".join(outputs), api)
            same(kinds(upstream.last.body), [["text", "tool_use", "tool_use"]] * 3, api)


async def completed(agent: Agent[Any], text: Any, streamed: bool, **options: Any) -> Any:
    if not streamed:
        return await Runner.run(agent, text, **options)
    running = Runner.run_streamed(agent, text, **options)
    events = [event async for event in running.stream_events()]
    assert any(event.type == "raw_response_event" for event in events), events
    return running


@check("tools: thinking goes back with its signatures, though nothing is stored")
async def thinking() -> None:
    settings = ModelSettings(reasoning=Reasoning(effort="high", summary="auto"), store=False)
    for streamed in (False, True):
        async with model_of("responses") as model:
            agent = Agent("a", model=model, tools=[get_weather], model_settings=settings)
            done = await completed(agent, "[[thinking redacted]] [[tool x3]] go", streamed)
        body = upstream.last.body
        same(kinds(body), [["thinking", "redacted_thinking", "tool_use"]] * 3)
        same(body["output_config"]["effort"], "high")
        reasoned = [i.raw_item for i in done.new_items if i.type == "reasoning_item"]
        assert reasoned[0].summary[0].text.startswith("Let me think"), reasoned
        assert done.context_wrapper.usage.output_tokens_details.reasoning_tokens, done


@check("a tool that is required is called once, then the answer is free")
async def required() -> None:
    for api in APIS:
        async with model_of(api, "claude-opus-4-6") as model:
            settings = ModelSettings(tool_choice="required")
            agent = Agent("a", model=model, tools=[get_weather], model_settings=settings)
            done = await Runner.run(agent, "go")
        assert done.final_output.startswith("results: sunny"), (api, done)
        same(upstream.messages[-2].body["tool_choice"]["type"], "any", api)
        assert upstream.last.body.get("tool_choice", {}).get("type") != "any", api


@check("handoff: the second agent answers, with its own instructions")
async def handoff() -> None:
    for api in APIS:
        async with model_of(api) as model:
            second = Agent("Spanish agent", instructions="en breve", model=model)
            first = Agent("triage", instructions="pass on", model=model, handoffs=[second])
            done = await Runner.run(first, "[[tool]] hola")
        same(done.last_agent.name, "Spanish agent", api)
        assert done.final_output.startswith("results: {"), (api, done.final_output)
        before, after = (r.body for r in upstream.messages[-2:])
        same([b["system"][0]["text"] for b in (before, after)], ["pass on", "en breve"], api)
        same([t["name"] for t in before["tools"]], ["transfer_to_spanish_agent"], api)
        same(roles(after), ["user", "assistant", "user"], api)


@check("structured output, alone and after a tool")
async def structured() -> None:
    for api in APIS:
        async with model_of(api) as model:
            for asked, tools in (("somebody", []), ("[[tool]] somebody", [get_weather])):
                agent = Agent("a", model=model, tools=tools, output_type=Person)
                person = (await Runner.run(agent, asked)).final_output
                assert isinstance(person, Person) and person.age == 3, (api, person)
        schema = upstream.last.body["output_config"]["format"]["schema"]
        same(schema["required"], ["name", "age", "nick"], api)


@check("previous_response_id: the client sends what is new, upstream gets it all")
async def previous_response() -> None:
    async with model_of("responses") as model:
        agent = Agent("a", model=model, tools=[get_weather])
        first = await Runner.run(agent, "one")
        second = await Runner.run(agent, "two", previous_response_id=first.last_response_id)
        same(second.final_output, "echo: two")
        same([m["content"][0]["text"] for m in upstream.last.body["messages"]],
             ["one", "echo: one", "two"])  # fmt: skip
        chained = await Runner.run(
            agent, "[[thinking]] [[tool x3]] go", auto_previous_response_id=True,
            previous_response_id=second.last_response_id,
        )  # fmt: skip
        same(chained.final_output, "results: " + "; ".join(["sunny in 13"] * 3))
        same(roles(upstream.last.body), ["user", "assistant"] * 5 + ["user"])
        same(kinds(upstream.last.body), [["text"]] * 2 + [["thinking", "tool_use"]] * 3)


@check("previous_response_id: an unknown one is the documented error")
async def unknown_previous() -> None:
    async with model_of("responses") as model:
        try:
            await Runner.run(Agent("a", model=model), "x", previous_response_id="resp_unknown")
        except openai.BadRequestError as error:
            same((error.code, error.param), ("previous_response_not_found", "previous_response_id"))
            same(upstream.messages, [])
            return
    raise AssertionError("no error")


@check("sessions: the history of the SDK's own store")
async def sessions() -> None:
    for api in APIS:
        session = SQLiteSession("s")
        async with model_of(api) as model:
            agent = Agent("a", model=model, tools=[get_weather])
            for asked in ("one", "[[thinking]] [[tool]] two", "three"):
                done = await Runner.run(agent, asked, session=session)
        same(done.final_output, "echo: three", api)
        same(roles(upstream.last.body), ["user", "assistant"] * 3 + ["user"], api)
        session.close()


@check("web search: Claude's own, with citations")
async def web_search() -> None:
    async with model_of("responses") as model:
        agent = Agent("a", model=model, tools=[WebSearchTool()])
        done = await Runner.run(agent, "[[citations]] weather")
    same([t["name"] for t in upstream.last.body["tools"]], ["web_search"])
    types = [item.raw_item.type for item in done.new_items]
    assert "web_search_call" in types, types
    last: Any = done.new_items[-1].raw_item
    notes = [a for part in last.content for a in part.annotations]
    same([(a.type, a.url) for a in notes], [("url_citation", "https://w.example")])


@check("a stream that breaks off raises, and is no answer")
async def broken() -> None:
    for api in APIS:
        for mark in ("error-midstream", "cut", "cut-clean"):
            async with model_of(api) as model:
                running = Runner.run_streamed(Agent("a", model=model), f"[[{mark}]] a longer text")
                try:
                    async for _ in running.stream_events():
                        pass
                except openai.APIError as error:
                    assert not isinstance(error, openai.APIStatusError), repr(error)
                    continue
            raise AssertionError(f"{api} {mark}: no error, but {running.final_output}")


if __name__ == "__main__":
    sys.exit(run("agents", translated))
