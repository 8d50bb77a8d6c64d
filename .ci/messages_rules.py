"""The rules of POST /v1/messages that the SDK's types do not hold, one generator each.

A rule yields the sentence with which the API refuses a body; wording in wire/anthropic.md is kept
to the letter. `refusal` gives the first one. `Ledger` remembers what the fake handed out, so that
thinking blocks and tool ids can be followed through a conversation.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator, SchemaError
from sdk_types import BETAS

JSON = dict[str, Any]

VERSIONS = ("2023-06-01", "2026-10-21")
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
TOOL_ID = re.compile(r"[a-zA-Z0-9_-]+")
MARK_LIMIT = 4
STRICT_TOOL_LIMIT, OPTIONAL_LIMIT, UNION_LIMIT = 20, 24, 16
EFFORT = ("low", "medium", "high", "xhigh", "max")


# --- models -------------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    return set(text.split())


class Model(NamedTuple):
    """What one model takes (wire/anthropic.md 1.5 and 6.2)."""

    id: str
    thinking: tuple[str, ...]
    effort: tuple[str, ...] = EFFORT
    sampling: str = "none"  # none: only defaults | one: not temperature with top_p | both
    forced: bool = True
    prefill: bool = False
    system_role: bool = False
    bound: bool = False  # thinking signatures cover the conversation before the block
    shown: bool = False  # thinking text is shown when `display` is not given
    small: bool = False  # 200K / 64K
    lifecycle: str = "active"
    listed: bool = True

    @property
    def line(self) -> str:
        return self.id.split("-")[1]

    @property
    def max_tokens(self) -> int:
        return 64_000 if self.small else 128_000

    @property
    def max_input_tokens(self) -> int:
        return 200_000 if self.small else 1_000_000


NEW = {"system_role": True, "bound": True}
OLD = {"sampling": "both", "shown": True}
OLDEST = {**OLD, "sampling": "one", "prefill": True, "small": True}
MODELS = {
    m.id: m
    for m in (
        *(
            Model(f"claude-{line}-5-{n}", ("adaptive",), forced=False, **NEW)
            for line in ("fable", "mythos")
            for n in (2, 1)
        ),
        *(
            Model(f"claude-{line}-5", ("adaptive",), system_role=True)
            for line in ("fable", "mythos")
        ),
        Model("claude-opus-5-5", ("adaptive",), forced=False, **NEW),
        Model("claude-sonnet-5-5", ("adaptive", "between_tools"), forced=False, **NEW),
        Model("claude-haiku-5-5", ("adaptive", "disabled"), **NEW),
        Model("claude-opus-5", ("adaptive", "disabled"), system_role=True),
        Model("claude-sonnet-5", ("adaptive", "disabled")),
        Model("claude-opus-4-8", ("adaptive", "disabled"), system_role=True),
        Model("claude-opus-4-7", ("adaptive", "disabled")),
        *(
            Model(
                name, ("adaptive", "enabled", "disabled"), ("low", "medium", "high", "max"), **OLD
            )
            for name in ("claude-opus-4-6", "claude-sonnet-4-6")
        ),
        Model("claude-opus-4-5-20251101", ("enabled", "disabled"), EFFORT[:3], **OLDEST),
        Model("claude-haiku-4-5-20251001", ("enabled", "disabled"), (), **OLDEST),
        Model(
            "claude-sonnet-4-5-20250929",
            ("enabled", "disabled"),
            (),
            **OLDEST,
            lifecycle="deprecated",
        ),
        # Callable and in no list: one newer than any table, one that is stricter than its line.
        Model("claude-opus-9", ("adaptive",), forced=False, **NEW, listed=False),
        Model(
            "claude-haiku-4-5-20991231", ("adaptive",), (), forced=False, small=True, listed=False
        ),
    )
}
ALIASES = {m.id[:-9]: m.id for m in MODELS.values() if m.listed and re.search(r"-\d{8}$", m.id)}
OFF_ONLY_TO_HIGH = {"claude-opus-5", "claude-haiku-5-5", "claude-sonnet-5-5"}

BETA_FIELDS = {
    "mcp_servers": "mcp-client-",
    "context_management": ("context-management-", "compact-"),
    "compaction": "compact-2026-09-04",
    "fallbacks": "server-side-fallback-",
    "fallback_credit_token": "fallback-credit-",
    "thread": "message-threads-",
    "billing_policy": "user-profiles-billing-",
}
CLI_BETAS = words(
    "oauth-2025-04-20 claude-code-20250219 per-turn-control-2026-07-01 effort-2025-11-24 "
    "advanced-tool-use-2025-11-20"
)


class Rejected(Exception):
    """An answer other than 200."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.kind = status, kind


class Call(NamedTuple):
    """One POST /v1/messages or count_tokens, parsed."""

    body: JSON
    model: Model
    version: str
    betas: frozenset[str]
    count: bool

    @property
    def messages(self) -> list[JSON]:
        return self.body["messages"]

    @property
    def thinking(self) -> str:
        return (self.body.get("thinking") or {}).get("type", "")

    @property
    def config(self) -> JSON:
        return self.body.get("output_config") or {}


def find_model(name: Any) -> Model:
    model = MODELS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if model is None:
        raise Rejected(f"model: {name}", 404, "not_found_error")
    return model


# --- helpers ------------------------------------------------------------------------------------


def blocks_of(content: Any) -> list[JSON]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or [])


def all_blocks(body: JSON) -> Iterator[tuple[str, JSON]]:
    """Every block of system and messages with its path, also those inside tool results."""
    for i, block in enumerate(blocks_of(body.get("system", []))):
        yield f"system.{i}", block
    for n, message in enumerate(body["messages"]):
        for m, block in enumerate(blocks_of(message["content"])):
            yield f"messages.{n}.content.{m}", block
            if block["type"] == "tool_result" and isinstance(block.get("content"), list):
                for k, inner in enumerate(block["content"]):
                    yield f"messages.{n}.content.{m}.tool_result.content.{k}", inner


def merged(messages: list[JSON]) -> list[tuple[str, list[tuple[str, JSON]]]]:
    """Turns as the API sees them: neighbours of one role joined, blocks with their paths."""
    turns: list[tuple[str, list[tuple[str, JSON]]]] = []
    for n, message in enumerate(messages):
        found = [
            (f"messages.{n}.content.{m}", block)
            for m, block in enumerate(blocks_of(message["content"]))
        ]
        if turns and turns[-1][0] == message["role"]:
            turns[-1][1].extend(found)
        else:
            turns.append((message["role"], found))
    return turns


def ids(turn: list[tuple[str, JSON]], kind: str) -> list[str]:
    key = "tool_use_id" if kind == "tool_result" else "id"
    return [block[key] for _, block in turn if block["type"] == kind]


# --- rules --------------------------------------------------------------------------------------


def beta_rule(call: Call) -> Iterator[str]:
    for name in sorted(call.betas - CLI_BETAS - BETAS):
        yield f"Unexpected value(s) `{name}` for the `anthropic-beta` header."
    for field, prefix in BETA_FIELDS.items():
        if call.body.get(field) and not any(b.startswith(prefix) for b in call.betas):
            yield f"{field}: Extra inputs are not permitted"


def version_rule(call: Call) -> Iterator[str]:
    if call.version == VERSIONS[0]:
        return
    for field in ("temperature", "top_p", "top_k"):
        if field in call.body:
            yield f"{field}: Extra inputs are not permitted"
    for path, block in all_blocks(call.body):
        role = call.messages[int(path.split(".")[1])]["role"] if path[0] == "m" else "system"
        if block["type"] == "document" and role == "assistant":
            yield f"{path}: `document` blocks are not permitted in assistant messages"
        if block["type"] == "text" and block.get("citations") and role == "user":
            yield f"{path}.citations: citations are not permitted in user messages"


def size_rule(call: Call) -> Iterator[str]:
    maximum, limit = call.body.get("max_tokens"), call.model.max_tokens
    if not call.count and maximum is not None:
        if maximum < 0 or (maximum == 0 and call.body.get("stream")):
            yield "max_tokens: Input should be greater than or equal to 1"
        if maximum > limit:
            yield (
                f"max_tokens: {maximum} > {limit}, which is the maximum allowed number of "
                f"output tokens for {call.model.id}"
            )
    for i, stop in enumerate(call.body.get("stop_sequences") or []):
        if not stop.strip():
            yield f"stop_sequences.{i}: each stop sequence must contain non-whitespace"
    user = (call.body.get("metadata") or {}).get("user_id") or ""
    if len(user) > 256:
        yield "metadata.user_id: String should have at most 256 characters"
    if re.search(r"[^\s@]+@[^\s@]+\.\w", user):
        yield "metadata.user_id: user_id appears to contain an email address"


def sampling_rule(call: Call) -> Iterator[str]:
    given = {k: call.body[k] for k in ("temperature", "top_p", "top_k") if k in call.body}
    for field, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or value < 0 or (field != "top_k" and value > 1):
            yield f"{field}: Input should be a number in its range"
    changed = [k for k, v in given.items() if k == "top_k" or v != 1]
    if call.model.sampling == "none":
        for field in changed:
            yield f"`{field}` is deprecated for this model."
    if call.model.sampling == "one" and {"temperature", "top_p"} <= set(given):
        yield (
            "`temperature` and `top_p` cannot both be specified for this model. "
            "Please use only one."
        )
    if call.thinking == "enabled":
        if "temperature" in changed:
            yield "`temperature` may only be set to 1 when thinking is enabled."
        if "top_k" in given or given.get("top_p", 1) < 0.95:
            yield "`top_p` must be greater than or equal to 0.95 or unset when thinking is enabled."


REFUSED_THINKING = {
    "enabled": (
        '"thinking.type.enabled" is not supported for this model. Use "thinking.type.'
        'adaptive" and "output_config.effort" to control thinking behavior.'
    ),
    "disabled": (
        '"thinking.type.disabled" is not supported for this model. Thinking defaults to '
        "adaptive mode when not specified; omit the field."
    ),
    "adaptive": "adaptive thinking is not supported on this model",
    "between_tools": '"thinking.type.between_tools" is not supported for this model.',
}


def thinking_rule(call: Call) -> Iterator[str]:
    kind, effort = call.thinking, call.config.get("effort")
    if kind and kind not in call.model.thinking:
        yield REFUSED_THINKING[kind]
    if kind == "enabled":
        budget = call.body["thinking"]["budget_tokens"]
        if budget < 1024:
            yield "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
        interleaved = any(b.startswith("interleaved-thinking") for b in call.betas)
        if not call.count and budget >= call.body["max_tokens"] and not interleaved:
            yield "`max_tokens` must be greater than `thinking.budget_tokens`."
    limited = kind in ("disabled", "between_tools") and call.model.id in OFF_ONLY_TO_HIGH
    if limited and effort in ("xhigh", "max"):
        yield f'"thinking.type.{kind}" is not supported at effort {effort!r}.'
    if effort and not call.model.effort:
        yield "This model does not support the effort parameter."
    elif effort and effort not in call.model.effort:
        yield f"output_config.effort: {effort!r} is not supported for this model."


def tool_choice_rule(call: Call) -> Iterator[str]:
    choice, tools = call.body.get("tool_choice"), call.body.get("tools")
    if not choice:
        return
    if not tools:
        yield "tool_choice: tool_choice may only be specified while providing tools"
    if choice["type"] in ("any", "tool"):
        if not call.model.forced:
            yield 'tool_choice: type "tool" and "any" are not supported for this model.'
        if call.thinking == "enabled":
            yield "Thinking may not be enabled when tool_choice forces tool use."
    if choice["type"] == "tool" and choice["name"] not in [t.get("name") for t in tools or []]:
        yield f"tool_choice.tool.name: Tool '{choice['name']}' not found in provided tools"


def tools_rule(call: Call) -> Iterator[str]:
    names = [t["name"] for t in call.body.get("tools") or [] if "name" in t]
    if len(names) != len(set(names)):
        yield "tools: Tool names must be unique."
    strict = [t for t in call.body.get("tools") or [] if t.get("strict")]
    if len(strict) > STRICT_TOOL_LIMIT:
        yield "Too many strict tools."
    for i, tool in enumerate(call.body.get("tools") or []):
        path = f"tools.{i}.custom"
        if not TOOL_NAME.fullmatch(tool.get("name", "x")):
            yield f"{path}.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'"
        if "input_schema" in tool:
            yield from (f"{path}.input_schema{c}" for c in input_schema_rule(tool["input_schema"]))
        if tool.get("strict"):
            yield from (f"{path}: {c}" for c in subset_rule(tool["input_schema"]))


def input_schema_rule(schema: JSON) -> Iterator[str]:
    if schema.get("type") != "object":
        yield ".type: Input should be 'object'"
    if {"oneOf", "anyOf", "allOf"} & set(schema):
        yield ": input_schema does not support oneOf, allOf, or anyOf at the top level"
    if schema_invalid(schema):
        yield ": JSON schema is invalid. It must match JSON Schema draft 2020-12"


def schema_invalid(schema: JSON) -> bool:
    if "$schema" in schema and "2020-12" not in str(schema["$schema"]):
        return True
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError:
        return True
    return bool(dangling_references(schema))


def dangling_references(schema: JSON) -> list[str]:
    return [r for r in references(schema) if not r.startswith("#") or resolve(schema, r) is None]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def resolve(schema: JSON, reference: str) -> JSON | None:
    node: Any = schema
    for part in reference.lstrip("#").strip("/").split("/"):
        if part:
            node = node.get(part) if isinstance(node, dict) else None
    return node


BANNED = words(
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength maxItems "
    "uniqueItems contains minContains maxContains prefixItems minProperties maxProperties "
    "patternProperties propertyNames dependentRequired dependentSchemas unevaluatedProperties "
    "unevaluatedItems if then else not oneOf"
)
FORMATS = words("date-time time date duration email hostname uri ipv4 ipv6 uuid")


def subset_rule(schema: JSON) -> Iterator[str]:
    """The structured-output subset of JSON Schema (1.10)."""
    if schema_invalid(schema):
        yield "JSON schema is invalid. It must match JSON Schema draft 2020-12"
    if recursive(schema, schema, ()):
        yield "output_config.format.schema: recursive schemas are not supported"
    nodes = list(subschemas(schema))
    for node in nodes:
        for key in sorted(BANNED & set(node)):
            yield (
                f"output_config.format.schema: For '{node.get('type')}' type, property "
                f"'{key}' is not supported"
            )
        if node.get("minItems", 0) not in (0, 1):
            yield (
                "output_config.format.schema: For 'array' type, 'minItems' values other than "
                "0 or 1 are not supported"
            )
        if "format" in node and node["format"] not in FORMATS:
            yield f"output_config.format.schema: format '{node['format']}' is not supported"
        if is_object(node) and node.get("additionalProperties") is not False:
            yield (
                "output_config.format.schema: For 'object' type, 'additionalProperties' must "
                "be explicitly set to false"
            )
    optional = sum(len(set(n.get("properties", {})) - set(n.get("required", []))) for n in nodes)
    unions = sum("anyOf" in n or isinstance(n.get("type"), list) for n in nodes)
    if optional > OPTIONAL_LIMIT or unions > UNION_LIMIT:
        yield "Schema is too complex for compilation."


def is_object(node: JSON) -> bool:
    kind = node.get("type")
    return "properties" in node or kind == "object" or (isinstance(kind, list) and "object" in kind)


def subschemas(node: Any) -> Iterator[JSON]:
    if not isinstance(node, dict):
        return
    yield node
    for key in ("properties", "$defs", "definitions"):
        for child in (node.get(key) or {}).values():
            yield from subschemas(child)
    for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        for child in node.get(key) or []:
            yield from subschemas(child)
    for key in ("items", "not", "additionalProperties"):
        yield from subschemas(node.get(key))


def recursive(root: JSON, node: Any, seen: tuple[str, ...]) -> bool:
    if isinstance(node, list):
        return any(recursive(root, child, seen) for child in node)
    if not isinstance(node, dict):
        return False
    reference = node.get("$ref")
    if isinstance(reference, str):
        if reference in seen:
            return True
        target = resolve(root, reference)
        return recursive(root, target, (*seen, reference))
    return any(recursive(root, v, seen) for k, v in node.items() if k not in ("$defs", "enum"))


def format_rule(call: Call) -> Iterator[str]:
    chosen = call.config.get("format")
    if not chosen:
        return
    yield from subset_rule(chosen["schema"])
    if call.messages and call.messages[-1]["role"] == "assistant":
        yield "output_config.format cannot be used with prefill"
    if any(
        (b.get("citations") or {}) != {}
        for _, b in all_blocks(call.body)
        if b["type"] in ("document", "search_result")
    ):
        yield "output_config.format cannot be used with citations"


USER_BLOCKS = words(
    "text image document search_result tool_result container_upload tool_addition tool_removal"
)
ASSISTANT_BLOCKS = words(
    "text document thinking redacted_thinking tool_use server_tool_use mcp_tool_use compaction "
    "fallback mcp_tool_listing container_upload"
)


def role_rule(call: Call) -> Iterator[str]:
    if not call.messages:
        yield "messages: at least one message is required"
        return
    if call.messages[0]["role"] != "user":
        yield 'messages: first message must use the "user" role'
    for n, message in enumerate(call.messages):
        final = n == len(call.messages) - 1 and message["role"] == "assistant"
        if not message["content"] and not final and message["role"] != "system":
            yield f"messages.{n}: {message['role']} messages must have non-empty content"
        for m, block in enumerate(blocks_of(message["content"])):
            kind, role = block["type"], message["role"]
            result = kind.endswith("_tool_result") and role == "assistant"
            if kind not in (USER_BLOCKS if role == "user" else ASSISTANT_BLOCKS) and not result:
                yield f"messages.{n}.content.{m}: `{kind}` blocks are not allowed in {role} turns"
    yield from system_role_rule(call)


def system_role_rule(call: Call) -> Iterator[str]:
    roles = [m["role"] for m in call.messages]
    for n, role in enumerate(roles):
        if role != "system":
            continue
        if not call.model.system_role:
            yield "role 'system' is not supported on this model"
        before = blocks_of(call.messages[n - 1]["content"])[-1:] if n else []
        served = bool(before) and before[0]["type"].startswith("server_tool_use")
        if n == 0 or (roles[n - 1] != "user" and not served):
            yield f"messages.{n}: role 'system' must come after a user message"
        if n + 1 < len(roles) and roles[n + 1] != "assistant":
            yield f"messages.{n}: role 'system' must be last or be followed by an assistant message"


def text_rule(call: Call) -> Iterator[str]:
    for path, block in all_blocks(call.body):
        if block["type"] != "text":
            continue
        where = path.split(".")[0]
        if not block["text"]:
            yield f"{where}: text content blocks must be non-empty"
        elif not block["text"].strip():
            yield f"{where}: text content blocks must contain non-whitespace text"


def prefill_rule(call: Call) -> Iterator[str]:
    last = call.messages[-1]
    if last["role"] != "assistant":
        return
    blocks = blocks_of(last["content"])
    if any(b["type"] == "server_tool_use" for b in blocks):
        return  # the continuation of a paused turn
    if not call.model.prefill:
        yield (
            "This model does not support assistant message prefill. The conversation must end "
            "with a user message."
        )
    if call.thinking == "enabled":
        yield "Prefilling assistant messages is not supported when thinking is enabled."
    text = blocks[-1].get("text", "") if blocks else ""
    if text != text.rstrip():
        yield "messages: final assistant content cannot end with trailing whitespace"


def pairing_rule(call: Call) -> Iterator[str]:
    """tool_use and tool_result: well-formed ids, adjacent, complete, once, results first."""
    turns = merged(call.messages)
    used: list[str] = []
    for n, (role, turn) in enumerate(turns):
        for path, block in turn:
            key = {"tool_use": "id", "tool_result": "tool_use_id"}.get(block["type"])
            if key and not TOOL_ID.fullmatch(block[key]):
                yield (
                    f"{path}.{block['type']}.{key}: String should match pattern '^[a-zA-Z0-9_-]+$'"
                )
            if block["type"] == "tool_use" and not TOOL_NAME.fullmatch(block["name"]):
                yield (
                    f"{path}.tool_use.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'"
                )
        if role == "user":
            before = turns[n - 1][1] if n and turns[n - 1][0] == "assistant" else []
            yield from answers_rule(n, ids(before, "tool_use"), turn)
        if role == "assistant":
            used += ids(turn, "tool_use")
            if n + 1 < len(turns) and turns[n + 1][0] != "user":
                yield from answers_rule(n + 1, ids(turn, "tool_use"), [])
    if len(used) != len(set(used)):
        yield "messages: `tool_use` ids must be unique"


def answers_rule(n: int, asked: list[str], turn: list[tuple[str, JSON]]) -> Iterator[str]:
    leading = []
    for _, block in turn:
        if block["type"] != "tool_result":
            break
        leading.append(block["tool_use_id"])
    answered = ids(turn, "tool_result")
    if len(answered) != len(set(answered)):
        yield (
            f"messages.{n}: each tool_use must have a single result. Found multiple "
            "`tool_result` blocks"
        )
    stray = [i for i in answered if i not in asked]
    if stray:
        yield (
            f"messages.{n}: unexpected `tool_use_id` found in `tool_result` blocks: {stray[0]}. "
            "Each `tool_result` block must have a corresponding `tool_use` block in the "
            "previous message."
        )
    missing = [i for i in asked if i not in leading]
    if missing:
        yield (
            f"messages.{n}: `tool_use` ids were found without `tool_result` blocks immediately "
            f"after: {', '.join(missing)}. Each `tool_use` block must have a corresponding "
            "`tool_result` block in the next message."
        )


MAGIC = {
    "image/png": (b"\x89PNG\r\n\x1a\n",),
    "image/jpeg": (b"\xff\xd8\xff",),
    "image/gif": (b"GIF87a", b"GIF89a"),
    "image/webp": (b"RIFF",),
    "application/pdf": (b"%PDF-",),
}


def media_rule(call: Call) -> Iterator[str]:
    for path, block in all_blocks(call.body):
        source = block.get("source")
        if block["type"] not in ("image", "document") or not isinstance(source, dict):
            continue
        if source["type"] == "url" and not source["url"].startswith("https://"):
            yield f"{path}.{block['type']}.source.url: Only HTTPS URLs are supported."
        if source["type"] == "base64":
            yield from (f"{path}.{block['type']}.source.base64.{c}" for c in base64_rule(source))


def base64_rule(source: JSON) -> Iterator[str]:
    try:
        raw = base64.b64decode(source["data"], validate=True)
    except (binascii.Error, ValueError):
        yield "data: Invalid base64 data"
        return
    kind = source["media_type"]
    if not raw.startswith(MAGIC[kind]) or (kind == "image/webp" and raw[8:12] != b"WEBP"):
        yield f"data: the content does not match the provided media type {kind}"


def cache_rule(call: Call) -> Iterator[str]:
    marked = [(t, "tool") for t in call.body.get("tools") or []]
    marked += [(b, path) for path, b in all_blocks(call.body)]
    marks = [(block, block["cache_control"]) for block, _ in marked if block.get("cache_control")]
    top = call.body.get("cache_control")
    found = len(marks) + bool(top)
    if found > MARK_LIMIT:
        yield f"A maximum of {MARK_LIMIT} blocks with cache_control may be provided. Found {found}."
    for block, _ in marks:
        if block.get("type") == "text" and not block["text"]:
            yield "cache_control cannot be set for empty text blocks"
        if block.get("type") in ("thinking", "redacted_thinking"):
            yield "cache_control cannot be set for thinking blocks"
    spans = [mark.get("ttl", "5m") for _, mark in marks]
    last = marked[-1][0].get("cache_control") if marked else None
    if top and last and top.get("ttl", "5m") != last.get("ttl", "5m"):
        yield (
            f"Top-level cache_control has ttl='{top.get('ttl', '5m')}' but the target block "
            f"already has ttl='{last.get('ttl', '5m')}'"
        )
    elif top:
        spans.append(top.get("ttl", "5m"))
    if "5m" in spans and "1h" in spans[spans.index("5m") :]:
        yield (
            "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control "
            "block. Note that blocks are processed in the following order: tools, system, "
            "messages."
        )


RULES = (
    beta_rule,
    version_rule,
    role_rule,
    text_rule,
    size_rule,
    sampling_rule,
    thinking_rule,
    tool_choice_rule,
    tools_rule,
    format_rule,
    prefill_rule,
    pairing_rule,
    media_rule,
    cache_rule,
)


def refusal(call: Call, ledger: Ledger) -> str | None:
    """The first complaint of the rules, or None."""
    for rule in RULES:
        for complaint in rule(call):
            return complaint
    return next(ledger.complaints(call), None)


# --- thinking blocks ----------------------------------------------------------------------------


class Ledger:
    """Signs thinking blocks, and checks those that come back."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._turns: dict[str, list[JSON]] = {}  # tool_use id -> thinking blocks of its turn
        self._paused: dict[str, list[JSON]] = {}  # server_tool_use id -> all blocks of its turn
        self._threads: dict[str, JSON] = {}  # message id -> its body, with the answer appended

    def seal(self, call: Call, text: str) -> str:
        """An opaque signature over the text and the conversation before the block."""
        before = list(call.messages)
        if before[-1]["role"] == "assistant":
            before.pop()
        bound = {
            "model": call.model.id,
            "prefix": prefix_digest(call.body, before),
            "nonce": secrets.token_hex(4),
        }
        raw = json.dumps(bound).encode()
        return base64.b64encode(self._code(raw, text) + raw).decode()

    def expand(self, body: JSON) -> JSON:
        """The body with all that a continued thread stands for."""
        thread = body.get("thread") or {}
        if thread.get("type") != "continue":
            return body
        before = self._threads.get(thread["previous_message_id"])
        if before is None:
            raise Rejected("thread: not found", 404, "not_found_error")
        return {**before, **body, "messages": before["messages"] + body["messages"]}

    def remember(self, call: Call, message_id: str, blocks: list[JSON]) -> None:
        answered = [*call.messages, {"role": "assistant", "content": blocks}]
        self._threads[message_id] = {**call.body, "messages": answered}
        thinking = [b for b in blocks if b["type"] in ("thinking", "redacted_thinking")]
        for block in blocks:
            if block["type"] == "tool_use":
                self._turns[block["id"]] = thinking
        if blocks and blocks[-1]["type"] == "server_tool_use":
            self._paused[blocks[-1]["id"]] = blocks

    def complaints(self, call: Call) -> Iterator[str]:
        turns = merged(call.messages)
        for n, (role, turn) in enumerate(turns):
            for path, block in turn:
                if role == "assistant" and block["type"] in ("thinking", "redacted_thinking"):
                    yield from self._block_complaints(call, turns[:n], path, block)
        yield from self._latest_complaints(call, turns)
        yield from self._paused_complaints(call, turns)

    def _block_complaints(self, call: Call, before: Any, path: str, block: JSON) -> Iterator[str]:
        name = "signature" if block["type"] == "thinking" else "data"
        bound = self._open(block[name], block.get("thinking", ""))
        if bound is None:
            yield f"{path}: Invalid `{name}` in `{block['type']}` block"
        elif bound["model"] == call.model.id and call.model.bound:
            messages = [{"role": r, "content": [b for _, b in t]} for r, t in before]
            if bound["prefix"] != prefix_digest(call.body, messages):
                yield (
                    f"{path}: Invalid `{name}` in `{block['type']}` block. The block is bound "
                    "to a different conversation"
                )

    def _latest_complaints(self, call: Call, turns: Any) -> Iterator[str]:
        latest = next((t for role, t in reversed(turns) if role == "assistant"), [])
        calls = [b for b in ids(latest, "tool_use") if self._turns.get(b)]
        shown = [b for _, b in latest if b["type"] in ("thinking", "redacted_thinking")]
        if not calls:
            return
        if call.thinking == "enabled" and not shown:
            yield "Expected `thinking` or `redacted_thinking`, but found `tool_use`"
        if shown and shown != self._turns[calls[-1]]:
            yield (
                "`thinking` or `redacted_thinking` blocks in the latest assistant message "
                "cannot be modified"
            )

    def _paused_complaints(self, call: Call, turns: Any) -> Iterator[str]:
        role, turn = turns[-1]
        blocks = [block for _, block in turn]
        if role != "assistant" or blocks[-1]["type"] != "server_tool_use":
            return
        if blocks[-1]["name"] not in [t.get("name") for t in call.body.get("tools") or []]:
            yield f"tools must define `{blocks[-1]['name']}` to continue the paused turn"
        handed = self._paused.get(blocks[-1]["id"])
        if handed is None or plain(blocks[-len(handed) :]) != plain(handed):
            yield "the paused turn must be sent back as it was"

    def _code(self, raw: bytes, text: str) -> bytes:
        return hmac.new(self._key, raw + text.encode(), hashlib.sha256).digest()[:12]

    def _open(self, signature: str, text: str) -> JSON | None:
        try:
            opened = base64.b64decode(signature, validate=True)
        except (binascii.Error, ValueError):
            return None
        if not hmac.compare_digest(opened[:12], self._code(opened[12:], text)):
            return None
        return json.loads(opened[12:])


def prefix_digest(body: JSON, messages: list[JSON]) -> str:
    """What a signature is bound to: system, the set of tools, the messages before the block."""
    turns = [
        [role, [plain(b) for _, b in turn if "thinking" not in b["type"]]]
        for role, turn in merged(messages)
    ]
    tools = sorted(json.dumps(plain(t), sort_keys=True) for t in body.get("tools") or [])
    system = [plain(b) for b in blocks_of(body.get("system", []))]
    text = json.dumps([system, tools, turns], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def plain(node: Any) -> Any:
    """A block without its cache marks; a string content as its list of one text block."""
    if isinstance(node, list):
        return [plain(child) for child in node]
    if not isinstance(node, dict):
        return node
    kept = {k: plain(v) for k, v in node.items() if k != "cache_control"}
    if node.get("type") == "tool_result":
        kept["content"] = plain(blocks_of(node.get("content")))
    return kept
