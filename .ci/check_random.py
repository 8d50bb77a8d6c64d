"""Random but legal requests to both of OpenAI's APIs, the same each time: none may be refused.

What clients send is messier than any list of cases: empty turns, results without calls, calls
without results, odd ids and names, marks and images anywhere, options the model does not take. The
generator knows only what the OpenAI dialect allows; the fake upstream knows what Anthropic refuses.
"""

from __future__ import annotations

import json
import random
import re
import sys
import urllib.error
import urllib.request
from typing import Any, Callable

from harness import SHIM, check, each, run, translated
from samples import PDF_BASE64, PNG_BASE64

JSON = dict[str, Any]
MODELS = (
    "opus sonnet haiku claude-fable-5-2 claude-fable-5 claude-opus-5 claude-sonnet-5 "
    "claude-opus-4-8 claude-opus-4-7 claude-opus-4-6 claude-sonnet-4-6 claude-opus-4-5 "
    "claude-haiku-4-5 claude-sonnet-4-5 claude-mythos-5-1"
).split()
TEXTS = (
    "hi",
    "",
    " ",
    "\n",
    "a b",
    "tail ",
    "[[tool]] go",
    "[[thinking]] go",
    "\ud83d half",
    "\u2028",
)
CALL_IDS = ("call_1", "call_2", "call:3", "c.4", "call_1 ")
NAMES = ("f", "g", "files.read", "x" * 140, "\u00fcn\u00ef")
SPACES = ("mcp__a", "mcp b", "functions")
ARGUMENTS = ("{}", "", "null", '{"a":1}', "{bad", "[1]", '"s"')
PNG_URL = "data:image/jpeg;base64," + PNG_BASE64
PARTS: tuple[JSON, ...] = (
    {"type": "image_url", "image_url": {"url": PNG_URL}},
    {"type": "image_url", "image_url": "https://example.org/a.png"},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF_BASE64}},
    {"type": "text", "text": "k", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}},
    {"type": "text", "text": "k", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    {"type": "input_text", "text": "t"},
)
NODE = {"type": "object", "properties": {"n": {"$ref": "#/definitions/n"}}}
SCHEMAS: tuple[JSON, ...] = (
    {},
    {"type": "object", "properties": {"a": {"type": "string", "format": "regex", "minLength": 3}}},
    {"anyOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {}}]},
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/definitions/n"}},
        "definitions": {"n": NODE},
    },
    {"type": ["object", "null"], "properties": {"a": {"maximum": 3, "exclusiveMaximum": True}}},
    {"type": "array", "items": {"type": "string"}, "minItems": 3},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "object", "additionalProperties": {"type": "string"}},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}}, {"required": ["a"]}]},
    {"$ref": "#/$defs/R", "$defs": {"R": {"type": "object", "properties": {"x": {}}}}},
)


class Maker:
    """Draws a body from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pick: Callable[[Any], Any] = self.random.choice

    def some(self, make: Callable[[], Any], least: int, most: int) -> list[Any]:
        return [make() for _ in range(self.random.randint(least, most))]

    def part(self) -> JSON:
        return self.pick((*PARTS, {"type": "text", "text": self.pick(TEXTS)}))

    def content(self) -> Any:
        return self.pick((self.pick(TEXTS), self.some(self.part, 1, 3)))

    def call(self) -> JSON:
        function = {"name": self.pick(NAMES), "arguments": self.pick(ARGUMENTS)}
        custom = {"name": "patch", "input": "*** x"}
        kinds = ({"type": "function", "function": function}, {"type": "custom", "custom": custom})
        return {"id": self.pick(CALL_IDS), **self.pick((*kinds, kinds[0]))}

    def message(self) -> JSON:
        text, parts = self.pick(TEXTS), [self.pick(PARTS[:2])]
        kinds: tuple[JSON, ...] = (
            {"role": "user", "content": self.content()},
            {"role": "user", "content": self.content()},
            {"role": self.pick(("system", "developer")), "content": text},
            {"role": "assistant", "content": self.pick((text, None))},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": text, "tool_calls": self.some(self.call, 1, 3)},
            {"role": "assistant", "content": None, "tool_calls": self.some(self.call, 1, 3)},
            {"role": "tool", "tool_call_id": self.pick(CALL_IDS), "content": text},
            {"role": "tool", "tool_call_id": self.pick(CALL_IDS), "content": parts},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
            {"role": "function", "name": "f", "content": self.pick((text, None))},
        )
        return self.pick(kinds)

    def tool(self) -> JSON:
        function = {"name": self.pick(NAMES), "parameters": self.pick(SCHEMAS)}
        lark = {"type": "grammar", "grammar": {"definition": "x", "syntax": "lark"}}
        kinds: tuple[JSON, ...] = (
            {
                "type": "function",
                "function": {**function, "strict": self.pick((True, False, None))},
            },
            {"type": "function", "function": function, "cache_control": {"type": "ephemeral"}},
            {"type": "function", **function},
            {"type": "custom", "custom": {"name": self.pick(NAMES), "format": lark}},
            {"name": self.pick(NAMES), "input_schema": {"type": "object", "properties": {}}},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        )
        return self.pick(kinds)

    def options(self) -> JSON:
        schema = {"name": "n", "schema": self.pick(SCHEMAS)}
        chances: JSON = {
            "tools": self.some(self.tool, 0, 3), "parallel_tool_calls": self.pick((True, False)),
            "tool_choice": self.pick(("auto", "none", "required", {"type": "any"}, None)),
            "temperature": self.pick((0, 0.5, 1, 2, None)), "top_p": self.pick((0.1, 0.95, 1)),
            "reasoning_effort": self.pick("none minimal low medium high xhigh max".split()),
            "max_tokens": self.pick((1, 16, 5000, 10**6, None)), "top_k": 5,
            "stop": self.pick(("x", ["\n", "y"], None, [])), "stream": self.pick((True, False)),
            "response_format": self.pick(({"type": "json_object"}, {"type": "json_schema",
                                                                    "json_schema": schema})),
            "user": self.pick(("u", "a@example.org", "u" * 400, "")),
            "web_search_options": {}, "cache_control": {"type": "ephemeral", "ttl": "1h"},
        }  # fmt: skip
        return {k: v for k, v in chances.items() if self.random.random() < 0.25}

    def body(self) -> JSON:
        messages = [{"role": "user", "content": "start"}, *self.some(self.message, 0, 6)]
        return {"model": self.pick(MODELS), "messages": messages, **self.options()}


class ItemsMaker(Maker):
    """Draws a body for Responses."""

    def output(self) -> Any:
        picture = {"type": "input_image", "image_url": PNG_URL}
        parts = [{"type": "input_text", "text": self.pick(TEXTS)}, picture]
        return self.pick((self.pick(TEXTS), parts, [picture], []))

    def item(self) -> JSON:
        text, call_id = self.pick(TEXTS), self.pick(CALL_IDS)
        name = {"name": self.pick(NAMES), **self.pick(({}, {"namespace": self.pick(SPACES)}))}
        said = {"type": "output_text", "text": text, "annotations": []}
        summary = [{"type": "summary_text", "text": text}]
        seal = self.pick((None, "gAAAA", "csh1.eyJ0.aaaa", ""))
        kinds: tuple[JSON, ...] = (
            {"role": "user", "content": self.pick((text, [{"type": "input_text", "text": text}]))},
            {"role": self.pick(("system", "developer")), "content": text},
            {"type": "message", "role": "assistant", "id": "msg_1", "content": [said],
             "phase": "commentary", "status": "completed"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"type": "reasoning", "id": "rs_1", "summary": summary, "encrypted_content": seal},
            {"type": "function_call", "call_id": call_id, **name,
             "arguments": self.pick(ARGUMENTS)},
            {"type": "function_call_output", "call_id": call_id, "output": self.output()},
            {"type": "custom_tool_call", "call_id": call_id, "input": text, **name},
            {"type": "custom_tool_call_output", "call_id": call_id, "output": self.output()},
            {"type": "web_search_call", "id": "ws_1", "status": "completed",
             "action": {"type": "search", "query": "q"}},
            {"type": "tool_search_call", "call_id": call_id, "execution": "client",
             "arguments": {"query": "q"}, "status": "completed"},
            {"type": "tool_search_output", "call_id": call_id, "tools": [self.item_tool()]},
            {"type": "additional_tools", "role": "developer", "tools": [self.item_tool()]},
            {"type": "item_reference", "id": "rs_gone"},
            {"type": "item_of_tomorrow", "id": "x_1", "text": text},
        )  # fmt: skip
        return self.pick((*kinds, *kinds[:8]))

    def item_tool(self) -> JSON:
        name, schema = self.pick(NAMES), self.pick(SCHEMAS)
        plain = {"type": "function", "name": name, "parameters": schema, "strict": False}
        lark = {"type": "grammar", "definition": "x", "syntax": "lark"}
        custom = {"type": "custom", "name": name, "format": lark}
        space = {"type": "namespace", "name": self.pick(SPACES), "description": "d",
                 "tools": [plain, custom]}  # fmt: skip
        search = {"type": "tool_search", "execution": "client", "parameters": schema}
        web = {"type": "web_search", "external_web_access": self.pick((True, False))}
        hosted = {"type": "code_interpreter", "container": {"type": "auto"}}
        return self.pick((plain, plain, custom, space, search, web, hosted))

    def options(self) -> JSON:
        schema = {"type": "json_schema", "name": "n", "schema": self.pick(SCHEMAS)}
        efforts = "none minimal low medium high xhigh max".split()
        chances: JSON = {
            "tools": self.some(self.item_tool, 0, 3), "instructions": self.pick((*TEXTS, None)),
            "parallel_tool_calls": self.pick((True, False)), "store": self.pick((True, False)),
            "tool_choice": self.pick(("auto", "none", "required")), "stream": True,
            "temperature": self.pick((0, 0.5, 1, 2, None)), "top_p": self.pick((0.1, 0.95, 1)),
            "reasoning": self.pick(({}, None, {"effort": self.pick(efforts), "summary": "auto"})),
            "text": self.pick(({}, {"format": schema}, {"format": {"type": "json_object"}})),
            "max_output_tokens": self.pick((16, 5000, 10**6, None)), "user": "a@example.org",
            "include": ["reasoning.encrypted_content"], "metadata": {"a": "b"},
            "client_metadata": {"a": "b"}, "truncation": self.pick(("auto", "disabled")),
        }  # fmt: skip
        return {k: v for k, v in chances.items() if self.random.random() < 0.25}

    def body(self) -> JSON:
        items = [{"role": "user", "content": "start"}, *self.some(self.item, 0, 7)]
        return {"model": self.pick(MODELS), "input": items, **self.options()}


def accepted(path: str, body: JSON) -> str:
    raw = json.dumps(body).encode()
    request = urllib.request.Request(SHIM + path, raw, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.read().decode()} for {raw[:1200].decode()}") from None


def one_chat(seed: int) -> None:
    text = accepted("/v1/chat/completions", Maker(seed).body())
    assert '"error"' not in text, text


def one_response(seed: int) -> None:
    text = accepted("/v1/responses", ItemsMaker(seed).body())
    assert re.search(r'"error": ?null', text) and '"failed"' not in text, text


@check("500 random requests are answered, if need be after the shim has mended one", refused=None)
def random_requests() -> None:
    each(range(500), one_chat, at_once=4)


@check("500 random requests to Responses likewise", refused=None)
def random_responses() -> None:
    each(range(500), one_response, at_once=4)


if __name__ == "__main__":
    sys.exit(run("random", translated))
