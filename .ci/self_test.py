"""Does the validator of the fake upstream catch what it should? One bad body a line.

And does .ci/bench judge as it says? One comparison a line.
"""
# ruff: noqa: E501 (a case table reads best with one case on one line)

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import bench_table
import scenarios
from fake_upstream import check_call, model_object
from messages_rules import MODELS, Call, Ledger, Rejected

JSON = dict[str, Any]
HEADERS = {
    "x-api-key": ["sk-ant-api03-test"],
    "anthropic-version": ["2023-06-01"],
    "content-type": ["application/json"],
}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
MARK: JSON = {"type": "ephemeral"}


def text(value: str, **more: Any) -> JSON:
    return {"type": "text", "text": value, **more}


def use(name: str = "f", id: str = "toolu_1") -> JSON:
    return {"type": "tool_use", "id": id, "name": name, "input": {}}


def result(id: str = "toolu_1", **more: Any) -> JSON:
    return {"type": "tool_result", "tool_use_id": id, "content": "18C", **more}


def image(data: str, kind: str = "image/png") -> JSON:
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def user(*content: Any) -> JSON:
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def assistant(*content: Any) -> JSON:
    return {"role": "assistant", "content": list(content)}


def schema(**properties: Any) -> JSON:
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}  # fmt: skip


def formatted(wanted: JSON) -> JSON:
    return {"output_config": {"format": {"type": "json_schema", "schema": wanted}}}


def tool(name: str = "f", **input_schema: Any) -> JSON:
    return {"name": name, "input_schema": {"type": "object", "properties": {}, **input_schema}}


def body(*messages: JSON, **fields: Any) -> JSON:
    made = {
        "model": "claude-opus-5-5",
        "max_tokens": 100,
        "messages": list(messages) or [user("hi")],
    }
    return {k: v for k, v in {**made, **fields}.items() if v is not ...}


LOOP = [user("hi"), assistant(text("ok"), use()), user([result(), text("and?")])]
OLD = {"model": "claude-haiku-4-5"}
MIDDLE = {"model": "claude-opus-4-6"}

# fmt: off
GOOD = [
    body(),
    body(*LOOP, tools=[tool()]),
    body(*LOOP),
    body(user([text("a"), image(PNG)]), system=[text("s", cache_control=MARK)], cache_control=MARK),
    body(temperature=1, top_p=1),
    body(**OLD, temperature=0.2),
    body(**MIDDLE, temperature=0.2, top_p=0.5),
    body(user("a"), assistant(text("{")), **OLD),
    body(**OLD, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048),
    body(thinking={"type": "adaptive", "display": "summarized"}, output_config={"effort": "max"}),
    body(**formatted(schema(a={"anyOf": [{"type": "integer"}, {"type": "null"}]}))),
    body(tools=[tool(), tool("g")], tool_choice={"type": "auto", "disable_parallel_tool_use": True}),
    body(**MIDDLE, tools=[tool()], tool_choice={"type": "any"}),
    body(user("a"), {"role": "system", "content": "now be brief"}),
    body(tools=[tool(**{"$defs": {"n": {"$ref": "#/$defs/n"}}})]),
]

BAD = [
    # types
    ("seed: Extra inputs", body(seed=1)),
    ("max_tokens: Field required", body(max_tokens=...)),
    ("max_tokens: Input should be a valid integer", body(max_tokens=None)),
    ("user.name: Extra inputs", body({**user("a"), "name": "n"})),
    ("content", body({"role": "user", "content": None})),
    ("'tool'", body({"role": "tool", "content": "x"})),
    ("image_url", body(user([{"type": "image_url", "image_url": {"url": "https://e.org"}}]))),
    ("function", body(tools=[{"type": "function", "function": {"name": "f"}}])),
    ("stop_sequences: Input", body(stop_sequences="x")),
    ("effort", body(output_config={"effort": "none"})),
    ("disable_parallel", body(tools=[tool()], tool_choice={"type": "none", "disable_parallel_tool_use": True})),
    ("tool_use.input", body(user("a"), assistant({**use(), "input": "{}"}), user([result()]))),
    ("thread: Extra inputs", body(thread={"type": "create"})),
    # models
    ("model: gpt-4o", body(model="gpt-4o")),
    ("128000, which is the maximum", body(max_tokens=128_001)),
    ("`temperature` is deprecated", body(temperature=0.5)),
    ("`top_k` is deprecated", body(top_k=5)),
    ("cannot both be specified", body(**OLD, temperature=0.5, top_p=0.5)),
    ("in its range", body(**OLD, temperature=1.5)),
    ("does not support assistant message prefill", body(user("a"), assistant(text("b")))),
    ("trailing whitespace", body(user("a"), assistant(text("b ")), **OLD)),
    ('"thinking.type.enabled"', body(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)),
    ('"thinking.type.disabled"', body(thinking={"type": "disabled"})),
    ("adaptive thinking is not", body(**OLD, thinking={"type": "adaptive"})),
    ("between_tools", body(thinking={"type": "between_tools"})),
    ("at effort 'max'", body(model="claude-haiku-5-5", thinking={"type": "disabled"}, output_config={"effort": "max"})),
    ("greater than or equal to 1024", body(**OLD, thinking={"type": "enabled", "budget_tokens": 5})),
    ("must be greater than `thinking", body(**OLD, thinking={"type": "enabled", "budget_tokens": 1024})),
    ("may only be set to 1", body(**OLD, temperature=0, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)),
    ("effort parameter", body(**OLD, output_config={"effort": "low"})),
    ("'xhigh' is not supported", body(**MIDDLE, output_config={"effort": "xhigh"})),
    ('type "tool" and "any"', body(tools=[tool()], tool_choice={"type": "any"})),
    ("forces tool use", body(**OLD, tools=[tool()], tool_choice={"type": "any"}, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)),
    ("role 'system' is not supported", body(user("a"), {"role": "system", "content": "b"}, **OLD)),
    ("must be last or", body(user("a"), {"role": "system", "content": "b"}, user("c"))),
    # messages
    ("at least one message", body(messages=[])),
    ('must use the "user" role', body(assistant(text("a")), user("b"))),
    ("must have non-empty content", body(user([]))),
    ("must have non-empty content", body(user(""))),
    ("must be non-empty", body(user([text("")]))),
    ("non-whitespace", body(user([text(" \n")]))),
    ("system: text content", body(system="")),
    ("not allowed in user turns", body(user([use()]))),
    ("not allowed in assistant turns", body(user("a"), assistant(image(PNG)), user("b"))),
    ("found without `tool_result`", body(user("a"), assistant(use()), user("b"))),
    ("found without `tool_result`", body(user("a"), assistant(use()), user([text("b"), result()]))),
    ("found without `tool_result`", body(user("a"), assistant(use(), use(id="t2")), user([result()]))),
    ("must come after a user message", body(user("a"), assistant(use()), {"role": "system", "content": "s"}, assistant(text("x")), user([result()]))),
    ("unexpected `tool_use_id`", body(user([result()]))),
    ("Found multiple", body(user("a"), assistant(use()), user([result(), result()]))),
    ("ids must be unique", body(*LOOP, *LOOP[1:])),
    ("tool_use.id: String should match", body(user("a"), assistant(use(id="call:1")), user([result("call:1")]))),
    ("tool_use.name: String should match", body(user("a"), assistant(use("a.b")), user([result()]))),
    ("does not match the provided media type", body(user([image(PNG, "image/jpeg")]))),
    ("Invalid base64", body(user([image("data:image/png;base64," + PNG)]))),
    ("Only HTTPS", body(user([{"type": "image", "source": {"type": "url", "url": "http://e.org/a.png"}}]))),
    ("non-whitespace", body(stop_sequences=["\n"])),
    ("email address", body(metadata={"user_id": "a@example.org"})),
    # tools and schemas
    ("name: String should match", body(tools=[tool("a.b")])),
    ("must be unique", body(tools=[tool(), tool()])),
    ("'object'", body(tools=[{"name": "f", "input_schema": {}}])),
    ("at the top level", body(tools=[tool(anyOf=[{}])])),
    ("draft 2020-12", body(tools=[tool(properties={"a": {"type": "integer", "minimum": 0, "exclusiveMinimum": True}})])),
    ("draft 2020-12", body(tools=[tool(**{"$schema": "http://json-schema.org/draft-07/schema#"})])),
    ("draft 2020-12", body(tools=[tool(properties={"a": {"$ref": "#/definitions/missing"}})])),
    ("may only be specified while", body(tool_choice={"type": "auto"})),
    ("not found in provided tools", body(**MIDDLE, tools=[tool()], tool_choice={"type": "tool", "name": "x"})),
    ("explicitly set to false", body(**formatted({"type": "object", "properties": {}}))),
    ("'minimum' is not supported", body(**formatted(schema(a={"type": "integer", "minimum": 1})))),
    ("other than 0 or 1", body(**formatted(schema(a={"type": "array", "minItems": 2})))),
    ("format 'regex'", body(**formatted(schema(a={"type": "string", "format": "regex"})))),
    ("recursive", body(**formatted({**schema(a={"$ref": "#/$defs/n"}), "$defs": {"n": schema(a={"$ref": "#/$defs/n"})}}))),
    ("too complex", body(**formatted({**schema(**{f"a{i}": {} for i in range(25)}), "required": []}))),
    ("explicitly set to false", body(tools=[{**tool(), "strict": True}])),
    ("cannot be used with citations", body(user([text("a"), {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}, "citations": {"enabled": True}}]), **formatted(schema()))),
    # caching
    ("Found 5", body(user([text(str(i), cache_control=MARK) for i in range(5)]))),
    ("Found 5", body(user([text(str(i), cache_control=MARK) for i in range(4)]), cache_control=MARK)),
    ("must not come after", body(user([text("a", cache_control={**MARK, "ttl": "1h"})]), system=[text("s", cache_control=MARK)])),
    ("Top-level cache_control", body(user([text("a", cache_control=MARK)]), cache_control={**MARK, "ttl": "1h"})),
    # headers' business
    ("Unexpected value(s) `x-2020`", body(), {"anthropic-beta": ["x-2020"]}),
    ("temperature: Extra", body(temperature=1), {"anthropic-version": ["2026-10-21"]}),
    ("not a valid version", body(), {"anthropic-version": ["2024-10-22"]}),
    ("0 credential headers", body(), {"x-api-key": []}),
    ("2 credential headers", body(), {"authorization": ["Bearer sk-ant-api03-test"]}),
    ("invalid x-api-key", body(), {"x-api-key": ["anything"]}),
    ("content-type", body(), {"content-type": ["text/plain"]}),
]

# fmt: on
RAW = [b"{", b'{"model": NaN}', b'"x"', b'{"a": "\\ud83d"}', b"\xff"]


def complaint(request: Any, headers: JSON, ledger: Ledger, *, count: bool = False) -> str:
    raw = request if isinstance(request, bytes) else json.dumps(request).encode()
    try:
        check_call(raw, {**HEADERS, **headers}, count=count, ledger=ledger)
    except Rejected as error:
        return str(error)
    return ""


def thinking_cases() -> list[tuple[str, JSON, Ledger]]:
    """Blocks that the fake handed out, sent back as they were, and tampered with."""
    ledger = Ledger()
    asked = body(user("[[thinking redacted]] [[tool]] now"), tools=[tool()])
    call = Call(asked, MODELS["claude-opus-5-5"], "2023-06-01", frozenset(), count=False)
    handed = scenarios.answer(call, ledger).blocks
    answered = user([result(handed[-1]["id"])])

    def back(change: Callable[[list[JSON]], Any], **fields: Any) -> JSON:
        blocks = copy.deepcopy(handed)
        change(blocks)
        return {**asked, "messages": [*asked["messages"], assistant(*blocks), answered], **fields}

    return [
        ("", back(lambda b: b), ledger),
        ("", back(lambda b: b, cache_control=MARK), ledger),
        ("", back(lambda b: [b.pop(0), b.pop(0)]), ledger),
        ("Invalid `signature`", back(lambda b: b[0].update(thinking="edited")), ledger),
        ("Invalid `signature`", back(lambda b: b[0].update(signature="AAAA")), ledger),
        ("cannot be modified", back(lambda b: b.pop(1)), ledger),
        ("cannot be modified", back(lambda b: b.insert(0, b.pop(1))), ledger),
        ("different conversation", back(lambda b: b, system="new"), ledger),
        ("different conversation", back(lambda b: b, tools=[tool(), tool("g")]), ledger),
    ]


# What "ours" and "naive" showed in three rounds, the ratio that was accepted, whether it fell.
# fmt: off
COMPARISONS = [
    ("as fast as it was", True, (50, 50, 50), (10, 10, 10), 5.0, False),
    ("much slower", True, (30, 30, 30), (10, 10, 10), 5.0, True),
    ("a little slower, which is noise", True, (46, 46, 46), (10, 10, 10), 5.0, False),
    ("slower, but for one round", True, (30, 30, 50), (10, 10, 10), 5.0, False),
    ("slower, as the other was in the same round", True, (30, 50, 20), (6, 10, 4), 5.0, False),
    ("takes longer", False, (8, 8, 8), (2, 2, 2), 3.0, True),
    ("takes less", False, (4, 4, 4), (2, 2, 2), 3.0, False),
    ("too slow to be measured", False, (None, None, None), (2, 2, 2), 3.0, True),
    ("too slow once", False, (None, 6, 6), (2, 2, 2), 3.0, False),
    ("nothing to compare with", False, (8, 8, 8), (0, 0, 0), 3.0, False),
]
# fmt: on


def misjudged() -> list[str]:
    """The names of the comparisons that .ci/bench judges otherwise."""
    wrong = []
    for name, more_is_better, ours, naive, accepted, wanted in COMPARISONS:
        row = bench_table.Row("x", "load", lambda sample, _: sample["x"], more_is_better)
        table = bench_table.Table("t", ("naive", "ours"), "ours", ("naive",), [row])
        rounds = [
            {side: {"load": bench_table.TOO_SLOW if x is None else {"x": x}} for side, x in pair}
            for pair in ((("ours", o), ("naive", n)) for o, n in zip(ours, naive))
        ]
        if bool(bench_table.worse([table], rounds, {"t: x / naive": accepted})) != wanted:
            wrong.append(name)
    return wrong


def main() -> int:
    fresh = Ledger()
    cases = [("", good, {}, fresh) for good in GOOD]
    cases += [(case[0], case[1], case[2] if len(case) > 2 else {}, fresh) for case in BAD]
    cases += [("not valid JSON", raw, {}, fresh) for raw in RAW if raw != b'"x"']
    cases += [(wanted, request, {}, ledger) for wanted, request, ledger in thinking_cases()]
    failed = 0
    for wanted, request, headers, ledger in cases:
        found = complaint(request, headers, ledger)
        if wanted not in found or bool(found) != bool(wanted):
            failed += 1
            print(
                f"FAIL wanted {wanted!r}\n     found {found!r}\n     in {json.dumps(str(request))}"
            )
    counted = complaint(body(max_tokens=..., stream=True), {}, fresh, count=True)
    failed += counted != "stream: Extra inputs are not permitted"
    failed += not all(model_object(m)["capabilities"] for m in MODELS.values())
    for name in misjudged():
        failed += 1
        print(f"FAIL the bench misjudges: {name}")
    print(f"{len(cases) + 2 + len(COMPARISONS)} cases, {failed} failed")
    return 1 if failed else 0
