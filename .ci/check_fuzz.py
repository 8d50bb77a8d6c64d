"""Random input for what reads bytes from outside: requests, JSON bodies, events, chunks.

    python check_fuzz.py [--long] [--seed N]

In process, on the public functions and on `App`: a mutator for volume, hypothesis for depth, h11 as
the oracle of requests. Then over sockets, with a look at threads and descriptors afterwards. Needs
h11 and hypothesis; the seed is printed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import h11
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as some
from wire import (
    HEALTH,
    LAST,
    LONG,
    SEED,
    SHIM_FILE,
    all_of,
    answers,
    back_to,
    check,
    connected,
    exchanged,
    held,
    received,
    run,
    shim,
)

_spec = importlib.util.spec_from_file_location("claude_shim", SHIM_FILE)
assert _spec and _spec.loader
claude_shim = importlib.util.module_from_spec(_spec)
sys.modules["claude_shim"] = claude_shim
_spec.loader.exec_module(claude_shim)

JSON = dict[str, Any]
MAX_BODY = 100_000


class Budget:
    """So many rounds, or so many seconds, whichever ends first; --long takes the rounds."""

    def __init__(self, rounds: int, seconds: float) -> None:
        self.rounds, self.seconds = rounds, 1e9 if LONG else seconds
        self.done, self.begun = 0, time.monotonic()

    def __iter__(self) -> Iterator[int]:
        while self.done < self.rounds and time.monotonic() - self.begun < self.seconds:
            yield self.done
            self.done += 1

    def __str__(self) -> str:
        spent = time.monotonic() - self.begun
        return f"{self.done:,} at {self.done / spent:,.0f}/s, seed {SEED}"


# --- requests: ours and h11's judgement -----------------------------------------------------------


class Read(NamedTuple):
    """A request as one reader understood it; None of it if it was refused, or is not whole."""

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes
    rest: bytes


REFUSED, NOT_WHOLE = "refused", "not whole"


def read_by_us(raw: bytes) -> tuple[Optional[Read], str]:
    """By the pure functions of section 13; with the reason when there is no request."""
    head, mark, rest = raw.partition(b"\r\n\r\n")
    if not mark:
        return None, NOT_WHOLE
    try:
        parsed = claude_shim.parsed_head(head)
        framing = claude_shim.request_framing(parsed, MAX_BODY)
        if framing.chunked:
            decoder = claude_shim.ChunkedDecoder()
            body = decoder.feed(rest)
            whole, rest = decoder.done, decoder.rest
        else:
            whole, length = len(rest) >= framing.length, framing.length
            body, rest = rest[:length], rest[length:]
    except claude_shim.ProtocolError as error:
        return None, error.message
    pairs = [(name, value) for name, values in parsed.fields.items() for value in values]
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    made = Read(parsed.method.encode(), parsed.target.encode(), sorted(fields), body, rest)
    return (made, "") if whole else (None, NOT_WHOLE)


def read_by_h11(raw: bytes) -> tuple[Optional[Read], str]:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    head, pieces = None, []
    try:
        connection.receive_data(raw)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return None, NOT_WHOLE
    except h11.RemoteProtocolError as error:
        return None, str(error)
    assert head is not None
    fields = sorted((bytes(name), bytes(value)) for name, value in head.headers)
    rest = connection.trailing_data[0]
    return Read(head.method, head.target, fields, b"".join(pieces), rest), ""


# Why we refuse what h11 takes: our sentence -> the reason. A refusal for another reason fails.
STRICTER = {
    "the request line is malformed": "h11 takes a bare LF, or any length of method",
    "a header field is malformed": "h11 takes a bare LF at a line's end, and unfolds folded fields",
    "claude_shim speaks HTTP/1.1, not": "h11 takes HTTP/1.2 to 1.9",
    "expected one Host header": "h11 takes an empty Host",
    "the request target is malformed": "h11 takes any target",
    "the body may be in gzip or deflate only": "codings are for the application, to h11",
    "expected one Content-Type header": "two can be read in two ways",
    "Transfer-Encoding together with": "h11 lets Transfer-Encoding win (RFC 9112 6.1 allows a 400)",
    "Content-Length is not one whole number": "h11 takes a list of equal lengths, and 20 digits",
    "the request body is over": "our limit",
    "the only transfer coding known here": "h11 says the same with another status",
    "a chunk of the body has no valid size": "h11 takes 20 digits, and any byte in an extension",
    "a chunk of the body does not end": "h11 says so when more has come",
    "the trailers of the body": "h11 takes framing fields, folds and bare LF in trailers",
}

# What we take and h11 does not.
LAXER = {
    re.compile(rb"\r\n[0-9A-Fa-f]+[ \t]+;"): "blanks before a chunk extension (RFC 9112 7.1.1)",
}

HEADS = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models?limit=5 HTTP/1.0\r\n\r\n",
    (
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nOrigin: https://a.example\r\nConnection: close"
        b"\r\n\r\n"
    ),
    b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: r-1\r\nAccept: */*\r\n\r\n",
    (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: [::1]:8765\r\nContent-Type: a/json\r\n"
        b'Authorization: Bearer x\r\nContent-Length: 14\r\n\r\n{"model": "m"}'
    ),
    (
        b"POST /v1/messages HTTP/1.1\r\nhost: a.b\r\ntransfer-encoding: chunked\r\n"
        b"expect: 100-continue\r\n\r\n5;a=b\r\nhello\r\n00A\r\n0123456789\r\n0\r\nX: y\r\n\r\n"
    ),
    (
        b"POST http://localhost:1/v1/messages?beta=true HTTP/1.1\r\nHost: localhost:1\r\n"
        b"Connection: keep-alive, x\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    ),
]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"\x0b", b"\x0c", b"\x85", b"\xa0",
    b"\xff", b"\x7f", b"\x1c", b"\r\n ", b"\r\n\t", b"\r\n\r\n", b"0\r\n\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: +5\r\n", b"Content-Length: 5, 5\r\n", b"content-length:0\r\n", b"chunked",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n", b"gzip, chunked",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding:\x0bchunked\r\n", b"Host: evil\r\n",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"99999999999999999999", b"-1", b"1_0",
    b"0x5",
    b"//", b"http://", b"@", b"#", b"?", b"*", b"%00", b"ffffffff\r\n", b"5;a=\"\r\n\"\r\n",
    b"Connection: close, content-length\r\n", b"Expect: 100-continue\r\n", b"\xb2",
    b"Upgrade: h2c\r\n",
]  # fmt: skip


class Mutator:
    """Makes bytes out of samples: cuts, doubles, swaps, inserts."""

    def __init__(self, number: int, samples: list[bytes], tokens: list[bytes]) -> None:
        self.random = random.Random(number)
        self.samples, self.tokens = samples, tokens

    def made(self) -> bytes:
        pick = self.random.random
        raw = self.samples[int(pick() * len(self.samples))]
        for _ in range(1 + int(pick() * 3)):
            raw = self.changed(raw, int(pick() * 6))
        return raw

    def changed(self, raw: bytes, kind: int) -> bytes:
        pick = self.random.random
        at = int(pick() * (len(raw) + 1))
        end = at + int(pick() * 8)
        if kind == 0:
            return raw[:at] + bytes([int(pick() * 256)]) + raw[at + 1 :]
        if kind == 1:
            return raw[:at] + raw[end:]
        if kind == 2:
            return raw[:end] + raw[at:]
        if kind == 3:
            other = self.samples[int(pick() * len(self.samples))]
            return raw[:at] + other[int(pick() * len(other)) :]
        token = self.tokens[int(pick() * len(self.tokens))]
        if kind == 4:
            return raw[:at] + token + raw[at:]
        line = raw.find(b"\r\n", at) + 2  # whole lines make more that is nearly right
        return raw[:line] + token + raw[line:]


def once(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The fields as h11 gives them: of equal lengths it keeps one, codings in lower case."""
    fields = [(k, v.lower() if k == b"transfer-encoding" else v) for k, v in fields]
    lengths = [field for field in fields if field[0] == b"content-length"]
    return sorted([field for field in fields if field not in lengths] + lengths[:1])


def difference(raw: bytes, ours: Optional[Read], reason: str, theirs: Optional[Read]) -> str:
    """What is wrong with our judgement, in the light of h11's."""
    if ours and not theirs:
        if any(lax.search(raw) for lax in LAXER):
            return ""
        return f"taken by us, not by h11: {raw!r}"
    if ours and theirs:
        plain = theirs.target.startswith(b"/") or theirs.target == b"*"
        same = ours[3:] == theirs[3:] and ours.method == theirs.method
        if plain and (ours.target, once(ours.fields)) != (theirs.target, once(theirs.fields)):
            same = False
        return "" if same else f"read in another way: {raw!r}: {ours} {theirs}"
    if theirs and reason != NOT_WHOLE and not any(reason.startswith(known) for known in STRICTER):
        return f"refused for no reason of the table ({reason}): {raw!r}"
    return ""


@check("mutated requests: none is taken that h11 refuses, none is read in another way")
def request_heads() -> str:
    mutator, problems, counts = Mutator(SEED, HEADS, TOKENS), [], Counter[str]()
    budget = Budget(1_000_000, 20)
    for number in budget:
        raw = mutator.made()
        ours, reason = read_by_us(raw)
        counts["taken"] += ours is not None
        if ours is None and number % 16:
            continue  # h11 takes twenty times as long
        theirs, _ = read_by_h11(raw)
        counts["asked h11"] += 1
        counts["stricter"] += ours is None and theirs is not None
        problem = difference(raw, ours, reason, theirs)
        if problem:
            problems.append(problem)
    all_of(problems)
    return f"{budget}; {dict(counts)}"


@check("mutated chunked bodies: the same bytes or the same refusal, however they are cut")
def chunked_bodies() -> str:
    bodies = [
        b"5\r\nhello\r\n0\r\n\r\nGET", b"1e;a=b\r\n" + b"x" * 30 + b"\r\n000\r\nA: b\r\n\r\n",
        b"A\r\n0123456789\r\n1\r\n\r\r\n0\r\nTrailer: 1\r\nOther: 2\r\n\r\n", b"0\r\n\r\n",
    ]  # fmt: skip
    mutator, budget = Mutator(SEED + 1, bodies, TOKENS), Budget(500_000, 6)
    for _ in budget:
        raw = mutator.made()
        whole, pieces = unchunked([raw]), unchunked(cut(raw, mutator.random))
        assert whole == pieces, f"{raw!r}: whole {whole}, in pieces {pieces}"
    return str(budget)


def unchunked(pieces: list[bytes]) -> tuple[bool, bytes, bytes]:
    """Whether the body came to its end, its bytes, and the rest; a refusal has none of them."""
    decoder, made, rest = claude_shim.ChunkedDecoder(), [], b""
    try:
        for piece in pieces:
            if decoder.done:
                rest += piece
            else:
                made.append(decoder.feed(piece))
                rest = decoder.rest
    except claude_shim.ProtocolError:
        return False, b"refused", b""
    return decoder.done, b"".join(made), rest


def cut(raw: bytes, chance: random.Random) -> list[bytes]:
    marks = sorted(int(chance.random() * (len(raw) + 1)) for _ in range(int(chance.random() * 8)))
    return [raw[a:b] for a, b in zip([0, *marks], [*marks, len(raw)])]


# --- events ---------------------------------------------------------------------------------------


@check("server-sent events at random boundaries give what they give as a whole")
def event_boundaries() -> str:
    streams = [b"".join(text_stream(random.Random(n), 4)) for n in range(4)]
    streams += [stream.replace(b"\n", b"\r\n") for stream in streams[:2]]
    tokens = [
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b": c\n",
        b"data",
        b"data:",
        b"event: x\n",
        b"\xef\xbb\xbf",
    ]
    mutator, budget = Mutator(SEED + 2, streams, [*tokens, b"\0", b"id: 1\n"]), Budget(300_000, 6)
    for _ in budget:
        raw = mutator.made()
        pieces = cut(raw, mutator.random)
        decoder = claude_shim.EventDecoder()
        whole = blocks(claude_shim.EventDecoder().feed(raw))
        found = blocks(b"".join(map(decoder.feed, pieces)))
        assert found == whole, f"{raw!r} cut as {[len(p) for p in pieces]}: {found}, not {whole}"
        made = [spelled_alike(transformed(each)) for each in ([raw], pieces)]
        if made[0] != made[1]:
            raise AssertionError(f"{raw!r} cut as {[len(p) for p in pieces]}: {made[0]} {made[1]}")
    return str(budget)


def blocks(events: bytes) -> list[bytes]:
    """The events; how many empty lines are between them says nothing."""
    return [block for block in re.split(rb"\n\n+", events.strip(b"\n")) if block]


def reply() -> Any:
    return claude_shim.ChatReply.to(
        claude_shim.messages_request_from_chat(
            {"model": "m", "messages": [{"role": "user", "content": "x"}],
             "stream_options": {"include_usage": True}},
            "claude-opus-5-5", lambda tool_use_id: [],
        ), 1_700_000_000,
    )  # fmt: skip


REPLY = reply()


class Unspliced:
    """An encoder without its fast path."""

    takes = property(lambda self: b"", lambda self, value: None)


class GeneralChat(Unspliced, claude_shim.ChatStreamEncoder):  # type: ignore[misc,name-defined]
    """That of chat completions."""


class GeneralResponses(Unspliced, claude_shim.ResponsesStreamEncoder):  # type: ignore[misc,name-defined]
    """That of Responses."""


def chat_encoder() -> Any:
    return claude_shim.ChatStreamEncoder(REPLY)


# The fast one, and the one that it must not differ from.
ENCODERS = (
    (chat_encoder, lambda: GeneralChat(REPLY)),
    (
        lambda: claude_shim.ResponsesStreamEncoder(claude_shim.ResponsesReply("resp_1")),
        lambda: GeneralResponses(claude_shim.ResponsesReply("resp_1")),
    ),
)


def transformed(pieces: list[bytes], encoder: Any = chat_encoder) -> bytes:
    transform = claude_shim.EventTransform(encoder())
    made = [transform.feed(piece) for piece in pieces]
    return b"".join([*made, transform.end()])


CHARACTERS = [
    "a", "Zz ", "\n", '"', "\\", "/", "\t", "\0", "\x7f", "\x85", "ä", "\u2028", "\u2029", "\u4e16",
    "\U0001f600", "e\u0301", "\ufeff", "\ud800", "\udc00", "<script>", "data: ", "\n\n", "]}",
    "{", "\\u0041",
    "\\\\", "  ", "\ufffd",
]  # fmt: skip


# A block, with the type and the member of its deltas.
FILLED = (
    ({"type": "text", "text": ""}, "text_delta", "text"),
    ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking"),
    (
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
        "input_json_delta",
        "partial_json",
    ),
)


def text_stream(chance: random.Random, events: int, kind: int = 0) -> Iterator[bytes]:
    """A message of one block of text or the like, in the spellings that upstream could choose."""
    start = {"type": "message_start", "message": {"id": "msg_1", "model": "m", "usage": {}}}
    yield framed(start, False)
    block, type_, member = FILLED[kind]
    yield framed({"type": "content_block_start", "index": 0, "content_block": block}, False)
    for _ in range(events):
        size = int(chance.random() * 6)
        text = "".join(CHARACTERS[int(chance.random() * len(CHARACTERS))] for _ in range(size))
        event = {"type": "content_block_delta", "index": 0, "delta": {"type": type_, member: text}}
        yield framed(event, chance.random() < 0.5, chance.random() < 0.3)
    yield framed({"type": "content_block_stop", "index": 0}, True)
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    yield framed({"type": "message_delta", "delta": delta, "usage": {"output_tokens": 3}}, True)
    yield framed({"type": "message_stop"}, True)


def framed(event: JSON, ascii_only: bool, padded: bool = False) -> bytes:
    text = json.dumps(event, separators=(",", ":"), ensure_ascii=ascii_only)
    raw = text.encode("utf-8", "surrogatepass")
    if padded:
        raw = raw[:-1] + b"   }"
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), raw)


@check("the splice gives the general path's bytes")
def splice_and_general() -> str:
    chance, per_stream, mutated = random.Random(SEED + 3), 40, 0
    mutator = Mutator(
        SEED + 4, [b""], [b"\\", b'"', b"\\u00e9", b"\\ud83d", b"}", b" ", b"\n", b"\xff", b"\0"]
    )
    budget = Budget(400_000 // per_stream, 15)
    for number in budget:
        events = list(text_stream(chance, per_stream, number // 2 % 3))
        if number % 2:  # one event in the middle is not as Anthropic writes it
            at, mutated = int(chance.random() * len(events)), mutated + 1
            events[at] = mutator.changed(events[at], int(chance.random() * 6))
        raw, encoders = b"".join(events), ENCODERS[number // 6 % 2]
        fast, general = (transformed([raw], encoder) for encoder in encoders)
        fast = fast.replace(b"\x7f", rb"\u007f")  # the one character with two usual spellings
        if fast != general and spelled_alike(fast) != spelled_alike(general):
            raise AssertionError(f"{raw!r}\nsplice:  {fast!r}\ngeneral: {general!r}")
        assert number % 2 or fast == general, f"{raw!r}\nsplice:  {fast!r}\ngeneral: {general!r}"
    return f"{budget.done * per_stream:,} events, {mutated:,} mutated; {budget} streams"


def spelled_alike(stream: bytes) -> list[Any]:
    """The data of the events, read: `\\/` and `/` are one, as are \\u0041 and A."""
    return [
        line if line == b"data: [DONE]" else json.loads(line[5:])
        for line in stream.split(b"\n") if line.startswith(b"data:")
    ]  # fmt: skip


# --- bodies through App ---------------------------------------------------------------------------

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
)
scalars = some.one_of(
    some.none(), some.booleans(), some.integers(), some.floats(allow_nan=False,
    allow_infinity=False),
    some.text(max_size=8), some.sampled_from([
        "user", "assistant", "system", "tool", "text", "image_url", "function", "auto", "none",
        "opus",
        "json_schema", "json_object", "data:image/png;base64,iVBORw0KGgo=", "tool_use", "high",
        "required",
        "tool_result", "toolu_1", 0, 1, -1, 10**30, 1e308, "",
    ]),
)  # fmt: skip
NAMES = """model messages role content type text image_url url tool_calls id function name
    arguments tool_call_id tools tool_choice parameters response_format json_schema schema strict
    stop n stream
    stream_options include_usage max_tokens max_completion_tokens temperature top_p user metadata
    reasoning_effort cache_control prompt system thinking budget_tokens input_schema input source
    media_type data properties items required enum anyOf $ref $defs description format custom
    logit_bias seed parallel_tool_calls functions function_call refusal file file_data filename
    input_audio prediction web_search_options best_of echo suffix output_config
    instructions reasoning effort previous_response_id include truncation store output
    call_id""".split()
names = some.one_of(some.sampled_from(NAMES), some.text(max_size=3))
values = some.recursive(
    scalars,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
roles = some.sampled_from(["user", "assistant", "system", "developer", "tool", "function", "x"])
types = some.sampled_from(["text", "image_url", "file", "input_audio", "tool_use", "tool_result",
                           "refusal", "image", "document", "thinking", "x"])  # fmt: skip


def with_more(fields: JSON, names: str) -> Any:
    """Objects with these fields and some of the others, of any type."""
    more = some.dictionaries(some.sampled_from(names.split()), values, max_size=3)
    return some.builds(lambda one, other: {**one, **other}, some.fixed_dictionaries(fields), more)


parts = with_more({"type": types}, "text image_url file input id name content source refusal type")
contents = some.one_of(some.text(max_size=9), some.lists(parts | values, max_size=3), values)
messages = with_more(
    {"role": roles, "content": contents},
    "tool_calls tool_call_id name function_call refusal reasoning_content thinking_blocks audio",
)
chats = {"model": some.just("opus"), "messages": some.lists(messages, min_size=1, max_size=3)}
items = with_more(
    {"type": types | some.sampled_from(["message", "function_call", "function_call_output",
                                        "reasoning", "custom_tool_call", "item_reference"])},
    "role content call_id id name arguments output summary encrypted_content status input phase",
)  # fmt: skip
questions = {"model": some.just("opus"), "input": some.lists(items | values, max_size=3) | values}
bodies = with_more(chats, " ".join(NAMES)) | with_more(questions, " ".join(NAMES)) | values


def app() -> Any:
    policy = claude_shim.Policy(retries=claude_shim.RetryPolicy(0), live_models=False)
    return claude_shim.App(claude_shim.EchoUpstream(), policy=policy)


def answered(shim_app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and bytes of an App's answer, its sources read to their ends."""
    response = shim_app.respond(claude_shim.Request("POST", path, {}, body, "shim_1"))
    if isinstance(response.body, claude_shim.Gathered):
        for stream in response.body.streams:
            drained(stream)
        response = response.body.response()
    if isinstance(response.body, claude_shim.Stream):
        return response.status, drained(response.body)
    return response.status, response.body


def drained(stream: Any) -> bytes:
    made = []
    while not (stream.transform.complete or stream.transform.failed):
        burst = stream.source.read()
        if burst == b"":
            made.append(stream.transform.end())
            break
        made.append(stream.transform.feed(burst or b""))
    return b"".join(made)


def judged(shim_app: Any, path: str, body: bytes) -> str:
    """What is wrong with an answer: a fault, or a status that tells of one."""
    try:
        status, made = answered(shim_app, path, body)
    except Exception as error:
        frame = sys.exc_info()[2]
        while frame and frame.tb_next:
            frame = frame.tb_next
        where = f"{frame.tb_frame.f_code.co_name}:{frame.tb_lineno}" if frame else ""
        return f"{path}: {type(error).__name__}: {error} at {where} for {body[:1500]!r}"
    told = b"claude_shim failed" in made
    return f"{path}: {status} {made[:200]!r} for {body[:1500]!r}" if status == 500 or told else ""


@check("bodies by hypothesis through App: no fault, no 500")
def json_bodies() -> str:
    shim_app, begun, count, problems = app(), time.monotonic(), Counter[str](), {}

    @seed(SEED)
    @settings(max_examples=20_000 if LONG else 1_500, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(some.sampled_from(PATHS), bodies)
    def body(path: str, value: Any) -> None:
        count["bodies"] += 1
        problem = judged(shim_app, path, json.dumps(value).encode())
        if problem:  # all of them, and one of each place
            problems.setdefault(re.sub(r" for .*", "", problem)[:150], problem)

    body()
    all_of(list(problems.values()))
    return f"{count['bodies']:,}, seed {SEED} ({time.monotonic() - begun:.1f} s)"


SAMPLES = [json.dumps(sample).encode() for sample in (
    {"model": "opus", "messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 1},
    {"model": "sonnet", "messages": [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "text", "text": "\u00e4\U0001f600"},
                                     {"type": "image_url",
                                     "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {
         "type": "object", "properties": {"a": {"type": "integer"}}}}}],
     "tool_choice": "auto", "response_format": {"type": "json_object"}, "max_tokens": 5},
    {"model": "haiku", "max_tokens": 9, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}], "system": "s",
     "thinking": {"type": "enabled", "budget_tokens": 1024}, "tools": [{"name": "t",
     "input_schema": {}}]},
    {"model": "opus", "prompt": ["a", "b"], "max_tokens": 3},
    {"model": "opus", "instructions": "i", "stream": True, "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "done"}],
     "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
     "reasoning": {"effort": "high"}, "text": {"format": {"type": "text"}}, "store": False},
)]  # fmt: skip
JSON_TOKENS = [
    b"null", b"true", b"1e999", b"-0", b"NaN", b"Infinity", b"[]", b"{}", b"[" * 300,
    b'{"a":' * 300, b'""',
    b'"\\ud800"', b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b",", b":", b'"', b"\\", b"]", b"}",
    b"1" * 5000,
    b'"model":', b'"role":', b'"\\u0000"', b"0.1e-400", b"[[[]]]", b'"opus"', b'"type":"text",',
]  # fmt: skip


@check("mutated bodies through App: no fault, no 500")
def mutated_bodies() -> str:
    shim_app, mutator, problems = app(), Mutator(SEED + 5, SAMPLES, JSON_TOKENS), {}
    budget = Budget(200_000, 8)
    for number in budget:
        raw = changed_value(mutator) if number % 2 else mutator.made()
        problem = judged(shim_app, PATHS[number % len(PATHS)], raw)
        if problem:
            problems.setdefault(re.sub(r" for .*", "", problem)[:150], problem)
    all_of(list(problems.values()))
    return str(budget)


SPARE: list[Any] = [None, True, 0, -1, 1.5, 10**25, "", "x", [], {}, [None], [[]], {"type": 5},
["a"], "opus",
                    {"a": {"b": []}}, "\ud800", {"": None}, [{"type": "text"}],
                    {"type": "object"}]  # fmt: skip


def changed_value(mutator: Mutator) -> bytes:
    """A sample with some of its values replaced, wherever they are."""
    chance = mutator.random
    value = json.loads(chance.choice(SAMPLES))
    for _ in range(chance.randint(1, 3)):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = chance.choice(list(keys))
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.75:
                place = place[key]
                continue
            place[key] = copy.deepcopy(chance.choice(SPARE))
            break
    return json.dumps(value).encode()


# --- over sockets ---------------------------------------------------------------------------------


@check("mutated requests over sockets: answered in HTTP or closed, never a fault; nothing is kept")
def over_sockets() -> str:
    top = b"POST %b HTTP/1.1\r\nHost: localhost\r\n"
    posts = [
        top % path.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(sample), sample)
        for path, sample in zip(PATHS * 2, SAMPLES * 2)
    ]
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SAMPLES[0]), SAMPLES[0])
    chunked = [top % b"/v1/chat/completions" + b"Transfer-Encoding: chunked\r\n\r\n" + chunks]
    bodied = [head for head in HEADS if not head.startswith(b"HEAD")]  # whose length has no bytes
    mutator = Mutator(SEED + 6, [*bodied, *posts, *chunked], [*TOKENS, *JSON_TOKENS])
    budget, found = Budget(100_000, 15), Counter[int]()
    with shim("--upstream", "echo", "--quiet") as server:
        exchanged(server.port, HEALTH, silence=0.2)
        base = back_to(held(server.pid), server.pid)
        for _ in budget:
            raw = mutator.made()
            with connected(server.port) as sock:
                try:
                    sock.sendall(raw)
                    # Some wait for more: what follows them is either their rest or a request.
                    sock.sendall(b"\r\n\r\n" + LAST)
                except ConnectionError:
                    pass
                came, _ = received(sock, silence=0.03)
            for answer in answers(came):
                found[answer.status] += 1
                assert answer.status not in (500, 502, 503, 504), f"{raw!r}: {answer}"
        left = back_to(base, server.pid)
    return f"{budget}; statuses {dict(sorted(found.items()))}; at first {base}, then {left}"


if __name__ == "__main__":
    print(f"seed {SEED}")
    sys.exit(run("fuzz"))
