"""The official anthropic SDK against the shim: what it sees, and that nothing was touched."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from typing import Any

import anthropic
import harness
import httpx2
from anthropic import Anthropic, AsyncAnthropic, beta_tool
from harness import (
    OUTPUT_TOKENS,
    SHIM,
    TIMEOUT,
    UPSTREAM_KEY,
    check,
    each,
    run,
    same,
    shim,
    upstream,
)
from samples import PNG_BASE64

JSON = dict[str, Any]
raised = functools.partial(harness.raised, anthropic.AnthropicError)
MODEL = "claude-opus-5-5"
sent: list[httpx2.Request] = []
received: list[httpx2.Response] = []


def client_of(url: str, **options: Any) -> Anthropic:
    hooks = {"request": [sent.append], "response": [received.append]}
    http = anthropic.DefaultHttpxClient(event_hooks=hooks)
    key = "anything"
    return Anthropic(base_url=url, api_key=key, http_client=http, timeout=TIMEOUT, **options)


client = client_of(SHIM)


def user(content: Any) -> JSON:
    return {"role": "user", "content": content}


def ask(text: str, **fields: Any) -> Any:
    return client.messages.create(model=MODEL, max_tokens=2000, messages=[user(text)], **fields)


def untouched() -> None:
    """The last request reached upstream byte for byte, only the credential is another."""
    last = upstream.received()[-1]
    request = sent[-1]
    same(last.raw, request.content, "the body")
    names = [n for n in request.headers if n.startswith("anthropic-")] + ["content-type"]
    same({n: last.headers.get(n) for n in names}, {n: request.headers[n] for n in names})
    same((last.headers.get("x-api-key"), last.headers.get("authorization")), (UPSTREAM_KEY, None))
    same(last.path, request.url.raw_path.decode())


WEATHER = {
    "name": "get_weather", "description": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}},
                     "required": ["city"]},
}  # fmt: skip
TIME = {**WEATHER, "name": "get_time"}


@check("text, and the request as it came")
def text() -> None:
    answer = ask("hello", system="be kind \u2028\u00e9\U0001f600")
    same((answer.content[0].text, answer.stop_reason), ("echo: hello", "end_turn"))
    usage = answer.usage
    same((usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens,
          usage.output_tokens), (12, 1500, 8000, OUTPUT_TOKENS))  # fmt: skip
    same(answer._request_id, upstream.last.request_id)
    same(upstream.last.headers["anthropic-version"], "2026-10-21")
    same("stream" in upstream.last.body, False)
    untouched()


@check("odd bytes in the body stay as they are")
def bytes_kept() -> None:
    body = (
        b'{ "messages":[{"content" : "hi\\u00e9 \xc3\xa9\\/", "role":"user"}],\n "max_tokens":1e2,'
    )
    for model, sent_model in ((MODEL, MODEL), ("opus", MODEL)):
        tail = b' "model" :"%s","stop_sequences":[ ] }'
        raw = body.replace(b"1e2", b"100") + tail
        answer = httpx2.post(
            SHIM + "/v1/messages?beta=true", content=raw % model.encode(), trust_env=False,
            headers={"content-type": "application/json", "anthropic-version": "2023-06-01",
                     "x-api-key": "anything", "accept-encoding": "gzip"},
        )  # fmt: skip
        same((answer.status_code, answer.json()["model"]), (200, MODEL))
        same(upstream.last.raw, raw % sent_model.encode(), "an alias is all that may change")


@check("stream: events as upstream sent them, pings and unknown ones included")
def stream() -> None:
    with client.messages.with_streaming_response.create(
        model=MODEL, max_tokens=50, messages=[user("[[unknown]] hello \u2028 x")], stream=True
    ) as response:
        same(response.headers["content-type"].split(";")[0], "text/event-stream")
        same(response.headers["request-id"], upstream.last.request_id)
        whole = b"".join(response.iter_bytes()).decode()
    names = [line[7:] for line in whole.split("\n") if line.startswith("event: ")]
    same(names[:3], ["message_start", "content_block_start", "ping"])
    same(names[-2:], ["message_delta", "message_stop"])
    assert "event_of_tomorrow" in names and "delta_of_tomorrow" in whole, whole
    assert "\u2028" in whole, "text is not escaped anew"
    untouched()


@check("stream helper, sync and async")
def stream_helper() -> None:
    with client.messages.stream(model=MODEL, max_tokens=50, messages=[user("a b c")]) as events:
        same("".join(events.text_stream), "echo: a b c")
        same(events.get_final_message().usage.output_tokens, OUTPUT_TOKENS)
    untouched()

    async def twice() -> list[str]:
        async with AsyncAnthropic(base_url=SHIM, api_key="anything") as other:
            body: Any = {"model": "sonnet", "max_tokens": 50, "messages": [user("a b c")]}
            answer = await other.messages.create(**body)
            async with other.messages.stream(**body) as events:
                return [answer.content[0].text, await events.get_final_text()]

    same(asyncio.run(twice()), ["echo: a b c"] * 2)
    same(upstream.last.body["model"], "claude-sonnet-5-5")


@check("tools: a loop of three turns with thinking and signatures")
def tools() -> None:
    messages: list[Any] = [user("[[thinking redacted]] [[tools-parallel x3]] go")]
    for _ in range(4):
        with client.messages.stream(
            model=MODEL, max_tokens=3000, messages=messages, tools=[WEATHER, TIME],
            thinking={"type": "adaptive", "display": "summarized"},
        ) as events:  # fmt: skip
            answer = events.get_final_message()
        messages.append({"role": "assistant", "content": answer.content})
        calls = [block for block in answer.content if block.type == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": c.id, "content": c.name} for c in calls]
        messages.append(user(results))
        untouched()
    same([b.type for b in answer.content], ["thinking", "redacted_thinking", "text"])
    same(answer.content[-1].text, "results: " + "; ".join(["get_weather", "get_time"] * 3))


@check("tools: the SDK's tool runner with its message threads")
def tool_runner() -> None:
    @beta_tool
    def get_weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: where
        """
        return f"sunny in {len(city)}"

    final = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=50, messages=[user("[[tool x2]] go")], tools=[get_weather]
    ).until_done()
    assert final.content[0].text.startswith("results: sunny"), final
    same(len(upstream.messages), 3)
    assert any("thread" in r.body for r in upstream.messages), "the runner used threads"
    untouched()


@check("images, documents, cache marks and beta headers pass")
def blocks() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PNG_BASE64}
    text = {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}}
    content = [{"type": "image", "source": source}, text]
    client.beta.messages.create(
        model=MODEL, max_tokens=50, messages=[user(content)],
        betas=["context-management-2025-06-27", "files-api-2025-04-14"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        extra_headers={"anthropic-workspace-id": "wrkspc_1", "anthropic-future": "x"},
    )  # fmt: skip
    same(upstream.last.headers["anthropic-future"], "x")
    untouched()


@check("count_tokens, batches, files, skills and whatever else is below /v1/")
def other_paths() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=[user("hi")])
    assert counted.input_tokens > 10, counted
    untouched()
    params: Any = {"model": MODEL, "max_tokens": 5, "messages": [user("hi")]}
    batch = client.messages.batches.create(requests=[{"custom_id": "a", "params": params}])
    same(batch.request_counts.processing, 1)
    untouched()
    same(client.messages.batches.list().data, [])
    client.get("/v1/skills?limit=3", cast_to=object)
    same(upstream.received()[-1].path, "/v1/skills?limit=3")


@check("models: list, pages, retrieve, 404")
def models() -> None:
    every = {m.id: m for m in client.models.list(limit=5)}
    assert {MODEL, "claude-haiku-4-5-20251001"} <= set(every), every
    same(every[MODEL].capabilities.thinking.types.disabled.supported, False)
    same((every[MODEL].max_tokens, every[MODEL].line), (128_000, "opus"))
    same(client.models.retrieve(MODEL).display_name, "Claude Opus 5 5")
    error = raised(lambda: client.models.retrieve("gpt-4o"))
    same((type(error), error.type), (anthropic.NotFoundError, "not_found_error"))


ERRORS = [
    ("400", anthropic.BadRequestError, 400, "invalid_request_error"),
    ("401", anthropic.AuthenticationError, 401, "authentication_error"),
    ("402", anthropic.PaymentRequiredError, 402, "billing_error"),
    ("403", anthropic.PermissionDeniedError, 403, "permission_error"),
    ("404", anthropic.NotFoundError, 404, "not_found_error"),
    ("413", anthropic.ContentTooLargeError, 413, "request_too_large"),
    ("413 html", anthropic.ContentTooLargeError, 413, "request_too_large"),  # no page is shown
    ("429", anthropic.RateLimitError, 429, "rate_limit_error"),
    ("429 retry-after=1", anthropic.RateLimitError, 429, "rate_limit_error"),
    ("500", anthropic.InternalServerError, 500, "api_error"),
    ("529", anthropic.OverloadedError, 529, "overloaded_error"),
]


@check("errors: status, envelope, headers and request id as upstream sent them")
def errors() -> None:
    each([(s, *row) for s in (False, True) for row in ERRORS], one_error, at_once=8)


def one_error(row: Any) -> None:
    streaming, mark, kind, status, error_type = row
    text = f"[[error {mark}]] stream={streaming}"
    error = raised(lambda: ask(text, stream=streaming))
    same((type(error), error.status_code, error.type), (kind, status, error_type))
    requests = upstream.told(text)
    if mark != "429":  # a spending limit: not the shim's to retry, and relayed as it came
        same(len(requests), 1 + 2 * (mark in RETRIED), "1 + --retries, none more by the SDK")
    same(error.request_id, requests[-1].request_id)
    headers = error.response.headers
    same(headers.get("retry-after"), "1" if "retry-after" in mark else None)
    assert "anthropic-ratelimit-requests-limit" in headers, headers
    if "html" not in mark:
        same(error.response.json()["request_id"], error.request_id, "the body as it came")


RETRIED = ("429 retry-after=1", "500", "529")  # by the shim


@check("errors: upstream's refusals come down word for word", refused=1)
def refusals() -> None:
    error = raised(lambda: ask("hi", thinking={"type": "disabled"}))
    assert '"thinking.type.disabled" is not supported' in str(error), error
    same(len(upstream.messages), 1, "a relayed request is not repaired")


@check("errors: the shim tries again before the first byte")
def retries() -> None:
    same(ask("[[error 529 x1]] hi").content[0].text, "echo: hi")


@check("errors: a fault in mid-stream, a cut and silence are errors, never a clean end")
def broken_streams() -> None:
    body: Any = {"model": MODEL, "max_tokens": 50}
    each(("error-midstream", "cut", "cut-clean"), lambda mark: one_break(mark, body))
    raised(lambda: ask("[[cut]] a longer text"))
    with shim("--retries", "0", "--silence-timeout", "1", "--first-byte-timeout", "1") as url:
        direct = client_of(url)
        stalled = [user("[[stall]] a longer text")]
        raised(lambda: list(direct.messages.create(messages=stalled, stream=True, **body)))
        error = raised(lambda: direct.messages.create(messages=[user("[[hang]]")], **body))
        same((error.status_code, error.type), (504, "timeout_error"))
        same(len(upstream.told("[[hang]]")), 1, "the SDK must not start it anew")


def one_break(mark: str, body: JSON) -> None:
    messages = [user(f"[[{mark}]] a longer text")]
    pieces: list[bytes] = []
    short = contextlib.suppress(httpx2.RemoteProtocolError)  # the body may end short as well
    request = client.messages.with_streaming_response.create(messages=messages, stream=True, **body)
    with request as response, short:
        pieces.extend(response.iter_bytes())
    raw = b"".join(pieces)
    same((raw.count(b"event: error"), raw.count(b"message_stop")), (1, 0), mark)
    error = raised(lambda: stream_text(messages, body))
    assert isinstance(error, anthropic.APIStatusError), repr(error)


def stream_text(messages: list[Any], body: JSON) -> str:
    with client.messages.stream(messages=messages, **body) as events:
        return "".join(events.text_stream)


@check("client keys: 401 in the Anthropic dialect, x-api-key and Bearer accepted")
def client_keys() -> None:
    with shim(CLAUDE_SHIM_API_KEY="let-me-in") as url:
        body: Any = {"model": MODEL, "max_tokens": 50, "messages": [user("hi")]}
        error = raised(lambda: client_of(url).messages.create(**body))
        same((type(error), error.type), (anthropic.AuthenticationError, "authentication_error"))
        same(upstream.received(), [])
        for headers in ({"x-api-key": "let-me-in"}, {"Authorization": "Bearer let-me-in"}):
            Anthropic(base_url=url, api_key="x").messages.create(
                extra_headers={"Authorization": anthropic.omit, **headers}, **body
            )
            same(upstream.last.headers.get("x-api-key"), UPSTREAM_KEY)


@check("pass-through: the client's own key goes upstream, in the header it came in")
def passthrough() -> None:
    with shim("--auth", "passthrough") as url:
        other = Anthropic(base_url=url, api_key="sk-ant-api03-of-the-client")
        other.messages.create(model=MODEL, max_tokens=50, messages=[user("hi")])
    headers = upstream.last.headers
    given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    same(given, "sk-ant-api03-of-the-client")


@check("a client that hangs up ends the upstream request")
def hang_up() -> None:
    events = ask("[[slow]] " + "a long text " * 20, stream=True)
    next(iter(events))
    events.close()
    same(upstream.last.aborted, True)


if __name__ == "__main__":
    sys.exit(run("anthropic"))
