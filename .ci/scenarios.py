"""What the fake upstream answers: marks in the last user text -> blocks -> Messages events.

A mark is `[[name arguments]]`; several may stand in one text:

    [[tool]] [[tool NAME]] [[tool x3]]   call a tool (of that name) (in three rounds)
    [[tools-parallel]] [[tool-no-args]]  two calls at once; a call whose input is {}
    [[calls JSON]]                       just these calls, a list a round; see harness.calls
    [[thinking]] [[thinking redacted]]   think first, where the request has thinking on
    [[json]] [[fenced]]                  a JSON text, the latter in a code fence
    [[citations]] [[pause]]              web search with citations; pause_turn, then the rest
    [[stop WORD]] [[max_tokens]] [[context]] [[refusal]] [[refusal-midstream]]
    [[unknown]]                          events, deltas and blocks that nobody knows yet
    [[error-midstream]] [[cut]] [[cut-clean]] [[stall]] [[slow]]   how the stream ends, or drags
    [[bytes]] [[lump]] [[crlf]]          how it is cut into pieces
    [[error 429 x1 name=value message]]  an HTTP error (only at the first try), with headers
    [[cut-head]] [[hang]]                the connection closes, or nothing comes at all

A forced tool choice calls the tool and a schema is filled without any mark. All else is echoed.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from messages_rules import JSON, Call, Ledger, merged, resolve

MARK = re.compile(r"\[\[([a-z_-]+)([^\]]*)\]\]")
THINKS_BY_DEFAULT = re.compile(r"claude-(fable|mythos|opus|sonnet|haiku)-(5|9)")
INPUT = {"input_tokens": 12, "cache_creation_input_tokens": 1500, "cache_read_input_tokens": 8000}
OUTPUT_TOKENS, THINKING_TOKENS, SEARCH_INPUT_TOKENS = 90, 40, 10_682


@dataclass
class Script:
    """The last user turn with text: its marks, its text without them, and the rounds since."""

    text: str = ""
    marks: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    results: list[str] = field(default_factory=list)


@dataclass
class Answer:
    """What one request is answered with."""

    blocks: list[JSON]
    stop_reason: str = "end_turn"
    stop_sequence: str | None = None
    stop_details: JSON | None = None
    ending: str = "message_stop"
    usage: JSON = field(default_factory=dict)
    id: str = field(default_factory=lambda: new_id("msg_01"))


def script_of(messages: list[JSON]) -> Script:
    turns = merged(messages)
    rounds, results = 0, []
    for role, turn in reversed(turns):
        if role != "user":
            continue
        answered = [block for _, block in turn if block["type"] == "tool_result"]
        rounds += bool(answered)
        results = [text_of(block.get("content")) for block in answered] + results
        text = " ".join(block["text"] for _, block in turn if block["type"] == "text")
        if text:
            marks = {name: arguments.strip() for name, arguments in MARK.findall(text)}
            return Script(MARK.sub("", text).strip(), marks, rounds, results)
    return Script()


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(block.get("text", f"<{block['type']}>") for block in content or [])


# --- the answer ---------------------------------------------------------------------------------


def answer(call: Call, ledger: Ledger) -> Answer:
    script = script_of(call.messages)
    thought = thinking_blocks(call, script, ledger)
    made = tool_answer(call, script) or text_answer(call, script)
    made.blocks = thought + made.blocks
    made.usage["output_tokens"] = OUTPUT_TOKENS
    if thought:
        made.usage["output_tokens_details"] = {"thinking_tokens": THINKING_TOKENS}
    for name in ("error-midstream", "cut", "cut-clean", "stall"):
        if name in script.marks:
            made.ending = name
    ledger.remember(call, made.id, made.blocks)
    return made


def thinking_blocks(call: Call, script: Script, ledger: Ledger) -> list[JSON]:
    default = "adaptive" if THINKS_BY_DEFAULT.match(call.model.id) else "disabled"
    if "thinking" not in script.marks or (call.thinking or default) not in ("adaptive", "enabled"):
        return []
    default_display = "summarized" if call.model.shown else "omitted"
    shown = ((call.body.get("thinking") or {}).get("display") or default_display) == "summarized"
    text = "Let me think: 1071 = 2 x 462 + 147.\nSo it is 21." if shown else ""
    blocks = [{"type": "thinking", "thinking": text, "signature": ledger.seal(call, text)}]
    if script.marks["thinking"] == "redacted":
        blocks.append({"type": "redacted_thinking", "data": ledger.seal(call, "")})
    return blocks


def tool_answer(call: Call, script: Script) -> Answer | None:
    """Tool calls when the choice or a mark asks for them, else None."""
    tools = [t for t in call.body.get("tools") or [] if "input_schema" in t]
    choice = call.body.get("tool_choice") or {"type": "auto"}
    marks = [name for name in ("tool", "tools-parallel", "tool-no-args") if name in script.marks]
    if not tools or choice["type"] == "none":
        return None
    if "calls" in script.marks:
        return scripted_calls(script, {t["name"] for t in tools})
    wanted = script.marks[marks[0]].split() if marks else []
    rounds = next((int(w[1:]) for w in wanted if re.fullmatch(r"x\d+", w)), 1)
    if choice["type"] == "auto" and (not marks or script.rounds >= rounds):
        return None
    names = [choice["name"]] if choice["type"] == "tool" else wanted
    chosen = [t for t in tools if t["name"] in names] or tools[:1]
    if "tools-parallel" in marks and not choice.get("disable_parallel_tool_use"):
        chosen = (tools * 2)[:2]
    calls = [tool_use(t, empty="tool-no-args" in marks) for t in chosen]
    opening = [{"type": "text", "text": "Okay, let's check:"}] if "tools-parallel" in marks else []
    return Answer(opening + calls, "tool_use")


def scripted_calls(script: Script, names: set[str]) -> Answer | None:
    """The calls that [[calls]] has for this round; None when all rounds are over."""
    rounds = json.loads(unquote(script.marks["calls"]))[script.rounds :]
    if not rounds:
        return None
    missing = [call["name"] for call in rounds[0] if call["name"] not in names]
    if missing:
        return Answer([{"type": "text", "text": f"no tool {missing[0]} in {sorted(names)}"}])
    blocks = [{"type": "tool_use", "id": new_id("toolu_01"), **call} for call in rounds[0]]
    return Answer(blocks, "tool_use")


def tool_use(tool: JSON, *, empty: bool) -> JSON:
    schema = tool["input_schema"]
    arguments = {} if empty else fill(schema, schema)
    name = tool["name"]
    return {"type": "tool_use", "id": new_id("toolu_01"), "name": name, "input": arguments}


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(11)


TEXTS = {
    "json": '{"answer": 42}',
    "fenced": '```json\n{"answer": 42}\n```',
    "refusal-midstream": "I will begin, but",
}
STOPS = {
    "max_tokens": "max_tokens", "context": "model_context_window_exceeded",
    "refusal": "refusal", "refusal-midstream": "refusal",
}  # fmt: skip


def text_answer(call: Call, script: Script) -> Answer:
    chosen = (call.body.get("output_config") or {}).get("format")
    text = next((t for name, t in TEXTS.items() if name in script.marks), echo(script))
    if chosen:
        text = json.dumps(fill(chosen["schema"], chosen["schema"]), ensure_ascii=False)
    made = Answer([{"type": "text", "text": text}])
    made.stop_reason = next((s for n, s in STOPS.items() if n in script.marks), "end_turn")
    if made.stop_reason == "refusal":
        made.stop_details = {
            "type": "refusal", "category": "cyber",
            "explanation": "This request was declined because it is a scripted refusal.",
        }  # fmt: skip
    if "refusal" in script.marks:
        made.blocks = []
    if script.marks.get("stop") in (call.body.get("stop_sequences") or []):
        made.stop_reason, made.stop_sequence = "stop_sequence", script.marks["stop"]
    if "citations" in script.marks:
        searched(made)
    if "pause" in script.marks:
        pause(call, made)
    if "unknown" in script.marks:
        made.blocks.insert(0, {"type": "connector_text", "text": "narration of tomorrow"})
    return made


def echo(script: Script) -> str:
    if script.results:
        return "results: " + "; ".join(script.results)
    return "echo: " + (script.text or "(no text)")


def search_blocks() -> tuple[JSON, JSON]:
    found = {"type": "web_search_result", "title": "W", "url": "https://w.example",
             "encrypted_content": "Ev0D", "page_age": None}  # fmt: skip
    use_id = new_id("srvtoolu_01")
    return (
        {"type": "server_tool_use", "id": use_id, "name": "web_search",
         "input": {"query": "weather NYC"}},
        {"type": "web_search_tool_result", "tool_use_id": use_id, "content": [found]},
    )  # fmt: skip


def searched(made: Answer) -> None:
    cited = {"type": "web_search_result_location", "url": "https://w.example", "title": "W",
             "encrypted_index": "Eo8B", "cited_text": "It is 21C"}  # fmt: skip
    told = {"type": "text", "text": "21C.", "citations": [cited]}
    made.blocks = [{"type": "text", "text": "I look it up. "}, *search_blocks(), told]
    made.usage.update(
        input_tokens=SEARCH_INPUT_TOKENS,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=0,
        server_tool_use={"web_search_requests": 1},
    )


def pause(call: Call, made: Answer) -> None:
    last = call.messages[-1]
    asked, found = search_blocks()
    if last["role"] == "user":
        made.blocks, made.stop_reason = [{"type": "text", "text": "Before. "}, asked], "pause_turn"
    else:
        found["tool_use_id"] = last["content"][-1]["id"]
        made.blocks = [found, {"type": "text", "text": "After."}]


# --- filling schemas ----------------------------------------------------------------------------

REFERENCE_DEPTH = 20
STRINGS = {
    "date": "2026-11-21", "date-time": "2026-11-21T10:00:00Z", "time": "10:00:00Z",
    "duration": "PT1H", "email": "a@example.org", "hostname": "example.org",
    "uri": "https://example.org/", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1",
    "uuid": "12345678-1234-4678-9234-567812345678",
}  # fmt: skip


def fill(schema: Any, root: JSON, key: str = "value", depth: int = 0) -> Any:
    """A value that fits the schema; the same each time, and cut short where it recurs."""
    if not isinstance(schema, dict):
        return "any"
    if "$ref" in schema:
        target = resolve(root, schema["$ref"])
        return fill(target, root, key, depth + 1) if depth < REFERENCE_DEPTH else {}
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for union in ("anyOf", "oneOf", "allOf"):
        if schema.get(union):
            return fill(schema[union][0], root, key, depth)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {k: fill(v, root, k, depth) for k, v in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [fill(schema.get("items") or {}, root, key, depth)]
    text = STRINGS.get(schema.get("format", ""), f"some {key} \u2028\u00e9\U0001f600")
    return {"integer": 3, "number": 2.5, "boolean": True, "null": None}.get(kind, text)


# --- events -------------------------------------------------------------------------------------


def events(call: Call, made: Answer, marks: dict[str, str]) -> Iterator[JSON]:
    """The events of wire/anthropic.md 4 for this answer, up to its ending."""
    usage = {**INPUT, "output_tokens": 1, "service_tier": "standard"}
    usage["cache_creation"] = {
        "ephemeral_5m_input_tokens": 1500, "ephemeral_1h_input_tokens": 0,
    }  # fmt: skip
    yield {"type": "message_start", "message": {
        "id": made.id, "type": "message", "role": "assistant", "model": call.model.id,
        "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage,
    }}  # fmt: skip
    for index, block in enumerate(made.blocks):
        last = index == len(made.blocks) - 1
        made_events = list(block_events(index, block))
        if last and made.ending != "message_stop":
            made_events = made_events[: max(2, len(made_events) // 2)]
        yield made_events[0]
        if index == 0:
            yield {"type": "ping"}
        if "unknown" in marks:
            yield {"type": "event_of_tomorrow", "index": index}
            yield delta(index, {"type": "delta_of_tomorrow", "value": 1})
        yield from made_events[1:]
    if made.ending == "error-midstream":
        yield {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    if made.ending == "message_stop":
        yield from closing_events(made)


def closing_events(made: Answer) -> Iterator[JSON]:
    stop: JSON = {"stop_reason": made.stop_reason, "stop_sequence": made.stop_sequence}
    if made.stop_details:
        stop["stop_details"] = made.stop_details
    yield {"type": "message_delta", "delta": stop, "usage": made.usage}
    yield {"type": "message_stop"}


def delta(index: int, piece: JSON) -> JSON:
    return {"type": "content_block_delta", "index": index, "delta": piece}


def block_events(index: int, block: JSON) -> Iterator[JSON]:
    begun, pieces = opened(block)
    yield {"type": "content_block_start", "index": index, "content_block": begun}
    for piece in pieces:
        yield delta(index, piece)
    yield {"type": "content_block_stop", "index": index}


def opened(block: JSON) -> tuple[JSON, list[JSON]]:
    """A block as content_block_start shows it, and the deltas that complete it."""
    kind = block["type"]
    if kind == "text":
        cited = [{"type": "citations_delta", "citation": c} for c in block.get("citations") or []]
        texts = [{"type": "text_delta", "text": t} for t in split(block["text"])]
        empty: JSON = {"citations": []} if cited else {}
        return {"type": "text", "text": "", **empty}, cited + texts
    if kind == "thinking":
        texts = [{"type": "thinking_delta", "thinking": t} for t in split(block["thinking"])]
        signed = {"type": "signature_delta", "signature": block["signature"]}
        return {"type": "thinking", "thinking": "", "signature": ""}, [*texts, signed]
    if kind in ("tool_use", "server_tool_use"):
        text = json.dumps(block["input"], ensure_ascii=False) if block["input"] else ""
        pieces = ["", *split(text)]
        return {**block, "input": {}}, [
            {"type": "input_json_delta", "partial_json": piece} for piece in pieces
        ]
    return block, []


def split(text: str) -> list[str]:
    size = max(1, len(text) // 5)
    return [text[i : i + size] for i in range(0, len(text), size)]


def message_of(stream: Iterator[JSON]) -> JSON:
    """The answer without a stream, folded from the same events."""
    message: JSON = {}
    for event in stream:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            message["content"].append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            fold(message["content"][event["index"]], event["delta"])
        elif kind == "content_block_stop" and "partial" in message["content"][event["index"]]:
            block = message["content"][event["index"]]
            block["input"] = json.loads(block.pop("partial") or "{}")
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
    return message


def fold(block: JSON, piece: JSON) -> None:
    kind = piece["type"]
    if kind == "text_delta":
        block["text"] += piece["text"]
    elif kind == "thinking_delta":
        block["thinking"] += piece["thinking"]
    elif kind == "signature_delta":
        block["signature"] = piece["signature"]
    elif kind == "citations_delta":
        block["citations"] = [*block["citations"], piece["citation"]]
    elif kind == "input_json_delta":
        block["partial"] = block.get("partial", "") + piece["partial_json"]
