#!/usr/bin/env python3
"""Use Claude from any program that speaks OpenAI's or Anthropic's API: one file, no dependencies.

    export ANTHROPIC_API_KEY=sk-ant-api03-...
    python claude_shim.py                        # serves http://127.0.0.1:8765
    export OPENAI_BASE_URL=http://127.0.0.1:8765/v1 OPENAI_API_KEY=anything
    export ANTHROPIC_BASE_URL=http://127.0.0.1:8765
    python claude_shim.py --upstream echo        # to try it without any credential

How the file is built: numbered sections, strictly bottom-up. A banner names the sections that its
code may use; section 0 is this head. Sections 1 to 7 are pure: no clock, environment, file, socket,
thread or random number; identifiers and the time come in as arguments. The Messages shape of
Anthropic is the only inner shape (the hub): a dialect is a request converter, an answer converter
and a stream encoder; an upstream yields Messages events and knows no dialect.

Copyright (c) 2026 the claude_shim authors (MIT licence)

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

# To start fast, what plain serving does not need is imported where it is used, and a pattern that
# few requests need is a string, which `re` compiles when it is first used.
import argparse
import base64
import binascii
import contextlib
import errno
import fnmatch
import functools
import hashlib
import heapq
import hmac
import http.server
import io
import ipaddress
import itertools
import json
import math
import operator
import os
import re
import secrets
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections import OrderedDict, deque
from datetime import datetime, timezone
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    Generator,
    Generic,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    TextIO,
    Tuple,
    Type,
    TypeVar,
    Union,
)

if TYPE_CHECKING:
    import configparser
    import sqlite3

__version__ = "0.1.0"

__all__ = [
    "APIKey",
    "App",
    "AuthToken",
    "ChatReply",
    "ChatStreamEncoder",
    "ChunkedDecoder",
    "ClientKeys",
    "CompletionStreamEncoder",
    "ConfigError",
    "Credential",
    "EchoUpstream",
    "EventDecoder",
    "EventTransform",
    "HTTPUpstream",
    "Limits",
    "Log",
    "MessageAssembler",
    "Passthrough",
    "Policy",
    "Request",
    "Response",
    "ResponseStore",
    "ResponsesReply",
    "ResponsesStreamEncoder",
    "Server",
    "ServerLimits",
    "ShimError",
    "Upstream",
    "adapted",
    "chat_from_messages",
    "completion_from_messages",
    "main",
    "messages_request_from_chat",
    "messages_request_from_responses",
    "response_from_message",
]

JSON = Dict[str, Any]  # an object on the wire: checked once at the edge, unknown fields survive
HeaderList = List[Tuple[str, str]]
Outcome = TypeVar("Outcome")


# ----------------------------------------------------------------------
# 1. Errors                                                      uses: 0
# ----------------------------------------------------------------------
# Every failure that a client may see is a ShimError: a sentence its user can act on, with an HTTP
# status. Both dialects' bodies are made here, so no other section knows how an error looks.


class ClientGone(Exception):
    """The client hung up: there is nobody left to answer."""


class ShimError(Exception):
    """A failure with an HTTP `status`, Anthropic's error `type` and OpenAI's `code` and `param`."""

    status = 500
    type = "api_error"
    code: Optional[str] = None

    def __init__(
        self, message: str, *, param: Optional[str] = None, headers: Iterable[Tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers: HeaderList = list(headers)


class RequestError(ShimError):
    """400: the request is wrong; `param` is the path of the field."""

    status = 400
    type = "invalid_request_error"


class ProtocolError(RequestError):
    """400: the bytes are not a well-formed HTTP/1.1 request; the connection is closed after it."""


class AuthenticationError(RequestError):
    """401: the client key is missing or wrong."""

    status = 401
    type = "authentication_error"


class ForbiddenError(RequestError):
    """403: a web page, or a host name that is not ours, asked."""

    status = 403
    type = "permission_error"


class NotFoundError(RequestError):
    """404: there is no such endpoint."""

    status = 404
    type = "not_found_error"
    code = "unsupported_endpoint"


class NotStoredError(NotFoundError):
    """404: no response and no item of this id is kept for this client."""

    code = "not_found"


class PreviousResponseError(RequestError):
    """400: the response to go on from is not kept for this client."""

    code = "previous_response_not_found"


class ModelNotFoundError(NotFoundError):
    """404: no model and no alias has this name."""

    code = "model_not_found"


class MethodNotAllowedError(RequestError):
    """405: the endpoint exists, the method does not; carries `Allow`."""

    status = 405


class RequestTimeoutError(ProtocolError):
    """408: head or body of the request did not come in time."""

    status = 408


class RequestTooLargeError(ProtocolError):
    """413: the body is over the limit."""

    status = 413
    type = "request_too_large"


class TargetTooLongError(ProtocolError):
    """414: the request line is over the limit."""

    status = 414


class UnsupportedEncodingError(ProtocolError):
    """415: the body has a coding that is not known here; carries `Accept-Encoding`."""

    status = 415


class UnsupportedTypeError(RequestError):
    """415: the body has a type that a form of any web page could have sent."""

    status = 415


class UpgradeRequiredError(RequestError):
    """426: no WebSocket here; Codex asks once and falls back to plain HTTP on this status."""

    status = 426


class HeadersTooLargeError(ProtocolError):
    """431: too many or too long header fields."""

    status = 431


class NotImplementedTransferError(ProtocolError):
    """501: a transfer coding other than chunked."""

    status = 501


class VersionNotSupportedError(ProtocolError):
    """505: neither HTTP/1.0 nor HTTP/1.1."""

    status = 505


class OverloadedError(ShimError):
    """529: more requests wait than are let in."""

    status = 529
    type = "overloaded_error"


class ShuttingDownError(ShimError):
    """503: the server is being stopped."""

    status = 503


class UpstreamError(ShimError):
    """A failure that upstream reported: its own status, type, sentence, headers and body."""

    def __init__(
        self, message: str, *, status: int, type: str, headers: Iterable[Tuple[str, str]] = ()
    ) -> None:
        super().__init__(message, headers=headers)
        self.status = status
        self.type = type


class UpstreamUnreachableError(ShimError):
    """502: no connection to upstream."""

    status = 502


class CredentialError(ShimError):
    """401: our own credential is void until its owner does what the message says."""

    status = 401
    type = "authentication_error"


class CredentialUnavailableError(ShimError):
    """503: our own credential cannot be renewed at the moment; carries `retry-after`."""

    status = 503

    def __init__(self, message: str, seconds: float = 5.0) -> None:
        super().__init__(message, headers=[("retry-after", str(math.ceil(seconds)))])
        self.seconds = seconds


class UpstreamFault(ShimError):
    """An answer that failed after it was ordered: it may be paid for, so nobody orders it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=[("x-should-retry", "false")])


class UpstreamCutError(UpstreamFault):
    """502: upstream stopped in the middle of an answer, or sent what is not an answer."""

    status = 502


class UpstreamTimeoutError(UpstreamFault):
    """504: upstream was silent for longer than the limit."""

    status = 504
    type = "timeout_error"


class ConfigError(Exception):
    """A setting is wrong; the message names it and where it came from."""


# Status of an error that comes inside a stream, where only Anthropic's type is given
# (platform.claude.com/docs/en/api/errors).
STATUS_BY_ERROR_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}

# What an OpenAI client is told: our status -> (its status, type, code). 529 is unknown to OpenAI's
# clients, and Codex tries it 30 times; it knows 503 with this code. 402 as 429 with
# insufficient_quota is where they look for an empty account.
OPENAI_ERRORS: Dict[int, Tuple[int, str, Optional[str]]] = {
    400: (400, "invalid_request_error", None),
    401: (401, "invalid_request_error", "invalid_api_key"),
    402: (429, "insufficient_quota", "insufficient_quota"),
    403: (403, "invalid_request_error", "permission_denied"),
    404: (404, "invalid_request_error", "not_found"),
    413: (413, "invalid_request_error", "request_too_large"),
    429: (429, "rate_limit_error", "rate_limit_exceeded"),
    504: (504, "server_error", "timeout"),
    529: (503, "server_error", "server_is_overloaded"),
}

_TOO_LONG = r"prompt is too long|exceed context limit|maximum context length"
_NO_CREDIT = r"credit balance is too low|specified API usage limits"


def has_no_credit(message: str) -> bool:
    """Return whether a 400 means that there is nothing left to pay with."""
    return bool(re.search(_NO_CREDIT, message))


def openai_error(error: ShimError) -> Tuple[int, JSON]:
    """Return the status and the body of `error` for a client that speaks OpenAI's API."""
    default = (
        error.status,
        "server_error" if error.status >= 500 else "invalid_request_error",
        None,
    )
    status, type_, code = OPENAI_ERRORS.get(error.status, default)
    message, param = error.message, error.param
    if error.status == 400 and re.search(_TOO_LONG, message):
        # Roo, Cline and LiteLLM look for these words, Codex and LangChain for the code.
        message += " (prompt is too long: this model's maximum context length is exceeded)"
        code, param = "context_length_exceeded", param or "messages"
    elif error.status == 400 and has_no_credit(message):
        status, type_, code = OPENAI_ERRORS[402]
    elif error.status == 401:
        message = f"Incorrect API key provided: {message}"  # LiteLLM knows a 401 by these words
    elif error.status == 404 and message.startswith("model:"):
        code, param = "model_not_found", "model"
    body = {"message": message, "type": type_, "param": param, "code": error.code or code}
    return status, {"error": body}


def anthropic_error(error: ShimError, request_id: Optional[str] = None) -> Tuple[int, JSON]:
    """Return the status and the body of `error` for a client that speaks Anthropic's API."""
    message = error.message if error.param is None else f"{error.param}: {error.message}"
    body: JSON = {"type": "error", "error": {"type": error.type, "message": message}}
    if request_id:
        body["request_id"] = request_id
    return error.status, body


def upstream_error(
    status: int, body: Any, headers: Iterable[Tuple[str, str]] = ()
) -> UpstreamError:
    """Return the error that upstream meant by an answer of `status` with the parsed `body`."""
    detail = body.get("error") if isinstance(body, dict) else None
    detail = detail if isinstance(detail, dict) else {}
    type_, message = detail.get("type"), detail.get("message")
    fallback = next((t for t, s in STATUS_BY_ERROR_TYPE.items() if s == status), "api_error")
    return UpstreamError(
        message if isinstance(message, str) else f"upstream answered with status {status}",
        status=status,
        type=type_ if isinstance(type_, str) else fallback,
        headers=headers,
    )


_SCHEME_AND_HOST = (
    r"https?://(?:\[[0-9A-Fa-f:]{2,45}\]|[A-Za-z0-9.-]{1,255})(?::[0-9]{1,5})?(?![^/?#])"
)


def redirect_target(headers: Iterable[Tuple[str, str]]) -> str:
    """Return where a redirect leads: scheme and host only, as the rest may hold secrets."""
    target = re.match(_SCHEME_AND_HOST, dict(headers).get("location", ""))
    return target.group() if target else "another page"


def error_from_event(event: JSON) -> UpstreamError:
    """Return the error of an `error` event, with the status that its type stands for."""
    detail = event.get("error")
    type_ = detail.get("type") if isinstance(detail, dict) else None
    return upstream_error(STATUS_BY_ERROR_TYPE.get(str(type_), 500), event)


# ----------------------------------------------------------------------
# 2. JSON                                                      uses: 0 1
# ----------------------------------------------------------------------
# Strict in, compact ASCII out (line splitters of some clients stumble over U+2028), and checked
# access to foreign bodies: a wrong type is a 400 that names the path, never a KeyError.

# json.loads recurses in C: CPython 3.13 crashes the process at some 5,000 levels in a small stack.
MAX_JSON_DEPTH = 200
# 32 MiB of "[]," would become a gigabyte; a long conversation with many tools has some 10,000.
MAX_JSON_VALUES = 500_000
MAX_JSON_DIGITS = 308  # of a whole number: what a double can hold, as for the others

LONG_STRING = 16 << 10  # a shorter one is not worth the search
HOLE = "\x7f"  # where a string goes that is not to be looked through
_CUT = b"-Infinity"  # the same in a text: no JSON, but a constant that the parser asks about
_PART = 64 << 10  # stays in the processor's cache
_PLAIN = b"+/-_=:;,.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BEFORE_VALUE = bytes(set(range(256)) - set(b"[{,"))
_NOT_MARK = bytes(set(range(256)) - set(b'[{]},"'))
_WHITE_SPACE = " \t\r\n"
_HALF = r"[\ud800-\udfff]"  # the parser joined what is a pair
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def dumps(value: Any) -> bytes:
    """Return `value` as compact ASCII JSON; ValueError for NaN or infinity."""
    return _encoded(value).encode("ascii")


def quoted(text: str) -> str:
    """Return `text` as ASCII JSON."""
    return json.encoder.encode_basestring_ascii(text)


def dumps_around(value: Any, strings: Sequence[str]) -> Optional[bytes]:
    """Return the JSON of `value` with `strings`, in turn, for those of its strings that are HOLE.

    Plain ones are copied, not looked through. None if there are more holes than strings.
    """
    pieces = dumps(value).split(dumps(HOLE))
    if len(pieces) != len(strings) + 1:
        return None
    text = io.BytesIO()  # each further copy of a large text costs as much as the rest
    for piece, string in zip(pieces, strings):
        plain = string.isascii() and _is_plain(_parts(string))
        quoted = itertools.chain((b'"',), _parts(string), (b'"',))
        text.write(piece)
        text.writelines(quoted if plain else (dumps(string),))
    text.write(pieces[-1])
    return text.getvalue()


def _parts(string: str) -> Iterator[bytes]:
    return (string[at : at + _PART].encode("ascii") for at in range(0, len(string), _PART))


def _is_plain(parts: Iterable[bytes]) -> bool:
    """Whether a string is base64, or a data: URL of it, which JSON writes as it stands."""
    return not any(part.translate(None, _PLAIN) for part in parts)


def loads(body: bytes, long: int = LONG_STRING) -> Any:
    """Return the value of a JSON text in UTF-8; ValueError says in a sentence what is wrong.

    Plain strings over `long` bytes go around the parser: that takes a fifth of the time.
    """
    pieces, cut = _without_long_strings(body, long) if len(body) > long else ([], [])
    if cut:
        with contextlib.suppress(ValueError):  # of which the whole body tells better
            return _loads_around(pieces, cut)
    return _loads(body, _DECODER)


def _loads(body: bytes, decoder: json.JSONDecoder) -> Any:
    if len(body) > MAX_JSON_DEPTH:
        marks = body.translate(None, _NOT_BEFORE_VALUE)
        if len(marks) > MAX_JSON_VALUES or len(marks) - marks.count(b",") > MAX_JSON_DEPTH:
            _check_structure(body)
    text = body.decode("utf-8")
    if text.startswith("\ufeff"):
        text = text[1:]
    value = _parsed(text, decoder)
    return _without_surrogates(value) if _SURROGATE_ESCAPE.search(text) else value


def _without_long_strings(body: bytes, long: int) -> Tuple[List[memoryview], List[memoryview]]:
    """What stands around the long plain strings of a JSON text, and those strings.

    A long string has a byte in every stretch of that length: only there it is looked for.
    """
    view, kept, decided = memoryview(body), 0, 0
    pieces: List[memoryview] = []
    cut: List[memoryview] = []
    while (end := body.find(b'"', decided + long)) >= 0:
        start = body.rfind(b'"', decided, decided + long) + 1
        parts = (body[at : min(at + _PART, end)] for at in range(start, end, _PART))
        decided = end
        if start and end - start > long and _is_plain(parts):
            pieces.append(view[kept : start - 1])
            cut.append(view[start:end])
            kept = decided = end + 1
    return [*pieces, view[kept:]], cut


def _loads_around(pieces: List[memoryview], cut: List[memoryview]) -> Any:
    """The value of a JSON text out of which strings were cut.

    ValueError for any other, also if what was cut was none of its strings: then the constant in the
    place of it is within one, and the parser does not ask what that means.
    """
    strings = iter(cut)

    def string(name: str) -> str:
        return str(next(strings), "ascii") if name == _CUT.decode("ascii") else _no_constant(name)

    body = _CUT.join(pieces)
    if body.count(_CUT) != len(cut):
        raise ValueError("the constant stood there before")
    value = _loads(body, _decoder(string))
    if next(strings, None) is not None:
        raise ValueError("not a string")
    return value


def loads_text(text: str) -> Any:
    """Return the value of a JSON text; ValueError for what is none, NaN and infinity included."""
    return _parsed(text, _DECODER)


def _parsed(text: str, decoder: json.JSONDecoder) -> Any:
    """As `decoder.decode`, but without its regular expressions for white space."""
    value, end = decoder.raw_decode(text, len(text) - len(text.lstrip(_WHITE_SPACE)))
    if text[end:].strip(_WHITE_SPACE):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def loads_object(body: bytes) -> JSON:
    """Return the JSON object of a request body; RequestError when it is anything else."""
    try:
        value = loads(body)
    except ValueError as error:
        reason = (
            "is not UTF-8"
            if isinstance(error, UnicodeDecodeError)
            else f"cannot be read as JSON: {error}"
        )
        raise RequestError(f"the request body {reason}") from None
    return as_object(value, "the request body")


def with_member(body: bytes, name: str, value: Any) -> bytes:
    """Return the text of a JSON object with the value of one member replaced, all else untouched.

    `body` must be a valid object that has the member.
    """
    text = body.decode("utf-8-sig")
    decode = json.JSONDecoder().raw_decode
    position, spans = _skipped(text, 0, "{"), []
    while text[position] != "}":
        key, position = decode(text, _skipped(text, position, ","))
        start = _skipped(text, position, ":")
        _, end = decode(text, start)
        if key == name:
            spans.append((start, end))
        position = _skipped(text, end, "")
    new = dumps(value).decode("ascii")
    for start, end in reversed(spans):
        text = text[:start] + new + text[end:]
    return text.encode("utf-8")


def _skipped(text: str, position: int, mark: str) -> int:
    """The position behind white space and, if it is there, one punctuation mark."""
    while text[position] in " \t\r\n":
        position += 1
    if not mark or text[position] != mark:
        return position
    return _skipped(text, position + 1, "")


def _check_structure(body: bytes) -> None:
    """Refuse what the parser would turn into far more stack or memory than it has bytes."""
    depth = values = 0
    for text in _outside_strings(body):
        values += text.count(b"[") + text.count(b"{") + text.count(b",")
        if values > MAX_JSON_VALUES:
            raise ValueError(f"it has more than {MAX_JSON_VALUES} values")
        steps = map(_STEP.__getitem__, text.replace(b",", b""))
        levels = list(itertools.accumulate(steps, initial=depth))
        if max(levels) > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
        depth = levels[-1]


def _outside_strings(body: bytes) -> Iterator[bytes]:
    """The marks outside of strings, in pieces: in linear time and little memory for any bytes.

    A regular expression for strings takes quadratic time where one is not closed.
    """
    if b"\\" in body:
        body = body.replace(b"\\\\", b"''").replace(b'\\"', b"''")  # by as many bytes: in one pass
    marks = body.translate(None, _NOT_MARK).replace(b'""', b"")  # strings without marks are gone
    inside = 0
    for start in range(0, len(marks), 1 << 16):
        pieces = marks[start : start + (1 << 16)].split(b'"')
        yield b"".join(pieces[inside::2])
        inside ^= len(pieces) & 1 ^ 1


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _whole_number(text: str) -> int:
    if len(text) > MAX_JSON_DIGITS:  # and int() of many digits takes quadratic time
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)


def _without_surrogates(value: Any) -> Any:
    """Half a surrogate pair is no character, and Anthropic refuses it: it becomes U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else re.sub(_HALF, "\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


def _decoder(constant: Callable[[str], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=constant, parse_float=_finite, parse_int=_whole_number)


def _encoder() -> Callable[[Any], str]:
    """`encode` of a JSONEncoder that is set up once; its own does that for each text."""
    encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    escape = json.encoder.encode_basestring_ascii
    try:
        pieces = make(None, encoder.default, escape, None, ":", ",", False, False, False)
        assert "".join(pieces({"a": [1, "\u2028"]}, 0)) == encoder.encode({"a": [1, "\u2028"]})
    except (TypeError, AssertionError):  # no CPython, or one that has it changed
        return encoder.encode
    return lambda value: "".join(pieces(value, 0))


_encoded = _encoder()
_DECODER = _decoder(_no_constant)


def as_object(value: Any, path: str) -> JSON:
    """Return `value` if it is a JSON object; RequestError naming `path` otherwise."""
    if isinstance(value, dict):
        return value
    raise _mistyped(value, path, "an object")


def object_or_empty(value: Any) -> JSON:
    """Return `value` if it is a JSON object, else an empty one: a wrong type says nothing."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any, path: str) -> List[Any]:
    """Return `value` if it is a JSON list; RequestError naming `path` otherwise."""
    if isinstance(value, list):
        return value
    raise _mistyped(value, path, "a list")


def as_text(value: Any, path: str) -> str:
    """Return `value` if it is a string; RequestError naming `path` otherwise."""
    if isinstance(value, str):
        return value
    raise _mistyped(value, path, "a string")


def as_boolean(value: Any, path: str) -> bool:
    """Return `value` if it is a boolean; RequestError naming `path` otherwise."""
    if isinstance(value, bool):
        return value
    raise _mistyped(value, path, "a boolean")


def as_number(value: Any, path: str) -> float:
    """Return `value` if it is a number; RequestError naming `path` otherwise."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    raise _mistyped(value, path, "a number")


def as_positive_integer(value: Any, path: str) -> int:
    """Return `value` if it is a whole number over zero; RequestError naming `path` otherwise."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JavaScript has no other numbers
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise _mistyped(value, path, "a whole number over zero")


def _mistyped(value: Any, path: str, expected: str) -> RequestError:
    shown = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    got = shown.get(type(value)) or json.dumps(value)[:40]
    return RequestError(f"expected {expected}, got {got}", param=path)


# ----------------------------------------------------------------------
# 3. Models                                                  uses: 0 1 2
# ----------------------------------------------------------------------
# What each model takes. GET /v1/models of upstream has the last word (ids, limits, thinking types,
# effort levels); what it does not tell, and an offline start, comes from this table.

_LOW_TO_HIGH = ("low", "medium", "high")
_ALL_EFFORTS = (*_LOW_TO_HIGH, "xhigh", "max")


class Model(NamedTuple):
    """What one model takes: limits in tokens, and which request fields it refuses."""

    id: str
    max_input_tokens: int = 1_000_000
    max_tokens: int = 128_000
    thinking: FrozenSet[str] = frozenset({"adaptive"})  # types that are not a 400
    efforts: Tuple[str, ...] = _ALL_EFFORTS
    thinks_by_default: bool = True
    forced_tool_choice: bool = True
    system_messages: bool = True  # role "system" inside messages
    off_up_to_high: bool = False  # thinking can be off at xhigh and max effort, too, if not
    sampling: bool = False  # temperature, top_p, top_k
    temperature_and_top_p: bool = True  # both at once
    prefill: bool = False  # a trailing assistant message
    structured_outputs: bool = True
    strict_tools: bool = True
    display_name: str = ""
    created: int = 0  # Unix seconds; 0 when not known


def _older(id: str, **differences: Any) -> Model:
    """A model before the fifth generation: it thinks when asked."""
    fields: JSON = {"thinks_by_default": False, "system_messages": False}
    return Model(id, **{**fields, **differences})


_ADAPTIVE_OFF = frozenset({"adaptive", "disabled"})
_BUDGET_OFF = frozenset({"enabled", "disabled"})
_UP_TO_4_5: JSON = {
    "max_input_tokens": 200_000,
    "max_tokens": 64_000,
    "thinking": _BUDGET_OFF,
    "efforts": (),
    "sampling": True,
    "temperature_and_top_p": False,
    "prefill": True,
}
_AT_4_6: JSON = {
    "thinking": _ADAPTIVE_OFF | _BUDGET_OFF,
    "efforts": (*_LOW_TO_HIGH, "max"),
    "sampling": True,
}

# Newest first within a line: an alias takes the first. Facts of November 2026
# (platform.claude.com/docs: models overview, errors, model migration).
MODELS: Tuple[Model, ...] = (
    Model("claude-opus-5-5", forced_tool_choice=False),
    Model("claude-opus-5", thinking=_ADAPTIVE_OFF, off_up_to_high=True),
    _older("claude-opus-4-8", thinking=_ADAPTIVE_OFF, system_messages=True),
    _older("claude-opus-4-7", thinking=_ADAPTIVE_OFF),
    _older("claude-opus-4-6", **_AT_4_6),
    _older("claude-opus-4-5", **{**_UP_TO_4_5, "efforts": _LOW_TO_HIGH}),
    Model(
        "claude-sonnet-5-5",
        thinking=frozenset({"adaptive", "between_tools"}),
        off_up_to_high=True,
        forced_tool_choice=False,
    ),
    Model("claude-sonnet-5", thinking=_ADAPTIVE_OFF, system_messages=False),
    _older("claude-sonnet-4-6", **_AT_4_6),
    _older("claude-sonnet-4-5", **_UP_TO_4_5),
    Model("claude-haiku-5-5", thinking=_ADAPTIVE_OFF, off_up_to_high=True),
    _older("claude-haiku-4-5", **_UP_TO_4_5),
    Model("claude-fable-5-2", forced_tool_choice=False),
    Model("claude-fable-5-1", forced_tool_choice=False),
    Model("claude-fable-5"),
    Model("claude-mythos-5-2", forced_tool_choice=False),
    Model("claude-mythos-5-1", forced_tool_choice=False),
    Model("claude-mythos-5"),
)

LINES = ("opus", "sonnet", "haiku")  # each is an alias of its newest active model

_DATE = re.compile(r"-20\d{6}$")
_PREFIX = re.compile(r"^(?:openai|anthropic|claude|claude[_-]shim)[/:]+", re.IGNORECASE)
_ALIAS = re.compile(r"^(?:claude-)?(opus|sonnet|haiku)(?:-latest)?$")


@functools.lru_cache(maxsize=256)
def known_model(id: str) -> Model:
    """Return what the table says of `id`; an unknown one is taken for the newest of its line."""
    bare = _DATE.sub("", id)
    for model in MODELS:
        if model.id == bare:
            return model._replace(id=id)
    line = next((line for line in (*LINES, "fable", "mythos") if line in bare), "opus")
    newest = next(model for model in MODELS if line in model.id)
    return newest._replace(id=id)


def model_from_live(entry: JSON) -> Optional[Model]:
    """Return the model of one entry of upstream's GET /v1/models; None if it has no id."""
    id = entry.get("id")
    if not isinstance(id, str):
        return None
    model = known_model(id)
    capabilities = object_or_empty(entry.get("capabilities"))
    thinking = _supported(_member(capabilities, "thinking", "types"))
    efforts = _supported(_member(capabilities, "effort"))
    structured = _member(capabilities, "structured_outputs").get("supported")
    return model._replace(
        max_input_tokens=_limit(entry, "max_input_tokens", model.max_input_tokens),
        max_tokens=_limit(entry, "max_tokens", model.max_tokens),
        thinking=model.thinking if thinking is None else frozenset(thinking),
        efforts=model.efforts if efforts is None else efforts,
        structured_outputs=structured if isinstance(structured, bool) else model.structured_outputs,
        display_name=str(entry.get("display_name") or ""),
        created=_unix_seconds(entry.get("created_at")),
    )


def _member(value: JSON, *names: str) -> JSON:
    for name in names:
        value = object_or_empty(value.get(name))
    return value


def _supported(flags: JSON) -> Optional[Tuple[str, ...]]:
    """Names whose entry says supported; None when nothing was said."""
    if not flags:
        return None
    return tuple(k for k, v in flags.items() if isinstance(v, dict) and v.get("supported") is True)


def _limit(entry: JSON, name: str, default: int) -> int:
    value = entry.get(name)
    return value if isinstance(value, int) and value > 0 else default


def _unix_seconds(text: Any) -> int:
    try:
        return int(datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp())
    except (ValueError, OverflowError):
        return 0


def resolved_model_id(name: str, aliases: Dict[str, str], live: Sequence[Model]) -> str:
    """Return the id that upstream knows for what the client called `name`.

    `aliases` maps names or globs to ids or to one of the lines; `live` is upstream's own list.
    ModelNotFoundError names what exists.
    """
    if len(name) > 256:  # models are kept by name, so it must not be large
        raise ModelNotFoundError(_no_such_model(name, aliases, live), param="model")
    bare, ids = _PREFIX.sub("", name.strip()), [model.id for model in live]
    for pattern, target in aliases.items():
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(bare, pattern):
            bare = target
            break
    else:
        if bare not in ids and not (_ALIAS.match(bare) or "claude" in bare.lower()):
            raise ModelNotFoundError(_no_such_model(name, aliases, live), param="model")
    if bare in ids:
        return bare
    alias = _ALIAS.match(bare)
    if not alias:
        return bare.replace(".", "-") if bare.startswith("claude-") else bare
    pinned = aliases.get(alias.group(1), bare)
    line = _ALIAS.match(pinned)
    return newest_of_line(line.group(1), live) if line else pinned


def newest_of_line(line: str, live: Sequence[Model]) -> str:
    """Return the id of the newest active model of `line`; upstream lists newest first."""
    dated = sorted(live, key=lambda model: model.created, reverse=True)
    return next(model.id for model in (*dated, *MODELS) if f"-{line}-" in model.id)


def _no_such_model(name: str, aliases: Dict[str, str], live: Sequence[Model]) -> str:
    ids = [*dict.fromkeys([*LINES, *aliases]), *(model.id for model in live or MODELS)]
    return (
        f"The model '{name[:100]}' does not exist here. Use one of {', '.join(ids)}, "
        f"or map the name with --alias '{name[:100]}=sonnet'."
    )


def model_entry(model: Model, live: JSON) -> JSON:
    """Return one entry of GET /v1/models that Anthropic's and OpenAI's clients both read.

    `live` is what upstream itself says of the model; it wins.
    """
    created = datetime.fromtimestamp(model.created, timezone.utc)
    return {
        "id": model.id,
        "type": "model",
        "object": "model",
        "display_name": model.display_name or model.id,
        "created": model.created,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "owned_by": "anthropic",
        "max_input_tokens": model.max_input_tokens,
        "max_tokens": model.max_tokens,
        "context_length": model.max_input_tokens,  # OpenRouter's name for it
        "max_model_len": model.max_input_tokens,  # vLLM's
        "max_output_tokens": model.max_tokens,
        "capabilities": _capabilities(model),
        "architecture": {
            "input_modalities": ["text", "image", "file"],
            "output_modalities": ["text"],
        },
        "supported_parameters": ["tools", "tool_choice", "reasoning", "response_format", "stop"],
        **live,
    }


def _capabilities(model: Model) -> JSON:
    return {
        "image_input": {"supported": True},
        "pdf_input": {"supported": True},
        "structured_outputs": {"supported": model.structured_outputs},
        "thinking": {
            "supported": bool(model.thinking),
            "types": {type_: {"supported": True} for type_ in sorted(model.thinking)},
        },
        "effort": {
            "supported": bool(model.efforts),
            **{level: {"supported": True} for level in model.efforts},
        },
    }


def one_page(entries: Sequence[JSON]) -> JSON:
    """Return a list as both dialects give it, all on one page."""
    return {
        "object": "list",
        "data": list(entries),
        "has_more": False,
        "first_id": entries[0]["id"] if entries else None,
        "last_id": entries[-1]["id"] if entries else None,
    }


def model_list(entries: Sequence[JSON]) -> JSON:
    """Return the body of GET /v1/models for both dialects, and Codex's catalogue; no SDK pages."""
    catalogue = [_codex_entry(number, entry) for number, entry in enumerate(entries)]
    return {**one_page(entries), "models": catalogue}


# Codex has these words for the model from the catalogue, and none of its own then.
_CODEX_INSTRUCTIONS = """You are a coding agent in the Codex CLI, on the user's own machine. Work \
until the task is done: read the code before you change it, keep to its style, make the smallest \
change that solves the whole problem, and run what shows that it works. Edit files with \
apply_patch where there is such a tool. Undo nothing that you did not do, and commit nothing \
unasked. Say at the end, in a few lines, what you changed and what you saw when you ran it."""

_CODEX_EFFORTS = {
    "low": "Quick answers",
    "medium": "Balanced",
    "high": "Thorough",
    "xhigh": "As thorough as it gets",
}


def _codex_entry(number: int, entry: JSON) -> JSON:
    """A model in Codex's catalogue: it refuses the whole list if a member is missing."""
    name = str(entry.get("display_name") or entry["id"])
    efforts = _member(entry, "capabilities", "effort")
    levels = [e for e in _CODEX_EFFORTS if e != "xhigh" or _member(efforts, e).get("supported")]
    return {
        "slug": entry["id"],
        "display_name": name,
        "description": f"{name} by claude_shim",
        "base_instructions": _CODEX_INSTRUCTIONS,
        "default_reasoning_level": "medium",
        "supported_reasoning_levels": [
            {"effort": effort, "description": _CODEX_EFFORTS[effort]} for effort in levels
        ],
        "supports_reasoning_summaries": True,
        "shell_type": "shell_command",
        "apply_patch_tool_type": "freeform",
        "experimental_supported_tools": [],
        "supports_parallel_tool_calls": True,
        "support_verbosity": False,
        "visibility": "list",
        "supported_in_api": True,
        "priority": number,
        "context_window": _limit(entry, "max_input_tokens", 200_000),
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "input_modalities": ["text", "image"],
    }


# ----------------------------------------------------------------------
# 4. Byte streams: chunked coding, server-sent events          uses: 0 1
# ----------------------------------------------------------------------
# Decoders are fed bytes as they come, cut anywhere, and hand out what is whole. They work on bytes:
# a character cut in two is whole again before anything is decoded.

_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_KNOWN_FIELDS: Dict[bytes, Tuple[str, str]] = {}  # by line: most come again and again
_MOST_KNOWN_FIELDS = 1024
_SECRETS = ("authorization", "key", "cookie", "token", "secret", "password", "assertion")


def header_fields(lines: Iterable[bytes]) -> HeaderList:
    """Return the fields of a head, names in lower case; ValueError if a line is malformed.

    RFC 9112 5; no folding, no space before the colon.
    """
    known = _KNOWN_FIELDS.get
    return [known(line) or _field(line) for line in lines]


def _field(line: bytes) -> Tuple[str, str]:
    match = _FIELD.fullmatch(line)
    if match is None:
        raise ValueError("a header field is malformed")
    name = match.group(1).decode("ascii").lower()
    field = (name, match.group(2).decode("latin-1").strip(" \t"))
    if len(line) < 200 and not name.endswith(_SECRETS):  # which are not kept
        if len(_KNOWN_FIELDS) >= _MOST_KNOWN_FIELDS:
            _KNOWN_FIELDS.clear()
        _KNOWN_FIELDS[line] = field
    return field


NAME_OF, VALUE_OF = operator.itemgetter(0), operator.itemgetter(1)  # of a header field


def field_lines(headers: HeaderList) -> str:
    """Return the lines of a head, each with its CRLF."""
    return "\r\n".join([*map(": ".join, headers), ""])


MAX_EVENT_BYTES = 16 << 20  # a web search result is the largest event known, some 100 KB
_MAX_CHUNK_LINE = 1024
_MAX_TRAILER = 16 << 10

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]{0,10}(?:;[\t\x20-\x7e\x80-\xff]{0,1000})?\r\n")
_CHUNK_START = re.compile(rb"(?:[0-9A-Fa-f]{1,8}[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r?)?")
# Trailers that would frame or route are a trap (RFC 9110 6.5.1); the others are not used.
_TRAILERS = (
    rb"(?:(?=[^\n]{1,1023}\n)(?!(?i:content-length|transfer-encoding|host):)"
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n){0,64}"
)


class ChunkedDecoder:
    """RFC 9112 chunked coding: `feed` returns body bytes; `done` after the last chunk and trailers.

    `rest` holds what came after the end. ProtocolError when the bytes are not well formed.
    """

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._pending = b""
        self._left = 0  # bytes of the open chunk still to come, its CRLF included
        self._in_trailer = False

    def feed(self, burst: bytes) -> bytes:
        """Return the body bytes that `burst` completes; ProtocolError on malformed chunks."""
        if not self._left and not self._pending and burst.endswith(b"\r\n"):
            size, _, rest = burst.partition(b"\r\n")
            if rest and size == b"%x" % (len(rest) - 2):  # one chunk, as mostly
                self.done = size == b"0"
                return rest[:-2]
        buffer, position, tried = self._pending + burst, 0, False
        pieces: List[bytes] = []
        while not self._in_trailer and position < len(buffer):
            if self._left == 0 and not tried:
                position, tried = self._whole_chunks(buffer, position, pieces), True
            elif self._left == 0:
                line = _CHUNK_SIZE.match(buffer, position)
                if line is None:
                    self._check_size_line(buffer[position : position + _MAX_CHUNK_LINE])
                    break
                position, self._left = line.end(), int(line.group(1), 16) + 2
                self._in_trailer = self._left == 2
            elif position + self._left > len(buffer):
                position += self._partial(buffer[position:], pieces)
                break
            else:
                end = position + self._left
                if buffer[end - 2 : end] != b"\r\n":
                    raise ProtocolError("a chunk of the body does not end in CRLF")
                pieces.append(buffer[position : end - 2])
                position, self._left = end, 0
        self._pending = buffer[position:]
        if self._in_trailer:
            self._after_chunks()
        return b"".join(pieces)

    def _whole_chunks(self, buffer: bytes, position: int, pieces: List[bytes]) -> int:
        """Take what is whole of chunks, if none holds a CRLF; where they end."""
        *lines, rest = buffer[position:].split(b"\r\n")
        found = lines[1::2]
        sizes = lines[: 2 * len(found) : 2]
        if b"" in found[:-1] or sizes != [b"%x" % len(piece) for piece in found]:
            return position
        last = found[-1:] == [b""]
        self.done = last and not rest and len(lines) == 2 * len(found)
        taken = found[:-1] if last and not self.done else found
        pieces += taken
        return len(buffer) - len(b"\r\n".join([*lines[2 * len(taken) :], rest]))

    def _partial(self, piece: bytes, pieces: List[bytes]) -> int:
        """Hand out the data of an unfinished chunk, but not its CRLF: how many bytes were taken."""
        taken = max(0, min(len(piece), self._left - 2))
        pieces.append(piece[:taken])
        self._left -= taken
        return taken

    @staticmethod
    def _check_size_line(line: bytes) -> None:
        """A line that does not match is unfinished or wrong."""
        if b"\n" in line or len(line) >= _MAX_CHUNK_LINE or not _CHUNK_START.fullmatch(line):
            raise ProtocolError("a chunk of the body has no valid size")

    def _after_chunks(self) -> None:
        empty = self._pending.startswith(b"\r\n")
        end = 2 if empty else self._pending.find(b"\r\n\r\n") + 4
        whole = empty or end >= 4
        if (end if whole else len(self._pending)) > _MAX_TRAILER:
            raise ProtocolError("the trailers of the body are too long")
        if whole:
            if not (empty or re.fullmatch(_TRAILERS, self._pending[: end - 2])):
                raise ProtocolError("the trailers of the body are malformed")
            self.done, self.rest, self._pending = True, self._pending[end:], b""


def chunk(piece: bytes) -> bytes:
    """Return `piece` as one chunk of a chunked body; nothing for nothing, which would end it."""
    return b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""


class EventDecoder:
    """Server-sent events (WHATWG HTML 9.2): `feed` returns all events that are whole by now.

    They come as one byte string with LF line ends, each closed by an empty line. UpstreamCutError
    for an event over `limit` bytes.
    """

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._pieces: List[bytes] = []  # of the event that is not whole yet
        self._size = 0
        self._after_cr = False
        self._at_start = True
        self.between = False  # two events, with nothing kept back

    def feed(self, burst: bytes) -> bytes:
        """Return the bytes of the whole events, up to and with the last empty line."""
        if self.between and burst.endswith(b"\n\n") and b"\r" not in burst:
            return burst
        if self._after_cr or b"\r" in burst:
            burst = self._with_lf(burst)
        self._pieces.append(burst)
        self._size += len(burst)
        self.between = False
        if b"\n" not in burst:
            self._check_size()
            return b""
        buffer = b"".join(self._pieces)
        if self._at_start:
            buffer, self._at_start = buffer.removeprefix(b"\xef\xbb\xbf"), False
        end = buffer.rfind(b"\n\n") + 2 if b"\n\n" in buffer else 0
        self._pieces, self._size = [buffer[end:]], len(buffer) - end
        self.between = not (self._size or self._after_cr)
        self._check_size()
        return buffer[:end]

    def _with_lf(self, burst: bytes) -> bytes:
        """CR and CRLF are line ends too, and a CRLF may be cut in two."""
        if self._after_cr and burst.startswith(b"\n"):
            burst = burst[1:]
            self._after_cr = False
        if burst:
            self._after_cr = burst.endswith(b"\r")
        return burst.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _check_size(self) -> None:
        if self._size > self._limit:
            raise UpstreamCutError(f"upstream sent an event of more than {self._limit} bytes")


_USUAL_EVENT = re.compile(rb"(?:event: [^\n]*\n)?data: ([^\n]*)\n*")


def event_data(block: bytes) -> bytes:
    """Return the joined data lines of one event; empty when it has none."""
    usual = _USUAL_EVENT.fullmatch(block)
    if usual:
        return usual.group(1)
    lines = (line for line in block.split(b"\n") if line.startswith(b"data"))
    values = [line[5:] for line in lines if line[4:5] == b":"]
    return b"\n".join([value[1:] if value[:1] == b" " else value for value in values])


def server_sent_event(data: bytes, name: str = "") -> bytes:
    """Return one event, without an `event` line when it has no name."""
    head = b"event: %b\n" % name.encode("ascii") if name else b""
    return b"%bdata: %b\n\n" % (head, data)


COMMENT = b": keep-alive\n\n"  # safe for every client tested, as an event without data is not


# ----------------------------------------------------------------------
# 5. Messages, the hub                                   uses: 0 1 2 3 4
# ----------------------------------------------------------------------
# What every dialect shares: content blocks, tools, schemas, the order of a conversation, the rules
# of a model, caching, and the way back from events to a message. Conversions return new objects
# and change nothing they were given.

IMAGE_TYPES = {
    b"\x89PNG\r\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",  # and "WEBP" four bytes later
}

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_NOT_NAME = r"[^a-zA-Z0-9_-]"


def safe_name(name: str) -> str:
    """Return `name` as Anthropic takes tool names and ids; distinct names stay distinct."""
    if _NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{re.sub(_NOT_NAME, '_', name)[:119]}_{digest}"


# --- content blocks


def text_block(text: str) -> List[JSON]:
    """Return a text block in a list; an empty list for blank text, which Anthropic refuses."""
    return [{"type": "text", "text": text}] if text.strip() else []


def _base64_start(encoded: str) -> bytes:
    try:
        return base64.b64decode("".join(encoded[:64].split())[:32], validate=True)
    except (binascii.Error, ValueError):
        return b""


def _data_url(url: str, path: str) -> Tuple[str, str]:
    """Media type and base64 text of a data: URL (RFC 2397)."""
    header, comma, payload = url.partition(",")
    media_type, *parameters = header[5:].split(";")
    if not comma:
        raise RequestError("not a data: URL: the comma is missing", param=path)
    if "base64" not in (parameter.strip().lower() for parameter in parameters):
        raw = urllib.parse.unquote_to_bytes(payload)
        payload = base64.b64encode(raw).decode("ascii")
    return media_type.strip().lower(), payload


def image_block(url: str, path: str) -> JSON:
    """Return the image block of a data: or http(s) URL; nothing is fetched here.

    The media type is read from the bytes, since Anthropic refuses a wrong one. RequestError for
    another scheme or a format that Claude does not read.
    """
    if url.startswith(("http://", "https://")):
        return {"type": "image", "source": {"type": "url", "url": url}}
    if not url.startswith("data:"):
        raise RequestError("expected an http(s) or data: URL", param=path)
    declared, payload = _data_url(url, path)
    return _image_from_base64(declared, payload, path)


def _image_from_base64(declared: str, payload: str, path: str) -> JSON:
    start = _base64_start(payload)
    sniffed = next((type_ for magic, type_ in IMAGE_TYPES.items() if start.startswith(magic)), None)
    media_type = sniffed or declared.replace("image/jpg", "image/jpeg")
    other_riff = sniffed == "image/webp" and start[8:12] != b"WEBP"
    if media_type not in IMAGE_TYPES.values() or other_riff:
        shown = declared[:60] or "unknown type"
        raise RequestError(f"Claude reads png, jpeg, gif and webp images, not {shown}", param=path)
    source = {"type": "base64", "media_type": media_type, "data": payload}
    return {"type": "image", "source": source}


def document_block(content: str, title: Any, path: str) -> JSON:
    """Return the block of a file given as data: URL, http(s) URL or bare base64.

    A PDF or text becomes a document, an image an image; RequestError for anything else.
    """
    if content.startswith(("http://", "https://")):
        return _titled({"type": "document", "source": {"type": "url", "url": content}}, title)
    declared, payload = _data_url(content, path) if content.startswith("data:") else ("", content)
    start = _base64_start(payload)
    if start.startswith(b"%PDF-") or declared == "application/pdf":
        source = {"type": "base64", "media_type": "application/pdf", "data": payload}
        return _titled({"type": "document", "source": source}, title)
    if declared.startswith("image/") or start.startswith(tuple(IMAGE_TYPES)):
        return _image_from_base64(declared, payload, path)
    source = {"type": "text", "media_type": "text/plain", "data": _decoded_text(payload, path)}
    return _titled({"type": "document", "source": source}, title)


def _decoded_text(payload: str, path: str) -> str:
    try:
        return base64.b64decode(payload, validate=True).decode("utf-8")
    except ValueError:
        raise RequestError("Claude reads PDF, text and image files only", param=path) from None


def _titled(block: JSON, title: Any) -> JSON:
    return {**block, "title": title} if isinstance(title, str) and title else block


# --- tools and schemas


def tool_input(arguments: Any) -> JSON:
    """Return the input object of a tool call from the arguments that a client sent.

    No arguments are {}; text that is not a JSON object is kept under "_raw".
    """
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = loads(arguments.encode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return {"_raw": arguments}
    elif isinstance(arguments, str):
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    return {} if arguments is None else {"_raw": arguments}


_SCHEMA_MAPS = frozenset("properties patternProperties $defs definitions dependentSchemas".split())
_SCHEMA_VALUES = frozenset("const enum default examples required".split())
_CHANGED_KEYWORDS = frozenset("definitions items $ref exclusiveMinimum exclusiveMaximum".split())


def _upgraded_schema(schema: Any) -> Any:
    """A schema of draft 4 to 7 as 2020-12: definitions, boolean exclusive limits, no $schema."""
    if isinstance(schema, list):
        return [_upgraded_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    new = {
        keyword: _upgraded_member(keyword, value) if isinstance(value, (dict, list)) else value
        for keyword, value in schema.items()
        if keyword != "$schema"
    }
    return new if _CHANGED_KEYWORDS.isdisjoint(new) else _renamed(new)


def _renamed(new: JSON) -> JSON:
    if isinstance(new.get("definitions"), dict):
        new["$defs"] = {**new.pop("definitions"), **object_or_empty(new.get("$defs"))}
    if isinstance(new.get("items"), list):
        new["prefixItems"] = new.pop("items")
    if isinstance(new.get("$ref"), str):
        new["$ref"] = re.sub(r"^#/definitions/", "#/$defs/", new["$ref"])
    for exclusive, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if new.get(exclusive) is True and limit in new:
            new[exclusive] = new.pop(limit)
        elif isinstance(new.get(exclusive), bool):
            del new[exclusive]
    return new


def _upgraded_member(keyword: str, value: Any) -> Any:
    if keyword in _SCHEMA_VALUES:
        return value
    if keyword in _SCHEMA_MAPS and isinstance(value, dict):
        return {name: _upgraded_schema(member) for name, member in value.items()}
    return _upgraded_schema(value)


def tool_schema(parameters: Any, path: str) -> JSON:
    """Return the `input_schema` of a tool from the parameters that a client sent.

    Anthropic wants an object at the root, and no union there: unions are merged into one object
    that takes what any of their branches takes.
    """
    if isinstance(parameters, str):
        parameters = tool_input(parameters)
    schema = _upgraded_schema(as_object({} if parameters is None else parameters, path))
    for union in ("oneOf", "anyOf", "allOf"):
        if union in schema:
            schema = _merged_union(schema, union, f"{path}.{union}")
    return {**schema, "type": "object", "properties": object_or_empty(schema.get("properties"))}


def _merged_union(schema: JSON, union: str, path: str) -> JSON:
    """The union's branches as one object; a property that differs takes what any of them takes."""
    branches = [_referenced(branch, schema) for branch in as_list(schema[union], path)]
    properties: Dict[str, List[Any]] = {}
    for branch in branches:
        for name, member in object_or_empty(branch.get("properties")).items():
            kinds = properties.setdefault(name, [])
            kinds.extend([member] if member not in kinds else [])
    keyword = "allOf" if union == "allOf" else "anyOf"
    joined = {
        k: kinds[0] if len(kinds) == 1 else {keyword: kinds} for k, kinds in properties.items()
    }
    required = [set(_names_in(branch.get("required"))) for branch in branches] or [set()]
    common = set.union(*required) if union == "allOf" else set.intersection(*required)
    merged = {k: v for k, v in schema.items() if k != union}
    merged["properties"] = {**joined, **object_or_empty(schema.get("properties"))}
    needed = [*_names_in(schema.get("required")), *sorted(common)]
    return {**merged, "required": list(dict.fromkeys(needed))} if needed else merged


def _referenced(branch: Any, schema: JSON) -> JSON:
    """A branch of a union, or the definition that it refers to."""
    reference = object_or_empty(branch).get("$ref")
    if isinstance(reference, str) and reference.startswith("#/$defs/"):
        name = reference[len("#/$defs/") :]
        return object_or_empty(object_or_empty(schema.get("$defs")).get(name))
    return object_or_empty(branch)


def _names_in(value: Any) -> List[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


# The subset of JSON Schema that constrained output takes (structured outputs page of the docs).
SCHEMA_KEYWORDS = frozenset(
    "$defs $ref additionalProperties allOf anyOf const default description enum format items "
    "minItems properties required title type".split()
)
SCHEMA_FORMATS = frozenset("date-time time date duration email hostname uri ipv4 ipv6 uuid".split())


def output_schema(schema: Any, path: str) -> Tuple[JSON, List[str]]:
    """Return the schema as constrained output takes it, with the keywords that had to go.

    What goes is kept as a hint in the description, so that the model still sees it.
    """
    gone: List[str] = []
    cleaned = _constrained(_upgraded_schema(as_object(schema, path)), gone)
    return cleaned, list(dict.fromkeys(gone))


def _constrained(schema: Any, gone: List[str]) -> Any:
    if not isinstance(schema, dict):
        return schema
    new: JSON = {}
    hints: List[str] = []
    for keyword, value in schema.items():
        if keyword == "oneOf" and "anyOf" not in schema:
            keyword = "anyOf"
        if _keyword_allowed(keyword, value):
            new[keyword] = _constrained_member(keyword, value, gone)
        else:
            hints.append(f"{keyword}: {json.dumps(value)}")
            gone.append(keyword)
    if new.get("type") == "object" or "object" in _names_in(new.get("type")) or "properties" in new:
        if new.get("additionalProperties", False) is not False:
            gone.append("additionalProperties")
        new["additionalProperties"] = False
        new.setdefault("type", "object")
        new.setdefault("properties", {})
    if hints:
        told = [str(new["description"])] if new.get("description") else []
        new["description"] = " ".join([*told, f"({', '.join(hints)})"])
    return new


def _keyword_allowed(keyword: str, value: Any) -> bool:
    if keyword == "minItems":
        return value in (0, 1)
    if keyword == "format":
        return isinstance(value, str) and value in SCHEMA_FORMATS
    if keyword == "$ref":
        return isinstance(value, str) and value.startswith("#")
    return keyword in SCHEMA_KEYWORDS


def _constrained_member(keyword: str, value: Any, gone: List[str]) -> Any:
    if keyword in ("properties", "$defs") and isinstance(value, dict):
        return {name: _constrained(member, gone) for name, member in value.items()}
    if keyword in ("anyOf", "allOf") and isinstance(value, list):
        return [_constrained(member, gone) for member in value]
    return _constrained(value, gone) if keyword == "items" else value


# --- a request in the making


class Draft:
    """A Messages request in the making, and what its answer needs to know of the question."""

    json_object = False  # a code fence around the whole answer is not part of the JSON
    json_schema = False
    explicit_cache = False  # the client marks what is to be cached
    annotated = False  # citations may come: their offsets count every character

    def __init__(self, model: str, recall: Optional[Callable[[str], List[JSON]]] = None) -> None:
        self.request: JSON = {"model": model}
        self.system: List[JSON] = []
        self.turns: List[Tuple[str, List[JSON]]] = []
        self.ignored: Dict[str, None] = {}  # a set in order
        self.betas: List[str] = []
        self._tools: Dict[Any, JSON] = {}
        self.original_names: Dict[str, str] = {}  # as upstream knows a tool -> as the client does
        self.custom_tools: List[str] = []  # tools of free text, as the client knows them
        self.recall = recall or (lambda tool_use_id: [])

    def ignore(self, field: str) -> None:
        """Note that `field` has no effect, once."""
        self.ignored[field] = None

    def tool_name(self, name: str) -> str:
        """Return the name of a tool as upstream takes it; the way back is remembered."""
        safe = safe_name(name)
        if safe != name:
            self.original_names[safe] = name
        return safe

    def add_tool(self, tool: JSON) -> None:
        """Add a tool; a later one of the same name replaces it, as Anthropic takes no twins."""
        name = tool.get("name", len(self._tools))  # sets of tools have none
        self._tools.pop(name, None)
        self._tools[name] = tool
        self.request["tools"] = self._tools.values()

    def require_tools(self, choice: JSON) -> None:
        """Set `tool_choice`, keeping a mark against parallel calls that is there already."""
        parallel = self.request.get("tool_choice", {}).get("disable_parallel_tool_use")
        if parallel and choice["type"] != "none":
            choice = {**choice, "disable_parallel_tool_use": parallel}
        self.request["tool_choice"] = choice

    def finished(self) -> JSON:
        """Return the Messages request, its conversation in the order that Anthropic takes."""
        request = {**self.request, "messages": conversation(self.turns), "stream": True}
        request["tools"] = list(self.request.get("tools", ()))
        if self.system:
            request["system"] = self.system
        if not request.get("tools"):
            request.pop("tools", None)
            request.pop("tool_choice", None)
        return limited_cache_marks(request)


def request_text(request: JSON, long: int = LONG_STRING) -> bytes:
    """Return a Messages request as JSON; images over `long` bytes go around the encoder."""
    if not any(_may_hold_images(b) for m in request["messages"] for b in m["content"]):
        return dumps(request)
    images: List[str] = []
    messages = [_with_holes(message, images, long) for message in request["messages"]]
    whole = dumps_around({**request, "messages": messages}, images)
    return dumps(request) if whole is None else whole  # a text of the client is just a hole, too


def _may_hold_images(block: JSON) -> bool:
    return "source" in block or isinstance(block.get("content"), list)


def _with_holes(block: JSON, images: List[str], long: int) -> JSON:
    """A message or block with holes for its images and documents, which are added to `images`."""
    inner, source = block.get("content"), object_or_empty(block.get("source"))
    if isinstance(inner, list):
        holed = [_with_holes(b, images, long) if isinstance(b, dict) else b for b in inner]
        return {**block, "content": holed}
    if isinstance(source.get("data"), str) and len(source["data"]) > long:
        images.append(source["data"])
        return {**block, "source": {**source, "data": HOLE}}
    return block


# --- the order of a conversation


def conversation(turns: Iterable[Tuple[str, List[JSON]]]) -> List[JSON]:
    """Return `messages` in the order that Anthropic takes, from turns in the order of a client.

    Turns of one role become one; each tool_use is answered in the very next turn, results first
    and in the order of the calls; a call without result gets one that says so, a result without a
    call becomes text. RequestError when nothing is left.
    """
    ordered = _merged(turns)
    if any(block["type"] in _OF_CALLS for _, blocks in ordered for block in blocks):
        ordered = _merged(_answered(ordered))
    if not ordered:
        raise RequestError("expected at least one message with content", param="messages")
    if ordered[0][0] != "user":
        ordered.insert(0, ("user", [{"type": "text", "text": "(The conversation starts here.)"}]))
    return [{"role": role, "content": blocks} for role, blocks in ordered]


Turns = List[Tuple[str, List[JSON]]]
_OF_CALLS = ("tool_use", "tool_result")


def _merged(turns: Iterable[Tuple[str, List[JSON]]]) -> Turns:
    merged: Turns = []
    for role, blocks in turns:
        if not blocks:
            continue
        last = merged[-1][0] if merged else ""
        if role == "system" and last not in ("user", "system"):
            role, blocks = "user", [system_reminder(block) for block in blocks]
        if role == "user" and last == "system":
            # A system message must be last or come before an assistant's: in between it is text.
            reminders = [system_reminder(block) for block in merged.pop()[1]]
            blocks, last = [*reminders, *blocks], "user"
        if role == last:
            merged[-1][1].extend(blocks)
        else:
            merged.append((role, list(blocks)))
    return merged


def system_reminder(block: JSON) -> JSON:
    """Return the text of a system message as user text, for where no system message may stand."""
    return {**block, "text": f"<system-reminder>\n{block['text']}\n</system-reminder>"}


def _answered(turns: Turns) -> Turns:
    """Each tool_use with its result in the turn after it; ids that come again get a number."""
    answered: Turns = []
    calls: Dict[str, str] = {}  # id as the client wrote it -> as it goes up
    seen: Dict[str, int] = {}  # ids that went up, with the last number that was added to each
    for role, blocks in turns:
        if role == "assistant":
            answered.append(("user", _results_first([], calls)))
            blocks, calls = _distinct_calls(blocks, seen)
        elif role == "user":
            blocks, calls = _results_first(blocks, calls), {}
        answered.append((role, blocks))
    return [*answered, ("user", _results_first([], calls))]


def _distinct_calls(blocks: List[JSON], seen: Dict[str, int]) -> Tuple[List[JSON], Dict[str, str]]:
    """Drop a second call of the same id; number an id that an earlier turn had."""
    kept: List[JSON] = []
    calls: Dict[str, str] = {}
    for block in blocks:
        if block["type"] == "tool_use":
            if block["id"] in calls:
                drop_last_thinking(kept)  # which led to it
                continue
            new = calls[block["id"]] = _unused(block["id"], seen)
            block = {**block, "id": new}
        kept.append(block)
    return kept, calls


def drop_last_thinking(blocks: List[JSON]) -> None:
    """Take thinking off the end of a turn, where it may not stand."""
    while blocks and blocks[-1]["type"] in THINKING_TYPES:
        blocks.pop()


def _unused(id: str, seen: Dict[str, int]) -> str:
    """`id`, with a number if it was seen; noted as seen."""
    new = id
    while new in seen:
        seen[id] += 1
        new = f"{id}_{seen[id]}"
    seen[new] = 0
    return new


def _results_first(blocks: List[JSON], calls: Dict[str, str]) -> List[JSON]:
    results = {b["tool_use_id"]: b for b in blocks if b["type"] == "tool_result"}
    missing = {"type": "tool_result", "content": "(no result)", "is_error": True}
    ordered = [{**results.get(id, missing), "tool_use_id": new} for id, new in calls.items()]
    rest: List[JSON] = []
    for block in blocks:
        if block["type"] != "tool_result":
            rest.append(block)
        elif block["tool_use_id"] not in calls:
            rest.extend(_stray_result(block))
    return [*ordered, *rest]


def _stray_result(block: JSON) -> List[JSON]:
    content = block.get("content")
    return text_block(content) if isinstance(content, str) else list(content or ())


# --- what OpenAI's two APIs share: parts and messages

Handler = Callable[[Draft, Any, str], None]  # the value, and the name of the field
DraftType = TypeVar("DraftType", bound=Draft)


def content_blocks(draft: Draft, content: Any, path: str) -> List[JSON]:
    """Return the content blocks of a message's `content`: a string, parts or null."""
    if content is None:
        return []
    if isinstance(content, str):
        return text_block(content)
    parts = enumerate(as_list(content, path))
    return [b for number, part in parts for b in _part(draft, part, f"{path}.{number}")]


def _part(draft: Draft, part: Any, path: str) -> List[JSON]:
    part = {"type": "text", "text": part} if isinstance(part, str) else as_object(part, path)
    type_ = part.get("type", "text")
    convert = PARTS.get(type_) if isinstance(type_, str) else None
    if convert is None:
        known = ", ".join(PARTS)
        raise RequestError(f"unknown part; expected one of {known}", param=f"{path}.type")
    if not isinstance(part.get("cache_control"), dict) or not part["cache_control"]:
        part = {name: value for name, value in part.items() if name != "cache_control"}
    return marked(convert(draft, part, path), part)


def marked(blocks: List[JSON], source: JSON) -> List[JSON]:
    """Return `blocks`, the last with the cache mark that `source` has in either dialect."""
    mark = source.get("cache_control")
    breakpoint_ = source.get("prompt_cache_breakpoint")
    if mark is None and isinstance(breakpoint_, dict):
        mark = {"type": "ephemeral", "ttl": "1h" if breakpoint_.get("ttl") == "12h" else "5m"}
    if not blocks or not mark or not isinstance(mark, dict) or "cache_control" in blocks[-1]:
        return blocks
    return [*blocks[:-1], {**blocks[-1], "cache_control": mark}]


def _text_part(draft: Draft, part: JSON, path: str) -> List[JSON]:
    return text_block(as_text(part.get("text"), f"{path}.text"))


def _refusal_part(draft: Draft, part: JSON, path: str) -> List[JSON]:
    return text_block(as_text(part.get("refusal"), f"{path}.refusal"))


def _image_part(draft: Draft, part: JSON, path: str) -> List[JSON]:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    return [image_block(as_text(url, f"{path}.image_url.url"), f"{path}.image_url.url")]


def _file_part(draft: Draft, part: JSON, path: str) -> List[JSON]:
    file = part["file"] if isinstance(part.get("file"), dict) else part
    content = file.get("file_data") or file.get("file_url")
    if isinstance(content, str):
        return [document_block(content, file.get("filename"), f"{path}.file.file_data")]
    missing = "file_data" if file.get("file_id") is None else "file_id"
    file_id = as_text(file.get("file_id"), f"{path}.file.{missing}")
    if not file_id.startswith("file_"):
        message = "no such file here: send file_data, or an id from Anthropic's POST /v1/files"
        raise RequestError(message, param=f"{path}.file.file_id")
    return [{"type": "document", "source": {"type": "file", "file_id": file_id}}]


def _audio_part(draft: Draft, part: JSON, path: str) -> List[JSON]:
    raise RequestError("Claude does not hear audio; send a transcript", param=path)


def _video_part(draft: Draft, part: JSON, path: str) -> List[JSON]:
    raise RequestError("Claude does not watch video; send images of it", param=path)


def _native_part(draft: Draft, part: JSON, path: str) -> List[JSON]:
    """A block in Anthropic's own shape, as Cursor sends for names with "claude-"."""
    block = dict(part)
    if isinstance(block.get("citations"), dict):
        draft.annotated = True
    return [block]


def _native_call(draft: Draft, part: JSON, path: str) -> List[JSON]:
    name = draft.tool_name(as_text(part.get("name"), f"{path}.name"))
    id = safe_name(as_text(part.get("id"), f"{path}.id"))
    return [{**part, "id": id, "name": name, "input": tool_input(part.get("input"))}]


def _native_result(draft: Draft, part: JSON, path: str) -> List[JSON]:
    id = safe_name(as_text(part.get("tool_use_id"), f"{path}.tool_use_id"))
    block = {**part, "tool_use_id": id}
    if not isinstance(part.get("content"), (str, type(None))):
        block["content"] = content_blocks(draft, part["content"], f"{path}.content")
    return [block]


PARTS: Dict[str, Callable[[Draft, JSON, str], List[JSON]]] = {
    "text": _text_part,
    "image_url": _image_part,
    "file": _file_part,
    "refusal": _refusal_part,
    "input_text": _text_part,
    "output_text": _text_part,
    "input_image": _image_part,
    "input_file": _file_part,
    "input_audio": _audio_part,
    "video_url": _video_part,
    "image": _native_part,
    "document": _native_part,
    "search_result": _native_part,
    "thinking": _native_part,
    "redacted_thinking": _native_part,
    "server_tool_use": _native_part,
    "web_search_tool_result": _native_part,
    "web_fetch_tool_result": _native_part,
    "container_upload": _native_part,
    "tool_use": _native_call,
    "tool_result": _native_result,
}


def system_message(draft: Draft, message: JSON, path: str) -> None:
    """Add a system or developer message: to `system`, in its place when turns came before it."""
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if any(block["type"] != "text" for block in _part(draft, part, f"{path}.content")):
            where = f"{path}.content.{number}"
            raise RequestError("a system message holds text only", param=where)
    blocks = marked(content_blocks(draft, content, f"{path}.content"), message)
    if draft.turns:
        draft.turns.append(("system", blocks))
    else:
        draft.system.extend(blocks)


def user_message(draft: Draft, message: JSON, path: str) -> None:
    """Add a message of the user, with the name that it may carry."""
    blocks = content_blocks(draft, message.get("content"), f"{path}.content")
    name = message.get("name")
    if isinstance(name, str) and name and blocks and blocks[0]["type"] == "text":
        blocks[0] = {**blocks[0], "text": f"{name}: {blocks[0]['text']}"}
    draft.turns.append(("user", marked(blocks, message)))


def tool_result(draft: Draft, id: str, content: Any, path: str) -> JSON:
    """Return the block that answers the call `id`, from a string, parts or null."""
    if isinstance(content, str):
        given: Any = content if content.strip() else None
    else:
        given = content_blocks(draft, content, path)
    block: JSON = {"type": "tool_result", "tool_use_id": safe_name(id or "call")}
    return {**block, "content": given} if given else block


# --- what OpenAI's two APIs share: tools


def instructions(draft: Draft, value: Any, path: str) -> None:
    """Add the first block of `system`."""
    draft.system.extend(text_block(as_text(value, path)))


def add_openai_tool(draft: Draft, tool: JSON, path: str) -> None:
    """Add one tool: a function or a custom tool, nested or flat, or one in Anthropic's shape."""
    function = flat_tool(tool)
    path = f"{path}.{tool['type']}" if isinstance(_inner(tool), dict) else path
    if is_server_tool(tool):
        as_text(tool.get("name", ""), f"{path}.name")
        draft.annotated = True
        draft.add_tool(dict(tool))
    elif tool.get("type") == "custom" and "input_schema" not in function:
        draft.add_tool(marked([_custom_tool(draft, function, path)], function)[0])
    else:
        draft.add_tool(marked([function_tool(draft, function, path)], function)[0])


def flat_tool(tool: JSON) -> JSON:
    """Return a tool, or a choice of one, with what stands under the name of its type beside it."""
    inner = _inner(tool)
    return {**tool, **inner} if isinstance(inner, dict) else tool


def _inner(tool: JSON) -> Any:
    """What a tool, or a choice of one, holds under the name of its type."""
    type_ = tool.get("type")
    return tool.get(type_) if isinstance(type_, str) else None


def is_server_tool(tool: JSON) -> bool:
    """Return whether this is one of Anthropic's: a date in its type, or a set of tools."""
    type_ = tool.get("type")
    return isinstance(type_, str) and bool(re.search(r"_20\d{6}$|^mcp_toolset$", type_))


_NATIVE_TOOL_FIELDS = (
    "input_examples",
    "defer_loading",
    "eager_input_streaming",
    "allowed_callers",
)


def function_tool(draft: Draft, function: JSON, path: str) -> JSON:
    """Return the tool that a function is, its name and schema made acceptable."""
    name = as_text(function.get("name"), f"{path}.name")
    schema = function.get("input_schema", function.get("parameters"))
    tool: JSON = {"name": draft.tool_name(name)}
    tool.update({k: function[k] for k in _NATIVE_TOOL_FIELDS if k in function})
    if isinstance(function.get("description"), str) and function["description"]:
        tool["description"] = function["description"]
    tool["input_schema"] = tool_schema(schema, f"{path}.parameters")
    if function.get("strict") is True:
        tool["input_schema"], gone = output_schema(tool["input_schema"], path)
        tool["strict"] = True
        for keyword in gone:
            draft.ignore(f"{path}.{keyword}")
    return tool


def _custom_tool(draft: Draft, tool: JSON, path: str) -> JSON:
    """A tool of free text: Claude fills one string, the grammar goes into the description."""
    name = as_text(tool.get("name"), f"{path}.name")
    draft.custom_tools.append(name)
    format = tool.get("format")
    grammar = format.get("grammar", format) if isinstance(format, dict) else {}
    description = str(tool.get("description") or "")
    if isinstance(grammar, dict) and grammar.get("definition"):
        syntax = grammar.get("syntax", "")
        description += f"\n\nThe input must fit this {syntax} grammar:\n{grammar['definition']}"
    return {
        "name": draft.tool_name(name),
        "description": description.strip() or name,
        "input_schema": {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
        },
    }


_CHOICES = {"none": "none", "auto": "auto", "required": "any", "any": "any"}


def tool_choice(draft: Draft, value: Any, path: str) -> None:
    """Set which tools the model may or must call, from any of the dialects."""
    if isinstance(value, str):
        if value not in _CHOICES:
            raise RequestError("expected none, auto, required or a tool", param=path)
        draft.require_tools({"type": _CHOICES[value]})
        return
    choice = as_object(value, path)
    if choice.get("type") == "allowed_tools":
        _allowed_tools(draft, choice, path)
        return
    if choice.get("type") in ("auto", "any", "none"):
        draft.require_tools({"type": choice["type"]})
    if choice.get("disable_parallel_tool_use") is True:
        parallel_tool_calls(draft, False, path)
    if choice.get("type") not in ("auto", "any", "none"):
        nested = isinstance(_inner(choice), dict)
        where = f"{path}.{choice['type']}.name" if nested else f"{path}.name"
        name = as_text(_chosen_name(choice), where)
        tools = draft.request.get("tools", ())
        if tools and all(tool.get("name") != safe_name(name) for tool in tools):
            raise RequestError(f"there is no tool {name!r}", param=where)
        draft.require_tools({"type": "tool", "name": draft.tool_name(name)})


def _chosen_name(choice: JSON) -> Any:
    inner = _inner(choice)
    return (inner if isinstance(inner, dict) else choice).get("name")


def _allowed_tools(draft: Draft, choice: JSON, path: str) -> None:
    allowed = choice.get("allowed_tools")
    allowed = allowed if isinstance(allowed, dict) else choice
    tools = as_list(allowed.get("tools"), f"{path}.allowed_tools.tools")
    names = {safe_name(str(_chosen_name(tool))) for tool in tools if isinstance(tool, dict)}
    kept = [tool for tool in draft.request.get("tools", ()) if tool.get("name") in names]
    if not kept:
        raise RequestError("none of these tools is given", param=f"{path}.allowed_tools.tools")
    draft.request["tools"] = kept
    draft.require_tools({"type": "any" if allowed.get("mode") == "required" else "auto"})


def parallel_tool_calls(draft: Draft, value: Any, path: str) -> None:
    """Allow one call at a time only, if `value` is false."""
    choice = draft.request.get("tool_choice", {"type": "auto"})
    if not as_boolean(value, path) and choice["type"] != "none":
        draft.request["tool_choice"] = {**choice, "disable_parallel_tool_use": True}


def web_search(draft: Draft, value: Any, path: str) -> None:
    """Add Anthropic's web search, with the place and the domains that OpenAI's options name."""
    options = as_object(value, path)
    tool: JSON = {"type": "web_search_20250305", "name": "web_search"}
    location = options.get("user_location")
    if isinstance(location, dict):
        place = location.get("approximate")
        place = place if isinstance(place, dict) else location
        fields = ("city", "region", "country", "timezone")
        known = {name: place[name] for name in fields if isinstance(place.get(name), str)}
        tool["user_location"] = {"type": "approximate", **known}
    domains = object_or_empty(options.get("filters")).get("allowed_domains")
    if domains:
        tool["allowed_domains"] = as_list(domains, f"{path}.filters.allowed_domains")
    if options.get("search_context_size") not in (None, "medium"):
        draft.ignore(f"{path}.search_context_size")
    draft.annotated = True
    draft.add_tool(tool)


# --- what OpenAI's two APIs share: fields


def copied(check: Callable[[Any, str], Any]) -> Handler:
    """Return what copies a field that Anthropic takes by the same name, its type checked."""

    def copy(draft: Draft, value: Any, path: str) -> None:
        draft.request[path] = check(value, path)

    return copy


def _cache_control(draft: Draft, value: Any, path: str) -> None:
    if as_object(value, path):
        draft.request[path] = value


def _text_or_object(value: Any, path: str) -> Any:
    return value if isinstance(value, str) else as_object(value, path)


def _max_tokens(draft: Draft, value: Any, path: str) -> None:
    limit = as_positive_integer(value, path)
    draft.request.setdefault("max_tokens", limit)


def _temperature(draft: Draft, value: Any, path: str) -> None:
    draft.request["temperature"] = max(0, min(1, as_number(value, path)))


def _top_p(draft: Draft, value: Any, path: str) -> None:
    if as_number(value, path) != 1:
        draft.request["top_p"] = value


def output_format(draft: Draft, value: Any, path: str) -> None:
    """Ask for JSON: by a schema, constrained, or by an instruction."""
    format = as_object(value, path)
    if format.get("type") == "json_object":
        draft.json_object = True
        text = "Answer with one JSON object and nothing else: no other text, no code fence."
        draft.system.append({"type": "text", "text": text})
    elif format.get("type") == "json_schema":
        nested = "json_schema" in format
        where = f"{path}.json_schema" if nested else path
        _json_schema(draft, as_object(format["json_schema"] if nested else format, where), where)
    elif format.get("type") != "text":
        message = "expected text, json_object or json_schema"
        raise RequestError(message, param=f"{path}.type")


def _json_schema(draft: Draft, format: JSON, path: str) -> None:
    schema, gone = output_schema(format.get("schema"), f"{path}.schema")
    for keyword in gone:
        draft.ignore(f"{path.partition('.json_schema')[0]}.{keyword}")
    if format.get("description"):
        draft.ignore(f"{path}.description")
    draft.json_schema = True
    _output_config(draft, {"format": {"type": "json_schema", "schema": schema}}, "output_config")


def _output_config(draft: Draft, value: Any, path: str) -> None:
    config = as_object(value, path)
    if config.get("effort") is not None:
        as_text(config["effort"], f"{path}.effort")
    if config.get("format") is not None:
        as_object(config["format"], f"{path}.format")
    draft.request["output_config"] = {**draft.request.get("output_config", {}), **config}


_EFFORTS = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}


def reasoning_effort(draft: Draft, value: Any, path: str) -> None:
    """Set effort and thinking; thoughts are shown unless `thinking` is set already."""
    effort = as_text(value, path)
    if effort == "none":
        draft.request["thinking"] = {"type": "disabled"}
        return
    if effort in _EFFORTS:
        _output_config(draft, {"effort": _EFFORTS[effort]}, path)
    else:
        draft.ignore(path)
    draft.request.setdefault("thinking", dict(SHOWN_THINKING))


SHOWN_THINKING = {"type": "adaptive", "display": "summarized"}


def _thinking(draft: Draft, value: Any, path: str) -> None:
    thinking = as_object(value, path)
    as_text(thinking.get("type"), f"{path}.type")
    draft.request["thinking"] = dict(thinking)
    if thinking.get("budget_tokens") is not None:
        budget = as_positive_integer(thinking["budget_tokens"], f"{path}.budget_tokens")
        draft.request["thinking"]["budget_tokens"] = budget


def _user(draft: Draft, value: Any, path: str) -> None:
    """Anthropic wants an opaque id here, and no address."""
    id = as_text(value, path)
    if "@" in id or len(id) > 256:
        id = hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()
    draft.request.setdefault("metadata", {"user_id": id})


def _prompt_cache_options(draft: Draft, value: Any, path: str) -> None:
    draft.explicit_cache = as_object(value, path).get("mode") == "explicit"


def _betas(draft: Draft, value: Any, path: str) -> None:
    names = value.split(",") if isinstance(value, str) else as_list(value, path)
    for name in names:
        if not re.fullmatch(r"\s*[A-Za-z0-9._-]+\s*", as_text(name, path)):
            raise RequestError("not the name of a beta", param=path)
        draft.betas.append(name.strip())


def _seen_elsewhere(draft: Draft, value: Any, path: str) -> None:
    """`model` and `stream` are read before the conversion."""


# Field -> what becomes of it, and how; for both APIs. What comes first wins.
SHARED_FIELDS: Dict[str, Tuple[str, Handler]] = {
    "model": ("`model`, by alias or as it is", _seen_elsewhere),
    "stream": ("stream or one answer; upstream is always streamed", _seen_elsewhere),
    "max_output_tokens": ("`max_tokens`; without it, all that the model has", _max_tokens),
    "max_tokens": ("the same; without it, all that the model has", _max_tokens),
    "temperature": ("the same, at most 1; left out where the model refuses it", _temperature),
    "top_p": ("the same; left out where the model refuses it", _top_p),
    "top_k": ("the same; left out where the model refuses it", copied(as_positive_integer)),
    "tool_choice": ("`tool_choice`; a request in words where forcing is refused", tool_choice),
    "parallel_tool_calls": ("`disable_parallel_tool_use`", parallel_tool_calls),
    "output_config": ("the same", _output_config),
    "thinking": ("the same, as far as the model takes it", _thinking),
    "safety_identifier": ("`metadata.user_id`, hashed if it is an address", _user),
    "user": ("`metadata.user_id`, hashed if it is an address", _user),
    "prompt_cache_options": (
        "explicit: only the parts marked by the client are cached",
        _prompt_cache_options,
    ),
    "cache_control": ("the same", _cache_control),
    "container": ("the same", copied(_text_or_object)),
    "mcp_servers": ("the same", copied(as_list)),
    "betas": ("header `anthropic-beta`", _betas),
    "anthropic_beta": ("header `anthropic-beta`", _betas),
}


_ASKS_FOR_NOTHING: Tuple[Any, ...] = (None, False, 0, "", "auto", "default")


def _asks(field: str, value: Any) -> bool:
    if field == "seed":
        return value is not None
    return bool(value) and value not in _ASKS_FOR_NOTHING


def read_fields(
    draft: DraftType,
    body: JSON,
    mapped: Dict[str, Tuple[str, Callable[[DraftType, Any, str], None]]],
    rejected: Dict[str, Tuple[str, Callable[[Any], bool]]],
) -> None:
    """Take the mapped fields, in the order of their table, into `draft`; note others as ignored.

    RequestError, with the reason, if a value of `rejected` is used.
    """
    for field in filter(body.__contains__, rejected):
        reason, used = rejected[field]
        if used(body[field]):
            raise RequestError(reason, param=field)
    for field in filter(body.__contains__, mapped):
        if body[field] is not None:
            mapped[field][1](draft, body[field], field)
    for field in body:
        if field not in mapped and field not in rejected and _asks(field, body[field]):
            draft.ignore(field)


# --- the rules of a model

SMALL_ANSWER = 4096  # tokens: under this limit unasked thinking would eat the answer
_BUDGETS = {"low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768, "max": 49152}


class Adapted(NamedTuple):
    """A request as its model takes it, with the names of the fields that had to change."""

    request: JSON
    changed: Tuple[str, ...]


def adapted(request: JSON, model: Model) -> Adapted:
    """Return `request` as `model` takes it: each rule drops or replaces what is a 400 there."""
    changed: List[str] = []
    for field, rule in MODEL_RULES:
        if field in request:
            request = rule(request, model, changed)
    return Adapted(request, tuple(dict.fromkeys(changed)))


def _without(request: JSON, *fields: str) -> JSON:
    return {k: v for k, v in request.items() if k not in fields}


def _with_output_config(request: JSON, **fields: Any) -> JSON:
    """Set members of output_config; None takes one out."""
    config = {**request.get("output_config", {}), **fields}
    config = {k: v for k, v in config.items() if v is not None}
    return {**request, "output_config": config} if config else _without(request, "output_config")


def _max_tokens_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    if request.get("max_tokens", 0) > model.max_tokens:
        changed.append("max_tokens")
        return {**request, "max_tokens": model.max_tokens}
    return request


def _small_answer_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    """max_tokens caps thinking and text together."""
    asked = "thinking" in request or "effort" in request.get("output_config", {})
    if (
        asked
        or not model.thinks_by_default
        or request.get("max_tokens", SMALL_ANSWER) >= SMALL_ANSWER
    ):
        return request
    return {**request, "thinking": {"type": "disabled"}}


def _thinking_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    thinking = request.get("thinking")
    if thinking and thinking.get("type") == "enabled" and "enabled" in model.thinking:
        return _with_budget(request, thinking.get("budget_tokens"))
    if not thinking or thinking.get("type") in model.thinking:
        return request
    if thinking.get("type") in ("disabled", "between_tools"):
        if "between_tools" in model.thinking:
            return {**request, "thinking": {"type": "between_tools"}}
        request = _without(request, "thinking")
        return _with_output_config(request, effort="low") if model.thinks_by_default else request
    if "adaptive" in model.thinking:  # a budget, for a model that sets its own
        kept = {"type": "adaptive", "display": thinking.get("display", "summarized")}
        return {**request, "thinking": kept}
    if "enabled" in model.thinking:
        effort = request.get("output_config", {}).get("effort", "high")
        return _with_budget(request, _BUDGETS.get(effort))
    changed.append("thinking")
    return _without(request, "thinking")


def _with_budget(request: JSON, budget: Any) -> JSON:
    """Thinking with a budget, for models up to 4.6: from 1,024 tokens to under max_tokens."""
    wanted = budget if isinstance(budget, int) else _BUDGETS["high"]
    capped = min(wanted, request.get("max_tokens", 1 << 20) - 1)
    if capped < 1024:
        return _without(request, "thinking")
    thinking = {**request["thinking"], "type": "enabled", "budget_tokens": capped}
    return {**request, "thinking": thinking}


def _effort_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    effort = request.get("output_config", {}).get("effort")
    if effort is None or effort in model.efforts:
        return _capped_effort(request) if model.off_up_to_high else request
    if effort not in _ALL_EFFORTS:
        return request  # upstream knows better
    lower = _ALL_EFFORTS[: _ALL_EFFORTS.index(effort)]
    nearest = next((level for level in reversed(lower) if level in model.efforts), None)
    if nearest is None and request.get("thinking", {}).get("type") != "enabled":
        changed.append("effort")
    return _with_output_config(request, effort=nearest)


def _capped_effort(request: JSON) -> JSON:
    """Where thinking can be off, but only up to high effort."""
    config, thinking = request.get("output_config", {}), request.get("thinking", {})
    off = thinking.get("type") in ("disabled", "between_tools")
    if off and config.get("effort") in ("xhigh", "max"):
        return _with_output_config(request, effort="high")
    return request


def _sampling_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    """Newer models take no sampling fields, older ones not with thinking, nor both at once."""
    thinks = request.get("thinking", {}).get("type") in ("enabled", "adaptive")
    fields = ["temperature", "top_p", "top_k"]
    if model.sampling and not thinks:
        both = "temperature" in request and not model.temperature_and_top_p
        fields = ["top_p"] if both else []
    gone = [field for field in fields if field in request]
    changed.extend(gone)
    return _without(request, *gone)


def _tool_choice_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    """Forced choice: impossible beside a thinking budget, and on some models at all."""
    choice = request.get("tool_choice", {})
    if choice.get("type") not in ("any", "tool"):
        return request
    if model.forced_tool_choice:
        budget = request.get("thinking", {}).get("type") == "enabled"
        return _without(request, "thinking") if budget else request
    name = choice.get("name")
    wanted = f"the tool {name}" if name else "one of the tools"
    line = {"type": "text", "text": f"Answer this turn by calling {wanted}."}
    changed.append("tool_choice")
    turns = [(m["role"], m["content"]) for m in request["messages"]]
    auto = {k: v for k, v in choice.items() if k == "disable_parallel_tool_use"}
    messages = conversation([*turns, ("system", [line])])
    return {**request, "tool_choice": {"type": "auto", **auto}, "messages": messages}


def _system_message_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    """A system message in the middle stays in its place, as user text where it must."""
    if model.system_messages or all(m["role"] != "system" for m in request["messages"]):
        return request
    turns = [
        ("user", [system_reminder(b) for b in m["content"]])
        if m["role"] == "system"
        else (m["role"], m["content"])
        for m in request["messages"]
    ]
    return {**request, "messages": conversation(turns)}


def _prefill_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    """A trailing assistant message: completed by older models, refused by newer ones."""
    last = request["messages"][-1]
    if last["role"] != "assistant":
        return request
    thinks = request.get("thinking", {}).get("type") == "enabled"
    if not model.prefill or thinks or "format" in request.get("output_config", {}):
        nudge = {"role": "user", "content": [{"type": "text", "text": "Continue."}]}
        return {**request, "messages": [*request["messages"], nudge]}
    *blocks, final = last["content"]
    if final["type"] == "text":
        final = {**final, "text": final["text"].rstrip()}
    last = {**last, "content": [*blocks, final]}
    return {**request, "messages": [*request["messages"][:-1], last]}


def _structured_output_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    format = request.get("output_config", {}).get("format")
    if model.structured_outputs or not format:
        return request
    changed.append("response_format")
    schema = dumps(format.get("schema")).decode("ascii")
    line = {"type": "text", "text": f"Answer with JSON that fits this JSON Schema: {schema}"}
    system = [*request.get("system", ()), line]
    return _with_output_config({**request, "system": system}, format=None)


def _strict_tools_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    """At most 20 tools may be strict."""
    strict = [tool for tool in request.get("tools", ()) if tool.get("strict")]
    if not strict or (model.strict_tools and len(strict) <= 20):
        return request
    changed.append("strict")
    return {**request, "tools": [_without(tool, "strict") for tool in request["tools"]]}


def _default_max_tokens_rule(request: JSON, model: Model, changed: List[str]) -> JSON:
    """Required upstream; all that the model has, since the answer is streamed anyway."""
    return {"max_tokens": model.max_tokens, **request}


# Each with a field that it is about: without one of them it changes nothing.
MODEL_RULES: Tuple[Tuple[str, Callable[[JSON, Model, List[str]], JSON]], ...] = (
    ("max_tokens", _max_tokens_rule),
    ("max_tokens", _small_answer_rule),
    ("thinking", _thinking_rule),
    ("output_config", _effort_rule),
    ("temperature", _sampling_rule),
    ("top_p", _sampling_rule),
    ("top_k", _sampling_rule),
    ("tool_choice", _tool_choice_rule),
    ("messages", _system_message_rule),
    ("messages", _prefill_rule),
    ("output_config", _structured_output_rule),
    ("tools", _strict_tools_rule),
    ("messages", _default_max_tokens_rule),
)

_SCHEMA_REFUSED = r"[Ss]chema is too complex|recursive schemas"

# A 400 of upstream that names what the table did not know: pattern -> what the model does not take.
REFUSALS: Tuple[Tuple[str, JSON], ...] = (
    (r"cannot both be specified", {"temperature_and_top_p": False}),
    (r"`(?:temperature|top_p|top_k)`|^(?:temperature|top_p|top_k)\b", {"sampling": False}),
    (r"tool_choice.*not supported|tool_choice forces tool use", {"forced_tool_choice": False}),
    (r"assistant message prefill", {"prefill": False}),
    (r"role 'system' is not supported", {"system_messages": False}),
    (r"adaptive thinking is not supported", {"thinking": _BUDGET_OFF}),
    (r'"thinking\.type\.enabled" is not supported', {"thinking": _ADAPTIVE_OFF}),
    (
        r'"thinking\.type\.disabled" is not supported',
        {"thinking": frozenset({"adaptive"}), "thinks_by_default": True},
    ),
    (r"output_config\.effort|effort.*not supported", {"efforts": ()}),
    (_SCHEMA_REFUSED, {"strict_tools": False}),
    (_SCHEMA_REFUSED, {"structured_outputs": False}),
    (r"output_config\.format.*not supported", {"structured_outputs": False}),
)

_SIGNATURE_REFUSED = (
    r"Invalid `signature` in `thinking` block|thinking` or `redacted_thinking` blocks in the latest"
    r"|Expected `thinking` or `redacted_thinking`"
)


def models_after_refusal(model: Model, message: str) -> Iterator[Model]:
    """Yield what may be true of `model` after upstream refused a request with `message`.

    Nothing when the message names nothing that could be left out.
    """
    for pattern, differences in REFUSALS:
        learned = model._replace(**differences)
        if learned != model and re.search(pattern, message):
            yield learned


def refuses_signature(message: str) -> bool:
    """Return whether upstream's sentence says that a thinking block came back changed."""
    return bool(re.search(_SIGNATURE_REFUSED, message))


def without_thinking(request: JSON) -> JSON:
    """Return `request` without the thinking blocks of earlier turns, the cure for that refusal."""
    turns = [
        (m["role"], [block for block in m["content"] if block["type"] not in THINKING_TYPES])
        for m in request["messages"]
    ]
    stripped = {**request, "messages": conversation(turns)}
    # A thinking budget demands that the last assistant turn starts with a thinking block.
    budget = request.get("thinking", {}).get("type") == "enabled"
    return _without(stripped, "thinking") if budget else stripped


# --- prompt caching

MAX_CACHE_MARKS = 4


def _marked_places(request: JSON) -> Iterator[JSON]:
    """Everything that may carry a cache mark, in Anthropic's order."""
    yield from request.get("tools", ())
    yield from request.get("system", ())
    for message in request["messages"]:
        for block in message["content"]:
            yield block
            if isinstance(block.get("content"), list):
                yield from (inner for inner in block["content"] if isinstance(inner, dict))


def _cache_marks(request: JSON) -> List[JSON]:
    places = itertools.chain(_marked_places(request), [request])
    return [p for p in places if "cache_control" in p and object_or_empty(p["cache_control"])]


def limited_cache_marks(request: JSON) -> JSON:
    """Return `request` with at most four cache marks and one lifetime order; more are a 400.

    The earliest marks of the messages go first, as the later ones reach further.
    """
    if not _cache_marks(request):
        return request
    request = _with_one_lifetime(request)
    marks = _cache_marks(request)
    hour_after_five = _hour_after_five_minutes(marks)
    if len(marks) <= MAX_CACHE_MARKS and not hour_after_five:
        return request
    fresh: JSON = json.loads(json.dumps(request))
    outer = _cache_marks({**fresh, "messages": []})
    inner = _cache_marks({"messages": fresh["messages"]})
    for place in [*inner, *outer][: max(0, len(marks) - MAX_CACHE_MARKS)]:
        del place["cache_control"]
    if hour_after_five:
        for place in _cache_marks(fresh):
            place["cache_control"] = {"type": "ephemeral"}
    return fresh


def _with_one_lifetime(request: JSON) -> JSON:
    """The mark at the top lives as long as that of the last block: else that is a 400."""
    places = [place for place in _marked_places(request) if place.get("type") != "thinking"]
    last = object_or_empty(places[-1].get("cache_control")) if places else None
    top = request.get("cache_control")
    differ = top and last and top.get("ttl", "5m") != last.get("ttl", "5m")
    return {**request, "cache_control": last} if differ else request


def _hour_after_five_minutes(marks: Sequence[JSON]) -> bool:
    hours = [place["cache_control"].get("ttl") == "1h" for place in marks]
    five = hours.index(False) if False in hours else len(hours)
    return any(hours[five:])


def with_prompt_cache(request: JSON, ttl: str) -> JSON:
    """Return `request` with the marks that make the next turn cheap; unchanged if it has any.

    A single question without tools would pay for a write that nobody reads.
    """
    mark = {"type": "ephemeral", "ttl": "1h"} if ttl == "1h" else {"type": "ephemeral"}
    worth = request.get("tools") or len(request["messages"]) > 1
    if ttl == "off" or not worth or _cache_marks(request):
        return request
    marked = {**request, "cache_control": mark}
    anchor = "system" if request.get("system") else "tools"
    if request.get(anchor):
        *others, last = request[anchor]
        marked[anchor] = [*others, {**last, "cache_control": mark}]
    return marked


# --- from events to a message


def merged_usage(usage: JSON, later: Any) -> JSON:
    """Return `usage` with what a later event says of it; usage is cumulative, null says nothing."""
    if not isinstance(later, dict):
        return usage
    return {**usage, **{key: value for key, value in later.items() if value is not None}}


def token_count(usage: JSON, name: str) -> int:
    """Return one count of `usage`; 0 when it is absent or no number."""
    value = usage.get(name)
    return value if type(value) is int else 0


def thinking_token_count(usage: JSON) -> int:
    """Return how many of the output tokens were thinking; 0 when it is not told."""
    return token_count(object_or_empty(usage.get("output_tokens_details")), "thinking_tokens")


def input_token_total(usage: JSON) -> int:
    """Return all input tokens: the uncached rest, what the cache gave and what went into it."""
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum([token_count(usage, name) for name in names])


THINKING_TYPES = ("thinking", "redacted_thinking")


def thinking_of(blocks: Iterable[JSON]) -> List[JSON]:
    """Return the thinking among content blocks, the redacted too."""
    return [block for block in blocks if block.get("type") in THINKING_TYPES]


def is_client_tool_use(block: JSON) -> bool:
    """Return whether the client is to run this call; server tools run upstream."""
    return block.get("type") == "tool_use"


class EventSink:
    """What Messages events flow into. `feed` returns bytes for the client, if any.

    Methods are named after the events (`_on_message_start`); unknown events are skipped, as
    Anthropic demands of every client.
    """

    complete = False  # message_stop was seen: nothing is missing
    takes = b""  # the type of deltas whose texts may come in JSON, by `feed_texts`; empty: none

    @property
    def heartbeat(self) -> bytes:
        """Bytes that fill a silence without a meaning of their own."""
        return b""

    def feed(self, event: JSON) -> bytes:
        """Return the bytes that one event makes."""
        method = getattr(self, f"_on_{event.get('type')}", None)
        return method(event) if method else b""

    def feed_texts(self, texts: List[bytes]) -> bytes:
        """Return the bytes that a run of deltas makes, given by their texts as ASCII JSON."""
        raise NotImplementedError

    def fail(self, error: ShimError) -> bytes:
        """Return the bytes that tell the client of a failure in the middle."""
        return b""

    def _on_error(self, event: JSON) -> bytes:
        raise error_from_event(event)


class MessageAssembler(EventSink):
    """Collects events into the whole `message`; None until message_start.

    The input of a call that was cut off, and so is no JSON, stays as text in `partial_json`.
    """

    def __init__(self) -> None:
        self.message: Optional[JSON] = None
        self._pieces: List[str] = []
        self._raw: List[bytes] = []  # pieces that come after those, in JSON

    @property
    def begun(self) -> bool:
        """Whether a delta of text came for the open block."""
        return bool(self._pieces or self._raw)

    @property
    def open_text(self) -> str:
        """The text of the open block so far, without what its start held."""
        self._settle()
        return "".join(self._pieces)

    def _settle(self) -> None:
        if self._raw:
            self._pieces.append(loads_text('"' + b"".join(self._raw).decode("ascii") + '"'))
            self._raw = []

    @property
    def _blocks(self) -> List[JSON]:
        return self.message["content"] if self.message else []

    def feed_texts(self, texts: List[bytes]) -> bytes:
        """Add the texts to the open block."""
        self._raw += texts
        return b""

    def _on_message_start(self, event: JSON) -> bytes:
        message = object_or_empty(event.get("message"))
        usage = object_or_empty(message.get("usage"))
        self.message = {**message, "content": [], "usage": usage}
        self.takes = b""
        return b""

    def _on_content_block_start(self, event: JSON) -> bytes:
        block = dict(object_or_empty(event.get("content_block")))
        self._blocks.append(block)
        self._pieces, self._raw = [], []
        self.takes = _BLOCK_DELTAS.get(str(block.get("type")), b"") if self.message else b""
        return b""

    def _on_content_block_delta(self, event: JSON) -> bytes:
        delta = event.get("delta")
        if not self._blocks or not isinstance(delta, dict):
            return b""
        block = self._blocks[-1]
        if delta.get("type") == "citations_delta":
            given = block.get("citations")
            known = given if isinstance(given, list) else []
            block["citations"] = [*known, delta.get("citation")]
        elif delta.get("type") == "signature_delta":
            block["signature"] = delta.get("signature")
        else:
            self._settle()
            self._pieces.extend(filter(None, [delta_text(delta)]))
        return b""

    def _on_content_block_stop(self, event: JSON) -> bytes:
        if not self._blocks:
            return b""
        block, text = self._blocks[-1], self.open_text
        self._pieces, self.takes = [], b""
        if "input" in block:
            block.update(_parsed_input(text, block["input"]))
        elif block.get("type") in ("text", "thinking"):
            block[block["type"]] = str(block.get(block["type"]) or "") + text
        return b""

    def _on_message_delta(self, event: JSON) -> bytes:
        if self.message is not None:
            delta = object_or_empty(event.get("delta"))
            self.message.update({k: delta[k] for k in _MESSAGE_DELTA if k in delta})
            self.message["usage"] = merged_usage(self.message["usage"], event.get("usage"))
        return b""

    def _on_message_stop(self, event: JSON) -> bytes:
        self.complete = self.message is not None
        return b""


# The deltas that fill a block with text.
_BLOCK_DELTAS = {
    "text": b"text_delta",
    "thinking": b"thinking_delta",
    "tool_use": b"input_json_delta",
    "server_tool_use": b"input_json_delta",
}
_MESSAGE_DELTA = ("stop_reason", "stop_sequence", "stop_details", "container")

# The member of a delta that holds its piece of text.
DELTA_TEXT = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "input_json_delta": "partial_json",
}


def delta_text(delta: JSON) -> str:
    """Return the piece of text that a delta brings; an empty string for one of another kind."""
    member = DELTA_TEXT.get(str(delta.get("type")))
    piece = delta.get(member) if member else None
    return piece if isinstance(piece, str) else ""


def _parsed_input(text: str, given: Any) -> JSON:
    if not text.strip():
        return {"input": object_or_empty(given)}
    try:
        value = loads_text(text)
    except (ValueError, RecursionError):
        value = None
    return {"input": value} if isinstance(value, dict) else {"input": {}, "partial_json": text}


# A delta of text, byte for byte as Anthropic writes it (it pads with spaces before the last brace).
# The JSON string grammar is spelled out, so that texts can be spliced as they stand; anything that
# differs in one byte takes the way through the JSON parser.
_TYPE_AND_MEMBER = "|".join(f'{type_}","{member}' for type_, member in DELTA_TEXT.items())
_START = (
    rb"event: content_block_delta\n"
    rb'data: \{"type":"content_block_delta","index":(?:0|[1-9]\d{0,5}),'
    rb'"delta":\{"type":"(%b)":"'
) % _TYPE_AND_MEMBER.encode("ascii")
_TEXT = rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*'
_DELTA_START, _JSON_TEXT = re.compile(_START), re.compile(_TEXT)
_DELTA_ENDS = frozenset(b"}" + b" " * padding + b"}" for padding in range(64))
_ONE_DELTA = re.compile(_START + b"(" + _TEXT + rb')"\} *\}\n\n')
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def delta_texts(events: Sequence[bytes], start: bytes) -> List[bytes]:
    """Return the texts of deltas that all have this start, as JSON in ASCII without quotes.

    Empty ones are left out; none at all if one of the events has to be parsed.
    """
    split = [
        rest.rpartition(b'"')
        for event in events
        if (rest := event.removeprefix(start)) is not event
    ]
    texts = [text for text, _, end in split if end in _DELTA_ENDS]
    run = b" ".join(texts)  # no escape sequence reaches over a space
    if len(texts) < len(events) or not _JSON_TEXT.fullmatch(run):
        return []
    texts = list(filter(None, texts))
    return texts if run.isascii() else ascii_texts(texts)


def ascii_texts(texts: Iterable[bytes]) -> List[bytes]:
    """Return JSON texts in ASCII; none at all if one is not UTF-8."""
    try:
        return [text if text.isascii() else _escaped(text) for text in texts]
    except UnicodeDecodeError:
        return []


def _escaped(text: bytes) -> bytes:
    escapes = _NOT_ASCII.sub(lambda found: quoted(found.group())[1:-1], text.decode("utf-8"))
    return escapes.encode("ascii")


class EventTransform:
    """Upstream's bytes in, a sink's bytes out: `feed` bursts, then `end` once."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._events = EventDecoder()
        self.complete = False  # the answer has come to its regular end
        self.failed = False  # the client was told of an error, and gets nothing more

    @property
    def heartbeat(self) -> bytes:
        """Bytes that fill a silence without a meaning of their own."""
        return self._sink.heartbeat

    def feed(self, burst: bytes) -> bytes:
        """Return what the client gets for `burst`; a failure becomes bytes too."""
        if self.failed or self.complete:
            return b""
        takes = self._sink.takes
        if takes and self._events.between:
            token = _ONE_DELTA.fullmatch(burst)  # as models write
            if token and token[1].startswith(takes) and token[2] and token[2].isascii():
                return self._sink.feed_texts([token[2]])
        made: List[bytes] = []
        try:
            self._feed_events(self._events.feed(burst), made)
            self.complete = self._sink.complete
        except ShimError as error:
            made.append(self.end(error))
        return b"".join(made)

    def _feed_events(self, events: bytes, made: List[bytes]) -> None:
        """Hand on whole events: deltas of text at once, those around them one by one."""
        delta = _DELTA_START.search(events)
        first, start = (delta.start(), delta.group()) if delta else (0, b"")
        if not start or events[max(0, first - 2) : first] not in (b"", b"\n\n"):
            self._feed_each(_blocks(events), made)
            return
        end = events.find(b"\n\n", events.rfind(start)) + 2
        self._feed_each(_blocks(events[:first]), made)
        deltas = _blocks(events[first:end])
        if not self._splice(deltas, start, made):
            self._feed_runs(deltas, start, made)
        self._feed_each(_blocks(events[end:]), made)

    def _feed_runs(self, blocks: Sequence[bytes], start: bytes, made: List[bytes]) -> None:
        """The same for deltas of text that others stand between."""
        for alike, group in itertools.groupby(blocks, lambda block: block.startswith(start)):
            run = list(group)
            if not (alike and self._splice(run, start, made)):
                self._feed_each(run, made)

    def _splice(self, run: Sequence[bytes], start: bytes, made: List[bytes]) -> bool:
        """Hand on the texts of deltas as they stand; whether that could be done."""
        takes = self._sink.takes
        spliced = takes and takes in start and not self._sink.complete
        texts = delta_texts(run, start) if spliced else []
        if texts:
            made.append(self._sink.feed_texts(texts))
        return bool(texts)

    def _feed_each(self, blocks: Iterable[bytes], made: List[bytes]) -> None:
        for block in blocks:
            event = None if self._sink.complete else parsed_event(block)
            if event:
                made.append(self._sink.feed(event))

    def end(self, error: Optional[ShimError] = None) -> bytes:
        """Return what the client gets when no more comes; a failure unless all had come."""
        if self.failed or self.complete:
            return b""
        self.failed = True
        return self._sink.fail(
            error or UpstreamCutError("upstream ended in the middle of the answer")
        )


def _blocks(events: bytes) -> List[bytes]:
    return events.split(b"\n\n")[:-1]


def parsed_event(block: bytes) -> Optional[JSON]:
    """Return the event of one block of lines; None for a comment; UpstreamCutError if no JSON.

    Events are shared and must not be changed: short ones come again and again, to the byte.
    """
    return _short_event(block) if len(block) < 160 else _event(block)


def _event(block: bytes) -> Optional[JSON]:
    data = event_data(block)
    if not data.strip():
        return None
    try:
        event = loads_text(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UpstreamCutError("upstream sent an event that is not JSON") from None
    return event if isinstance(event, dict) else None


_short_event = functools.lru_cache(maxsize=64)(_event)


class TurnJoiner:
    """Makes one message of the several that a paused server-tool turn takes.

    `feed` returns the event to hand on, renumbered, or None; after a `pause_turn`, `paused` is set
    and `resumed` gives the request that continues. Usage is summed.
    """

    def __init__(self) -> None:
        self.paused = False
        self._resumed = False
        self._blocks = 0  # of the earlier messages
        self._spent: JSON = {}
        self._part = MessageAssembler()

    def feed(self, event: JSON) -> Optional[JSON]:
        """Return the event as the client is to see it; None when it must not."""
        type_ = event.get("type")
        if type_ != "error":
            self._part.feed(event)
        message = self._part.message or {}
        if type_ == "message_delta":
            self.paused = message.get("stop_reason") == "pause_turn"
            usage = _summed_usage(self._spent, message.get("usage", {}))
            return None if self.paused else {**event, "usage": usage}
        if (type_ == "message_start" and self._resumed) or (
            type_ == "message_stop" and self.paused
        ):
            return None
        if isinstance(event.get("index"), int):
            return {**event, "index": event["index"] + self._blocks}
        return event

    def resumed(self, request: JSON) -> JSON:
        """Return the request that goes on where the paused message stopped."""
        message = self._part.message or {"content": [], "usage": {}}
        self._blocks += len(message["content"])
        self._spent = _summed_usage(self._spent, message["usage"])
        self._part = MessageAssembler()
        self.paused, self._resumed = False, True
        turn = {"role": "assistant", "content": message["content"]}
        last = request["messages"][-1]
        if last["role"] == "assistant":
            turn = {**turn, "content": [*last["content"], *message["content"]]}
            return {**request, "messages": [*request["messages"][:-1], turn]}
        return {**request, "messages": [*request["messages"], turn]}


def _summed_usage(one: JSON, other: JSON) -> JSON:
    total = {**one, **other}
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            total[key] = _summed_usage(one[key], other[key])
        elif isinstance(one[key], int) and isinstance(other[key], int):
            total[key] = one[key] + other[key]
    return total


# --- what OpenAI's two APIs share: answers


DECLINED = "The model declined to answer."


def refusal_text(message: JSON) -> str:
    """Return upstream's explanation of a refusal, or a plain sentence when it gives none."""
    details = message.get("stop_details")
    explanation = details.get("explanation") if isinstance(details, dict) else None
    return explanation if isinstance(explanation, str) and explanation else DECLINED


def custom_input(block: JSON) -> str:
    """Return the free text that a custom tool is called with."""
    given = block.get("input")
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else str(block.get("partial_json") or "")


def url_citations(blocks: Iterable[JSON]) -> List[JSON]:
    """Return the web citations of text blocks; offsets count code points of the joined text."""
    found: List[JSON] = []
    start = 0
    for block in blocks:
        if block.get("type") != "text":
            continue
        end = start + len(str(block.get("text", "")))
        for citation in block.get("citations") or ():
            url = _cited_url(citation)
            if url:
                title = str(citation.get("title") or url)
                found.append({"start_index": start, "end_index": end, "title": title, "url": url})
        start = end
    return found


def _cited_url(citation: Any) -> str:
    url = citation.get("url") or citation.get("source") if isinstance(citation, dict) else None
    return url if isinstance(url, str) else ""


class Unfenced:
    """Takes one Markdown code fence away that encloses a whole text: `feed` pieces, then `end`.

    The one place where the model's words are touched: a client that asked for a JSON object cannot
    parse the fence that models like to put around it.
    """

    def __init__(self) -> None:
        self._held = ""
        self._opened: Optional[bool] = None  # None until the start is known

    def whole(self, text: str) -> List[str]:
        """Return the pieces of a text that is there at once."""
        return [self.feed(text), self.end()]

    def feed(self, piece: str) -> str:
        """Return what is certain to stay."""
        self._held += piece
        if self._opened is None and not self._start_known():
            return ""
        if not self._opened:
            return self._taken(len(self._held))
        tail = re.search(r"\s*`{0,3}\s*\Z", self._held)
        return self._taken(tail.start() if tail else len(self._held))

    def end(self) -> str:
        """Return what was held back and stays after all."""
        if self._opened:
            return re.sub(r"\s*```\s*\Z", "", self._held)
        return self._held

    def _start_known(self) -> bool:
        start = self._held.lstrip()
        if len(start) < 3 and "```".startswith(start):
            return False
        if not start.startswith("```"):
            self._opened = False
        elif "\n" in start:
            self._opened = True
            self._held = start.partition("\n")[2]
        return self._opened is not None

    def _taken(self, end: int) -> str:
        taken, self._held = self._held[:end], self._held[end:]
        return taken


# ----------------------------------------------------------------------
# 6. Chat Completions <-> Messages                       uses: 0 1 2 4 5
# ----------------------------------------------------------------------
# Three tables say what becomes of each request field; a test holds them against OpenAI's SDK and
# the README. Real clients send three tool dialects in one body (OpenAI's nested, the flat one of
# Responses, Anthropic's own), so the shape is decided per element, never per endpoint.

ChatHandler = Callable[["ChatDraft", Any, str], None]  # the value, and the name of the field


class ChatDraft(Draft):
    """A request from a chat completion, with what its answer must look like."""

    legacy = False  # the client knows `function_call`, not `tool_calls`
    include_usage = False
    n = 1

    def __init__(self, model: str, recall: Optional[Callable[[str], List[JSON]]]) -> None:
        super().__init__(model, recall)
        self.last_calls: Dict[str, str] = {}  # id of the last call, by name


# --- messages


def _assistant_message(draft: ChatDraft, message: JSON, path: str) -> None:
    blocks = content_blocks(draft, message.get("content"), f"{path}.content")
    refusal = message.get("refusal")
    if isinstance(refusal, str):
        blocks.extend(text_block(refusal))
    if message.get("audio") is not None:
        draft.ignore("messages.audio")
    calls = message.get("tool_calls")
    for number, call in enumerate(
        as_list(calls, f"{path}.tool_calls") if calls is not None else ()
    ):
        where = f"{path}.tool_calls.{number}"
        blocks.extend(marked([_tool_use(draft, as_object(call, where), where)], call))
    if message.get("function_call") is not None:
        blocks.append(_legacy_call(draft, message["function_call"], f"{path}.function_call"))
    used = [block for block in reversed(blocks) if block["type"] == "tool_use"]
    draft.last_calls.update((block["name"], block["id"]) for block in used)
    draft.turns.append(("assistant", marked(_with_thinking(draft, blocks, message), message)))


def _with_thinking(draft: ChatDraft, blocks: List[JSON], message: JSON) -> List[JSON]:
    """Put the signed thinking of the turn before it: from the client, else from our memory."""
    if thinking_of(blocks):
        return blocks
    carried = _signed(message.get("thinking_blocks"))
    carried = carried or _detailed(message.get("reasoning_details"))
    calls = (block["id"] for block in blocks if block["type"] == "tool_use")
    remembered = (draft.recall(id) for id in calls)
    return [*(carried or next(filter(None, remembered), [])), *blocks]


def _signed(carried: Any) -> List[JSON]:
    """The blocks of LiteLLM's `thinking_blocks` that a signature makes valid."""
    blocks: List[JSON] = []
    for block in carried if isinstance(carried, list) else ():
        type_ = block.get("type") if isinstance(block, dict) else None
        if type_ == "thinking" and isinstance(block.get("signature"), str):
            text = block.get("thinking")
            text = text if isinstance(text, str) else ""
            blocks.append({"type": type_, "thinking": text, "signature": block["signature"]})
        elif type_ == "redacted_thinking" and isinstance(block.get("data"), str):
            blocks.append({"type": type_, "data": block["data"]})
    return blocks


def _detailed(carried: Any) -> List[JSON]:
    """The same out of OpenRouter's `reasoning_details`."""
    named = []
    for detail in carried if isinstance(carried, list) else ():
        if isinstance(detail, dict) and detail.get("type") == "reasoning.text":
            named.append({**detail, "type": "thinking", "thinking": detail.get("text")})
        elif isinstance(detail, dict) and detail.get("type") == "reasoning.encrypted":
            named.append({**detail, "type": "redacted_thinking"})
    return _signed(named)


def _tool_use(draft: ChatDraft, call: JSON, path: str) -> JSON:
    kind = "custom" if isinstance(call.get("custom"), dict) else "function"
    function = as_object(call.get(kind, call), f"{path}.{kind}")
    name = as_text(function.get("name"), f"{path}.{kind}.name")
    id = as_text(call.get("id", call.get("call_id")), f"{path}.id")
    given = {"input": function.get("input")} if kind == "custom" else function.get("arguments")
    return {
        "type": "tool_use",
        "id": safe_name(id or "call"),
        "name": draft.tool_name(name),
        "input": tool_input(given),
    }


def _legacy_call(draft: ChatDraft, call: Any, path: str) -> JSON:
    """Functions of the old API have no id: the place in the conversation serves as one."""
    function = as_object(call, path)
    return {
        "type": "tool_use",
        "id": f"call_fn_{len(draft.turns)}",
        "name": draft.tool_name(as_text(function.get("name"), f"{path}.name")),
        "input": tool_input(function.get("arguments")),
    }


def _tool_message(draft: ChatDraft, message: JSON, path: str) -> None:
    id = as_text(message.get("tool_call_id"), f"{path}.tool_call_id")
    block = tool_result(draft, id, message.get("content"), f"{path}.content")
    if message.get("is_error") is True:
        block["is_error"] = True
    draft.turns.append(("user", marked([block], message)))


def _function_message(draft: ChatDraft, message: JSON, path: str) -> None:
    name = draft.tool_name(as_text(message.get("name"), f"{path}.name"))
    id = draft.last_calls.get(name, "call_fn")
    block = tool_result(draft, id, message.get("content"), f"{path}.content")
    draft.turns.append(("user", [block]))


CHAT_ROLES: Dict[str, Callable[[ChatDraft, JSON, str], None]] = {
    "system": system_message,
    "developer": system_message,
    "user": user_message,
    "assistant": _assistant_message,
    "tool": _tool_message,
    "function": _function_message,
}


def _messages(draft: ChatDraft, value: Any, path: str) -> None:
    for number, message in enumerate(as_list(value, path)):
        where = f"{path}.{number}"
        role = as_object(message, where).get("role")
        add = CHAT_ROLES.get(role) if isinstance(role, str) else None
        if add is None:
            known = ", ".join(CHAT_ROLES)
            raise RequestError(f"unknown role; expected one of {known}", param=f"{where}.role")
        add(draft, message, where)


def _input(draft: ChatDraft, value: Any, path: str) -> None:
    """The items of a Responses body that Cursor posts to the chat endpoint."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    messages: List[JSON] = []
    for number, item in enumerate(as_list(value, path)):
        item = as_object(item, f"{path}.{number}")
        if item.get("type") in ("function_call", "custom_tool_call"):
            kind = "custom" if item["type"] == "custom_tool_call" else "function"
            call = {"id": item.get("call_id"), kind: item}
            messages.append({"role": "assistant", "tool_calls": [call]})
        elif item.get("type") in ("function_call_output", "custom_tool_call_output"):
            result = {"tool_call_id": item.get("call_id"), "content": item.get("output")}
            messages.append({"role": "tool", **result})
        elif "role" in item:
            messages.append(item)
        else:
            draft.ignore(f"input.{item.get('type')}")
    _messages(draft, messages, path)


# --- tools


def _tools(draft: ChatDraft, value: Any, path: str) -> None:
    for number, tool in enumerate(as_list(value, path)):
        where = f"{path}.{number}"
        add_openai_tool(draft, as_object(tool, where), where)


def _functions(draft: ChatDraft, value: Any, path: str) -> None:
    draft.legacy = True
    for number, function in enumerate(as_list(value, path)):
        where = f"{path}.{number}"
        draft.add_tool(function_tool(draft, as_object(function, where), where))
    parallel_tool_calls(draft, False, path)  # the old answer has room for one call


def _function_call(draft: ChatDraft, value: Any, path: str) -> None:
    draft.legacy = True
    if isinstance(value, str):
        tool_choice(draft, value, path)
    else:
        named = {**as_object(value, path), "type": "function"}
        tool_choice(draft, named, path)


# --- the other fields


def _stop(draft: ChatDraft, value: Any, path: str) -> None:
    values = [value] if isinstance(value, str) else as_list(value, path)
    texts = [as_text(text, f"{path}.{number}") for number, text in enumerate(values)]
    kept = [text for text in texts if text.strip()]  # Anthropic refuses blank ones
    if len(kept) < len(texts):
        draft.ignore(path)
    if kept:
        draft.request["stop_sequences"] = kept


def _n(draft: ChatDraft, value: Any, path: str) -> None:
    draft.n = as_positive_integer(value, path)
    if draft.n > MAX_CHOICES:
        raise RequestError(f"at most {MAX_CHOICES} choices", param=path)


MAX_CHOICES = 16  # each is a request upstream of its own


def _stream_options(draft: ChatDraft, value: Any, path: str) -> None:
    draft.include_usage = as_object(value, path).get("include_usage") is True


def _reasoning(draft: ChatDraft, value: Any, path: str) -> None:
    """OpenRouter's form: an effort, or a budget of tokens, or just on and off."""
    reasoning = as_object(value, path)
    if reasoning.get("enabled") is False:
        reasoning_effort(draft, "none", path)
    elif reasoning.get("effort") is not None:
        reasoning_effort(draft, reasoning["effort"], f"{path}.effort")
    elif reasoning.get("max_tokens") is not None:
        budget = as_positive_integer(reasoning["max_tokens"], f"{path}.max_tokens")
        draft.request["thinking"] = {"type": "enabled", "budget_tokens": max(1024, budget)}
    elif reasoning:
        draft.request["thinking"] = dict(SHOWN_THINKING)
    thinking = draft.request.get("thinking", {})
    if reasoning.get("exclude") is True and thinking.get("type") == "adaptive":
        draft.request["thinking"] = {**thinking, "display": "omitted"}


# Field -> what becomes of it, and how. The order matters: what comes first wins, and a choice of
# tools needs the tools.
CHAT_REQUEST: Dict[str, Tuple[str, ChatHandler]] = {
    "instructions": ("the first block of `system`, beside `input`", instructions),
    "messages": ("`system` and `messages`", _messages),
    "input": ("`messages`, for clients that send Responses items here", _input),
    "stream_options": ("`include_usage`: a last chunk with usage", _stream_options),
    "max_completion_tokens": ("`max_tokens`", SHARED_FIELDS["max_tokens"][1]),
    "stop": ("`stop_sequences`, without blank ones", _stop),
    "n": ("that many requests upstream; only 1 with `stream`", _n),
    "tools": ("`tools`; names and schemas made acceptable", _tools),
    "functions": ("`tools`, answered as `function_call`", _functions),
    "web_search_options": ("the `web_search` tool, with citations", web_search),
    "function_call": ("`tool_choice`", _function_call),
    "response_format": ("`output_config.format`; json_object as an instruction", output_format),
    "reasoning_effort": ("`output_config.effort` and `thinking`", reasoning_effort),
    "reasoning": ("`output_config.effort` and `thinking`", _reasoning),
    "context_management": ("the same", copied(as_object)),
    **SHARED_FIELDS,
}

# Field -> why it has no effect. Named in the answer's header x-claude-shim-ignored unless its value
# asks for nothing; an unknown field is treated the same way.
CHAT_IGNORED: Dict[str, str] = {
    "audio": "Claude answers in text",
    "frequency_penalty": "Claude has no such setting",
    "logit_bias": "Claude has no such setting",
    "logprobs": "Claude does not tell probabilities",
    "metadata": "nothing is stored",
    "moderation": "Claude has its own safeguards",
    "prediction": "Claude has no such setting",
    "presence_penalty": "Claude has no such setting",
    "prompt_cache_key": "Anthropic's cache needs no key",
    "prompt_cache_retention": "see --prompt-cache",
    "seed": "Claude has no such setting",
    "service_tier": "the account decides",
    "store": "nothing is stored",
    "top_logprobs": "Claude does not tell probabilities",
    "verbosity": "say it in the system message",
}

# Field -> why a request that uses it is a 400, and whether a value uses it.
CHAT_REJECTED: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    "modalities": ("Claude answers in text only", lambda value: value not in (None, [], ["text"])),
}


def messages_request_from_chat(
    body: JSON, model: str, recall: Optional[Callable[[str], List[JSON]]] = None
) -> ChatDraft:
    """Return the draft of the Messages request that a chat completion request stands for.

    `recall` gives the thinking blocks that came before a tool call, by its id. `draft.finished()`
    is the request; the model's own rules are not applied yet. RequestError names the field.
    """
    draft = ChatDraft(model, recall)
    if body.get("messages") is None and body.get("input") is None:
        raise RequestError("you must give messages", param="messages")
    if body.get("messages") and "input" in body:
        body = {name: value for name, value in body.items() if name != "input"}
    read_fields(draft, body, CHAT_REQUEST, CHAT_REJECTED)
    return draft


# --- answers

FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "compaction": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class ChatReply(NamedTuple):
    """What the answer to one chat completion request must look like."""

    created: int = 0  # Unix seconds
    names: Dict[str, str] = {}  # of tools, as upstream knows them -> as the client does
    custom_tools: FrozenSet[str] = frozenset()
    legacy: bool = False
    json_object: bool = False
    json_schema: bool = False
    include_usage: bool = False
    annotated: bool = False

    @classmethod
    def to(cls, draft: ChatDraft, created: int) -> ChatReply:
        """Return the reply that `draft` asks for."""
        return cls(
            created,
            draft.original_names,
            frozenset(draft.custom_tools),
            draft.legacy,
            draft.json_object,
            draft.json_schema,
            draft.include_usage,
            draft.annotated,
        )


def chat_usage(usage: JSON) -> JSON:
    """Return OpenAI's usage; prompt_tokens hold what the cache gave and took, as clients expect."""
    prompt, completion = input_token_total(usage), token_count(usage, "output_tokens")
    read = token_count(usage, "cache_read_input_tokens")
    written = token_count(usage, "cache_creation_input_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": read,
            "audio_tokens": 0,
            "cache_write_tokens": written,
        },
        "completion_tokens_details": {
            "reasoning_tokens": thinking_token_count(usage),
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "cache_creation_input_tokens": written,  # Roo and LiteLLM read these two
        "cache_read_input_tokens": read,
    }


def chat_from_messages(messages: Sequence[JSON], reply: ChatReply) -> JSON:
    """Return the chat completion made of one whole message per choice."""
    usages = [chat_usage(message.get("usage") or {}) for message in messages]
    return {
        "id": f"chatcmpl-{messages[0].get('id', '')}",
        "object": "chat.completion",
        "created": reply.created,
        "model": messages[0].get("model", ""),
        "choices": [_choice(number, message, reply) for number, message in enumerate(messages)],
        "usage": functools.reduce(_added, usages),
        "service_tier": "default",
        "system_fingerprint": "claude_shim",
    }


def chat_json(messages: Sequence[JSON], reply: ChatReply) -> bytes:
    """Return the JSON of `chat_from_messages`; of one plain text in a third of the time."""
    message = messages[0]
    refused = reply.json_schema and message.get("stop_reason") == "refusal"
    if len(messages) > 1 or reply.json_object or refused or not _is_plain_text(message):
        return dumps(chat_from_messages(messages, reply))
    usage, stop_reason = message["usage"], str(message.get("stop_reason"))
    prompt, completion = input_token_total(usage), token_count(usage, "output_tokens")
    values = {
        "id": quoted(f"chatcmpl-{message['id']}"),
        "model": quoted(message["model"]),
        "text": quoted(message["content"][0]["text"]),
        "created": reply.created,
        "prompt": prompt,
        "completion": completion,
        "total": prompt + completion,
        "read": token_count(usage, "cache_read_input_tokens"),
        "written": token_count(usage, "cache_creation_input_tokens"),
        "reasoning": thinking_token_count(usage),
    }
    form = _plain_text_form(stop_reason if stop_reason in FINISH_REASONS else "")
    return (form % values).encode("ascii")


def _is_plain_text(message: JSON) -> bool:
    """Whether an answer is one text and nothing else, as most are."""
    block = object_or_empty(message["content"][0] if len(message["content"]) == 1 else None)
    return (
        block.get("type") == "text"
        and len(block) == 2
        and isinstance(block.get("text"), str)
        and isinstance(message.get("id"), str)
        and isinstance(message.get("model"), str)
        and isinstance(message.get("usage"), dict)
        and not message.get("stop_details")
    )


@functools.lru_cache(maxsize=16)
def _plain_text_form(stop_reason: str) -> str:
    """The JSON of such an answer, made of one with marks where its values go."""
    usage = {
        "input_tokens": 1,
        "cache_read_input_tokens": 2,
        "cache_creation_input_tokens": 4,
        "output_tokens": 8,
        "output_tokens_details": {"thinking_tokens": 3},
    }
    message = {
        "id": "%(id)s",
        "model": "%(model)s",
        "content": [{"type": "text", "text": "%(text)s"}],
        "stop_reason": stop_reason,
        "usage": usage,
    }
    told = {2: "read", 3: "reasoning", 4: "written", 5: "created", 8: "completion"}
    marks = {**told, 7: "prompt", 15: "total"}  # which are sums of those above
    form = dumps(chat_from_messages([message], ChatReply(created=5))).decode("ascii")
    form = re.sub(r'"(?:chatcmpl-)?(%\(\w+\)s)"', r"\1", form)  # they come with quotes
    return re.sub(r":([1-9]\d*)", lambda mark: f":%({marks[int(mark[1])]})d", form)


def _added(one: Any, other: Any) -> Any:
    return {k: _added(one[k], other[k]) for k in one} if isinstance(one, dict) else one + other


def _choice(number: int, message: JSON, reply: ChatReply) -> JSON:
    answer = _chat_message(message, reply)
    called = bool(answer.get("tool_calls") or answer.get("function_call"))
    choice = {"index": number, "message": answer, "logprobs": None}
    return {**choice, **_finish(message, called, reply)}


def _finish(message: JSON, called: bool, reply: ChatReply) -> JSON:
    """Why the answer ended; a call of the client's own tools is always `tool_calls`."""
    reason = FINISH_REASONS.get(str(message.get("stop_reason")), "stop")
    if called and reason == "stop":
        reason = "tool_calls"
    if reason == "tool_calls":
        reason = ("function_call" if reply.legacy else reason) if called else "stop"
    finish: JSON = {"finish_reason": reason}
    if message.get("stop_details"):
        finish["stop_details"] = message["stop_details"]
    return finish


def _chat_message(message: JSON, reply: ChatReply) -> JSON:
    blocks = [block for block in message["content"] if isinstance(block, dict)]
    text = "".join(str(b.get("text", "")) for b in blocks if b.get("type") == "text")
    calls = [_chat_call(block, reply) for block in blocks if is_client_tool_use(block)]
    answer: JSON = {"role": "assistant", "content": text, "refusal": None}
    if reply.json_object:
        answer["content"] = "".join(Unfenced().whole(text))
    if calls and not text:
        answer["content"] = None
    answer["annotations"] = _annotations(blocks)
    if calls and reply.legacy:
        answer["function_call"] = calls[0]["function"]
    elif calls:
        answer["tool_calls"] = calls
    answer.update(_chat_reasoning(blocks))
    if message.get("stop_reason") == "refusal" and reply.json_schema:
        answer["refusal"] = refusal_text(message)
    return answer


def _annotations(blocks: List[JSON]) -> List[JSON]:
    return [{"type": "url_citation", "url_citation": place} for place in url_citations(blocks)]


def _chat_call(block: JSON, reply: ChatReply) -> JSON:
    id, name = str(block.get("id")), str(block.get("name"))
    name = reply.names.get(name, name)
    if name in reply.custom_tools:
        return _custom_call(id, name, custom_input(block))
    arguments = block.get("partial_json") or json.dumps(block.get("input"), separators=(",", ":"))
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _custom_call(id: str, name: str, text: str) -> JSON:
    return {"id": id, "type": "custom", "custom": {"name": name, "input": text}}


def _chat_reasoning(blocks: List[JSON]) -> JSON:
    """Thinking, readable and as the exact blocks that must come back in a tool loop."""
    thoughts = thinking_of(blocks)
    text = "".join(str(block.get("thinking", "")) for block in thoughts)
    carried = {"thinking_blocks": thoughts} if thoughts else {}
    return {"reasoning_content": text, **carried} if text else carried


# --- streams

_SHOWN_BLOCKS = ("text", "thinking", "tool_use")


class ChatStreamEncoder(EventSink):
    """Messages events -> the chunks of a streamed chat completion, as server-sent events.

    `remember` is told, at the end, the ids of the calls and the thinking blocks before them.
    """

    heartbeat = COMMENT
    object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(
        self, reply: ChatReply, remember: Optional[Callable[[List[str], List[JSON]], None]] = None
    ) -> None:
        self._reply = reply
        self._remember = remember or (lambda ids, blocks: None)
        self._message = MessageAssembler()  # blocks of text stay empty unless their text is needed
        self._head = b""  # of a chunk, the same in all
        self._around = (b"", b"")  # the text of a delta of the open block
        self._calls = 0
        self._unfenced = Unfenced() if reply.json_object else None

    def feed_texts(self, texts: List[bytes]) -> bytes:
        """Return the chunks of a run of deltas: JSON text is spliced as it stands."""
        if self.takes != b"text_delta":
            self._message.feed_texts(texts)
        before, after = self._around
        return before + (after + before).join(texts) + after

    def fail(self, error: ShimError) -> bytes:
        """Return the error as a line of data; nothing follows it, no [DONE] either."""
        return server_sent_event(dumps(openai_error(error)[1]))

    # The parts that the legacy completion has in another form.

    def _choice(self, delta: JSON, finish: JSON) -> JSON:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **finish}

    def _text_delta(self, text: str) -> JSON:
        return {"content": text}

    def _first_delta(self) -> JSON:
        return {"role": "assistant", "content": "", "refusal": None}

    def _chunk(self, choices: List[JSON], usage: Optional[JSON] = None) -> bytes:
        rest: JSON = {"choices": choices}
        if self._reply.include_usage:
            rest["usage"] = usage
        return server_sent_event(b"%b,%b" % (self._head, dumps(rest)[1:]))

    def _delta(self, delta: JSON) -> bytes:
        return self._chunk([self._choice(delta, {})])

    def _text(self, text: str) -> bytes:
        if self._unfenced:
            text = self._unfenced.feed(text)
        return self._delta(self._text_delta(text)) if text else b""

    def _call(self, call: JSON) -> bytes:
        if self._reply.legacy:
            return self._delta({"function_call": call["function"]})
        return self._delta({"tool_calls": [{"index": self._calls - 1, **call}]})

    # Events

    def _on_message_start(self, event: JSON) -> bytes:
        self._message.feed(event)
        message, self.takes = self._message.message or {}, b""
        head = {
            "id": f"{self.id_prefix}{message.get('id', '')}",
            "object": self.object,
            "created": self._reply.created,
            "model": message.get("model", ""),
            "service_tier": "default",
            "system_fingerprint": "claude_shim",
        }
        self._head = dumps(head)[:-1]
        first = self._first_delta()
        return self._delta(first) if first else b""

    def _on_content_block_start(self, event: JSON) -> bytes:
        self._message.feed(event)
        block = self._open_block()
        self._calls += 1 if is_client_tool_use(block) else 0
        self._around = self._prepared()
        self.takes = self._message.takes if self._around[0] else b""
        if block.get("type") == "text" and block.get("text"):
            return self._text(str(block["text"]))
        if not is_client_tool_use(block):
            return b""
        name = self._name(block)
        if name in self._reply.custom_tools:
            return self._call(_custom_call(str(block.get("id")), name, ""))
        function = {"name": name, "arguments": ""}
        return self._call({"id": block.get("id"), "type": "function", "function": function})

    def _on_content_block_delta(self, event: JSON) -> bytes:
        delta = object_or_empty(event.get("delta"))
        piece = delta_text(delta)
        if delta.get("type") != "text_delta" or self._reply.annotated:
            self._message.feed(event)
        return self._piece(str(delta.get("type")), piece) if piece else b""

    def _piece(self, type_: str, piece: str) -> bytes:
        """The chunk of a piece of the open block, which a delta of this type brought."""
        block = self._open_block()
        if block.get("type") not in _SHOWN_BLOCKS:
            return b""
        if type_ == "text_delta":
            return self._text(piece)
        if type_ == "thinking_delta":
            return self._delta({"reasoning_content": piece})
        if not is_client_tool_use(block) or self._name(block) in self._reply.custom_tools:
            return b""
        return self._call({"function": {"arguments": piece}})

    def _prepared(self) -> Tuple[bytes, bytes]:
        """What stands around such a piece; nothing where its characters count or are looked at."""
        type_ = self._message.takes.decode("ascii")
        if type_ == "text_delta" and (self._reply.annotated or self._unfenced):
            return b"", b""
        before, _, after = self._piece(type_, "\x00").rpartition(b"\\u0000")
        return before, after

    def _on_content_block_stop(self, event: JSON) -> bytes:
        told = self._message.open_text.strip()
        self._message.feed(event)
        self.takes = b""
        block = self._open_block()
        if block.get("type") in THINKING_TYPES:
            return self._thinking_block(block)
        if not is_client_tool_use(block):
            return b""
        if self._name(block) in self._reply.custom_tools:
            return self._call({"custom": {"input": custom_input(block)}})
        arguments = json.dumps(block.get("input") or {}, separators=(",", ":"))
        return b"" if told else self._call({"function": {"arguments": arguments}})

    def _thinking_block(self, block: JSON) -> bytes:
        """The exact block, once: what LiteLLM and the Agents SDK send back in a tool loop."""
        index = len(thinking_of(self._blocks())) - 1
        return self._delta({"thinking_blocks": [{"index": index, **block}]})

    def _on_message_delta(self, event: JSON) -> bytes:
        return self._message.feed(event)

    def _on_message_stop(self, event: JSON) -> bytes:
        self._message.feed(event)
        message = self._message.message
        if message is None:
            raise UpstreamCutError("upstream ended an answer that had not begun")
        self.complete = True
        calls = [str(block.get("id")) for block in self._blocks() if is_client_tool_use(block)]
        self._remember(calls, thinking_of(self._blocks()))
        finish = _finish(message, bool(calls), self._reply)
        chunks = [*self._last_deltas(message), self._chunk([self._choice({}, finish)])]
        if self._reply.include_usage:
            chunks.append(self._chunk([], chat_usage(message["usage"])))
        return b"".join([*chunks, server_sent_event(b"[DONE]")])

    def _last_deltas(self, message: JSON) -> Iterator[bytes]:
        rest = self._unfenced.end() if self._unfenced else ""
        if rest:
            yield self._delta(self._text_delta(rest))
        found = _annotations(self._blocks())
        if found:
            yield self._delta({"annotations": found})
        if message.get("stop_reason") == "refusal" and self._reply.json_schema:
            yield self._delta({"refusal": refusal_text(message)})

    def _blocks(self) -> List[JSON]:
        return self._message.message["content"] if self._message.message else []

    def _open_block(self) -> JSON:
        blocks = self._blocks()
        return blocks[-1] if blocks else {}

    def _name(self, block: JSON) -> str:
        name = str(block.get("name"))
        return self._reply.names.get(name, name)


# --- the legacy endpoint, over the same path

COMPLETION_REJECTED = ("suffix", "echo")


def chats_from_completion(body: JSON) -> List[JSON]:
    """Return the chat bodies that a legacy completion request stands for, one for each prompt."""
    return [chat_from_completion(body, prompt) for prompt in completion_prompts(body)]


def chat_from_completion(body: JSON, prompt: str) -> JSON:
    """Return the chat body that a legacy completion request stands for, for one of its prompts."""
    for field in COMPLETION_REJECTED:
        if body.get(field):
            raise RequestError("Claude completes no text in the middle", param=field)
    if body.get("best_of") not in (None, 1, body.get("n")):
        raise RequestError("choose among `n` choices instead", param="best_of")
    shared = {k: v for k, v in body.items() if k not in ("prompt", "best_of", *COMPLETION_REJECTED)}
    return {**shared, "messages": [{"role": "user", "content": prompt}]}


def completion_prompts(body: JSON) -> List[str]:
    """Return the prompts of a legacy completion request; RequestError for lists of tokens."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    texts = [as_text(text, "prompt") for text in prompts]
    if not texts or not all(text.strip() for text in texts):
        raise RequestError("expected a prompt that is not blank", param="prompt")
    return texts


def completion_from_messages(messages: Sequence[JSON], reply: ChatReply) -> JSON:
    """Return the legacy text completion made of one whole message per choice."""
    completion = chat_from_messages(messages, reply)
    choices = [
        {
            "index": choice["index"],
            "text": choice["message"]["content"] or "",
            "logprobs": None,
            "finish_reason": choice["finish_reason"],
        }
        for choice in completion["choices"]
    ]
    id = f"cmpl-{messages[0].get('id', '')}"
    return {**completion, "id": id, "object": "text_completion", "choices": choices}


class CompletionStreamEncoder(ChatStreamEncoder):
    """Messages events -> the chunks of a streamed legacy completion: text and a reason, no more."""

    object = "text_completion"
    id_prefix = "cmpl-"

    def _choice(self, delta: JSON, finish: JSON) -> JSON:
        text = delta.get("text", "")
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": None, **finish}

    def _text_delta(self, text: str) -> JSON:
        return {"text": text}

    def _first_delta(self) -> JSON:
        return {}

    def _delta(self, delta: JSON) -> bytes:
        return super()._delta(delta) if "text" in delta else b""


# ----------------------------------------------------------------------
# 7. Responses <-> Messages                              uses: 0 1 2 4 5
# ----------------------------------------------------------------------
# Items instead of messages. What has no place in them, signed thinking above all, travels in
# envelopes that the client hands back unread; what it names by id only comes in as `Known`. An item
# tells its own events, so that an answer in one piece and a streamed one cannot differ.

_ENVELOPE = "csh1."


def sealed(content: JSON, key: bytes) -> str:
    """Return `content` in an envelope that only `unsealed` with the same key opens.

    It is authenticated, not encrypted: a client may read what it got anyway, but change nothing.
    """
    text = _ENVELOPE + base64.urlsafe_b64encode(dumps(content)).decode("ascii")
    return f"{text}.{_seal(text, key)}"


def unsealed(envelope: Any, key: bytes) -> JSON:
    """Return the content of an envelope; nothing if it is not ours, or was changed."""
    text, _, seal = envelope.rpartition(".") if isinstance(envelope, str) else ("", "", "")
    expected = _seal(text, key).encode("ascii")
    genuine = hmac.compare_digest(seal.encode("utf-8", "replace"), expected)
    if not genuine or not text.startswith(_ENVELOPE):
        return {}
    return object_or_empty(loads(base64.urlsafe_b64decode(text[len(_ENVELOPE) :])))


def _seal(text: str, key: bytes) -> str:
    return hmac.new(key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


class Known(NamedTuple):
    """What is known of earlier answers to the same client; by default nothing."""

    key: bytes = b""  # of the envelopes
    thinking: Callable[[str], List[JSON]] = lambda call_id: []  # that came before a call
    item: Callable[[str], Optional[JSON]] = lambda item_id: None
    # All items up to and with a response:
    history: Callable[[str], Optional[List[JSON]]] = lambda response_id: None


class CalledAs(NamedTuple):
    """How the client knows a tool: the type of the item of a call, and the tool's name."""

    type: str
    name: str
    namespace: str = ""


class ResponsesDraft(Draft):
    """A request from a Responses body, with what its answer must look like."""

    compacts = False  # the answer is a summary in an envelope
    plain_refusal = False  # as text: the client shows no other parts
    store = True

    def __init__(self, model: str, known: Known) -> None:
        super().__init__(model, known.thinking)
        self.known = known
        self.history: List[JSON] = []  # the items before those of this request
        self.items: List[JSON] = []  # those of this request
        self.called_as: Dict[str, CalledAs] = {}  # by the name that upstream knows
        self.upstream_names: Dict[Tuple[str, str], str] = {}  # by namespace and name
        self.echo: JSON = {}  # the members of the response that repeat the request

    def add_name(self, called: CalledAs) -> str:
        """Return the name for a tool that is as upstream takes it; a namespace comes first."""
        name = _flat_name(called.name, called.namespace)
        if self.called_as.get(safe_name(name), called)[1:] != called[1:]:
            # There is a tool of the very name that the namespace makes.
            name = safe_name(f"{called.namespace}/{called.name}")
        self.called_as[safe_name(name)] = called
        self.upstream_names[called.namespace, called.name] = safe_name(name)
        return name


def _flat_name(name: str, namespace: str) -> str:
    return f"{namespace}__{name}" if namespace else name


# --- tools

ToolReader = Callable[[ResponsesDraft, JSON, str], None]

_ONLY_OPENAIS = ("allowed_callers", "async", "defer_loading", "output_schema")


def _response_tools(draft: ResponsesDraft, value: Any, path: str) -> None:
    """All tools; namespaces last, because the plain names go first when two are the same."""
    tools = [
        (as_object(t, f"{path}.{n}"), f"{path}.{n}") for n, t in enumerate(as_list(value, path))
    ]
    for tool, where in sorted(tools, key=lambda pair: pair[0].get("type") == "namespace"):
        type_ = re.sub(r"^web_search(_preview)?(_20\d\d_\d\d_\d\d)?$", "web_search", _type(tool))
        read = RESPONSES_TOOLS.get(type_)
        if is_server_tool(tool):
            add_openai_tool(draft, tool, where)
        elif read:
            read(draft, tool, where)
        else:
            draft.ignore(f"tools.{type_}")


def _type(tool: JSON) -> str:
    """The type of a tool; those of Anthropic's shape have none."""
    return str(tool.get("type") or ("function" if "name" in tool else ""))


def _callable_tool(draft: ResponsesDraft, tool: JSON, path: str) -> None:
    _add_callable(draft, tool, path, "")


def _add_callable(draft: ResponsesDraft, tool: JSON, path: str, namespace: str) -> None:
    flat = flat_tool(tool)
    type_ = "custom_tool_call" if tool.get("type") == "custom" else "function_call"
    name = as_text(flat.get("name"), f"{path}.name")
    kept = {k: v for k, v in flat.items() if k not in _ONLY_OPENAIS or "input_schema" in flat}
    kept["name"] = draft.add_name(CalledAs(type_, name, namespace))
    add_openai_tool(draft, kept, path)


def _namespace(draft: ResponsesDraft, tool: JSON, path: str) -> None:
    namespace = as_text(tool.get("name"), f"{path}.name")
    for number, inner in enumerate(as_list(tool.get("tools"), f"{path}.tools")):
        where = f"{path}.tools.{number}"
        _add_callable(draft, as_object(inner, where), where, namespace)


def _tool_search(draft: ResponsesDraft, tool: JSON, path: str) -> None:
    """A search for tools that the client runs itself; what it finds comes as an item."""
    if tool.get("execution") != "client":
        draft.ignore("tools.tool_search")
        return
    name = draft.add_name(CalledAs("tool_search_call", "tool_search"))
    draft.add_tool(function_tool(draft, {**tool, "name": name}, path))


def _web_search(draft: ResponsesDraft, tool: JSON, path: str) -> None:
    """Codex says by default that no live pages are to be read: then there is nothing to search."""
    if tool.get("external_web_access") is False:
        draft.ignore("tools.web_search")
    else:
        web_search(draft, tool, path)


RESPONSES_TOOLS: Dict[str, ToolReader] = {
    "function": _callable_tool,
    "custom": _callable_tool,
    "namespace": _namespace,
    "tool_search": _tool_search,
    "web_search": _web_search,
}


def _tool_choice(draft: ResponsesDraft, value: Any, path: str) -> None:
    choice = value if isinstance(value, str) else _named_choice(draft, as_object(value, path), path)
    tool_choice(draft, choice, path)


def _named_choice(draft: ResponsesDraft, choice: JSON, path: str) -> JSON:
    """A choice with the names that upstream knows; those among allowed ones, too."""
    type_ = _type(choice)
    if type_ == "allowed_tools":
        tools = as_list(choice.get("tools"), f"{path}.tools")
        inner = [_named_choice(draft, as_object(tool, f"{path}.tools"), path) for tool in tools]
        return {**choice, "tools": inner}
    if type_.startswith("web_search"):
        return {"type": "tool", "name": "web_search"}
    if type_ not in ("function", "custom", "tool", "auto", "any", "none"):
        raise RequestError(f"Claude has no tool of type {type_[:60]!r}", param=f"{path}.type")
    flat = flat_tool(choice)
    key = (str(flat.get("namespace") or ""), str(flat.get("name")))
    return {**flat, "name": draft.upstream_names.get(key, flat.get("name"))}


# --- input items

ItemReader = Callable[[ResponsesDraft, JSON, str], None]


def _items(draft: ResponsesDraft, value: Any, path: str) -> None:
    given = [{"role": "user", "content": value}] if isinstance(value, str) else value
    for number, item in enumerate(as_list(given, path)):
        where = f"{path}.{number}"
        whole = _dereferenced(draft, as_object(item, where), where)
        draft.items.extend([_full_message(whole)] if whole else [])
    # One in the history was answered: else whoever goes on from there gets nothing but summaries.
    draft.compacts = any(_item_type(item) == "compaction_trigger" for item in draft.items)
    items = [*draft.history, *draft.items]
    for number, item in enumerate(items):
        if _item_type(item) in ("additional_tools", "tool_search_output"):
            _response_tools(draft, item.get("tools") or [], f"{path}.{number}.tools")
    for number, item in enumerate(items):
        read = INPUT_ITEMS.get(_item_type(item))
        if read:
            read(draft, item, f"{path}.{number}")
        else:
            draft.ignore(f"{path}.{_item_type(item)}")


def _item_type(item: JSON) -> str:
    """The type of an item; messages, and references to items, may come without."""
    type_ = item.get("type") or ("message" if "role" in item else "item_reference")
    return str(type_)[:60]


def _dereferenced(draft: ResponsesDraft, item: JSON, path: str) -> Optional[JSON]:
    """The item that a reference means; reasoning that was forgotten is a loss, but no fault."""
    if _item_type(item) != "item_reference":
        return item
    id = as_text(item.get("id"), f"{path}.id")
    found = draft.known.item(id)
    if found is None and not id.startswith("rs_"):
        raise NotStoredError(f"Item with id '{id[:100]}' not found.", param="input")
    if found is None:
        draft.ignore("input.item_reference")
    return found


def _full_message(item: JSON) -> JSON:
    """A message in the long form, which it has when it is listed; other items as they are."""
    if _item_type(item) != "message":
        return item
    full = {"type": "message", "status": "completed", **item}
    if isinstance(item.get("content"), str):
        type_ = "output_text" if item.get("role") == "assistant" else "input_text"
        full["content"] = [{"type": type_, "text": item["content"]}]
    return full


def _message(draft: ResponsesDraft, item: JSON, path: str) -> None:
    role = item.get("role")
    read = _ROLES.get(role) if isinstance(role, str) else None
    if read is None:
        known = ", ".join(_ROLES)
        raise RequestError(f"unknown role; expected one of {known}", param=f"{path}.role")
    read(draft, item, path)


def _assistant(draft: Draft, item: JSON, path: str) -> None:
    draft.turns.append(("assistant", content_blocks(draft, item.get("content"), f"{path}.content")))


_ROLES: Dict[str, Callable[[Draft, JSON, str], None]] = {
    "user": user_message,
    "assistant": _assistant,
    "system": system_message,
    "developer": system_message,
}


def _reasoning_item(draft: ResponsesDraft, item: JSON, path: str) -> None:
    envelope = item.get("encrypted_content")
    blocks = unsealed(envelope, draft.known.key).get("thinking")
    if blocks:
        draft.turns.append(("assistant", blocks))
    elif envelope:
        draft.ignore("input.reasoning.encrypted_content")


def _call_item(draft: ResponsesDraft, item: JSON, path: str) -> None:
    custom = item.get("type") == "custom_tool_call"
    given = {"input": item.get("input")} if custom else item.get("arguments")
    name, namespace = as_text(item.get("name"), f"{path}.name"), str(item.get("namespace") or "")
    block = {
        "type": "tool_use",
        "id": safe_name(as_text(item.get("call_id"), f"{path}.call_id") or "call"),
        "name": draft.upstream_names.get((namespace, name), safe_name(_flat_name(name, namespace))),
        "input": tool_input(given),
    }
    draft.turns.append(("assistant", [block]))


def _output_item(draft: ResponsesDraft, item: JSON, path: str) -> None:
    id = as_text(item.get("call_id"), f"{path}.call_id")
    output = item.get("output")
    if item.get("type") == "tool_search_output":
        output = dumps(item.get("tools") or []).decode("ascii")
    draft.turns.append(("user", [tool_result(draft, id, output, f"{path}.output")]))


def _search_item(draft: ResponsesDraft, item: JSON, path: str) -> None:
    """A search for tools by the client, or its result; OpenAI's own searches have no call id."""
    if item.get("call_id") is None:
        draft.ignore(f"input.{item['type']}")
    elif item["type"] == "tool_search_call":
        _call_item(draft, {**item, "name": "tool_search"}, path)
    else:
        _output_item(draft, item, path)


def _compaction_item(draft: ResponsesDraft, item: JSON, path: str) -> None:
    summary = unsealed(item.get("encrypted_content"), draft.known.key).get("summary")
    if not summary:
        draft.ignore("input.compaction")
        return
    text = f"<conversation-summary>\n{summary}\n</conversation-summary>"
    draft.turns.append(("user", text_block(text)))


def _configuration_update(draft: ResponsesDraft, item: JSON, path: str) -> None:
    for field, read in (("reasoning", _reasoning_field), ("text", _text_field)):
        if item.get(field) is not None:
            read(draft, item[field], f"{path}.{field}")


def _read_before(draft: ResponsesDraft, item: JSON, path: str) -> None:
    """What this item says was taken in before all items were read."""


INPUT_ITEMS: Dict[str, ItemReader] = {
    "message": _message,
    "reasoning": _reasoning_item,
    "function_call": _call_item,
    "custom_tool_call": _call_item,
    "tool_search_call": _search_item,
    "function_call_output": _output_item,
    "custom_tool_call_output": _output_item,
    "tool_search_output": _search_item,
    "additional_tools": _read_before,
    "compaction": _compaction_item,
    "compaction_trigger": _read_before,
    "configuration_update": _configuration_update,
}


def _with_recalled_thinking(
    turns: Iterable[Tuple[str, List[JSON]]], recall: Callable[[str], List[JSON]]
) -> Iterator[Tuple[str, List[JSON]]]:
    """Put remembered thinking before calls that came without; no turn may end in thinking."""
    for role, group in itertools.groupby(turns, key=lambda turn: turn[0]):
        blocks = [block for _, part in group for block in part]
        if role == "assistant":
            calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
            remembered = () if thinking_of(blocks) else map(recall, calls)
            blocks = [*next(filter(None, remembered), []), *blocks]
            drop_last_thinking(blocks)
        yield role, blocks


# --- the other fields


def _previous_response(draft: ResponsesDraft, value: Any, path: str) -> None:
    history = draft.known.history(as_text(value, path))
    if history is None:
        message = f"Previous response with id '{value[:100]}' not found."
        raise PreviousResponseError(message, param=path)
    draft.history = history


def _reasoning_field(draft: ResponsesDraft, value: Any, path: str) -> None:
    reasoning = as_object(value, path)
    summary = reasoning.get("summary") or reasoning.get("generate_summary")
    summary = summary if summary != "none" else None
    if summary or reasoning.get("effort") is not None:
        display = "summarized" if summary else "omitted"
        draft.request["thinking"] = {"type": "adaptive", "display": display}
    if reasoning.get("effort") is not None:
        reasoning_effort(draft, reasoning["effort"], f"{path}.effort")
    for name, usual in (("context", ("auto", "all_turns")), ("mode", ("standard",))):
        if reasoning.get(name) not in (None, *usual):
            draft.ignore(f"{path}.{name}")


def _text_field(draft: ResponsesDraft, value: Any, path: str) -> None:
    text = as_object(value, path)
    if text.get("format") is not None and not draft.compacts:  # a summary has none
        output_format(draft, text["format"], f"{path}.format")
    if text.get("verbosity") not in (None, "medium"):
        draft.ignore(f"{path}.verbosity")


_INCLUDED = ("reasoning.encrypted_content", "web_search_call.action.sources")


def _include(draft: ResponsesDraft, value: Any, path: str) -> None:
    for name in as_list(value, path):
        if name not in _INCLUDED:
            draft.ignore(f"{path}.{name}")


def _truncation(draft: ResponsesDraft, value: Any, path: str) -> None:
    if value != "disabled":
        draft.ignore(path)


def _store(draft: ResponsesDraft, value: Any, path: str) -> None:
    draft.store = as_boolean(value, path)


def _repeated(draft: ResponsesDraft, value: Any, path: str) -> None:
    """The answer says it again."""


# Field -> what becomes of it, and how; in the order in which they are read.
RESPONSES_REQUEST: Dict[str, Tuple[str, Callable[[ResponsesDraft, Any, str], None]]] = {
    "instructions": ("the first block of `system`", instructions),
    "tools": ("`tools`; calls come back by type, name and namespace", _response_tools),
    "previous_response_id": ("the conversation so far, from --responses-store", _previous_response),
    "input": ("`system` and `messages`; tools among the items are `tools`", _items),
    "reasoning": ("`output_config.effort` and `thinking`", _reasoning_field),
    "text": ("`output_config.format`; json_object as an instruction", _text_field),
    "include": ("signed thinking and sources are always there", _include),
    "store": ("whether the answer can be named later", _store),
    "metadata": ("told again in the answer", _repeated),
    "stream_options": ("no obfuscation is ever sent", _repeated),
    "truncation": ("only `disabled`: nothing said is left out", _truncation),
    **SHARED_FIELDS,
    "tool_choice": (SHARED_FIELDS["tool_choice"][0], _tool_choice),
}

# Field -> why it has no effect; named in x-claude-shim-ignored as those of Chat Completions are.
RESPONSES_IGNORED: Dict[str, str] = {
    "access_programs": "Claude has no such setting",
    "client_metadata": "nobody reads it",
    "context_management": "compaction is up to the client",
    "image": "Claude has no such setting",
    "max_tool_calls": "Claude has no such setting",
    "moderation": "Claude has its own safeguards",
    "prompt_cache_key": "Anthropic's cache needs no key",
    "prompt_cache_retention": "see --prompt-cache",
    "service_tier": "the account decides",
    "top_logprobs": "Claude does not tell probabilities",
}

# Field -> why a request that uses it is a 400, and whether a value uses it.
RESPONSES_REJECTED: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    "background": ("claude_shim does not work in the background; stream instead", bool),
    "conversation": ("use previous_response_id instead", lambda value: value is not None),
    "prompt": ("claude_shim stores no prompts; send the text", lambda value: value is not None),
}

# The members of a response in OpenAI's order, with what they say if nothing else is known. Those
# that are fields of the request, too, repeat it.
_RESPONSE: JSON = {
    "id": "",
    "object": "response",
    "created_at": 0,
    "status": "in_progress",
    "background": False,
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "model": "",
    "output": [],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1,
    "truncation": "disabled",
    "usage": None,
    "user": None,
    "metadata": {},
}
_REPEATED = _RESPONSE.keys() & {*RESPONSES_REQUEST, *RESPONSES_IGNORED} - {"service_tier"}

SUMMARISE = (
    "Write a summary of this conversation that replaces it: whoever goes on with the work sees "
    "nothing else. Say what the user wants and decided, what was done and found, which files, "
    "commands, names and numbers matter, and what is still to do. Answer with the summary only."
)


def messages_request_from_responses(
    body: JSON,
    model: str,
    known: Known = Known(),  # noqa: B008 - immutable
) -> ResponsesDraft:
    """Return the draft of the Messages request that a Responses request stands for.

    `known` gives what the request only names. `draft.finished()` is the request; the model's own
    rules are not applied yet. RequestError names the field.
    """
    draft = ResponsesDraft(model, known)
    if body.get("input") is None and body.get("previous_response_id") is None:
        raise RequestError("you must give input", param="input")
    if body.get("input") is None:
        body = {**body, "input": []}
    read_fields(draft, body, RESPONSES_REQUEST, RESPONSES_REJECTED)
    draft.turns = list(_with_recalled_thinking(draft.turns, draft.recall))
    text = {**_RESPONSE["text"], **object_or_empty(body.get("text"))}
    given = {name: body[name] for name in _REPEATED if body.get(name) is not None}
    draft.echo = {**_RESPONSE, **given, "text": text}
    # Codex, which alone sends this field, drops a message with a refusal as a whole.
    draft.plain_refusal = "client_metadata" in body
    if not any(blocks for _, blocks in draft.turns):
        raise RequestError("expected at least one message with content", param="input")
    if draft.compacts:
        draft.turns.append(("user", text_block(SUMMARISE)))
        draft.require_tools({"type": "none"})
    elif draft.json_schema and draft.request.get("tool_choice", {}).get("type") in ("any", "tool"):
        # instructor sends the same schema as text format and as forced tool: the call must win.
        config = draft.request.pop("output_config")
        kept = {name: value for name, value in config.items() if name != "format"}
        draft.request.update({"output_config": kept} if kept else {})
        draft.ignore("text.format")
    return draft


# --- answers


class ResponsesReply(NamedTuple):
    """What the answer to one Responses request must look like."""

    id: str = "resp_"
    created: int = 0  # Unix seconds
    model: str = ""
    key: bytes = b""  # of the envelopes
    echo: JSON = _RESPONSE
    called_as: Dict[str, CalledAs] = {}
    json_object: bool = False
    compacts: bool = False
    plain_refusal: bool = False
    clock: Callable[[], int] = lambda: 0  # Unix seconds, when the answer is complete

    @classmethod
    def to(cls, draft: ResponsesDraft, id: str, clock: Callable[[], int]) -> ResponsesReply:
        """Return the reply that `draft` asks for."""
        return cls(
            id,
            clock(),
            str(draft.request["model"]),
            draft.known.key,
            draft.echo,
            draft.called_as,
            draft.json_object,
            draft.compacts,
            draft.plain_refusal,
            clock,
        )


def responses_usage(usage: JSON) -> JSON:
    """Return the usage of a response; input_tokens hold what the cache gave and took."""
    total, output = input_token_total(usage), token_count(usage, "output_tokens")
    return {
        "input_tokens": total,
        "input_tokens_details": {
            "cached_tokens": token_count(usage, "cache_read_input_tokens"),
            "cache_write_tokens": token_count(usage, "cache_creation_input_tokens"),
        },
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": thinking_token_count(usage)},
        "total_tokens": total + output,
    }


def _response(reply: ResponsesReply, status: str, output: List[JSON], **fields: Any) -> JSON:
    known = {"id": reply.id, "created_at": reply.created, "status": status, "model": reply.model}
    return {**reply.echo, **known, "output": output, **fields}


# Stop reasons that leave the answer incomplete. A refusal does not: Codex repeats a whole turn
# that is incomplete for it, five times.
INCOMPLETE = {
    "max_tokens": "max_output_tokens",
    "model_context_window_exceeded": "max_output_tokens",
}


def _last_status(message: JSON) -> str:
    """The status of a message's last item: only that can have been cut off."""
    return "incomplete" if str(message.get("stop_reason")) in INCOMPLETE else "completed"


def _finished(reply: ResponsesReply, message: JSON, output: List[JSON]) -> JSON:
    reason = INCOMPLETE.get(str(message.get("stop_reason")))
    fields: JSON = {"model": message.get("model") or reply.model}
    fields["usage"] = responses_usage(object_or_empty(message.get("usage")))
    if reason:
        return _response(
            reply, "incomplete", output, incomplete_details={"reason": reason}, **fields
        )
    return _response(reply, "completed", output, completed_at=reply.clock(), **fields)


def response_from_message(message: JSON, reply: ResponsesReply) -> JSON:
    """Return the response made of one whole message; UpstreamCutError for no summary at all."""
    items: List[OutputItem] = []
    for block in [*message["content"], *_refusal(message, reply)]:
        if items and items[-1].takes(block):
            items[-1].blocks.append(block)
        else:
            kind = _item_kind(block, reply)
            items.extend([kind(len(items), block, reply)] if kind else [])
    statuses = [*("completed" for _ in items[1:]), _last_status(message)]
    output = [item.whole(status) for item, status in zip(items, statuses)]
    return _finished(reply, message, _with_summary(output, reply))


def compaction_request(body: JSON) -> JSON:
    """Return the Responses request that a body of /v1/responses/compact stands for."""
    given = body.get("input")
    text = [{"role": "user", "content": given}] if isinstance(given, str) else None
    items = text or ([] if given is None else as_list(given, "input"))
    return {**body, "store": False, "input": [*items, {"type": "compaction_trigger"}]}


def compacted(response: JSON, draft: ResponsesDraft) -> JSON:
    """Return the answer of /v1/responses/compact: what the user said, and the summary."""
    items = [*draft.history, *draft.items]
    said = [item for item in items if _item_type(item) == "message" and item.get("role") == "user"]
    kept = {name: response[name] for name in ("id", "created_at", "usage")}
    output = [*with_ids(said, response["id"]), *response["output"]]
    return {**kept, "object": "response.compaction", "output": output}


def with_ids(items: Iterable[JSON], response_id: str) -> List[JSON]:
    """Return the items of a request, each with an id: clients may send them without."""
    return [{"id": f"item_{n}_{response_id}", **item} for n, item in enumerate(items)]


def _refusal(message: JSON, reply: ResponsesReply) -> List[JSON]:
    """A refusal as a block: it becomes a part of a message, or else a message of its own."""
    if message.get("stop_reason") != "refusal":
        return []
    field, type_ = ("text", "refusal_text") if reply.plain_refusal else ("refusal", "refusal")
    return [{"type": type_, field: refusal_text(message)}]


def _with_summary(output: List[JSON], reply: ResponsesReply) -> List[JSON]:
    if reply.compacts and not output:
        raise UpstreamCutError("upstream wrote no summary of the conversation")
    return output


Events = Iterator[Tuple[str, JSON]]  # types and members, without what all events of an item have


class OutputItem:
    """One item of an answer: whole, and as the events that open, fill and close it."""

    prefix = ""
    told = ""  # what the deltas of its blocks brought, of those that are whole

    def __init__(self, index: int, block: JSON, reply: ResponsesReply) -> None:
        self.index = index
        self.id = f"{self.prefix}_{reply.id.partition('_')[2]}_{index}"
        self.blocks = [block]
        self.reply = reply

    def takes(self, block: JSON) -> bool:
        """Return whether a block that follows belongs to this item."""
        return False

    def whole(self, status: str) -> JSON:
        """Return the item; `in_progress` as it begins, `completed` or `incomplete`."""
        raise NotImplementedError

    def opening(self, block: JSON) -> Events:
        """Yield the events of a block that begins, the first or one that it takes."""
        return iter(())

    def before_deltas(self) -> Events:
        """Yield the events that go before the first delta of a block."""
        return iter(())

    def delta(self, piece: str) -> Events:
        """Yield the events of a piece of text, or of a call's arguments."""
        return iter(())

    def closing(self) -> Events:
        """Yield the events of the end, when all blocks are whole."""
        return iter(())


class MessageItem(OutputItem):
    """Text blocks in a row are one part of one message; a refusal is a part after it."""

    prefix = "msg"

    def __init__(self, index: int, block: JSON, reply: ResponsesReply) -> None:
        super().__init__(index, block, reply)
        self._unfenced = Unfenced() if reply.json_object else None

    def takes(self, block: JSON) -> bool:
        return block.get("type") in ("text", "refusal")

    def whole(self, status: str) -> JSON:
        content = [] if status == "in_progress" else self._parts()
        message = {"id": self.id, "type": "message", "status": status, "content": content}
        return {**message, "role": "assistant"}

    def _parts(self) -> List[JSON]:
        texts = [block for block in self.blocks if block["type"] != "refusal"]
        refusals = [block for block in self.blocks if block["type"] == "refusal"]
        return [*([_text_part_of(texts, self.reply)] if texts else []), *refusals]

    def opening(self, block: JSON) -> Events:
        if block["type"] == "refusal":
            yield from self._text_closing()
            place = {"content_index": len(self._parts()) - 1}
            yield "response.content_part.added", {**place, "part": {**block, "refusal": ""}}
            yield "response.refusal.delta", {**place, "delta": block["refusal"]}
            yield "response.refusal.done", {**place, "refusal": block["refusal"]}
            yield "response.content_part.done", {**place, "part": block}
        elif block is self.blocks[0]:
            part = _text_part_of([], self.reply)
            yield "response.content_part.added", {"content_index": 0, "part": part}

    def delta(self, piece: str) -> Events:
        text = self._unfenced.feed(piece) if self._unfenced else piece
        if text:
            yield (
                "response.output_text.delta",
                {"content_index": 0, "delta": text, "logprobs": []},
            )

    def closing(self) -> Events:
        return iter(()) if self.blocks[-1]["type"] == "refusal" else self._text_closing()

    def _text_closing(self) -> Events:
        part = self._parts()[0]
        if part["type"] == "refusal":
            return
        rest = self._unfenced.end() if self._unfenced else ""
        if rest:
            yield (
                "response.output_text.delta",
                {"content_index": 0, "delta": rest, "logprobs": []},
            )
        for number, found in enumerate(part["annotations"]):
            place = {"content_index": 0, "annotation_index": number}
            yield "response.output_text.annotation.added", {**place, "annotation": found}
        done = {"content_index": 0, "text": part["text"], "logprobs": []}
        yield "response.output_text.done", done
        yield "response.content_part.done", {"content_index": 0, "part": part}


def _text_part_of(blocks: List[JSON], reply: ResponsesReply) -> JSON:
    text = "".join(str(block.get("text", "")) for block in blocks)
    if reply.json_object:
        text = "".join(Unfenced().whole(text))
    found = [{"type": "url_citation", **place} for place in url_citations(blocks)]
    return {"type": "output_text", "annotations": found, "logprobs": [], "text": text}


class ReasoningItem(OutputItem):
    """A thinking block: its text as a summary, and itself, signed, in an envelope."""

    prefix = "rs"

    def whole(self, status: str) -> JSON:
        block = self.blocks[0]
        text = block.get("thinking") if status != "in_progress" else ""
        summary = [{"type": "summary_text", "text": text}] if text else []
        item: JSON = {"id": self.id, "type": "reasoning", "summary": summary}
        if status != "in_progress" and (block.get("signature") or block.get("data")):
            item["encrypted_content"] = sealed({"thinking": [block]}, self.reply.key)
        return item

    def before_deltas(self) -> Events:
        part = {"type": "summary_text", "text": ""}
        yield "response.reasoning_summary_part.added", {"summary_index": 0, "part": part}

    def delta(self, piece: str) -> Events:
        yield "response.reasoning_summary_text.delta", {"summary_index": 0, "delta": piece}

    def closing(self) -> Events:
        if self.told:
            place = {"summary_index": 0}
            part = {"type": "summary_text", "text": self.told}
            yield "response.reasoning_summary_text.done", {**place, "text": self.told}
            yield "response.reasoning_summary_part.done", {**place, "part": part}


class FunctionCallItem(OutputItem):
    """A call of a function; its arguments are streamed as they come."""

    prefix = "fc"

    def whole(self, status: str) -> JSON:
        return self._call(status, arguments="" if status == "in_progress" else self._arguments())

    def _call(self, status: str, **fields: Any) -> JSON:
        called = called_as(self.blocks[0], self.reply)
        named = {"namespace": called.namespace} if called.namespace else {}
        item = {"id": self.id, "type": called.type, "status": status, **fields}
        return {**item, "call_id": self.blocks[0].get("id"), "name": called.name, **named}

    def _arguments(self) -> str:
        block = self.blocks[0]
        whole = dumps(object_or_empty(block.get("input"))).decode("ascii")
        return self.told if self.told.strip() else str(block.get("partial_json") or whole)

    def delta(self, piece: str) -> Events:
        yield "response.function_call_arguments.delta", {"delta": piece}

    def closing(self) -> Events:
        whole = self._arguments()
        if not self.told.strip():
            yield "response.function_call_arguments.delta", {"delta": whole}
        yield "response.function_call_arguments.done", {"arguments": whole}


class CustomCallItem(FunctionCallItem):
    """A call of a tool of free text, which is told when it is whole."""

    prefix = "ctc"

    def whole(self, status: str) -> JSON:
        text = "" if status == "in_progress" else custom_input(self.blocks[0])
        return self._call(status, input=text)

    def delta(self, piece: str) -> Events:
        return iter(())

    def closing(self) -> Events:
        text = custom_input(self.blocks[0])
        if text:
            yield "response.custom_tool_call_input.delta", {"delta": text}
        yield "response.custom_tool_call_input.done", {"input": text}


class ToolSearchItem(OutputItem):
    """A search for tools, which the client runs."""

    prefix = "tsc"

    def whole(self, status: str) -> JSON:
        block = self.blocks[0]
        item = {"id": self.id, "type": "tool_search_call", "status": status, "execution": "client"}
        given = {} if status == "in_progress" else object_or_empty(block.get("input"))
        return {**item, "call_id": block.get("id"), "arguments": given}


class WebSearchItem(OutputItem):
    """A search of the web that upstream runs, with its result."""

    prefix = "ws"

    def takes(self, block: JSON) -> bool:
        answers = block.get("tool_use_id") == self.blocks[0].get("id")
        return block.get("type") == "web_search_tool_result" and answers

    def whole(self, status: str) -> JSON:
        query = str(object_or_empty(self.blocks[0].get("input")).get("query") or "")
        found = self.blocks[-1].get("content") if len(self.blocks) > 1 else []
        pages = found if isinstance(found, list) else []
        urls = [str(page.get("url")) for page in pages if isinstance(page, dict)]
        sources = [{"type": "url", "url": url} for url in urls]
        if status == "completed" and found is not pages:
            status = "failed"
        action = {"type": "search", "query": query, "queries": [query], "sources": sources}
        return {"id": self.id, "type": "web_search_call", "status": status, "action": action}

    def opening(self, block: JSON) -> Events:
        if block is self.blocks[0]:
            yield "response.web_search_call.in_progress", {}
            yield "response.web_search_call.searching", {}

    def closing(self) -> Events:
        yield "response.web_search_call.completed", {}


class CompactionItem(OutputItem):
    """The summary of a conversation, in an envelope."""

    prefix = "cmp"

    def takes(self, block: JSON) -> bool:
        return block.get("type") == "text"

    def whole(self, status: str) -> JSON:
        text = "".join(str(block.get("text", "")) for block in self.blocks)
        content = "" if status == "in_progress" else sealed({"summary": text}, self.reply.key)
        return {"id": self.id, "type": "compaction", "encrypted_content": content}


CALL_ITEMS: Dict[str, Type[OutputItem]] = {
    "function_call": FunctionCallItem,
    "custom_tool_call": CustomCallItem,
    "tool_search_call": ToolSearchItem,
}
BLOCK_ITEMS: Dict[str, Type[OutputItem]] = {
    "text": MessageItem,
    "refusal": MessageItem,
    "refusal_text": MessageItem,
    "thinking": ReasoningItem,
    "redacted_thinking": ReasoningItem,
}


def called_as(block: JSON, reply: ResponsesReply) -> CalledAs:
    """Return how the client knows the tool that a block calls."""
    name = str(block.get("name"))
    return reply.called_as.get(name, CalledAs("function_call", name))


def _item_kind(block: JSON, reply: ResponsesReply) -> Optional[Type[OutputItem]]:
    """The kind of item that a block begins; None if the client does not get to see it."""
    type_ = str(block.get("type"))
    if reply.compacts:
        return CompactionItem if type_ == "text" else None
    if is_client_tool_use(block):
        return CALL_ITEMS[called_as(block, reply).type]
    if type_ == "server_tool_use" and block.get("name") == "web_search":
        return WebSearchItem
    return BLOCK_ITEMS.get(type_)


# --- streams


class ResponsesStreamEncoder(EventSink):
    """Messages events -> the events of a streamed response.

    An item is closed when the next one begins, or with the message: whether its end was cut off
    is known only then. `remember` is told, at the end, the message and the response.
    """

    def __init__(
        self,
        reply: ResponsesReply,
        remember: Callable[[JSON, JSON], None] = lambda message, response: None,
    ) -> None:
        self._reply = reply
        self._remember = remember
        self._message = MessageAssembler()
        self._output: List[JSON] = []  # the items that are closed
        self._open: Optional[OutputItem] = None
        self._filled: Optional[OutputItem] = None  # the open one, if the open block belongs to it
        self._number = 0  # of the next event
        self._around = b""  # the text of a delta of the open block

    @property
    def heartbeat(self) -> bytes:
        """An event once the stream has begun: Codex counts no comments as signs of life."""
        if self._message.message is None:
            return COMMENT
        return _response_event("keepalive", {"sequence_number": self._number})

    def feed_texts(self, texts: List[bytes]) -> bytes:
        """Return the events of a run of deltas: JSON text is spliced as it stands."""
        before = self._before_first()
        self._message.feed_texts(texts)
        numbered = itertools.chain.from_iterable(enumerate(texts, self._number))
        self._number += len(texts)
        return before + (self._around * len(texts)) % tuple(numbered)

    def fail(self, error: ShimError) -> bytes:
        """Return the two events that tell of a failure; nothing follows them."""
        status, body = openai_error(error)
        detail = body["error"]
        # Codex does not repeat a request that was refused with this code.
        code = detail["code"] or ("invalid_prompt" if status == 400 else "server_error")
        told = {"code": code, "message": detail["message"]}
        failed = _response(self._reply, "failed", self._output, error=told)
        events = [("error", {"error": {**detail, "code": code}})]
        return self._told([*events, ("response.failed", {"response": failed})])

    # Events

    def _told(self, events: Iterable[Tuple[str, JSON]]) -> bytes:
        made: List[bytes] = []
        for type_, fields in events:
            made.append(_response_event(type_, {"sequence_number": self._number, **fields}))
            self._number += 1
        return b"".join(made)

    def _of(self, item: OutputItem, events: Events) -> Events:
        place = {"item_id": item.id, "output_index": item.index}
        return ((type_, {**place, **fields}) for type_, fields in events)

    def _on_message_start(self, event: JSON) -> bytes:
        self._message.feed(event)
        message, self.takes = self._message.message or {}, b""
        self._reply = self._reply._replace(model=message.get("model") or self._reply.model)
        begun = {"response": _response(self._reply, "in_progress", [])}
        return self._told([("response.created", begun), ("response.in_progress", begun)])

    def _on_content_block_start(self, event: JSON) -> bytes:
        if self._message.message is None:
            return b""
        self._end_block()
        self._message.feed(event)
        return self._begun(self._message.message["content"][-1])

    def _begun(self, block: JSON) -> bytes:
        closed, item, self.takes = b"", self._open, b""
        if item and item.takes(block):
            item.blocks.append(block)
        else:
            kind = _item_kind(block, self._reply)
            if kind is None:
                return b""
            closed = self._closed("completed")
            item = kind(len(self._output), block, self._reply)
            added = {"output_index": item.index, "item": item.whole("in_progress")}
            closed += self._told([("response.output_item.added", added)])
        self._open = self._filled = item
        opened = self._told(self._of(item, item.opening(block)))
        self._around = self._prepared(item)
        self.takes = self._message.takes if self._around else b""
        return closed + opened + self._piece(block.get("text"))

    def _prepared(self, item: OutputItem) -> bytes:
        """The event of a delta, with gaps for its number and its text."""
        looked_at = self._reply.json_object and self._message.takes == b"text_delta"
        events = () if looked_at else self._of(item, item.delta("\x00"))
        for type_, fields in events:
            event = _response_event(type_, {"sequence_number": -1, **fields}).replace(b"%", b"%%")
            return event.replace(b":-1,", b":%d,").replace(b"\\u0000", b"%b")
        return b""

    def _piece(self, piece: Any) -> bytes:
        if self._filled is None or not isinstance(piece, str) or not piece:
            return b""
        before = self._before_first()
        return before + self._told(self._of(self._filled, self._filled.delta(piece)))

    def _before_first(self) -> bytes:
        """The events before the first delta of the open block."""
        item = self._filled
        if item is None or self._message.begun:
            return b""
        return self._told(self._of(item, item.before_deltas()))

    def _on_content_block_delta(self, event: JSON) -> bytes:
        made = self._piece(delta_text(object_or_empty(event.get("delta"))))
        return made + self._message.feed(event)

    def _on_content_block_stop(self, event: JSON) -> bytes:
        self._end_block()
        return self._message.feed(event)

    def _end_block(self) -> None:
        if self._filled:
            self._filled.told += self._message.open_text
        self._filled, self.takes = None, b""

    def _on_message_delta(self, event: JSON) -> bytes:
        return self._message.feed(event)

    def _closed(self, status: str) -> bytes:
        self._end_block()
        item, self._open = self._open, None
        if item is None:
            return b""
        closing = self._told(self._of(item, item.closing()))
        self._output.append(item.whole(status))
        done = {"output_index": item.index, "item": self._output[-1]}
        return closing + self._told([("response.output_item.done", done)])

    def _on_message_stop(self, event: JSON) -> bytes:
        message = self._message.message
        if message is None:
            raise UpstreamCutError("upstream ended an answer that had not begun")
        refused = b"".join(self._begun(block) for block in _refusal(message, self._reply))
        closed = self._closed(_last_status(message))
        response = _finished(self._reply, message, _with_summary(self._output, self._reply))
        self.complete = True
        self._remember(message, response)
        last = self._told([(f"response.{response['status']}", {"response": response})])
        return refused + closed + last


def _response_event(type_: str, fields: JSON) -> bytes:
    return server_sent_event(dumps({"type": type_, **fields}), type_)


# ----------------------------------------------------------------------
# 8. Credentials                                             uses: 0 1 2
# ----------------------------------------------------------------------
# Who pays. A credential gives the headers of one upstream request, and newer ones when those were
# refused. HTTP comes in as a function; secrets are never in a repr, a log line or an error.


class Kind(NamedTuple):
    """One way of proving to upstream who pays."""

    name: str  # in a sentence
    given: str  # how its user gives it
    payer: str
    claude_ai: bool = False  # a token of a subscription, which Anthropic reserves for its own apps


_CONSOLE = "billed to its Claude Console organisation"
_SUBSCRIPTION = "drawn from its Claude subscription or billed as extra usage"

# What --auth takes, in the order in which `auto` looks (D7).
KINDS: Dict[str, Kind] = {
    "oauth-bundle": Kind("OAuth login", "`claude_shim login`, or `--bundle`", _SUBSCRIPTION, True),
    "setup-token": Kind(
        "setup token", "`CLAUDE_CODE_OAUTH_TOKEN`, `--setup-token-file`", _SUBSCRIPTION, True
    ),
    "api-key": Kind("API key", "`ANTHROPIC_API_KEY`, `--api-key-file`", _CONSOLE),
    "auth-token": Kind(
        "bearer token", "`ANTHROPIC_AUTH_TOKEN`", "billed to whoever the token is of"
    ),
    "helper": Kind("key", "`--key-helper COMMAND`", "billed to whoever the key is of"),
    "federation": Kind("workload identity", "`ANTHROPIC_FEDERATION_RULE_ID` and its kin", _CONSOLE),
    "profile": Kind("profile", "`ant auth login`, `ANTHROPIC_PROFILE`", _CONSOLE),
    "claude-code": Kind("login of Claude Code", "`claude`, then `/login`", _SUBSCRIPTION, True),
    "passthrough": Kind(
        "each client's own key", "`--auth passthrough` and nothing else", "billed to each client"
    ),
    "none": Kind("none", "`--upstream echo`", "nothing is billed"),
}


class Description(NamedTuple):
    """What a credential is, without secrets; as text a sentence."""

    kind: str  # a key of KINDS
    source: str = ""  # where it is from
    expires_at: Optional[float] = None  # seconds since 1970; None: not known, or never
    renews: bool = False  # by itself

    @property
    def payer(self) -> str:
        """Who pays, in words."""
        return KINDS[self.kind].payer

    def __str__(self) -> str:
        origin = f" from {self.source}" if self.source else ""
        return f"{KINDS[self.kind].name}{origin}, {self.payer}"


class Credential:
    """What proves to upstream who pays: one header, never two."""

    def authorization(
        self, client: Dict[str, str], rejected: Optional[HeaderList] = None
    ) -> HeaderList:
        """Return the header fields for a request whose client sent the headers `client`.

        `rejected` are those that upstream answered with 401; they come back when there are no
        newer ones. A ShimError says what its owner has to do.
        """
        raise NotImplementedError

    def describe(self) -> Description:
        """Return what it is, where it is from and whose bill it is."""
        raise NotImplementedError

    def secrets(self) -> List[str]:
        """Return what must never be shown."""
        return []

    def start(self) -> None:
        """Begin to renew it in time, if that is ever needed."""

    def settle(self) -> None:
        """Save what another one in its place would not know; ConfigError if that fails."""

    def close(self) -> None:
        """Stop renewing it, after the renewal that is under way."""

    def ready(self) -> bool:
        """Return whether `authorization` takes no time."""
        return True


class APIKey(Credential):
    """An API key of the Claude Console, sent as `x-api-key`."""

    kind = "api-key"
    bearer = False

    def __init__(self, key: str, source: str, kind: str = "") -> None:
        self._key = key
        self._description = Description(kind or self.kind, source)

    def authorization(
        self, client: Dict[str, str], rejected: Optional[HeaderList] = None
    ) -> HeaderList:
        return key_headers(self._key, self.bearer)

    def describe(self) -> Description:
        return self._description

    def secrets(self) -> List[str]:
        return [self._key]


class AuthToken(APIKey):
    """A token that is sent as `Authorization: Bearer`, and never renewed."""

    kind = "auth-token"
    bearer = True


class Passthrough(Credential):
    """The client's own credential, handed on as it came."""

    def authorization(
        self, client: Dict[str, str], rejected: Optional[HeaderList] = None
    ) -> HeaderList:
        for name in ("x-api-key", "authorization"):
            if client.get(name):
                return [(name, client[name])]
        if client.get("api-key"):
            return [("x-api-key", client["api-key"])]
        raise AuthenticationError(
            "send your Anthropic API key as x-api-key or Authorization: Bearer"
        )

    def describe(self) -> Description:
        return Description("passthrough")


class NoCredential(Credential):
    """For an upstream that asks for none."""

    def authorization(
        self, client: Dict[str, str], rejected: Optional[HeaderList] = None
    ) -> HeaderList:
        return []

    def describe(self) -> Description:
        return Description("none")


OAUTH_BETA = "oauth-2025-04-20"
FEDERATION_BETA = "oidc-federation-2026-04-01"


def key_headers(key: str, bearer: bool) -> HeaderList:
    """Return the header fields that show a key; OAuth tokens are refused without their beta."""
    oauth = key.startswith("sk-ant-oat")
    if not (bearer or oauth):
        return [("x-api-key", key)]
    beta = [("anthropic-beta", OAUTH_BETA)] if oauth else []
    return [("authorization", f"Bearer {key}"), *beta]


def with_authorization(headers: HeaderList, authorization: HeaderList) -> HeaderList:
    """Return the header fields of a request with those of a credential, which win.

    Only `anthropic-beta` is a list: there the client's come first, none twice.
    """
    shown = dict(authorization)
    if "anthropic-beta" in shown:
        lists = [value for name, value in headers if name == "anthropic-beta"]
        betas = [beta.strip() for beta in ",".join([*lists, shown["anthropic-beta"]]).split(",")]
        shown["anthropic-beta"] = ",".join(dict.fromkeys(filter(None, betas)))
    return [(name, value) for name, value in headers if name not in shown] + list(shown.items())


# A beginning that tells what a key is -> why it is no API key.
_NO_API_KEY = {
    "sk-ant-oat": "is an OAuth token: give it as CLAUDE_CODE_OAUTH_TOKEN or --setup-token-file",
    "sk-ant-ort": "is a refresh token, which is no key: put the whole login into --bundle",
    "sk-ant-admin": "is an admin key, which may not run models: create an API key",
}


def checked_api_key(text: str, source: str) -> str:
    """Return an API key; ConfigError if it is something else."""
    key = checked_secret(text, source)
    for beginning, reason in _NO_API_KEY.items():
        if key.startswith(beginning):
            raise ConfigError(f"the key from {source} {reason}")
    return key


MIN_SETUP_TOKEN = 80


def checked_setup_token(text: str, source: str, allow_odd: bool = False) -> str:
    """Return a setup token; ConfigError if it does not look like one, unless that is allowed."""
    token = checked_secret(text, source)
    if allow_odd or (token.startswith("sk-ant-oat") and len(token) >= MIN_SETUP_TOKEN):
        return token
    short = f"has {len(token)} characters of at least {MIN_SETUP_TOKEN}: is it cut off?"
    reason = short if token.startswith("sk-ant-oat") else "does not begin with sk-ant-oat"
    raise ConfigError(
        f"the setup token from {source} {reason} (--allow-odd-token takes it all the same)"
    )


_HEADER_SAFE = re.compile(r"[\x21-\x7e]+")


def checked_secret(text: str, source: str) -> str:
    """Return a key without surrounding white space; ConfigError if it cannot be a header value."""
    key = text.strip()
    if not _HEADER_SAFE.fullmatch(key):
        reason = "is empty" if not key else "holds white space or characters beyond ASCII"
        raise ConfigError(f"the key from {source} {reason}")
    return key


# --- files that hold secrets

MAX_SECRET_BYTES = 1 << 20


def _own_target(path: str) -> str:
    """The file itself; a symbolic link of the user's own is followed once, another's never."""
    try:
        path = os.path.abspath(os.path.expanduser(path))
        link = os.lstat(path)
    except OSError:
        return path  # whoever opens it tells why
    except ValueError as error:
        raise ConfigError(f"cannot read {path!r}: {error}") from None
    if not stat.S_ISLNK(link.st_mode):
        return path
    if os.name == "posix" and link.st_uid != os.geteuid():
        raise ConfigError(f"{path} is a symbolic link of another user: name the file itself")
    return os.path.join(os.path.dirname(path), os.readlink(path))


def read_secret_file(path: str) -> str:
    """Return the text of a file that only its owner can read.

    ConfigError with what to do if it is another's, open to others, a second link or no file. On
    Windows only the last: there the profile folder guards it.
    """
    target = _own_target(path)
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"))
    try:
        descriptor = os.open(target, functools.reduce(operator.or_, flags, os.O_RDONLY))
        try:
            _check_guarded(path, os.fstat(descriptor))
            return os.read(descriptor, MAX_SECRET_BYTES).decode("utf-8-sig")
        finally:
            os.close(descriptor)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        reason = "a link to a link" if getattr(error, "errno", 0) == errno.ELOOP else reason
        raise ConfigError(f"cannot read {path}: {reason}") from None


def _check_guarded(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is no regular file")
    if os.name != "posix":
        return
    import shlex

    file = shlex.quote(os.path.realpath(os.path.expanduser(path)))
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user: run chown {os.geteuid()} {file}")
    if status.st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others: run chmod 600 {file}")


def write_secret_file(path: str, text: str) -> None:
    """Replace a file at once, or not at all, readable by its owner alone; OSError if it failed.

    After the return it is on the disk. A missing folder is made, for the owner alone. A process
    that is killed meanwhile leaves `path`.new, which `finish_write` puts in place.
    """
    target = _own_target(path)
    folder = os.path.dirname(target)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    temporary = f"{target}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:  # 0600 from its birth
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)  # of the name; the bytes are safe already
        finally:
            os.close(opened)


def finish_write(path: str, check: Callable[[str, str], object]) -> None:
    """Put in place what a killed process wrote but did not come to put there, if it is whole.

    Not over a file that was written or removed since then, by a login or by hand.
    """
    with contextlib.suppress(ConfigError, OSError):
        target = _own_target(path)
        check(read_secret_file(f"{target}.new"), path)
        if os.stat(f"{target}.new").st_mtime_ns >= os.stat(target).st_mtime_ns:
            os.replace(f"{target}.new", target)


# --- tokens

# Of Claude Code 2.1 (no other client id is known to be granted); each can be set by an option.
OAUTH_CLIENT_ID = "9d1c250a-e61b-44d9-88ed-5944d1962f5e"
OAUTH_SCOPE = "user:profile user:inference"
AUTHORIZE_URL = "https://claude.com/cai/oauth/authorize"
MANUAL_REDIRECT_URL = "https://platform.claude.com/oauth/code/callback"
TOKEN_URL = "https://platform.claude.com/v1/oauth/token"
OLD_TOKEN_URL = "https://console.anthropic.com/v1/oauth/token"  # asked when TOKEN_URL is a 404


class Bundle(NamedTuple):
    """A login: what is sent, what renews it, and until when it is good."""

    access_token: str
    refresh_token: str = ""  # empty: cannot be renewed
    expires_at: Optional[float] = None  # seconds since 1970; None: not known

    def __repr__(self) -> str:
        return f"Bundle(expires_at={self.expires_at})"


def parsed_bundle(text: str, source: str) -> Bundle:
    """Return the login that a JSON file holds; ConfigError names what is wrong with `source`."""
    value = _parsed_object(text.encode("utf-8"))
    if "claudeAiOauth" in value:
        raise ConfigError(f"{source} is Claude Code's own file: use --auth claude-code instead")
    access, refresh = value.get("access_token"), value.get("refresh_token") or ""
    if not isinstance(access, str) or not isinstance(refresh, str):
        raise ConfigError(f"{source} is no JSON object with the texts access_token, refresh_token")
    expires_at = parsed_expiry(value.get("expires_at"), source)
    return Bundle(checked_secret(access, source), refresh, expires_at)


def _parsed_object(body: bytes) -> JSON:
    with contextlib.suppress(ValueError):
        return object_or_empty(loads(body))
    return {}


def parsed_expiry(value: Any, source: str) -> Optional[float]:
    """Return the seconds since 1970 that seconds, milliseconds or ISO 8601 stand for, or None."""
    if value is None or value == "":
        return None
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(value, str) and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
            text = re.sub(r"[.,][0-9]+", "", value.strip().upper()).replace("Z", "+00:00")
            moment = datetime.fromisoformat(text)
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = float(value)
            seconds = number / 1000 if number > 1e11 else number  # 1e11 s: the year 5138
            if 0 <= seconds <= 1e11:
                return seconds
    raise ConfigError(f"{source}: expires_at is neither ISO 8601 nor seconds or milliseconds")


class TokenRequest(NamedTuple):
    """A POST to a token endpoint, the fields as a JSON object."""

    url: str
    fields: Dict[str, str]
    headers: HeaderList = []

    def __repr__(self) -> str:
        return f"TokenRequest({self.url})"

    def body(self) -> bytes:
        """Return the fields as JSON."""
        return dumps(self.fields)


class TokenAnswer(NamedTuple):
    """What a token endpoint answered, read to the end."""

    status: int
    headers: HeaderList  # names in lower case
    body: bytes

    def __repr__(self) -> str:
        return f"TokenAnswer({self.status})"


# Follows no redirect, verifies TLS, honours proxies, is limited in time and size; a ShimError when
# there is no whole answer. Section 14 makes it of section 9.
TokenPost = Callable[[TokenRequest], TokenAnswer]


# Never in the environment of a program that we start.
SECRET_VARIABLES = frozenset(
    """
    ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN ANTHROPIC_CUSTOM_HEADERS ANTHROPIC_IDENTITY_TOKEN
    CLAUDE_CODE_OAUTH_REFRESH_TOKEN CLAUDE_CODE_OAUTH_TOKEN CLAUDE_SHIM_API_KEY
    CLAUDE_SHIM_UPSTREAM_HEADER OPENAI_API_KEY
    """.split()
)


def without_secrets(environment: Dict[str, str]) -> Dict[str, str]:
    """Return an environment for a program that has no business with our secrets."""
    return {k: v for k, v in environment.items() if k.upper() not in SECRET_VARIABLES}


RUN_SECONDS = 30.0


def run_program(command: Sequence[str], seconds: float = RUN_SECONDS) -> Tuple[int, str]:
    """Return the exit code and the output of a program that is killed when time is up.

    With it die the programs that it started. OSError if it cannot be run or says too much,
    TimeoutError.
    """
    import subprocess

    output, end = bytearray(), time.monotonic() + seconds
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=without_secrets(dict(os.environ)),
        start_new_session=True,
        bufsize=0,
    ) as process:
        reader = threading.Thread(target=_collect, args=(process.stdout, output), daemon=True)
        try:
            reader.start()
            reader.join(seconds)
            if len(output) > MAX_SECRET_BYTES:
                raise OSError(f"more than {MAX_SECRET_BYTES} bytes came")
            if reader.is_alive():
                raise subprocess.TimeoutExpired(command, seconds)
            process.wait(max(0.0, end - time.monotonic()))
        except BaseException as error:
            _kill_group(process.pid)
            if reader.is_alive():
                reader.join(1.0)  # longer only if somebody else holds the other end
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"no answer within {seconds:g} seconds") from None
            raise
    return process.returncode, output.decode("utf-8", "replace")


def _collect(pipe: BinaryIO, output: bytearray) -> None:
    """Read to the end, or until it is too much."""
    with contextlib.suppress(ValueError):  # nobody waits for the rest any more
        while len(output) <= MAX_SECRET_BYTES:
            piece = pipe.read(MAX_SECRET_BYTES + 1 - len(output))
            if not piece:
                break
            output += piece


def _kill_group(leader: int) -> None:
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(leader, signal.SIGKILL)
        else:
            os.kill(leader, signal.SIGTERM)


def _nobody(line: str) -> None:
    """Neither told nor hidden."""


class Outside(NamedTuple):
    """What a credential needs of the world."""

    post: TokenPost
    tell: Callable[[str], None] = _nobody  # a line for the log
    hide: Callable[[str], None] = _nobody  # a secret that the log must mask from now on
    clock: Callable[[], float] = time.time
    run: Callable[[Sequence[str]], Tuple[int, str]] = run_program
    save: Callable[[str, str], None] = write_secret_file


class OAuthClient(NamedTuple):
    """Who asks for tokens, and where."""

    urls: Tuple[str, ...] = (TOKEN_URL, OLD_TOKEN_URL)  # the next is asked when one is a 404
    id: str = OAUTH_CLIENT_ID
    scope: str = OAUTH_SCOPE
    headers: HeaderList = []  # for the token endpoint
    beside: HeaderList = []  # for upstream, beside the token
    repair: str = "run `claude_shim login`"  # what to do when the login is void


# An answer that says less is renewed after an hour, as Anthropic's SDK does it; none more often
# than each minute, whatever the answer says.
DEFAULT_LIFETIME = 3600.0
MIN_LIFETIME = 120.0
MAX_LIFETIME = 10 * 365 * 86400.0


def granted(outside: Outside, client: OAuthClient, fields: Dict[str, str]) -> Bundle:
    """Return the tokens that a token endpoint gives for `fields` (RFC 6749 4.1.3, 6).

    CredentialError when the grant is void for good, CredentialUnavailableError when it may work
    later.
    """
    for url in client.urls:
        host = urllib.parse.urlsplit(url).netloc
        try:
            answer = outside.post(TokenRequest(url, fields, client.headers))
        except ShimError as error:
            message = f"the token endpoint {host} gave no answer: {error.message}"
            raise CredentialUnavailableError(message) from None
        if answer.status != 404:
            break
    body = _parsed_object(answer.body)
    token = body.get("access_token")
    if answer.status != 200 or not isinstance(token, str) or not _HEADER_SAFE.fullmatch(token):
        raise _why_no_token(answer, body, host, client.repair)
    lifetime = body.get("expires_in")
    if isinstance(lifetime, bool) or not isinstance(lifetime, (int, float)):
        lifetime = DEFAULT_LIFETIME
    refresh = body.get("refresh_token")
    bundle = Bundle(
        token,
        refresh if isinstance(refresh, str) else "",
        outside.clock() + min(max(lifetime, MIN_LIFETIME), MAX_LIFETIME),
    )
    hide_bundle(outside, bundle)
    return bundle


def _why_no_token(answer: TokenAnswer, body: JSON, host: str, repair: str) -> ShimError:
    """What an answer without tokens means; its own words may hold secrets and are not repeated."""
    error = body.get("error")
    code = error.get("type") if isinstance(error, dict) else error
    if code == "invalid_grant":
        return CredentialError(f"{host} says that the login is no longer valid: {repair}")
    if 300 <= answer.status < 400:
        where = redirect_target(answer.headers)
        said = f"redirects to {where}, which is not followed: check --token-url"
    elif answer.status == 200:
        said = "answered with what is no token: check --token-url, or log in to your network first"
    else:
        named = isinstance(code, str) and re.fullmatch("[a-z_]{1,40}", code)
        said = f"answered with status {answer.status}" + (f" ({code})" if named else "")
    wait = dict(answer.headers).get("retry-after", "")
    seconds = float(wait) if re.fullmatch("[0-9]{1,6}", wait) else 5.0
    return CredentialUnavailableError(f"the token endpoint {host} {said}", seconds)


def hide_bundle(outside: Outside, bundle: Bundle) -> None:
    """Have the log mask the tokens of a login."""
    for secret in filter(None, (bundle.access_token, bundle.refresh_token)):
        outside.hide(secret)


# --- tokens that are renewed


class TokenSource:
    """Where the tokens of a credential come from, and newer ones after them."""

    kind = ""
    place = ""  # for people
    margin = 60.0  # seconds before the end at which a token is renewed
    expired_at_once = Bundle("", "", 0.0)  # of a source that has none until it is asked

    def current(self) -> Bundle:
        """Return the token at hand; ConfigError when there should be one."""
        return self.expired_at_once

    def renewed(self, old: Bundle) -> Bundle:
        """Return a token after `old`.

        CredentialError when there will be none, CredentialUnavailableError when not now.
        """
        raise NotImplementedError

    def can_renew(self, bundle: Bundle) -> bool:
        """Return whether there will be a token after `bundle`."""
        return True

    def headers(self, token: str) -> HeaderList:
        """Return the header fields that show a token."""
        return [("authorization", f"Bearer {token}"), ("anthropic-beta", OAUTH_BETA)]

    def settle(self) -> bool:
        """Save what could not be saved before; whether nothing of that is left."""
        return True


class Renewed(Credential):
    """A token that is renewed shortly before its end, and when upstream refuses it.

    One thread renews it; meanwhile the others use the old one while it is good, or wait. After
    `start` that thread is one of its own.
    """

    TICK = 30.0  # seconds; the clock may jump, as when a laptop wakes up
    MAX_BACKOFF = 300.0
    MIN_INTERVAL = 30.0  # between renewals after a 401, whose cause may be something else

    def __init__(self, source: TokenSource, outside: Outside) -> None:
        self._source = source
        self._outside = outside
        self._bundle = source.current()
        self._renewal = threading.Lock()
        self._renewed_at = -math.inf
        self._failures = 0
        self._retry_at = 0.0
        self._wait = 0.0
        self._reason = ""
        self._told = ""
        self._stopping = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def authorization(
        self, client: Dict[str, str], rejected: Optional[HeaderList] = None
    ) -> HeaderList:
        return self._source.headers(self._usable(rejected).access_token)

    def describe(self) -> Description:
        source, bundle = self._source, self._bundle
        return Description(source.kind, source.place, bundle.expires_at, source.can_renew(bundle))

    def ready(self) -> bool:
        return self._good(self._bundle, self._source.margin + 1.0)

    def _good(self, bundle: Bundle, margin: float = 0.0) -> bool:
        return bundle.expires_at is None or self._outside.clock() < bundle.expires_at - margin

    def _refused(self, bundle: Bundle, rejected: Optional[HeaderList]) -> bool:
        return rejected is not None and rejected == self._source.headers(bundle.access_token)

    def _usable(self, rejected: Optional[HeaderList]) -> Bundle:
        bundle = self._bundle
        refused = self._refused(bundle, rejected)
        if not refused and self._good(bundle, self._source.margin):
            return bundle
        serves = not refused and self._good(bundle)
        if not self._renewal.acquire(blocking=not serves):
            return bundle  # somebody renews it already, and it is good until then
        try:
            return self._after_others(rejected)
        except ShimError:
            if serves:
                return bundle
            raise
        finally:
            self._renewal.release()

    def _after_others(self, rejected: Optional[HeaderList]) -> Bundle:
        """The token after all that other threads did meanwhile, renewed if it still has to be."""
        refused = self._refused(self._bundle, rejected)
        since = self._outside.clock() - self._renewed_at
        if refused and 0 <= since < self.MIN_INTERVAL:
            return self._bundle
        if refused or not self._good(self._bundle, self._source.margin):
            self._renew()
        return self._bundle

    def _renew(self) -> None:
        now = self._outside.clock()
        if 0 < self._retry_at - now <= self._wait:  # if it is more, the clock was set back
            raise CredentialUnavailableError(self._reason, self._retry_at - now)
        try:
            self._bundle = self._source.renewed(self._bundle)
        except CredentialUnavailableError as error:
            self._wait = max(error.seconds, min(5.0 * 2**self._failures, self.MAX_BACKOFF))
            self._failures = min(self._failures + 1, 10)
            self._retry_at, self._reason = self._outside.clock() + self._wait, error.message
            self._outside.tell(f"warning: {error.message}; next try in {self._wait:.0f} s")
            raise
        self._renewed_at, self._failures = self._outside.clock(), 0

    def start(self) -> None:
        self._thread = threading.Thread(target=self._keep_fresh, daemon=True)
        self._thread.start()

    def _keep_fresh(self) -> None:
        self._tend()
        while not self._stopping.wait(self._pause()):
            self._tend()

    def _tend(self) -> None:
        try:
            self._usable(None)
        except CredentialUnavailableError:
            pass  # told already, with the time of the next try
        except ShimError as error:
            if error.message != self._told:
                self._outside.tell(f"error: {error.message}")
            self._told = error.message
        with self._renewal:
            self._source.settle()

    def _pause(self) -> float:
        end = self._bundle.expires_at
        left = self.TICK if end is None else end - self._source.margin - self._outside.clock()
        return left if 0 < left < self.TICK else self.TICK

    def settle(self) -> None:
        with self._renewal:
            if not self._source.settle():
                raise ConfigError(f"the login of {self._source.place} is not on the disk yet")

    def close(self) -> None:
        self._stopping.set()
        if self._thread:
            self._thread.join()
        with self._renewal:  # a request may be renewing it: the new token must not be lost
            self._source.settle()


# --- files of logins


def _took_lock(descriptor: int) -> bool:
    """Whether the lock of an open file was free; it ends with the file, or with the process."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # no locks here
    return True


LOCK_SECONDS = 40.0  # more than a renewal takes


def lock_file(path: str, seconds: float = LOCK_SECONDS) -> Optional[int]:
    """Return a descriptor that holds the lock of `path` until it is closed.

    None where there can be no such file, as in a read-only folder; CredentialUnavailableError if
    it is another user's, or another process does not let go of it.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.EROFS or not os.path.lexists(path):
            return None
        raise CredentialUnavailableError(f"cannot open {path}: {error.strerror}") from None
    deadline = time.monotonic() + seconds
    while not _took_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise CredentialUnavailableError(f"another process does not let go of {path}")
        time.sleep(0.02)
    return descriptor


def bundle_text(bundle: Bundle, document: JSON) -> str:
    """Return the text of a login file: `document` with new tokens, its expiry in the same form."""
    old, new = document.get("expires_at"), bundle.expires_at
    expiry: Union[int, str, None] = None
    if new is not None and isinstance(old, (int, float)):
        expiry = int(new * 1000) if old > 1e11 else int(new)
    elif new is not None:
        moment = datetime.fromtimestamp(int(new), timezone.utc)
        expiry = moment.isoformat().replace("+00:00", "Z")
    tokens = {"access_token": bundle.access_token, "refresh_token": bundle.refresh_token}
    return json.dumps({**document, **tokens, "expires_at": expiry}, indent=2) + "\n"


class BundleFile(TokenSource):
    """A login in a file, shared with other processes.

    A refresh token works once: whoever presents it a second time ends the login for all. So it is
    used under a lock that all processes respect, after reading the file again, and the new one is
    on the disk before anybody uses it. What cannot be saved is kept, and with it the lock.
    """

    def __init__(
        self, path: str, client: OAuthClient, outside: Outside, kind: str = "oauth-bundle"
    ) -> None:
        self.kind = kind
        self.place = path
        self._client = client
        self._outside = outside
        self._document: JSON = {}
        self._void = ""  # the refresh token that was refused
        self._unsaved: Optional[Bundle] = None
        self._lock_path = f"{_own_target(path)}.lock"
        self._lock: Optional[int] = None
        folder = os.path.dirname(self._lock_path)
        if os.path.isdir(folder) and not os.access(folder, os.W_OK):
            outside.tell(
                f"warning: {folder} is read-only: when the login of {path} is renewed, that is "
                "lost when this process ends, and its other users are logged out"
            )

    def can_renew(self, bundle: Bundle) -> bool:
        return bool(bundle.refresh_token)

    def headers(self, token: str) -> HeaderList:
        return [*super().headers(token), *self._client.beside]

    def current(self) -> Bundle:
        text = read_secret_file(self.place)
        bundle = parsed_bundle(text, self.place)
        self._document = _parsed_object(text.encode("utf-8"))
        hide_bundle(self._outside, bundle)
        return bundle

    def renewed(self, old: Bundle) -> Bundle:
        if self._lock is None:
            self._lock = lock_file(self._lock_path)
        if self._lock is not None:
            finish_write(self.place, parsed_bundle)
        try:
            return self._renewed_alone(old)
        finally:
            self._unlock()

    def _renewed_alone(self, old: Bundle) -> Bundle:
        try:
            held = self._unsaved or self.current()
        except ConfigError as error:
            raise CredentialError(f"{error}; {self._client.repair}") from None
        fresh = held.expires_at is None or held.expires_at - self.margin > self._outside.clock()
        if held.access_token != old.access_token and fresh:
            return held  # another process was faster
        if not held.refresh_token:
            raise CredentialError(f"{self.place} cannot be renewed: {self._client.repair}")
        if held.refresh_token == self._void:
            raise CredentialError(
                f"the login of {self.place} is no longer valid: {self._client.repair}"
            )
        fields = {
            "grant_type": "refresh_token",
            "refresh_token": held.refresh_token,
            "client_id": self._client.id,
        }
        try:
            bundle = granted(self._outside, self._client, fields)
        except CredentialError:
            self._void = held.refresh_token
            return self._renewed_alone(old)  # a program without our lock may have been faster
        bundle = bundle._replace(refresh_token=bundle.refresh_token or held.refresh_token)
        self._save(bundle)
        return bundle

    def _save(self, bundle: Bundle) -> None:
        told = self._unsaved is bundle
        self._unsaved = bundle
        try:
            self._outside.save(self.place, bundle_text(bundle, self._document))
        except (OSError, ConfigError) as error:
            reason = getattr(error, "strerror", None) or error
            if not told:
                self._outside.tell(
                    f"error: the renewed login cannot be written to {self.place}: {reason}; it "
                    "lives in this process only, and is lost when that ends: mend it soon"
                )
            return
        self._unsaved = None

    def settle(self) -> bool:
        if self._unsaved:
            self._save(self._unsaved)
            self._unlock()
        return self._unsaved is None

    def _unlock(self) -> None:
        if self._lock is not None and self._unsaved is None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def locked_login(path: str) -> Iterator[None]:
    """Keep processes that renew the login of `path` from doing so: they would write it again."""
    lock = lock_file(_own_target(path) + ".lock")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


# --- other sources of tokens


class Federation(TokenSource):
    """Workload identity: a token of the platform that the process runs on, exchanged for one."""

    def __init__(
        self, client: OAuthClient, fields: Dict[str, str], identity: Callable[[], str], out: Outside
    ) -> None:
        self.kind = "federation"
        self.place = fields.get("federation_rule_id", "")
        self._client = client._replace(
            headers=[("anthropic-beta", f"{OAUTH_BETA},{FEDERATION_BETA}")]
        )
        self._fields = fields
        self._identity = identity
        self._outside = out

    def renewed(self, old: Bundle) -> Bundle:
        try:
            assertion = checked_secret(self._identity(), "the identity token")
            self._outside.hide(assertion)
            fields = {
                "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
                "assertion": assertion,
                **self._fields,
            }
            return granted(self._outside, self._client, fields)._replace(refresh_token="")
        except (ConfigError, CredentialError) as error:  # the platform may give a better one later
            raise CredentialUnavailableError(str(error), 30.0) from None


class Helper(TokenSource):
    """A command that prints a key, which is good for a while."""

    kind = "helper"
    margin = 0.0

    def __init__(self, command: str, seconds: float, outside: Outside) -> None:
        self.place = "--key-helper"
        shell = ["cmd", "/c"] if os.name == "nt" else ["/bin/sh", "-c"]
        self._command = [*shell, command]
        self._seconds = seconds
        self._outside = outside

    def headers(self, token: str) -> HeaderList:
        return key_headers(token, bearer=not token.startswith("sk-ant-api"))

    def renewed(self, old: Bundle) -> Bundle:
        try:
            code, output = self._outside.run(self._command)
            if code:
                raise ConfigError(f"it ended with code {code}")
            key = checked_secret(output, "it")
        except (ConfigError, OSError) as error:
            raise CredentialUnavailableError(f"--key-helper gave no key: {error}") from None
        self._outside.hide(key)
        return Bundle(key, "", self._outside.clock() + self._seconds)


KEYCHAIN_SERVICE = "Claude Code-credentials"


class ClaudeCode(TokenSource):
    """Claude Code's own login: read, and read again, but renewed by nobody but Claude Code."""

    kind = "claude-code"

    def __init__(self, path: str, service: str, outside: Outside) -> None:
        self.place = self._path = path
        self._service = service  # of the keychain of macOS; empty: there is none
        self._outside = outside

    def can_renew(self, bundle: Bundle) -> bool:
        return False

    def current(self) -> Bundle:
        text = self._keychain() if self._service else ""
        self.place = "the keychain" if text else self._path
        bundle = parsed_claude_code(text or read_secret_file(self._path), self.place)
        hide_bundle(self._outside, bundle)
        return bundle

    def renewed(self, old: Bundle) -> Bundle:
        try:
            bundle = self.current()
        except ConfigError as error:
            raise CredentialError(str(error)) from None
        if bundle.access_token == old.access_token:
            raise CredentialError(
                "the login of Claude Code has ended: run `claude`, which renews it"
            )
        return bundle

    def _keychain(self) -> str:
        """The login in the keychain, or an empty string; ConfigError if it is locked."""
        command = ["/usr/bin/security", "find-generic-password", "-s", self._service, "-w"]
        try:
            code, text = self._outside.run(command)
        except OSError as error:
            raise ConfigError(f"the keychain did not answer: {error}") from None
        if code == 36:  # errSecInteractionNotAllowed, as over SSH
            raise ConfigError("the keychain is locked: run `security unlock-keychain` first")
        return text.strip() if code == 0 else ""


def keychain_service(config_folder: str) -> str:
    """Return the name of Claude Code's entry in the keychain; another for CLAUDE_CONFIG_DIR."""
    import unicodedata

    if not config_folder:
        return KEYCHAIN_SERVICE
    folder = unicodedata.normalize("NFC", config_folder)
    return f"{KEYCHAIN_SERVICE}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"


def parsed_claude_code(text: str, source: str) -> Bundle:
    """Return Claude Code's login, in JSON or JSON in hexadecimal; ConfigError if it is none."""
    with contextlib.suppress(ValueError):
        text = bytes.fromhex(text.strip()).decode("utf-8")
    login = object_or_empty(_parsed_object(text.encode("utf-8", "replace")).get("claudeAiOauth"))
    token = login.get("accessToken")
    if not isinstance(token, str):
        raise ConfigError(f"{source} holds no login of Claude Code: run `claude`, then /login")
    return Bundle(checked_secret(token, source), "", parsed_expiry(login.get("expiresAt"), source))


# --- keys of clients


class ClientKeys:
    """The keys that clients must show, by name; none set means that all may call."""

    def __init__(self, keys: Optional[Dict[str, str]] = None) -> None:
        self._keys = {name: key.encode() for name, key in (keys or {}).items()}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def secrets(self) -> List[str]:
        """Return what must never be shown."""
        return [key.decode() for key in self._keys.values()]

    def key_of(self, name: str) -> str:
        """Return the key of a name; the name itself where there is none."""
        return self._keys.get(name, name.encode()).decode()

    def stripped(self, client: Dict[str, str]) -> Dict[str, str]:
        """Return a request's headers without our own keys, which must never go upstream."""
        if not self._keys:
            return client
        return {
            name: value
            for name, value in client.items()
            if not self._named(
                [key.encode("utf-8", "replace") for key in shown_keys({name: value})]
            )
        }

    def _named(self, shown: List[bytes]) -> List[str]:
        """The names of the keys among those shown; all are compared, whatever is found."""
        return [
            name
            for name, key in self._keys.items()
            for candidate in shown
            if hmac.compare_digest(key, candidate)
        ]

    def name_of(self, client: Dict[str, str]) -> str:
        """Return the name of the key that a request's headers show.

        Every key is compared, in constant time. AuthenticationError when none fits.
        """
        if not self._keys:
            return ""
        shown = [text.encode("utf-8", "replace") for text in shown_keys(client)]
        found = self._named(shown)
        if found:
            return found[0]
        reason = "wrong" if shown else "missing"
        raise AuthenticationError(
            f"The client key is {reason}: send the key of this claude_shim as "
            "Authorization: Bearer, x-api-key or api-key."
        )


def shown_keys(client: Dict[str, str]) -> List[str]:
    """Return the keys that a request shows, wherever clients put them."""
    scheme, _, token = client.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    places = (
        bearer,
        *(client.get(name, "") for name in ("x-api-key", "api-key", "x-claude-shim-key")),
    )
    return [key for key in places if key]


def parsed_client_keys(text: str, source: str) -> Dict[str, str]:
    """Return name -> key of a key file: one key a line, an optional name and a space before it.

    Empty lines and lines that start with # are skipped. ConfigError names the line.
    """
    keys: Dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise ConfigError(f"{source}, line {number}: expected a key, or a name and a key")
        name = words[0] if len(words) == 2 else f"line {number}"
        if name in keys:
            raise ConfigError(f"{source}, line {number}: the name {name} is taken")
        keys[name] = checked_secret(words[-1], f"{source}, line {number}")
    if not keys:
        raise ConfigError(f"{source} holds no key")
    return keys


# --- logging in: RFC 7636 (PKCE), in the browser (RFC 8252) or by a pasted line


class LoginError(Exception):
    """A login ended without tokens; the message says why and what to do."""


class WrongCallbackError(Exception):
    """Not the answer to this login: anybody could have sent it, so it changes nothing."""


class LoginAttempt:
    """One attempt to log in: where its user is sent, and which answer it believes.

    `verifier` and `state` are two random numbers of 256 bits; only the challenge of the first goes
    through the browser, and the second must come back from there.
    """

    def __init__(self, redirect_uri: str, verifier: str, state: str) -> None:
        self._redirect_uri = redirect_uri
        self._verifier = verifier
        self._state = state

    def url(self, authorize_url: str, client_id: str, scope: str) -> str:
        """Return the page on which the user agrees."""
        challenge = hashlib.sha256(self._verifier.encode("ascii")).digest()
        fields = {
            "code": "true",
            "client_id": client_id,
            "response_type": "code",
            "redirect_uri": self._redirect_uri,
            "scope": scope,
            "code_challenge": base64.urlsafe_b64encode(challenge).decode("ascii").rstrip("="),
            "code_challenge_method": "S256",
            "state": self._state,
        }
        return f"{authorize_url}?{urllib.parse.urlencode(fields)}"

    def code_called_back(self, query: str) -> str:
        """Return the code in the query of a callback.

        WrongCallbackError if it does not answer this attempt, LoginError if the login was denied.
        """
        try:
            pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=20)
        except ValueError:
            raise WrongCallbackError() from None
        fields = dict(pairs)
        if len(fields) < len(pairs) or not self._is_ours(fields.get("state", "")):
            raise WrongCallbackError()
        if "error" in fields:
            reason = re.sub(r"[^a-z_]", "", fields["error"])[:40] or "no reason given"
            raise LoginError(f"the login was not granted ({reason})")
        return _checked_code(fields.get("code", ""))

    def code_pasted(self, line: str) -> str:
        """Return the code of a pasted CODE#STATE; WrongCallbackError if it is none of ours."""
        code, _, state = line.strip().partition("#")
        if not self._is_ours(state):
            raise WrongCallbackError()
        return _checked_code(code)

    def _is_ours(self, state: str) -> bool:
        return hmac.compare_digest(state.encode("utf-8", "replace"), self._state.encode("ascii"))

    def token_fields(self, code: str, client_id: str) -> Dict[str, str]:
        """Return what is posted to the token endpoint to exchange a code for tokens."""
        return {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "client_id": client_id,
            "code_verifier": self._verifier,
            "state": self._state,
        }


def _checked_code(code: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]{1,4096}", code):
        raise WrongCallbackError()
    return code


# ----------------------------------------------------------------------
# 9. Upstream over HTTP                                      uses: 0 1 4
# ----------------------------------------------------------------------
# An urllib opener whose handlers are ours: kept-alive connections, heads written and parsed here
# (the email parser costs more than the rest), no redirects, limits on every wait. A wait also ends
# when the client hangs up.

MAX_HEAD_BYTES = 64 << 10
_MOST_INTERIM = 100
_BURST = 128 << 10  # of more the memory is given back to the system, and is new each time
_PIECE = 64 << 10


class Limits(NamedTuple):
    """How long to wait for upstream, in seconds."""

    connect: float = 10.0
    first_byte: float = 300.0  # of the head; a long prompt takes a while before it
    silence: float = 300.0  # between two reads; Anthropic pings every 30 s
    total: float = 3600.0


def readable(sockets: Sequence[socket.socket], timeout: float) -> List[socket.socket]:
    """Return those of `sockets` that can be read, or were closed, within `timeout` seconds."""
    return ready_of(sockets, (), timeout)


def ready_of(
    readers: Sequence[socket.socket], writers: Sequence[socket.socket], timeout: float
) -> List[socket.socket]:
    """Return those of `readers` that can be read and of `writers` that can be written in time."""
    if not hasattr(select, "poll"):  # Windows
        read, written, _ = select.select(readers, writers, [], max(0.0, timeout))
        return [*read, *written]
    poll = select.poll()
    for sock in readers:
        poll.register(sock, select.POLLIN)
    for sock in writers:
        poll.register(sock, select.POLLOUT)
    milliseconds = max(0, math.ceil(min(timeout, 1e6) * 1000))
    ready = {descriptor for descriptor, _ in poll.poll(milliseconds)}
    return [sock for sock in (*readers, *writers) if sock.fileno() in ready]


NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def sent_now(sock: socket.socket, piece: Union[bytes, memoryview]) -> int:
    """Return how many bytes a non-blocking socket takes now; OSError when it is broken."""
    try:
        return sock.send(piece)
    except NOT_NOW:
        return 0


def received_now(sock: socket.socket, size: int) -> Optional[bytes]:
    """Return what a non-blocking socket has, b"" at its end; OSError when it is broken.

    None when there is nothing, or only what is TLS's own: tickets and half records.
    """
    try:
        return sock.recv(size)
    except NOT_NOW:
        return None


def peeked_now(sock: socket.socket) -> Optional[bytes]:
    """Return the next byte of a non-blocking socket, left in it, else as `received_now` does.

    Of TLS it is a sealed one: TLS's own method would take it.
    """
    try:
        return socket.socket.recv(sock, 1, socket.MSG_PEEK)
    except BlockingIOError:
        return None


def holds_more(sock: socket.socket) -> bool:
    """Return whether TLS has bytes at hand, which the socket does not show."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


PROMPT_BYTES = 16 << 10  # are translated in some milliseconds, and fit into a socket's buffer


class ClientWatch:
    """Notices that the client of a request hung up; a half-closed connection counts as gone."""

    def __init__(self, sock: Optional[socket.socket] = None) -> None:
        self._sock = sock

    def wait(self, sock: Optional[socket.socket], timeout: float) -> bool:
        """Return whether `sock` became readable in time; ClientGone as soon as the client left."""
        deadline = time.monotonic() + timeout
        while True:
            self._check_open()
            watched = [s for s in (sock, self._sock) if s is not None]
            ready = readable(watched, deadline - time.monotonic()) if watched else []
            if self._sock in ready:
                self._look()
            if sock in ready and sock is not None:
                return True
            if time.monotonic() >= deadline:
                return False
            if not watched:
                time.sleep(max(0.0, deadline - time.monotonic()))

    def wait_writable(self, sock: socket.socket, timeout: float) -> bool:
        """Return whether `sock` takes bytes in time; ClientGone as soon as the client left."""
        deadline = time.monotonic() + timeout
        while True:
            self._check_open()
            watched = [self._sock] if self._sock is not None else []
            ready = ready_of(watched, [sock], deadline - time.monotonic())
            if self._sock in ready:
                self._look()
            if sock in ready or time.monotonic() >= deadline:
                return sock in ready

    def _check_open(self) -> None:
        if self._sock is not None and self._sock.fileno() < 0:
            raise ClientGone()

    def _look(self) -> None:
        """Bytes are the next request, sent early: then there is nothing more to see here."""
        try:
            byte = peeked_now(self._sock) if self._sock else None
        except OSError:
            byte = b""
        if byte == b"":
            raise ClientGone()
        if byte:
            self._sock = None


class UpstreamRequest(NamedTuple):
    """One request as an upstream gets it."""

    method: str
    path: str  # with the query, below the base URL
    headers: HeaderList
    body: bytes
    watch: ClientWatch = ClientWatch()
    patience: Optional[float] = None  # seconds until the head, where less than usual will do
    delay: float = 0.0  # seconds to wait before it is sent
    fresh: bool = False  # over a new connection
    handed_on: bool = False  # the events of its answer are not read before they are handed on

    def prompt(self) -> bool:
        """Return whether to send it, and to go on when the head has come, takes no time."""
        return self.handed_on and not self.delay and len(self.body) <= PROMPT_BYTES


class Source:
    """Body bytes that are still coming: `read` until b"", then `close`; or `drop` at any time.

    Nothing here waits: what upstream must be asked to go on is handed out as `resumption`.
    """

    sock: Optional[socket.socket] = None  # to wait on; None when all is at hand
    silence_seconds = 300.0  # after which the rest is not waited for
    deadline = math.inf  # of time.monotonic(), for all of it

    def check_time(self, silent: float) -> None:
        """Raise UpstreamTimeoutError after too many `silent` seconds, or too many in all."""
        if time.monotonic() >= self.deadline:
            raise UpstreamTimeoutError("the answer took longer than the total limit")
        if silent >= self.silence_seconds:
            raise UpstreamTimeoutError("upstream fell silent in the middle of the answer")

    def ready(self) -> bool:
        """Return whether `read` has bytes at hand."""
        return True

    def rests(self) -> bool:
        """Return whether the answer is read to its end, after reading what is at hand."""
        return True

    def resumption(self) -> Optional[Conversation[None]]:
        """Return the conversation with upstream after which more comes; None: there is no more.

        To be asked once, after `read` returned b"".
        """
        return None

    def read(self) -> Optional[bytes]:
        """Return the next burst, None if it is not whole yet, b"" at the regular end.

        A ShimError when the rest will not come.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the connection after the whole answer; it may serve another."""

    def drop(self) -> None:
        """Close the connection at once: nobody wants the rest."""


class BytesSource(Source):
    """A body that is all there."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def read(self) -> bytes:
        body, self._body = self._body, b""
        return body


class UpstreamResponse(NamedTuple):
    """Head of an answer, and the source of its body."""

    status: int
    headers: HeaderList  # names in lower case
    source: Source

    def header(self, name: str) -> str:
        """Return the value of a header field, or an empty string."""
        for key, value in self.headers:
            if key == name:
                return value
        return ""

    def is_event_stream(self) -> bool:
        """Return whether the body is server-sent events."""
        return self.header("content-type").lower().startswith("text/event-stream")


class Upstream:
    """Where Messages requests go."""

    url = ""

    def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Return the head of the answer; a ShimError when there is none."""
        raise NotImplementedError

    def begin(self, request: UpstreamRequest, connects: bool) -> Optional[UpstreamConnection]:
        """Send a request without waiting for the answer; None: `send` must do it.

        Without `connects` it takes no time, and so only an idle connection will do.
        """
        return None

    def close(self) -> None:
        """Let go of idle connections."""


_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [\t\x20-\x7e\x80-\xff]*)?")
_UNSAFE_HEADER = re.compile(r"[^\t\x20-\x7e\x80-\xff]")


def parsed_response_head(head: bytes) -> Tuple[int, HeaderList]:
    """Return the status and header fields of a response head; UpstreamCutError if malformed."""
    first, *lines = head.split(b"\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise UpstreamCutError(_NO_HTTP)
    try:
        return int(status.group(1)), header_fields(lines)
    except ValueError:
        raise UpstreamCutError(_NO_HTTP) from None


_NO_HTTP = "upstream did not answer in HTTP/1.1"


class Framing(NamedTuple):
    """How the end of a body is known."""

    chunked: bool
    length: Optional[int]  # None: until the connection closes
    keep: bool  # whether the connection lives on


_FRAMING_FIELDS = frozenset(
    {"connection", "content-encoding", "content-length", "transfer-encoding"}
)


def response_framing(status: int, headers: HeaderList) -> Framing:
    """Return the framing of a response body (RFC 9112 6.3); UpstreamCutError if it is ambiguous."""
    return _framing(status, tuple([pair for pair in headers if pair[0] in _FRAMING_FIELDS]))


@functools.lru_cache(maxsize=64)
def _framing(status: int, headers: Tuple[Tuple[str, str], ...]) -> Framing:
    fields: Dict[str, List[str]] = {}
    for name, value in headers:
        fields.setdefault(name, []).append(value.lower())
    keep = "close" not in ",".join(fields.get("connection", []))
    if fields.get("content-encoding", ["identity"]) != ["identity"]:
        raise UpstreamCutError("upstream compressed its answer although that was not asked for")
    if status in (204, 304):
        return Framing(False, 0, keep)
    codings, lengths = fields.get("transfer-encoding", []), fields.get("content-length", [])
    if codings == ["chunked"]:
        return Framing(True, None, keep and not lengths)
    if codings or len(set(lengths)) > 1 or not all(re.fullmatch("[0-9]{1,15}", n) for n in lengths):
        raise UpstreamCutError("upstream framed its answer in a way that is not valid HTTP/1.1")
    return Framing(False, int(lengths[0]) if lengths else None, keep and bool(lengths))


class Way(NamedTuple):
    """What all requests over a connection have in common."""

    target: str  # before the path: of the base URL, or all of it for a proxy
    fields: str  # lines of the head

    def head(self, request: UpstreamRequest) -> bytes:
        """Return the head of a request; RequestError if a field could break out of its line."""
        fields = request.headers
        if request.body or request.method not in ("GET", "HEAD"):
            fields = [*fields, ("Content-Length", str(len(request.body)))]
        line = f"{request.method} {self.target}{request.path} HTTP/1.1"
        texts = line + "".join(itertools.chain.from_iterable(fields))
        if not (texts.isascii() and texts.isprintable()) and _UNSAFE_HEADER.search(texts):
            raise RequestError("a header for upstream holds a control character")
        return f"{line}\r\n{self.fields}{field_lines(fields)}\r\n".encode("latin-1")


class UpstreamConnection(Source):
    """One connection: a request out, a head in, then the source of the body."""

    def __init__(
        self, sock: socket.socket, way: Way, limits: Limits, release: Callable[..., None]
    ) -> None:
        self.sock: socket.socket = sock
        self._sealed = isinstance(sock, ssl.SSLSocket)
        self._way = way
        self.used = False  # has carried an answer before
        self.idle_since = 0.0
        self.silence_seconds = limits.silence
        self._limits = limits
        self._release = release
        self._buffer = b""
        self._chunks: Optional[ChunkedDecoder] = None
        self._left: Optional[int] = None
        self._keep = False
        self._persistent = True
        self._given_back = False
        self._finished = False
        self._interim = 0  # heads of 1xx that have come
        self.head_deadline = 0.0

    def is_quiet(self) -> bool:
        """Return whether it is open, and nothing came that nobody asked for."""
        try:
            return peeked_now(self.sock) is None
        except OSError:
            return False

    def begin(self, request: UpstreamRequest) -> None:
        """Send a request; OSError if the connection broke."""
        now = time.monotonic()
        self.deadline = now + (request.patience or self._limits.total)
        self.head_deadline = now + (request.patience or self._limits.first_byte)
        if request.patience:
            self.silence_seconds = request.patience
        try:
            self._send(self._way.head(request), request)
        except (BrokenPipeError, ConnectionResetError):
            if self.used or not readable([self.sock], 0.5):
                raise  # else an early refusal, such as 413, may be waiting

    def _send(self, head: bytes, request: UpstreamRequest) -> None:
        # One packet is faster than two, but a large body is not copied for that.
        pieces = [head + request.body] if len(request.body) < _PIECE else [head, request.body]
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[sent_now(self.sock, rest[:_PIECE]) :]
                if rest and not request.watch.wait_writable(self.sock, self._limits.silence):
                    raise UpstreamTimeoutError("upstream does not read the request")

    def answer(self) -> Optional[UpstreamResponse]:
        """Return the answer if its head has come, which its body may still follow; reads once.

        OSError if the connection broke before a byte of it.
        """
        burst, searched = self._head_burst(), max(0, len(self._buffer) - 3)
        self._buffer += burst or b""
        while burst:
            end = self._buffer.find(b"\r\n\r\n", searched)
            if end < 0:
                break
            status, headers = parsed_response_head(self._buffer[:end])
            self._persistent = self._buffer.startswith(b"HTTP/1.1")
            self._buffer, searched = self._buffer[end + 4 :], 0
            if status >= 200:
                return self._framed(status, headers)
            self._interim += 1  # 100 Continue, 103 Early Hints
            if self._interim > _MOST_INTERIM:
                raise UpstreamCutError("upstream sends interim answers and no other")
        if len(self._buffer) > MAX_HEAD_BYTES:
            raise UpstreamCutError("upstream sent an endless response head")
        return None

    def _framed(self, status: int, headers: HeaderList) -> UpstreamResponse:
        framing = response_framing(status, headers)
        self._chunks = ChunkedDecoder() if framing.chunked else None
        self._left, self._keep = framing.length, framing.keep and self._persistent
        self._finished = framing.length == 0
        return UpstreamResponse(status, headers, self)

    def _head_burst(self) -> Optional[bytes]:
        try:
            burst = received_now(self.sock, _BURST)
            if burst == b"":
                raise ConnectionResetError("upstream closed the connection without an answer")
        except (ConnectionError, ssl.SSLError) as error:
            if self._interim or self._buffer:  # then it may have acted on the request
                raise UpstreamCutError(f"upstream broke off in the head: {error}") from None
            raise
        return burst

    def failure(self, error: OSError) -> Optional[UpstreamCutError]:
        """Close after an error before the answer; return what it comes to.

        None if the request may go again, over a new connection: this one was closed while idle.
        """
        self.drop()
        stale = self.used and isinstance(error, _STALE)
        return None if stale else UpstreamCutError(f"no answer from upstream: {error}")

    def awaited_answer(self, request: UpstreamRequest) -> UpstreamResponse:
        """Return the answer, waiting for its head; ClientGone as soon as the client left."""
        while True:
            left = self.head_deadline - time.monotonic()
            if left <= 0 or not (holds_more(self.sock) or request.watch.wait(self.sock, left)):
                raise UpstreamTimeoutError(NO_ANSWER_IN_TIME)
            answer = self.answer()
            if answer is not None:
                return answer

    def ready(self) -> bool:
        return bool(self._buffer) or self._finished or (self._sealed and holds_more(self.sock))

    def read(self) -> Optional[bytes]:
        if self._finished:
            return b""
        try:
            burst, self._buffer = self._buffer or received_now(self.sock, _BURST), b""
        except OSError as error:
            raise UpstreamCutError(f"the connection to upstream broke: {error}") from None
        body = None if burst is None else self._decoded(burst)
        return body or (b"" if self._finished else None)

    def _decoded(self, burst: bytes) -> bytes:
        if self._chunks is None and self._left is None:
            self._finished = not burst  # the end of the connection is the end of the body
            return burst
        if not burst:
            raise UpstreamCutError("upstream hung up in the middle of the answer")
        if self._chunks is not None:
            try:
                body = self._chunks.feed(burst)
            except ProtocolError as error:
                raise UpstreamCutError(f"upstream: {error.message}") from None
            self._finished = self._chunks.done
            return body
        assert self._left is not None
        body, self._buffer = burst[: self._left], burst[self._left :]
        self._left -= len(body)
        self._finished = self._left == 0
        return body

    def close(self) -> None:
        if self._keep and self.rests():
            heir = UpstreamConnection(self.sock, self._way, self._limits, self._release)
            heir.used = self._given_back = True  # a late `drop` must not close what is another's
            self._release(heir)
        else:
            self.drop()

    def rests(self) -> bool:
        if not self._finished:
            with contextlib.suppress(ShimError):
                self.read()
        return self._finished and not self._buffer and not (self._chunks and self._chunks.rest)

    def drop(self) -> None:
        self._keep = False
        if not self._given_back:
            with contextlib.suppress(OSError):
                self.sock.close()


# How a connection fails that was closed while it was idle.
_STALE = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
NO_ANSWER_IN_TIME = "upstream did not start to answer in time"


class IdleConnections:
    """Connections that carried an answer to its end; the last one used is taken first.

    One that was closed meanwhile is noticed when it turns readable.
    """

    IDLE_SECONDS = 30.0  # less than servers keep one open
    MAX_IDLE = 64

    def __init__(self) -> None:
        self._idle: List[UpstreamConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    def taken(self) -> Optional[UpstreamConnection]:
        """Return a connection that seems to be open still, or None."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return None
            fresh = time.monotonic() - connection.idle_since < self.IDLE_SECONDS
            if fresh and connection.is_quiet():
                return connection
            connection.drop()

    def release(self, connection: UpstreamConnection) -> None:
        """Take back a connection whose answer was read to the end."""
        connection.idle_since = time.monotonic()
        with self._lock:
            keep = not self._closed and len(self._idle) < self.MAX_IDLE
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.drop()

    def close_all(self) -> None:
        """Close the idle connections and keep none from now on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.drop()


class ConnectingHandler(urllib.request.BaseHandler):
    """urllib's http: and https: for a new connection, which then carries requests by itself."""

    def __init__(
        self, limits: Limits, context: Optional[ssl.SSLContext], idle: IdleConnections
    ) -> None:
        self._limits = limits
        self._context = context
        self._release = idle.release

    def http_open(self, call: UpstreamCall) -> UpstreamConnection:
        """Return an open connection; UpstreamUnreachableError says why there is none."""
        host = call.host
        try:
            sock = socket.create_connection(_address(host, call.type), self._limits.connect)
        except (OSError, UnicodeError) as error:
            message = (
                f"cannot reach upstream at {host}: {getattr(error, 'strerror', None) or error}"
            )
            raise UpstreamUnreachableError(message) from None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = self._secured(sock, call)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            raise UpstreamUnreachableError(_tls_sentence(host, error)) from None
        except BaseException:
            sock.close()
            raise
        return UpstreamConnection(sock, call.way(), self._limits, self._release)

    https_open = http_open

    def _secured(self, sock: socket.socket, call: UpstreamCall) -> socket.socket:
        if call.type != "https" and not call.tunnel:
            return sock
        name, port = _address(call.tunnel or call.host, "https")
        if call.tunnel:
            _connect_through_proxy(sock, f"{name}:{port}", call.proxy_authorization())
        assert self._context is not None
        return self._context.wrap_socket(sock, server_hostname=name)


def _address(host: str, scheme: str) -> Tuple[str, int]:
    parts = urllib.parse.urlsplit(f"//{host}")
    return parts.hostname or "", parts.port or (443 if scheme == "https" else 80)


def _connect_through_proxy(sock: socket.socket, target: str, authorization: str) -> None:
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    lines += [f"Proxy-Authorization: {authorization}"] if authorization else []
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)  # what follows the head belongs to TLS
        if not byte or len(head) > MAX_HEAD_BYTES:
            raise UpstreamUnreachableError("the proxy closed the connection")
        head += byte
    status, _ = parsed_response_head(head[:-4])
    if status != 200:
        raise UpstreamUnreachableError(f"the proxy refused to connect to {target}: status {status}")


def _tls_sentence(host: str, error: OSError) -> str:
    reason = getattr(error, "verify_message", "") or error.strerror or str(error)
    advice = " (give your organisation's CA with --ca-file)" if "certificate" in str(error) else ""
    return f"no secure connection to upstream at {host}: {reason}{advice}"


class UpstreamCall(urllib.request.Request):
    """A base URL on its way through urllib's handlers, with the fields of every request."""

    def __init__(self, base_url: str, fields: HeaderList) -> None:
        super().__init__(base_url)
        self._fields = [("Host", self.host), *fields, ("Accept-Encoding", "identity")]

    @property
    def tunnel(self) -> str:
        """Host and port behind a proxy that is asked to CONNECT, or an empty string."""
        return str(getattr(self, "_tunnel_host", None) or "")

    def proxy_authorization(self) -> str:
        """Return what ProxyHandler made of the user and password in the proxy's URL."""
        return str(self.headers.get("Proxy-authorization") or "")

    def way(self) -> Way:
        """Return what a request needs to take this way."""
        fields = self._fields
        if not self.tunnel and self.proxy_authorization():
            fields = [*fields, ("Proxy-Authorization", self.proxy_authorization())]
        if _UNSAFE_HEADER.search("".join(itertools.chain.from_iterable(fields))):
            raise ConfigError("a header to add upstream holds a control character")
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
        return Way(self.selector.rstrip("/"), lines)


class HTTPUpstream(Upstream):
    """The Messages API at `url`, or any gateway that speaks it.

    `extra_headers` go with every request (for a corporate gateway). Proxies come from the
    environment, as urllib reads it; never for a loopback upstream. A request that finds its
    connection closed is sent again, on a new one, only if not a byte of an answer had come.
    """

    def __init__(
        self,
        url: str = "https://api.anthropic.com",
        *,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        extra_headers: Iterable[Tuple[str, str]] = (),
        context: Optional[ssl.SSLContext] = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._extra_headers = list(extra_headers)
        if context is None and self.url.startswith("https:"):
            context = ssl.create_default_context()
        self._idle = IdleConnections()
        self._opener = (
            urllib.request.OpenerDirector()
        )  # without its redirect, file: and ftp: handlers
        proxies = proxies_for(self.url)
        if proxies:
            self._opener.add_handler(urllib.request.ProxyHandler(proxies))
        self._opener.add_handler(ConnectingHandler(limits, context, self._idle))

    def _connected(self) -> UpstreamConnection:
        connection: Any = self._opener.open(UpstreamCall(self.url, self._extra_headers))
        assert isinstance(connection, UpstreamConnection)
        return connection

    def begin(self, request: UpstreamRequest, connects: bool) -> Optional[UpstreamConnection]:
        taken = None if request.fresh else self._idle.taken()
        while taken or connects:
            connection, taken = taken or self._connected(), None
            try:
                connection.begin(request)
                return connection
            except OSError as error:
                failure = connection.failure(error)
                if failure:
                    raise failure from None
            except BaseException:
                connection.drop()
                raise
        return None

    def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Return the head of the answer; a ShimError when there is none, ClientGone on hang-up."""
        while True:
            connection = self.begin(request, True)
            assert connection is not None
            try:
                return connection.awaited_answer(request)
            except OSError as error:
                failure = connection.failure(error)
                if failure:
                    raise failure from None
                request = request._replace(fresh=True)
            except BaseException:
                connection.drop()
                raise

    def close(self) -> None:
        self._idle.close_all()


def proxies_for(url: str) -> Dict[str, str]:
    """Return the proxies of the environment for `url`, by scheme; ConfigError for SOCKS."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or is_loopback(host) or urllib.request.proxy_bypass(host):
        return {}
    if "://" in proxy and not proxy.startswith("http://"):
        raise ConfigError(
            f"the proxy for {parts.scheme} is no http:// proxy: only those are supported"
        )
    return {parts.scheme: proxy}


@functools.lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Return whether `host` is this machine: localhost, 127.0.0.0/8 or ::1."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# --- retries


class RetryPolicy(NamedTuple):
    """How often and how long a request that was refused for the moment is tried again."""

    retries: int = 2
    patience: float = 20.0  # seconds of waiting in all


NO_RETRIES = RetryPolicy(0)

_TRANSIENT = frozenset({408, 409, 500, 502, 503, 504, 529})


def retry_delay(status: int, headers: HeaderList, attempt: int) -> Optional[float]:
    """Return the seconds to wait before the next try; None if upstream would not have one.

    429 without retry-after is a spending limit, where trying again is in vain.
    """
    if status < 300:
        return None
    fields = dict(headers)
    told, wait = fields.get("x-should-retry"), _retry_after(fields)
    transient = status in _TRANSIENT or (status == 429 and wait is not None)
    if told == "false" or not (transient or told == "true"):
        return None
    return wait if wait is not None else min(0.5 * 2**attempt, 8.0)


def _retry_after(fields: Dict[str, str]) -> Optional[float]:
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(fields.get(name, "")) / unit
            if 0 <= seconds < math.inf:
                return seconds
    return None


# What asks upstream yields requests and is sent the answers, or a ShimError is thrown in. So it
# need not know who waits: a worker or the relay of section 13, or `driven`.
Conversation = Generator[UpstreamRequest, UpstreamResponse, Outcome]


def send_with_retries(
    request: UpstreamRequest, policy: RetryPolicy
) -> Conversation[UpstreamResponse]:
    """Return upstream's answer after as many tries as `policy` allows, all before a byte is shown.

    UpstreamCutError for a redirect, which would carry the credential elsewhere.
    An answer that ends the tries says `x-should-retry: false`: clients would multiply them.
    """
    waited = 0.0
    for attempt in itertools.count():
        answer: Union[UpstreamResponse, UpstreamUnreachableError]
        try:
            answer = yield request
            _check_redirect(request, answer)
        except UpstreamUnreachableError as error:
            answer = error
        delay = retry_delay(answer.status, answer.headers, attempt)
        if delay is None or attempt >= policy.retries or waited + delay > policy.patience:
            return _final(answer, tries_spent=attempt > 0 and delay is not None)
        if isinstance(answer, UpstreamResponse):
            answer.source.close()
        request = request._replace(delay=delay)
        waited += delay
    raise AssertionError


def _check_redirect(request: UpstreamRequest, answer: UpstreamResponse) -> None:
    unchanged = answer.status == 304 and request.method == "GET"
    if 300 <= answer.status < 400 and not unchanged:
        answer.source.drop()
        raise UpstreamCutError(
            f"upstream answers with status {answer.status}, a redirect to"
            f" {redirect_target(answer.headers)}, which is not followed:"
            " --base-url is probably wrong"
        )


def _final(
    answer: Union[UpstreamResponse, UpstreamUnreachableError], tries_spent: bool
) -> UpstreamResponse:
    if tries_spent:
        kept = [(name, value) for name, value in answer.headers if name != "x-should-retry"]
        headers = [*kept, ("x-should-retry", "false")]
        if isinstance(answer, UpstreamResponse):
            return answer._replace(headers=headers)
        answer.headers = headers
    if isinstance(answer, UpstreamResponse):
        return answer
    raise answer


def answer_or_failure(
    upstream: Upstream, request: UpstreamRequest
) -> Union[UpstreamResponse, ShimError, ClientGone]:
    """Return upstream's answer to a request that is sent after its delay, or why there is none."""
    try:
        if request.delay:
            request.watch.wait(None, request.delay)
        return upstream.send(request)
    except (ShimError, ClientGone) as error:
        return error


def driven(conversation: Conversation[Outcome], upstream: Upstream) -> Outcome:
    """Return what a conversation comes to, waiting for each of its answers."""
    try:
        request = next(conversation)
        while True:
            answer = answer_or_failure(upstream, request)
            if isinstance(answer, UpstreamResponse):
                request = conversation.send(answer)
            else:
                request = conversation.throw(answer)
    except StopIteration as stop:
        outcome: Outcome = stop.value
        return outcome


# ----------------------------------------------------------------------
# 10. Upstream echo                                        uses: 0 2 4 9
# ----------------------------------------------------------------------
# A Messages upstream inside the file, for wiring up a client without a credential. It answers the
# same bytes to the same question, by the same events as the real one, and never leaves the process.

ECHO_ERROR = r"\[echo error ([45]\d\d)\]"
_ECHO_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


def echo_text(body: JSON) -> str:
    """Return the text of the last user turn, which is what the echo has to say."""
    for message in reversed(body.get("messages") or []):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            return content
        blocks = [b for b in content or () if isinstance(b, dict)]
        texts = [str(b["text"]) for b in blocks if b.get("type") == "text" and "text" in b]
        if texts or any(b.get("type") == "tool_result" for b in blocks):
            return "\n".join(texts) or "I got the result of the tool."
    return "(nothing was said)"


def echo_content(body: JSON) -> List[JSON]:
    """Return the blocks of the echo's answer: thinking if asked for, a call of the first tool if it
    was not called yet, JSON if a schema is given, else the text."""
    blocks: List[JSON] = []
    if (body.get("thinking") or {}).get("type") in ("adaptive", "enabled"):
        blocks.append(
            {"type": "thinking", "thinking": "What was I asked?", "signature": "ZWNobw=="}
        )
    format = (body.get("output_config") or {}).get("format")
    tool = next((t for t in body.get("tools") or () if "input_schema" in t), None)
    answered = '"tool_result"' in json.dumps(body.get("messages"))
    if tool and not answered and (body.get("tool_choice") or {}).get("type") != "none":
        sample = echo_sample(tool["input_schema"])
        blocks.append(
            {"type": "tool_use", "id": "toolu_echo", "name": tool["name"], "input": sample}
        )
    elif format:
        blocks.append({"type": "text", "text": json.dumps(echo_sample(format.get("schema")))})
    else:
        blocks.append({"type": "text", "text": echo_text(body)})
    return blocks


def echo_sample(schema: Any) -> Any:
    """Return the plainest value that fits `schema`."""
    schema = object_or_empty(schema)
    for values in ([schema["const"]] if "const" in schema else [], schema.get("enum")):
        if isinstance(values, list) and values:
            return values[0]
    for union in ("anyOf", "allOf"):
        if isinstance(schema.get(union), list) and schema[union]:
            return echo_sample(schema[union][0])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if kind == "object":
        members = object_or_empty(schema.get("properties"))
        return {name: echo_sample(member) for name, member in members.items()}
    plain = {"array": [], "integer": 1, "number": 1.5, "boolean": True, "null": None}
    return plain.get(kind if isinstance(kind, str) else "string", "echo")


def echo_events(body: JSON) -> List[JSON]:
    """Return the Messages events of the echo's answer to a Messages request."""
    content = echo_content(body)
    called = content[-1]["type"] == "tool_use"
    usage = {"input_tokens": echo_tokens(body), "output_tokens": 1}
    message: JSON = {
        "id": "msg_echo",
        "type": "message",
        "role": "assistant",
        "model": body.get("model"),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
    events: List[JSON] = [{"type": "message_start", "message": message}]
    for index, block in enumerate(content):
        events.extend(_echo_block(index, block))
    delta = {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}
    spoken = {"output_tokens": max(1, len(json.dumps(content)) // 4)}
    events.append({"type": "message_delta", "delta": delta, "usage": spoken})
    return [*events, {"type": "message_stop"}]


def _echo_block(index: int, block: JSON) -> Iterator[JSON]:
    kind = block["type"]
    empty: JSON = {
        "text": {"text": ""},
        "thinking": {"thinking": "", "signature": ""},
        "tool_use": {"input": {}},
    }
    yield {"type": "content_block_start", "index": index, "content_block": {**block, **empty[kind]}}
    if kind == "tool_use":
        pieces = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
    else:
        pieces = [{"type": f"{kind}_delta", kind: word} for word in _echo_words(block[kind])]
    if kind == "thinking":
        pieces.append({"type": "signature_delta", "signature": block["signature"]})
    for piece in pieces:
        yield {"type": "content_block_delta", "index": index, "delta": piece}
    yield {"type": "content_block_stop", "index": index}


def _echo_words(text: str) -> List[str]:
    """The text word by word; a long one, whose words would fill the memory, in 1,000 pieces."""
    if len(text) <= 10_000:
        return re.findall(r"\S+\s*|\s+", text)
    size = math.ceil(len(text) / 1000)
    return [text[start : start + size] for start in range(0, len(text), size)]


def echo_tokens(body: JSON) -> int:
    """Return a rough count of the tokens of a request: four bytes each."""
    return max(1, len(json.dumps(body.get("messages"))) // 4)


class EchoUpstream(Upstream):
    """Answers every Messages request with its own last words; `[echo error 429]` in them fails."""

    url = "echo"

    def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Return the echo's answer, an error body included."""
        path = request.path.partition("?")[0]
        if path == "/v1/messages" and request.method == "POST":
            return self._message(self._checked(request.body))
        if path == "/v1/messages/count_tokens" and request.method == "POST":
            return self._json(200, {"input_tokens": echo_tokens(self._checked(request.body))})
        if path == "/v1/models":
            return self._json(200, {"data": [], "has_more": False})
        return self._error(404, "the echo has messages and nothing else")

    @staticmethod
    def _checked(raw: bytes) -> JSON:
        """The body, if the real one would take its form."""
        body = loads_object(raw)
        as_boolean(body.get("stream", False), "stream")
        for field in ("thinking", "output_config", "tool_choice"):
            as_object(body.get(field) or {}, field)
        for number, message in enumerate(as_list(body.get("messages"), "messages")):
            content = as_object(message, f"messages.{number}").get("content")
            as_text(message.get("role"), f"messages.{number}.role")
            if not isinstance(content, str):
                as_list(content, f"messages.{number}.content")
        for number, tool in enumerate(as_list(body.get("tools") or [], "tools")):
            as_text(as_object(tool, f"tools.{number}").get("name"), f"tools.{number}.name")
        return body

    def _message(self, body: JSON) -> UpstreamResponse:
        wanted = re.search(ECHO_ERROR, echo_text(body))
        if wanted:
            return self._error(int(wanted.group(1)), "you asked for this error")
        events = echo_events(body)
        if body.get("stream"):
            frames = [server_sent_event(dumps(event), event["type"]) for event in events]
            headers = [("content-type", "text/event-stream"), ("request-id", "req_echo")]
            return UpstreamResponse(200, headers, BytesSource(b"".join(frames)))
        usage = {**events[0]["message"]["usage"], **events[-2]["usage"]}
        whole = {**events[0]["message"], "content": echo_content(body), "usage": usage}
        return self._json(200, {**whole, **events[-2]["delta"]})

    def _error(self, status: int, message: str) -> UpstreamResponse:
        type_ = _ECHO_TYPES.get(status, "api_error")
        return self._json(status, {"type": "error", "error": {"type": type_, "message": message}})

    @staticmethod
    def _json(status: int, body: JSON) -> UpstreamResponse:
        headers = [("content-type", "application/json"), ("request-id", "req_echo")]
        return UpstreamResponse(status, headers, BytesSource(dumps(body)))


# ----------------------------------------------------------------------
# 11. Log                                                        uses: 0
# ----------------------------------------------------------------------
# One line a request, of fixed fields. No bodies, no query strings, no header values, no secrets;
# what comes from outside is escaped and cut, so that nobody can write a line of their own.


class Record(NamedTuple):
    """What is logged of one request."""

    method: str
    path: str
    status: int
    seconds: float
    request_id: str
    model: str = ""
    key_name: str = ""
    outcome: str = "ok"  # or why the answer did not end regularly


def plain(text: str, limit: int = 120) -> str:
    """Return `text` for a log: printable ASCII without spaces, cut to `limit`."""
    text = text[:limit]
    if text.isascii() and text.isprintable() and " " not in text:
        return text or "-"
    return _NOT_PLAIN.sub("_", text)


_NOT_PLAIN = re.compile(r"[^\x21-\x7e]")


def _poll_of(stream: Optional[TextIO]) -> Optional[select.poll]:
    """What says whether a pipe or socket can be written to; None for what never waits."""
    if stream is None or not hasattr(select, "poll"):
        return None
    poll = select.poll()
    try:
        mode = os.fstat(stream.fileno()).st_mode
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return None
    return poll if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None


def log_line(record: Record) -> str:
    """Return the line for one request."""
    method, path, status, seconds, *others = record
    words = [word or "-" for word in (method[:10], path, *others)]
    together = "".join(words)
    if plain(together) != together:
        words = [plain(word) for word in words]
    method, path, id, model, key, outcome = words
    return f"{method} {path} {status} {seconds * 1000:.1f}ms {id} model={model} key={key} {outcome}"


def spellings(secret: str) -> List[str]:
    """Return the forms in which a secret may turn up: as it is, in base64, percent-encoded.

    In base64 it looks different behind each number of bytes (modulo 3), and its ends mix with
    what is beside it: those are left out.
    """
    if not secret:
        return []
    found = {secret, urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret)}
    raw = secret.encode("utf-8", "replace")
    for shift in range(3) if len(raw) >= 12 else ():
        whole = base64.b64encode(bytes(shift) + raw).decode()
        inner = whole[math.ceil(shift * 8 / 6) : (shift + len(raw)) * 8 // 6]
        found |= {inner, inner.translate(_URL_SAFE)}
    return sorted(found)


_URL_SAFE = str.maketrans("+/", "-_")


class Log:
    """Writes lines to `stream` (None: nowhere), with every known secret masked."""

    def __init__(
        self, stream: Optional[TextIO] = None, secrets: Iterable[str] = (), quiet: bool = False
    ) -> None:
        self._stream = stream
        self.quiet = quiet  # about requests; notes and faults are written all the same
        self._secrets: List[str] = []
        self._renewed: Deque[str] = deque(maxlen=64)
        self._masked: List[str] = []
        self._lock = threading.Lock()
        self._told: List[str] = []
        self._lost = 0  # lines
        self._ready = _poll_of(stream)
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        """Mask these, too, from now on."""
        with self._lock:
            self._secrets += [spelling for secret in secrets for spelling in spellings(secret)]
            self._masked = self._longest_first()

    def hide(self, secret: str) -> None:
        """Mask one more secret from now on; of those that come and go, the latest are kept."""
        with self._lock:
            self._renewed.extend(s for s in spellings(secret) if s not in self._masked)
            self._masked = self._longest_first()

    def _longest_first(self) -> List[str]:
        return sorted({*self._secrets, *self._renewed}, key=len, reverse=True)

    def masked(self, text: str) -> str:
        """Return `text` with every known secret replaced."""
        for secret in self._masked:
            text = text.replace(secret, "[secret]")
        return text

    def write(self, line: str) -> None:
        """Write one line; a log that cannot be written, or is not read, must not stop an answer."""
        if self._stream is None:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):
            if not self._takes_a_line():
                self._lost += 1
                return
            lost = f"note: {self._lost} lines were lost\n" if self._lost else ""
            self._lost = 0
            self._stream.write(f"{lost}{self.masked(line)}\n")
            self._stream.flush()

    def _takes_a_line(self) -> bool:
        """Whether a write would not wait: a pipe that is ready takes 4 KiB."""
        return self._ready is None or bool(self._ready.poll(0))

    def once(self, line: str) -> None:
        """Write a line that was not written before; only the first 1,000 are."""
        with self._lock:
            known = line in self._told or len(self._told) >= 1000
            if not known:
                self._told.append(line)
        if not known:
            self.write(line)


# ----------------------------------------------------------------------
# 12. Endpoints                             uses: 0 1 2 3 4 5 6 7 8 9 11
# ----------------------------------------------------------------------
# Request in, Response out. Nothing here knows sockets of clients; a body that is still coming is a
# Stream or a Gathered, which section 13 pumps.

GET_SECONDS = 5.0  # for what upstream answers at once: its models


class Request(NamedTuple):
    """One request of a client, read to the end."""

    method: str
    path: str  # as the client wrote it, with the query
    headers: Dict[str, str]  # names in lower case
    body: bytes = b""
    request_id: str = ""
    watch: ClientWatch = ClientWatch()
    key_name: str = ""  # of the client key that it showed


class Transform:
    """Upstream's bytes in, the client's bytes out; here: the same bytes."""

    complete = False  # nothing is missing; after `end` at the latest
    failed = False
    heartbeat = b""

    def feed(self, burst: bytes) -> bytes:
        """Return what the client gets for `burst`."""
        return burst

    def end(self, error: Optional[ShimError] = None) -> bytes:
        """Return what the client gets when no more comes; `complete` says whether all is well."""
        self.complete = error is None
        return b""


class Stream(NamedTuple):
    """An answer that goes to the client as it comes."""

    source: Source
    transform: Union[Transform, EventTransform]


class Gathered(NamedTuple):
    """An answer that is made when all of its sources have ended."""

    streams: List[Stream]
    response: Callable[[], Response]


class Response(NamedTuple):
    """An answer to a client."""

    status: int
    headers: HeaderList
    body: Union[bytes, Stream, Gathered] = b""
    model: str = ""  # for the log


Answering = Union[Response, Conversation[Response]]


class RelayTransform(Transform):
    """Messages events as they came, one whole event at a time.

    A stream that breaks off gets an `error` event: it must not look finished.
    """

    heartbeat = server_sent_event(b'{"type": "ping"}', "ping")

    def __init__(self) -> None:
        self._rest = b""
        self._tail = b""

    def feed(self, burst: bytes) -> bytes:
        if burst.endswith(b"\n\n") and not self._rest:  # as mostly
            self._tail = (self._tail + burst[-4096:])[-4096:]
            return burst
        buffer = self._rest + burst
        marks = (b"\n\n", b"\r\n\r\n", b"\r\r")
        end = max(buffer.rfind(mark) + len(mark) if mark in buffer else 0 for mark in marks)
        self._rest = buffer[end:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise UpstreamCutError(f"upstream sent an event of more than {MAX_EVENT_BYTES} bytes")
        self._tail = (self._tail + buffer[max(0, end - 4096) : end])[-4096:]
        return buffer[:end]

    def end(self, error: Optional[ShimError] = None) -> bytes:
        last = self._last_type()
        self.complete = last == "message_stop"
        if last in ("message_stop", "error"):
            return self._rest
        cut = error or UpstreamCutError("upstream ended in the middle of the answer")
        return server_sent_event(dumps(anthropic_error(cut)[1]), "error")

    def _last_type(self) -> Any:
        """The type of the last event that went by, pings apart."""
        blocks = EventDecoder().feed(self._tail).split(b"\n\n")
        with contextlib.suppress(UpstreamCutError):
            events = (parsed_event(block) for block in reversed(blocks) if block)
            types = (event.get("type") for event in events if event)
            return next((type_ for type_ in types if type_ != "ping"), "")
        return ""


class ResumingSource(Source):
    """The events of a turn that upstream pauses, as one message: `ask` has it go on."""

    MAX_RESUMPTIONS = 20

    def __init__(
        self, source: Source, request: JSON, ask: Callable[[JSON], Conversation[Source]]
    ) -> None:
        self._source = source
        self._request = request
        self._ask = ask
        self._joiner = TurnJoiner()
        self._events = EventDecoder()
        self._resumptions = 0
        self._follow()

    def ready(self) -> bool:
        return self._source.ready()

    def read(self) -> Optional[bytes]:
        burst = self._source.read()
        return self._joined(self._events.feed(burst)) or None if burst else burst

    def rests(self) -> bool:
        return self._source.rests()

    def _joined(self, events: bytes) -> bytes:
        parsed = (parsed_event(block + b"\n\n") for block in events.split(b"\n\n") if block)
        kept = (self._joiner.feed(event) for event in parsed if event is not None)
        return b"".join(
            server_sent_event(dumps(e), str(e.get("type"))) for e in kept if e is not None
        )

    def resumption(self) -> Optional[Conversation[None]]:
        self._resumptions += 1
        if not self._joiner.paused or self._resumptions > self.MAX_RESUMPTIONS:
            return None
        return self._resumed()

    def _resumed(self) -> Conversation[None]:
        self._source.close()
        self._source, self.sock = BytesSource(b""), None
        self._request = self._joiner.resumed(self._request)
        self._source = yield from self._ask(self._request)
        self._events = EventDecoder()
        self._follow()

    def _follow(self) -> None:
        self.sock, self.deadline = self._source.sock, self._source.deadline
        self.silence_seconds = self._source.silence_seconds

    def close(self) -> None:
        self._source.close()

    def drop(self) -> None:
        self._source.drop()


class ThinkingMemory:
    """Thinking blocks by the id of the call they led to, for clients that do not send them back.

    Bounded; what is lost costs a thought, not an answer.
    """

    def __init__(self, max_bytes: int = 16 << 20) -> None:
        self._max_bytes = max_bytes
        self._turns: OrderedDict[str, Tuple[List[JSON], int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.tell: Optional[Callable[[bytes], None]] = None  # other processes, which `hear` it

    def remember(self, tool_use_ids: List[str], blocks: List[JSON]) -> None:
        """Keep `blocks` under each of the ids."""
        if not tool_use_ids or not blocks:
            return
        self._keep(tool_use_ids, blocks)
        if self.tell:
            self.tell(dumps([tool_use_ids, blocks]))

    def hear(self, told: bytes) -> None:
        """Keep what another process was told to remember."""
        self._keep(*loads(told))

    def _keep(self, tool_use_ids: List[str], blocks: List[JSON]) -> None:
        size = len(dumps(blocks))
        with self._lock:
            for id in tool_use_ids:
                self._bytes += size - self._turns.pop(id, ([], 0))[1]
                self._turns[id] = (blocks, size)
            while self._bytes > self._max_bytes:
                self._bytes -= self._turns.popitem(last=False)[1][1]

    def recall(self, tool_use_id: str) -> List[JSON]:
        """Return the blocks kept under an id; an empty list when there are none."""
        with self._lock:
            return self._turns.get(tool_use_id, ([], 0))[0]


class StoreFault(ShimError):
    """500: the store of responses cannot be used."""


class ResponseStore:
    """Responses that a later request may name; each belongs to one client.

    An SQLite database, in memory or in the file `place`. What nobody used for some hours is
    forgotten, and what was used the longest ago when there is too much. StoreFault when the
    database fails.
    """

    LIMITS = {"memory": (64 << 20, 24)}  # bytes and hours
    FILE_LIMITS = (1 << 30, 30 * 24)
    LOCK_SECONDS = 5.0  # for other processes, in turn, to finish their transactions
    SAVE_SECONDS = 0.5  # for another process to write what it has just answered
    patience = 0.0  # seconds for another process to write what is asked for

    def __init__(self, place: str = "memory", clock: Callable[[], float] = time.time) -> None:
        self.place = place
        self._path = ":memory:" if place in ("memory", "off") else os.path.expanduser(place)
        self.max_bytes, self._hours = self.LIMITS.get(place, self.FILE_LIMITS)
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: Optional[sqlite3.Connection] = None
        self._unsaved: Deque[Tuple[str, Sequence[JSON], JSON]] = deque()
        self._uncounted = self._room = 0  # bytes since all were counted, and until they are again

    def share(self, path: str) -> None:
        """Serve several processes, with a file at `path` for what would be in memory."""
        self._path = path if self.place == "memory" else self._path
        self.patience = self.SAVE_SECONDS
        self.check()
        self.close()  # a connection must not be taken along to another process

    def put(self, owner: str, items: Sequence[JSON], response: JSON) -> None:
        """Keep a response, with the items of its own request; `save` writes it, or what reads."""
        if self.place != "off":
            self._unsaved.append((owner, items, response))

    def save(self) -> None:
        """Write what was put; StoreFault when the database fails."""
        with self._database():
            pass

    def _save(self, database: sqlite3.Connection) -> None:
        while self._unsaved:
            self._insert(database, *self._unsaved.popleft())

    def _insert(
        self, database: sqlite3.Connection, owner: str, items: Sequence[JSON], response: JSON
    ) -> None:
        id, previous = response["id"], response["previous_response_id"] or ""
        texts = [dumps(items).decode("ascii"), dumps(response).decode("ascii")]
        row = (owner, id, previous, self._clock(), sum(map(len, texts)), *texts)
        named = [(owner, item["id"], id) for item in response["output"]]
        database.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", named)
        self._forget(database, row[4])

    def response(self, owner: str, id: str) -> Optional[JSON]:
        """Return a response as it was given."""
        row = self._row(owner, id)
        return None if row is None else object_or_empty(json.loads(row[2]))

    def history(self, owner: str, id: str) -> Optional[List[JSON]]:
        """Return all items up to and with a response; None if any of them is gone."""
        items = self._before(owner, id)
        return None if items is None else [*items[0], *items[1]]

    def input_items(self, owner: str, id: str) -> Optional[List[JSON]]:
        """Return the items that a response was made of, each with an id."""
        items = self._before(owner, id)
        return None if items is None else with_ids(items[0], id)

    def _before(self, owner: str, id: str) -> Optional[Tuple[List[JSON], List[JSON]]]:
        """What a response was made of, and what it said."""
        items: List[JSON] = []
        said: Optional[List[JSON]] = None
        while id or said is None:
            row = self._row(owner, id)
            if row is None:
                return None
            output = json.loads(row[2])["output"]
            items = [*json.loads(row[1]), *(output if said is not None else []), *items]
            said, id = output if said is None else said, row[0]
        return items, said

    def item(self, owner: str, id: str) -> Optional[JSON]:
        """Return an item of an earlier response."""
        found = self._found("SELECT response FROM items WHERE owner = ? AND id = ?", owner, id)
        output = (self.response(owner, found[0]) or {"output": []})["output"] if found else []
        return next((item for item in output if item["id"] == id), None)

    def delete(self, owner: str, id: str) -> bool:
        """Forget a response; False if there is none."""
        with self._database() as database:
            query = "DELETE FROM responses WHERE owner = ? AND id = ?"
            return bool(database.execute(query, (owner, id)).rowcount)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    __del__ = close

    def _row(self, owner: str, id: str) -> Optional[Tuple[str, str, str]]:
        """The previous response, the input and the response itself."""
        with self._database() as database:
            update = "UPDATE responses SET used = ? WHERE owner = ? AND id = ?"
            database.execute(update, (self._clock(), owner, id))
        query = "SELECT previous, input, response FROM responses WHERE owner = ? AND id = ?"
        row: Optional[Tuple[str, str, str]] = self._found(query, owner, id)
        return row

    def _found(self, query: str, owner: str, id: str) -> Any:
        """The row of a query; a client may name an answer before its process has written it."""
        end = time.monotonic() + self.patience
        while True:
            with self._database() as database:
                row = database.execute(query, (owner, id)).fetchone()
            if row or time.monotonic() >= end:
                return row
            time.sleep(0.01)

    def check(self) -> None:
        """Open the database; StoreFault if that cannot be done."""
        with self._database():
            pass

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The database, for one transaction."""
        try:
            import sqlite3  # most programs never need it
        except ImportError:
            raise StoreFault("this Python has no sqlite3; use --responses-store off") from None
        with self._lock:
            try:
                if self._connection is None:
                    path, wait = self._file(), self.LOCK_SECONDS
                    database = sqlite3.connect(path, timeout=wait, check_same_thread=False)
                    self._connection = _with_tables(database)
                with self._connection:
                    self._save(self._connection)
                    yield self._connection
            except (sqlite3.Error, OSError) as error:
                raise StoreFault(f"the store of responses ({self.place}): {error}") from None

    def _file(self) -> str:
        """The path of the database, which only its owner may read."""
        if self._path != ":memory:":
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        return self._path

    def _forget(self, database: sqlite3.Connection, added: int) -> None:
        oldest = (self._clock() - self._hours * 3600,)
        database.execute("DELETE FROM responses WHERE used < ?", oldest)
        self._uncounted += added
        if self._uncounted > self._room:  # by now there may be too much; counting takes a while
            total = database.execute("SELECT sum(bytes) FROM responses").fetchone()[0] or 0
            enough = self.max_bytes - self.max_bytes // 64
            rows = "SELECT rowid, bytes FROM responses ORDER BY used"
            for rowid, size in database.execute(rows).fetchall() if total > self.max_bytes else ():
                if total <= enough:
                    break
                database.execute("DELETE FROM responses WHERE rowid = ?", (rowid,))
                total -= size
            self._uncounted, self._room = 0, min(self.max_bytes - total, self.max_bytes // 64)


def _with_tables(database: sqlite3.Connection) -> sqlite3.Connection:
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(database.close)
        database.executescript(_STORE_TABLES)
        on_failure.pop_all()
    return database


_STORE_TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS responses (
    owner TEXT, id TEXT, previous TEXT, used REAL, bytes INTEGER, input TEXT, response TEXT,
    PRIMARY KEY (owner, id)
);
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used, bytes);
CREATE TABLE IF NOT EXISTS items (owner TEXT, id TEXT, response TEXT, PRIMARY KEY (owner, id));
CREATE INDEX IF NOT EXISTS items_by_response ON items (owner, response);
CREATE TRIGGER IF NOT EXISTS items_go AFTER DELETE ON responses BEGIN
    DELETE FROM items WHERE owner = OLD.owner AND response = OLD.id;
END;
"""


def kept_key(path: str) -> bytes:
    """Return the key in a file that only its owner may read, made if it is not there; OSError.

    Without a path the key is a new one.
    """
    if not path:
        return secrets.token_bytes(32)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        draft = f"{path}.{secrets.token_hex(8)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(draft, path)
        finally:
            os.unlink(draft)

    try:
        text = read_secret_file(path).strip()
    except ConfigError as error:
        raise OSError(errno.EINVAL, str(error)) from None
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise OSError(errno.EINVAL, "holds no key of 64 hexadecimal digits")
    return bytes.fromhex(text)


class Catalogue:
    """What is known of models: upstream's own list, the table, and what refusals taught."""

    FRESH_SECONDS = 3600.0
    RETRY_SECONDS = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = clock()
        self._learned: Dict[str, Model] = {}
        self.live: Dict[str, Tuple[Model, JSON]] = {}
        self._lock = threading.Lock()

    def claim(self) -> bool:
        """Return whether it is time to ask upstream; only one caller is told so."""
        if self._clock() < self._due:
            return False
        with self._lock:
            due = self._clock() >= self._due
            if due:
                self._due = self._clock() + self.RETRY_SECONDS
            return due

    def update(self, entries: Iterable[Any]) -> None:
        """Take the entries of upstream's GET /v1/models."""
        objects = [entry for entry in entries if isinstance(entry, dict)]
        models = [(model_from_live(entry), entry) for entry in objects]
        with self._lock:
            self.live = {model.id: (model, entry) for model, entry in models if model}
            self._due = self._clock() + self.FRESH_SECONDS

    def models(self) -> List[Model]:
        """Return upstream's models, or an empty list while it has not told."""
        return [model for model, _ in self.live.values()]

    def model(self, id: str) -> Model:
        """Return what is known of one model."""
        known = self.live.get(id)
        return self._learned.get(id) or (known[0] if known else known_model(id))

    def learn(self, model: Model) -> None:
        """Remember what a refusal taught."""
        with self._lock:
            self._learned[model.id] = model

    def entries(self) -> List[JSON]:
        """Return the entries of our GET /v1/models."""
        if self.live:
            return [model_entry(model, entry) for model, entry in self.live.values()]
        return [model_entry(model, {}) for model in MODELS]


class Policy(NamedTuple):
    """What an operator decides about requests."""

    client_keys: ClientKeys = ClientKeys()
    aliases: Dict[str, str] = {}
    prompt_cache: str = "5m"  # off, 5m, 1h
    strict: bool = False  # a field without effect is a 400
    retries: RetryPolicy = RetryPolicy()
    live_models: bool = True
    responses_store: str = "memory"  # off, memory, or the file of a database
    fallback: Optional[Credential] = None  # who pays when the first does not
    allowed_origins: FrozenSet[str] = frozenset()  # of web pages that may call


class ChatForm(NamedTuple):
    """One of the two forms of OpenAI's completions."""

    encoder: Type[ChatStreamEncoder]
    whole: Callable[[Sequence[JSON], ChatReply], bytes]


CHAT_FORM = ChatForm(ChatStreamEncoder, chat_json)
LEGACY_FORM = ChatForm(
    CompletionStreamEncoder,
    lambda messages, reply: dumps(completion_from_messages(messages, reply)),
)


class Form(NamedTuple):
    """How one answer is given: streamed, or whole, made of one message per choice."""

    encoder: Callable[[], EventSink]
    whole: Callable[[Sequence[JSON]], bytes]


MAX_CURES = 4  # of one request; each costs a round trip


class Asked(NamedTuple):
    """An answer of upstream that has begun."""

    source: Source
    headers: HeaderList
    changed: Tuple[str, ...]


class Route(NamedTuple):
    """One endpoint. In `path`, {id} stands for some characters, [/...] for nothing or a subpath."""

    methods: Tuple[str, ...]
    path: str
    endpoint: str  # the method of App
    summary: str
    open: bool = False  # without a client key

    def serves(self, path: str) -> bool:
        """Return whether this is the route of a normalised path."""
        pattern = re.escape(self.path).replace(r"\{id\}", ".+").replace(r"\[/\.\.\.\]", "(?:/.*)?")
        return bool(re.fullmatch(pattern, path))


_READ = ("GET", "HEAD")
_STORE = ("GET", "POST", "DELETE")

ROUTES: Tuple[Route, ...] = (
    Route(("POST",), "/v1/chat/completions", "chat_completions", "OpenAI chat, streamed or not"),
    Route(("POST",), "/v1/completions", "completions", "OpenAI's legacy completions"),
    Route(("POST",), "/v1/messages", "messages", "Anthropic messages, relayed byte for byte"),
    Route(
        ("POST",), "/v1/messages/count_tokens", "count_tokens", "relayed; an estimate if refused"
    ),
    Route(_STORE, "/v1/messages/batches[/...]", "relay", "Anthropic's batches, relayed"),
    Route(_STORE, "/v1/skills[/...]", "relay", "Anthropic's skills, relayed"),
    Route(_STORE, "/v1/files[/...]", "files", "Anthropic's files, with `anthropic-version` only"),
    Route(_READ, "/v1/models", "models", "models with limits and capabilities, for both SDKs"),
    Route(_READ, "/v1/chat/models", "models", "the same"),
    Route(_READ, "/v1/models/{id}", "model", "one model, by id or alias"),
    Route(
        ("GET", "POST"), "/v1/responses", "responses", "OpenAI's Responses; GET: 426, no WebSocket"
    ),
    Route(("POST",), "/v1/responses/input_tokens", "input_tokens", "how long the input is"),
    Route(("POST",), "/v1/responses/compact", "compact", "a conversation as a summary"),
    Route(("POST",), "/v1/responses/{id}/cancel", "cancel", "400: none runs in the background"),
    Route(
        _READ, "/v1/responses/{id}/input_items", "input_items", "what a stored answer was made of"
    ),
    Route(("GET", "HEAD", "DELETE"), "/v1/responses/{id}", "response", "a stored answer"),
    Route(_READ, "/", "health", "is it up", True),
    Route(_READ, "/v1", "health", "is it up", True),
    Route(_READ, "/health", "health", "is it up; `?deep=1`: is the credential taken", True),
    Route(_READ, "/healthz", "health", "is it up", True),
    Route(_READ, "/ping", "health", "is it up", True),
    Route(_READ, "/version", "health", "is it up", True),
    Route(_READ, "/openapi.json", "openapi", "this table as an OpenAPI 3.1 description"),
)

_PREFIXES = re.compile(
    r"^(?:/openai(?=/|$)|/api(?=/v1)|(?:/v1)?/(?:engines|deployments)/[^/]+(?=/))"
)
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?=/|$)", re.IGNORECASE)
_HIDDEN_SLASH = r"%2[fF]|%5[cC]|\\"
_DEPLOYMENT = re.compile(r"/(?:deployments|engines)/([^/]+)/")
_TWICE = re.compile(
    r"^/v1/(?:chat/completions|completions|messages|responses)(?:/v1)?"
    r"/(chat/completions|completions|messages|responses|models)$"
)


def normalised_path(target: str) -> str:
    """Return the path as ROUTES has it, from the many ways that base URLs are set."""
    return _normalised(target.partition("?")[0])


@functools.lru_cache(maxsize=64)
def _normalised(path: str) -> str:
    path = re.sub(r"/{2,}", "/", path).rstrip("/") or "/"
    while _PREFIXES.search(path):
        path = _PREFIXES.sub("", path) or "/"
    path = re.sub(r"^(?:/v1)+(?=/|$)", "/v1", path)
    if not path.startswith("/v1") and route_of("/v1" + path) and not route_of(path):
        path = "/v1" + path
    return _TWICE.sub(r"/v1/\1", path)


@functools.lru_cache(maxsize=64)
def route_of(path: str) -> Optional[Route]:
    """Return the route of a normalised path; none for one with dots, which could climb upstream."""
    return (
        None
        if _DOTS.search(path)
        else next((route for route in ROUTES if route.serves(path)), None)
    )


def speaks_anthropic(path: str, headers: Dict[str, str]) -> bool:
    """Return whether a request is in Anthropic's dialect, so that errors are, too."""
    if re.match(r"/v1/(?:messages|skills)(?:/|$)", path):
        return True
    openai = re.match(r"/v1/(?:chat/)?(?:completions|responses)(?:/|$)", path)
    return not openai and "anthropic-version" in headers


_OWN_HEADERS = ("allow", "accept-encoding")  # of errors that are ours: what would be taken instead
_RELAYED_TO_UPSTREAM = re.compile(
    r"anthropic-.*|x-stainless-.*|x-claude-code-.*|x-app|user-agent|accept|content-type|idempotency-key"
)
_RELAYED_TO_CLIENT = re.compile(
    r"anthropic-.*|request-id|retry-after|retry-after-ms|x-should-retry|content-type|content-disposition"
    r"|x-claude-shim-billing"
)
# Codex sends a request six times in all on these; a 400 it believes.
CODEX_REPEATS = {404: 400, 413: 400, 422: 400}


def responses_status(status: int, body: JSON, headers: HeaderList, client: Dict[str, str]) -> int:
    """Return the status of an error of POST /v1/responses that Codex repeats no more than it must.

    It knows no x-should-retry, and sends a request thirty times on a 5xx other than overload.
    """
    final = ("x-should-retry", "false") in headers and client.get("originator", "")[:5] == "codex"
    if final and status >= 500 and body["error"]["code"] != "server_is_overloaded":
        return 400
    return CODEX_REPEATS.get(status, status)


_RATE_LIMITS = re.compile(r"anthropic-ratelimit-(requests|tokens)-(limit|remaining|reset)")
_TOLD_AS_IT_IS = re.compile(
    r"retry-after(?:-ms)?|x-should-retry|anthropic-ratelimit-.*|x-claude-shim-billing"
)


def _openai_names(name: str) -> List[str]:
    """What a header field of upstream's answer is called for an OpenAI client."""
    limit = _RATE_LIMITS.fullmatch(name)
    renamed = [f"x-ratelimit-{limit.group(2)}-{limit.group(1)}"] if limit else []
    if name == "request-id":
        renamed.append("x-request-id")
    return [*renamed, name] if _TOLD_AS_IT_IS.fullmatch(name) else renamed


@functools.lru_cache(maxsize=16)  # an upstream has few sets of fields
def _told(names: Tuple[str, ...]) -> List[Tuple[int, str, bool]]:
    """Which of upstream's fields an OpenAI client is told: where, the name, whether an instant."""
    told = [(at, told) for at, name in enumerate(names) for told in _openai_names(name)]
    return [(at, name, name in _RESETS) for at, name in told]


def openai_headers(headers: HeaderList, now: float) -> HeaderList:
    """Return the header fields of upstream's answer that an OpenAI client understands."""
    values = list(map(VALUE_OF, headers))
    return [
        (name, duration(values[at], now) if instant else values[at])
        for at, name, instant in _told(tuple(map(NAME_OF, headers)))
    ]


_RESETS = frozenset({"x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"})


def duration(until: str, now: float) -> str:
    """Return the time from `now` until an RFC 3339 instant as OpenAI writes it, such as 6m0s."""
    instant = _instant(until)
    if instant is None:
        return until
    seconds = instant - now
    minutes, rest = divmod(max(0, math.ceil(seconds)), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


@functools.lru_cache(maxsize=64)
def _instant(text: str) -> Optional[float]:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


# --- the description of the endpoints


def _object_schema(required: Sequence[str], **properties: JSON) -> JSON:
    return {"type": "object", "required": list(required), "properties": properties}


_ANY_TEXT: JSON = {"type": "string"}
_TEXT_SCHEMA: JSON = {"type": "string", "pattern": "\\S"}
_STREAM_SCHEMA: JSON = {"type": ["boolean", "null"], "default": False}
_MODEL_SCHEMA: JSON = {
    "type": "string",
    "description": "a Claude id, opus, sonnet, haiku or an alias",
    "examples": ["sonnet"],
}
_CHAT_MESSAGE = _object_schema(
    ("role", "content"),
    role={"enum": ["developer", "system", "user", "assistant"]},
    content={**_TEXT_SCHEMA, "description": "or parts, as OpenAI and Anthropic describe them"},
)
_MESSAGE = _object_schema(
    ("role", "content"),
    role={"type": "string", "examples": ["user"]},
    content={"type": ["string", "array"]},
)

# Endpoint -> what the body of a POST cannot do without; all else that is taken is in the README.
REQUEST_SCHEMAS: Dict[str, JSON] = {
    "chat_completions": _object_schema(
        ("model", "messages"),
        model=_MODEL_SCHEMA,
        messages={
            "type": "array",
            "items": _CHAT_MESSAGE,
            "contains": {"properties": {"role": {"enum": ["user", "assistant"]}}},
        },
        stream=_STREAM_SCHEMA,
    ),
    "completions": _object_schema(
        ("model", "prompt"), model=_MODEL_SCHEMA, prompt=_TEXT_SCHEMA, stream=_STREAM_SCHEMA
    ),
    "responses": _object_schema(
        ("model", "input"),
        model={**_MODEL_SCHEMA, "pattern": "^(claude-.|opus$|sonnet$|haiku$)"},  # or it is a 400
        input=_TEXT_SCHEMA,
        stream=_STREAM_SCHEMA,
    ),
    **dict.fromkeys(
        ("compact", "input_tokens"),
        _object_schema(("model", "input"), model=_MODEL_SCHEMA, input=_TEXT_SCHEMA),
    ),
    "cancel": _object_schema(()),
    "messages": _object_schema(
        ("model", "messages"),
        model=_MODEL_SCHEMA,
        messages={"type": "array", "items": _MESSAGE, "minItems": 1},
        stream={"type": "boolean", "default": False},
    ),
    "count_tokens": _object_schema(
        ("model", "messages"),
        model=_MODEL_SCHEMA,
        messages={"type": "array", "items": _MESSAGE},
    ),
}
_JSON_CONTENT: JSON = {"application/json": {"schema": {"type": "object"}}}
_ANY_CONTENT: JSON = {"*/*": {}}

_TEXT_OR_NULL: JSON = {"type": ["string", "null"]}
_ERRORS: Dict[str, JSON] = {
    "OpenAIError": _object_schema(
        ("error",),
        error=_object_schema(
            ("message", "type", "param", "code"),
            message=_ANY_TEXT,
            type=_ANY_TEXT,
            param=_TEXT_OR_NULL,
            code=_TEXT_OR_NULL,
        ),
    ),
    "AnthropicError": _object_schema(
        ("type", "error"),
        type={"const": "error"},
        error=_object_schema(("type", "message"), type=_ANY_TEXT, message=_ANY_TEXT),
        request_id=_ANY_TEXT,
    ),
}
_ANY_ERROR: JSON = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in _ERRORS]}
_COMPONENTS: JSON = {
    "schemas": _ERRORS,
    "responses": {
        "Error": {
            "description": "what went wrong, in the dialect of the path, or of anthropic-version",
            "content": {"application/json": {"schema": _ANY_ERROR}},
        }
    },
    "securitySchemes": {
        "Authorization": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
    },
}


def openapi_description(routes: Sequence[Route], keyed: bool) -> JSON:
    """Return the OpenAPI 3.1 description of `routes`; `keyed`: clients must show a key."""
    paths: JSON = {}
    for route in routes:
        exact, below, _ = route.path.partition("[/...]")
        for path in (exact, f"{exact}/{{rest}}") if below else (exact,):
            paths[path] = {method.lower(): _operation(route, method) for method in route.methods}
            names = re.findall(r"{(\w+)}", path)
            if names:
                schema = {"in": "path", "required": True, "schema": {"type": "string"}}
                paths[path]["parameters"] = [{"name": name, **schema} for name in names]
    return {
        "openapi": "3.1.0",
        "info": {"title": "claude_shim", "version": __version__},
        "security": [{name: []} for name in _COMPONENTS["securitySchemes"]] if keyed else [],
        "paths": paths,
        "components": _COMPONENTS,
    }


def _operation(route: Route, method: str) -> JSON:
    relayed = route.endpoint in ("relay", "files")
    body = REQUEST_SCHEMAS.get(route.endpoint) if method == "POST" else None
    content = _ANY_CONTENT if relayed else _JSON_CONTENT
    if body and "stream" in body["properties"]:
        content = {**content, "text/event-stream": {}}
    operation: JSON = {
        "summary": route.summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }
    if body:
        described = {"required": True, "content": {"application/json": {"schema": body}}}
        operation["requestBody"] = described
    elif method == "POST":
        operation["requestBody"] = {"content": _ANY_CONTENT}
    return {**operation, "security": []} if route.open else operation


class App:
    """Answers requests: `admit` before the body is read, `respond` after."""

    def __init__(
        self,
        upstream: Upstream,
        credential: Credential = NoCredential(),  # noqa: B008 - immutable
        policy: Policy = Policy(),  # noqa: B008 - immutable
        log: Log = Log(),  # noqa: B008 - writes nowhere
    ) -> None:
        self.upstream = upstream
        self.credential = credential
        self.policy = policy
        self.log = log
        self.catalogue = Catalogue()
        self._model_ids: Tuple[object, object, Callable[[str], str]] = (None, None, str)
        self.memory = ThinkingMemory()
        self.store = ResponseStore(policy.responses_store)
        self.sealing_key_file = ""  # made when first needed; without, the key ends with the process
        self._sealing_key = b""
        self._sealing_lock = threading.Lock()
        self._health: Tuple[float, JSON] = (-math.inf, {})
        self.draining = False  # the server is about to stop
        self.later: Callable[[Callable[[], None]], None] = lambda work: work()  # what takes time

    def start(self) -> None:
        """Have credentials renewed before they end, from now on."""
        for payer in self.payers():
            payer.start()

    def close(self) -> None:
        """Let go of upstream and of the store."""
        for payer in self.payers():
            payer.close()
        self.upstream.close()
        self.store.close()

    # --- before the body

    def admit(self, method: str, target: str, headers: Dict[str, str]) -> str:
        """Return the name of the client key a request shows; a ShimError if it goes no further."""
        path = normalised_path(target)
        route = route_of(path)
        if method == "OPTIONS":
            return ""  # tells the methods, and shares nothing across origins
        open_ = route is not None and route.open and not asks_deep(target)
        name = "" if open_ else self.policy.client_keys.name_of(headers)
        if route is None:
            raise NotFoundError(f"{plain(method)} {plain(path)} is not supported by claude_shim")
        if method not in route.methods:
            allow = ", ".join(route.methods)
            message = f"{plain(path)} takes {allow}, not {plain(method)}"
            raise MethodNotAllowedError(message, headers=[("allow", allow)])
        return name

    # --- with the body

    def prompt(self, request: Request) -> bool:
        """Return whether it takes no time to answer a request, or to ask upstream."""
        stored = "/responses" in request.path and self.store.place != "off"
        small = len(request.body) <= PROMPT_BYTES and not stored
        fallback = self.policy.fallback
        return small and self.credential.ready() and (fallback is None or fallback.ready())

    def respond(self, request: Request) -> Response:
        """Return the answer, which may be an error; ClientGone when nobody waits for it."""
        return driven(self.answering(request), self.upstream)

    def answering(self, request: Request) -> Conversation[Response]:
        """Return the same answer, for those who ask upstream themselves."""
        try:
            path = normalised_path(request.path)
            route = route_of(path)
            if request.method == "OPTIONS":
                methods = (*route.methods, "OPTIONS") if route else ("OPTIONS",)
                return Response(204, [("allow", ", ".join(methods))])
            if route is None:
                raise NotFoundError(f"{plain(path)} is not supported by claude_shim")
            endpoint: Callable[[Request], Answering] = getattr(self, route.endpoint)
            answer = endpoint(request)
            return answer if isinstance(answer, Response) else (yield from answer)
        except ShimError as error:
            return self.failure(error, request)
        except RecursionError:
            return self.failure(RequestError("the request is nested too deeply"), request)

    def failure(self, error: ShimError, request: Request) -> Response:
        """Return the answer that tells of `error` in the dialect of `request`."""
        error.message = self.log.masked(error.message)
        headers = [(k, v) for k, v in error.headers if k != "content-type"]
        headers.append(("content-type", "application/json"))
        if speaks_anthropic(normalised_path(request.path), request.headers):
            status, body = anthropic_error(error, request.request_id)
            kept = [
                (k, v) for k, v in headers if _RELAYED_TO_CLIENT.fullmatch(k) or k in _OWN_HEADERS
            ]
        else:
            status, body = openai_error(error)
            if request.method == "POST" and normalised_path(request.path) == "/v1/responses":
                status = responses_status(status, body, headers, request.headers)
            spent = status == 429 and all(name != "retry-after" for name, _ in headers)
            if spent:  # a limit on spending: trying again is in vain
                headers.append(("x-should-retry", "false"))
            kept = [*openai_headers(headers, time.time()), ("content-type", "application/json")]
            kept += [(k, v) for k, v in headers if k in _OWN_HEADERS]
        return Response(status, kept, dumps(body).replace(b"<", b"\\u003c"))  # it may quote markup

    def sealing_key(self) -> bytes:
        """Return the key of the envelopes, made when it is first needed."""
        with self._sealing_lock:
            self._sealing_key = self._sealing_key or self._kept_key()
            return self._sealing_key

    def _kept_key(self) -> bytes:
        try:
            return kept_key(self.sealing_key_file)
        except OSError as error:
            reason = f"{self.sealing_key_file}: {error.strerror}"
            self.log.once(f"note: sealed thinking ends with this process: {reason}")
            return kept_key("")

    # --- OpenAI's completions

    def chat_completions(self, request: Request) -> Conversation[Response]:
        """POST /v1/chat/completions."""
        return self._complete(request, lambda body: [body], CHAT_FORM)

    def completions(self, request: Request) -> Conversation[Response]:
        """POST /v1/completions."""
        return self._complete(request, chats_from_completion, LEGACY_FORM)

    @staticmethod
    def _with_deployment(request: Request, body: JSON) -> JSON:
        """Azure's clients name the model in the path."""
        deployment = _DEPLOYMENT.search(request.path)
        if deployment and not body.get("model"):
            return {**body, "model": urllib.parse.unquote(deployment.group(1))}
        return body

    def _complete(
        self, request: Request, chats: Callable[[JSON], List[JSON]], form: ChatForm
    ) -> Conversation[Response]:
        drafts, stream = self._chat_drafts(request, chats)
        questions = [draft for draft in drafts for _ in range(draft.n)]
        if stream and len(questions) > 1:
            raise RequestError("one choice only with stream; ask for more without it", param="n")
        if len(questions) > MAX_CHOICES:
            raise RequestError(f"at most {MAX_CHOICES} choices in all", param="prompt")
        reply = ChatReply.to(drafts[0], int(time.time()))
        made = Form(
            lambda: form.encoder(reply, self.memory.remember),
            lambda messages: form.whole(messages, reply),
        )
        return (yield from self._answered(request, questions, stream, made))

    def _chat_drafts(
        self, request: Request, chats: Callable[[JSON], List[JSON]]
    ) -> Tuple[List[ChatDraft], bool]:
        """What is asked, and whether for a stream; nothing keeps the body until the answer."""
        body = self._with_deployment(request, loads_object(request.body))
        bodies, id = chats(body), self._requested_model(request, body)
        drafts = [messages_request_from_chat(b, id, self.memory.recall) for b in bodies]
        return drafts, asks_for_stream(body)

    def _requested_model(self, request: Request, body: JSON) -> str:
        self._refresh_models(request)
        return self._model_id(as_text(body.get("model"), "model"))

    def _answered(
        self, request: Request, drafts: Sequence[Draft], stream: bool, form: Form
    ) -> Conversation[Response]:
        """Put the questions to upstream, and give their answers in one form."""
        self._check_strict(drafts[0])
        asked = yield from self._ask_all(request, drafts)
        headers, model = self._answer_headers(asked, drafts[0]), str(drafts[0].request["model"])
        body: Union[Stream, Gathered]
        if stream:
            body = Stream(asked[0].source, EventTransform(form.encoder()))
        else:
            body = self._gathered(request, asked, Response(200, headers, model=model), form)
        return Response(200, headers, body, model)

    def _gathered(
        self, request: Request, asked: List[Asked], head: Response, form: Form
    ) -> Gathered:
        """The answers, of which the answer to the client is made when all have come."""
        sinks = [GatheringSink() for _ in asked]
        streams = [Stream(a.source, EventTransform(sink)) for a, sink in zip(asked, sinks)]

        def response() -> Response:
            failed = next((sink.error for sink in sinks if sink.error), None)
            if failed:
                return self.failure(failed, request)
            messages = [sink.message for sink in sinks if sink.message]
            for message in messages:
                self.memory.remember(*calls_and_thinking(message))
            try:
                body = form.whole(messages)
            except ShimError as error:
                return self.failure(error, request)
            json_type = [("content-type", "application/json")]
            return Response(200, [*head.headers, *json_type], body, head.model)

        return Gathered(streams, response)

    def _check_strict(self, draft: Draft) -> None:
        for field in draft.ignored:
            if self.policy.strict:
                message = "this field has no effect on Claude (claude_shim runs with --strict)"
                raise RequestError(message, param=field)
            self.log.once(f"note: {plain(field)} has no effect on Claude and is ignored")

    def _answer_headers(self, asked: Sequence[Asked], draft: Draft) -> HeaderList:
        headers = openai_headers(asked[0].headers, time.time())
        billing = [pair for each in asked[1:] for pair in each.headers if pair[0] == BILLING_HEADER]
        if billing and BILLING_HEADER not in map(NAME_OF, headers):
            headers.append(billing[0])
        changed = dict.fromkeys((*draft.ignored, *asked[0].changed))
        if changed:
            ignored = ",".join(map(plain, changed))
            ignored = ignored if len(ignored) <= 2000 else f"{ignored[:2000]}..."  # they are short
            headers.append(("x-claude-shim-ignored", ignored))
        return headers

    def _ask_all(self, request: Request, drafts: Sequence[Draft]) -> Conversation[List[Asked]]:
        """Ask upstream once per choice; the answers are written while earlier ones are read."""
        asked: List[Asked] = []
        try:
            for draft in drafts:
                answer = yield from self._ask(request, draft)
                asked.append(answer)
        except BaseException:
            for begun in asked:
                begun.source.drop()
            raise
        return asked

    def _ask(self, request: Request, draft: Draft) -> Conversation[Asked]:
        """Ask upstream; a refusal that names what could be left out is cured and asked again."""
        question = draft.finished()
        if not draft.explicit_cache:
            question = with_prompt_cache(question, self.policy.prompt_cache)
        model = self.catalogue.model(question["model"])
        stripped = False
        tried: List[JSON] = []
        while True:
            fitted = adapted(question, model)
            tried.append(fitted.request)
            try:
                response = yield from self._post(request, fitted.request, draft.betas)
                break
            except UpstreamError as error:
                if error.status != 400 or len(tried) > MAX_CURES:
                    raise
                if refuses_signature(error.message) and not stripped:
                    question, stripped = without_thinking(question), True
                else:
                    model = self._cured(question, model, error, tried)
        if len(tried) > 1:
            self._learn(model)
        source = response.source
        if draft.annotated:  # server tools may pause the turn
            source = ResumingSource(
                source, fitted.request, lambda body: self._continued(request, body, draft.betas)
            )
        return Asked(source, response.headers, fitted.changed)

    def _continued(
        self, request: Request, body: JSON, betas: Sequence[str]
    ) -> Conversation[Source]:
        response = yield from self._post(request, body, betas)
        return response.source

    def _learn(self, model: Model) -> None:
        """Remember what refusals taught; what was said of a schema is true of that schema alone."""
        known = self.catalogue.model(model.id)
        about_schemas = ("strict_tools", "structured_outputs")
        model = model._replace(**{field: getattr(known, field) for field in about_schemas})
        if model != known:
            self.catalogue.learn(model)

    @staticmethod
    def _cured(question: JSON, model: Model, error: UpstreamError, tried: Sequence[JSON]) -> Model:
        """What to take `model` for, to put the question as it was not put yet; else the error."""
        for learned in models_after_refusal(model, error.message):
            if adapted(question, learned).request not in tried:
                return learned
        raise error

    def _post(
        self, request: Request, body: JSON, betas: Sequence[str]
    ) -> Conversation[UpstreamResponse]:
        """Return upstream's answer to a translated request; UpstreamError if it is no stream."""
        headers = translated_headers(betas, "text/event-stream")
        path, raw = "/v1/messages", request_text(body)
        call = UpstreamRequest("POST", path, headers, raw, request.watch, handed_on=True)
        response = yield from self._sent(call, request.headers, self.policy.retries)
        if response.status != 200:
            body_bytes = read_error_body(response)
            raise upstream_error(response.status, parsed_or_none(body_bytes), response.headers)
        if not response.is_event_stream():
            response.source.drop()
            raise UpstreamCutError("upstream did not answer with an event stream")
        return response

    # --- OpenAI's Responses

    def responses(self, request: Request) -> Conversation[Response]:
        """POST /v1/responses; by GET, Codex asks for a WebSocket here, once."""
        if request.method != "POST":
            if "upgrade" not in request.headers:
                raise NotFoundError("claude_shim lists no responses")
            message = "claude_shim has no WebSocket; use plain HTTP"
            raise UpgradeRequiredError(message, headers=[("upgrade", "HTTP/1.1")])
        body = loads_object(request.body)
        draft = self._responses_draft(request, body)
        reply, owner = self._reply_to(draft), self._owner(request)

        def remember(message: JSON, response: JSON) -> None:
            self.memory.remember(*calls_and_thinking(message))
            if response["store"]:
                self._keep(owner, draft, response)

        def whole(messages: Sequence[JSON]) -> bytes:
            response = response_from_message(messages[0], reply)
            remember(messages[0], response)
            return dumps(response)

        form = Form(lambda: ResponsesStreamEncoder(reply, remember), whole)
        return (yield from self._answered(request, [draft], asks_for_stream(body), form))

    def _responses_draft(self, request: Request, body: JSON) -> ResponsesDraft:
        owner = self._owner(request)
        known = Known(
            self.sealing_key(),
            self.memory.recall,
            functools.partial(self.store.item, owner),
            functools.partial(self.store.history, owner),
        )
        draft = messages_request_from_responses(body, self._requested_model(request, body), known)
        draft.echo["store"] = draft.store and self.store.place != "off"
        return draft

    @staticmethod
    def _reply_to(draft: ResponsesDraft) -> ResponsesReply:
        id = f"resp_{secrets.token_hex(24)}"
        return ResponsesReply.to(draft, id, lambda: int(time.time()))

    def _owner(self, request: Request) -> str:
        """Who may see an answer again: the client key that was shown, or what paid for it."""
        passed, keys = isinstance(self.credential, Passthrough), self.policy.client_keys
        paid = self.credential.authorization(keys.stripped(request.headers)) if passed else []
        # Not the name: that of a key without one is its line, and lines move.
        text = "\n".join([keys.key_of(request.key_name), *(value for _, value in paid)])
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

    def _keep(self, owner: str, draft: ResponsesDraft, response: JSON) -> None:
        self.store.put(owner, draft.items, response)
        self.later(self._save)

    def _save(self) -> None:
        try:
            self.store.save()
        except ShimError as error:
            self.log.once(f"note: a response was not stored: {error.message}")

    def response(self, request: Request) -> Response:
        """GET and DELETE /v1/responses/{id}."""
        id, owner = stored_id(request.path), self._owner(request)
        if request.method == "DELETE":
            if not self.store.delete(owner, id):
                raise not_stored(id)
            return json_response(200, {"id": id, "object": "response", "deleted": True})
        if "true" in query_values(request.path, "stream"):
            raise RequestError("a stored response comes whole", param="stream")
        found = self.store.response(owner, id)
        if found is None:
            raise not_stored(id)
        return json_response(200, found)

    def input_items(self, request: Request) -> Response:
        """GET /v1/responses/{id}/input_items, the newest first unless `order=asc`."""
        id = stored_id(request.path)
        items = self.store.input_items(self._owner(request), id)
        if items is None:
            raise not_stored(id)
        return json_response(200, item_page(items, request.path))

    def cancel(self, request: Request) -> Response:
        """POST /v1/responses/{id}/cancel."""
        id = stored_id(request.path)
        if self.store.response(self._owner(request), id) is None:
            raise not_stored(id)
        raise RequestError("only background responses can be cancelled, and there are none")

    def compact(self, request: Request) -> Conversation[Response]:
        """POST /v1/responses/compact."""
        body = compaction_request(loads_object(request.body))
        draft = self._responses_draft(request, body)
        reply = self._reply_to(draft)

        def whole(messages: Sequence[JSON]) -> bytes:
            return dumps(compacted(response_from_message(messages[0], reply), draft))

        form = Form(GatheringSink, whole)
        return (yield from self._answered(request, [draft], False, form))

    def input_tokens(self, request: Request) -> Conversation[Response]:
        """POST /v1/responses/input_tokens; an estimate where upstream does not count."""
        draft = self._responses_draft(request, loads_object(request.body))
        fitted = adapted(draft.finished(), self.catalogue.model(str(draft.request["model"])))
        counted = {k: v for k, v in fitted.request.items() if k in COUNTED_FIELDS}
        headers = translated_headers(draft.betas, "application/json")
        path, body = "/v1/messages/count_tokens", request_text(counted)
        call = UpstreamRequest("POST", path, headers, body, request.watch)
        response = yield from self._sent(call, request.headers)
        answer = object_or_empty(parsed_or_none(read_error_body(response)))
        told: JSON = {"object": "response.input_tokens"}
        if response.status in (403, 404, 405, 501):
            estimate = max(1, math.ceil(len(body) / 3.2))
            answered = json_response(200, {**told, "input_tokens": estimate})
            return answered._replace(headers=[*answered.headers, ESTIMATED])
        if response.status != 200:
            raise upstream_error(response.status, answer, response.headers)
        return json_response(200, {**told, "input_tokens": token_count(answer, "input_tokens")})

    # --- Anthropic's messages and the rest, relayed

    def messages(self, request: Request) -> Conversation[Response]:
        """POST /v1/messages."""
        body = loads_object(request.body)
        if not as_list(body.get("messages"), "messages"):
            raise RequestError("expected at least one message", param="messages")
        return (yield from self._relayed_with_model(request, body))

    def count_tokens(self, request: Request) -> Conversation[Response]:
        """POST /v1/messages/count_tokens; an estimate where upstream has no such endpoint."""
        body = loads_object(request.body)
        response = yield from self._relayed_with_model(request, body)
        if response.status not in (403, 404, 405, 501):
            return response
        estimate = max(1, math.ceil(len(request.body) / 3.2))
        headers = [("content-type", "application/json"), ESTIMATED]
        return Response(200, headers, dumps({"input_tokens": estimate}), response.model)

    def _relayed_with_model(self, request: Request, body: JSON) -> Conversation[Response]:
        self._refresh_models(request)
        name = as_text(body.get("model"), "model")
        id = self._model_id(name)
        if id != name:
            request = request._replace(body=with_member(request.body, "model", id))
        response = yield from self.relay(request)
        return response._replace(model=id)

    def files(self, request: Request) -> Conversation[Response]:
        """Anthropic's files: /v1/files is OpenAI's too, and only this header tells them apart."""
        if "anthropic-version" not in request.headers:
            raise NotFoundError(
                "claude_shim has no OpenAI files; Anthropic's need anthropic-version"
            )
        return self.relay(request)

    def relay(self, request: Request) -> Conversation[Response]:
        """Hand a request on as it came, and the answer back as it comes."""
        query = request.path.partition("?")[2]
        path = normalised_path(request.path) + (f"?{query}" if query else "")
        if re.search(_HIDDEN_SLASH, normalised_path(request.path)):
            raise NotFoundError("this path could climb upstream")
        passed = [(k, v) for k, v in request.headers.items() if _RELAYED_TO_UPSTREAM.fullmatch(k)]
        if "anthropic-version" not in request.headers:
            passed.append(_VERSION)
        asked = (request.method, path, passed, request.body, request.watch)
        call = UpstreamRequest(*asked, handed_on=True)
        response = yield from self._sent(call, request.headers)
        kept = [(k, v) for k, v in response.headers if _RELAYED_TO_CLIENT.fullmatch(k)]
        ids = [("x-request-id", value) for name, value in kept if name == "request-id"]
        head = Response(response.status, [*kept, *ids])
        if response.status >= 400 or response.status in (204, 304):
            body = read_error_body(response)
            if (
                body and response.status >= 400 and parsed_or_none(body) is None
            ):  # a page of a proxy
                raise upstream_error(response.status, None, response.headers)
            return head._replace(body=body)
        transform = RelayTransform() if response.is_event_stream() else Transform()
        return head._replace(body=Stream(response.source, transform))

    # --- who pays

    def payers(self) -> List[Credential]:
        """Return who pays, and then who does when the first does not."""
        return [payer for payer in (self.credential, self.policy.fallback) if payer]

    def _sent(
        self, call: UpstreamRequest, client: Dict[str, str], retries: RetryPolicy = NO_RETRIES
    ) -> Conversation[UpstreamResponse]:
        """Return upstream's answer to a request, paid by the fallback if there has to be one."""
        shown = self.policy.client_keys.stripped(client)
        fallback = self.policy.fallback
        if fallback is None:
            return (yield from _authorized(self.credential, call, shown, retries))
        with contextlib.suppress(CredentialError, CredentialUnavailableError):
            response = yield from _authorized(self.credential, call, shown, retries)
            if response.status not in PAYER_REFUSED:
                return response
            body = read_error_body(response)
            if response.status == 400 and not has_no_credit(body.decode("utf-8", "replace")):
                return response._replace(source=BytesSource(body))
        response = yield from _authorized(fallback, call, shown, retries)
        billing = (BILLING_HEADER, fallback.describe().kind)
        return response._replace(headers=[*response.headers, billing])

    # --- models and health

    def _model_id(self, name: str) -> str:
        known, policy, live = self._model_ids, self.policy, self.catalogue.live
        if known[0] is not policy or known[1] is not live:  # which both may be replaced
            ask = functools.partial(
                resolved_model_id, aliases=policy.aliases, live=self.catalogue.models()
            )
            self._model_ids = known = policy, live, functools.lru_cache(maxsize=256)(ask)
        return known[2](name)

    def _refresh_models(self, request: Request) -> None:
        """Ask upstream for its models now and then, beside the requests."""
        if self.policy.live_models and self.catalogue.claim():
            conversation = self._fetch_models(dict(request.headers))
            self.later(lambda: driven(conversation, self.upstream))

    def _fetch_due_models(self, client: Dict[str, str]) -> Conversation[None]:
        if self.policy.live_models and self.catalogue.claim():
            yield from self._fetch_models(client)

    def _fetch_models(self, client: Dict[str, str]) -> Conversation[None]:
        try:
            response = yield from self._sent(models_request(1000), client)
            body = parsed_or_none(read_error_body(response))
            if (
                response.status == 200
                and isinstance(body, dict)
                and isinstance(body.get("data"), list)
                and body["data"]
            ):
                self.catalogue.update(body["data"])
        except ShimError as error:
            self.log.once(f"note: upstream does not list its models: {error.message}")

    def models(self, request: Request) -> Conversation[Response]:
        """GET /v1/models."""
        yield from self._fetch_due_models(request.headers)
        return json_response(200, model_list(self.catalogue.entries()))

    def model(self, request: Request) -> Conversation[Response]:
        """GET /v1/models/{id or alias}."""
        yield from self._fetch_due_models(request.headers)
        path = normalised_path(request.path)
        id = self._model_id(urllib.parse.unquote(path[len("/v1/models/") :]))
        entries = {entry["id"]: entry for entry in self.catalogue.entries()}
        entry = entries.get(id) or model_entry(self.catalogue.model(id), {})
        return json_response(200, entry)

    def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return json_response(200, openapi_description(ROUTES, bool(self.policy.client_keys)))

    def health(self, request: Request) -> Conversation[Response]:
        """GET / and /health; with ?deep=1 also whether upstream takes the credential."""
        status: JSON = {"status": "ok", "service": "claude_shim", "version": __version__}
        if self.draining:
            return json_response(503, {**status, "status": "draining"})
        if not asks_deep(request.path):
            return json_response(200, status)
        asked, told = self._health
        if time.monotonic() - asked > 60 or isinstance(self.credential, Passthrough):
            told = yield from self._credential_health(request.headers)
            self._health = (time.monotonic(), told)
        return json_response(200 if told["credential"] == "ok" else 503, {**status, **told})

    def _credential_health(self, client: Dict[str, str]) -> Conversation[JSON]:
        try:
            response = yield from self._sent(models_request(1), client)
        except ShimError as error:
            return {
                "status": "failed",
                "credential": "unknown",
                "reason": self.log.masked(error.message),
            }
        body = parsed_or_none(read_error_body(response))
        if response.status == 200:
            return {"credential": "ok"}
        reason = upstream_error(response.status, body).message
        return {"status": "failed", "credential": "refused", "reason": self.log.masked(reason)}


_VERSION = ("anthropic-version", "2023-06-01")
_US = ("user-agent", f"claude-shim/{__version__}")


def translated_headers(betas: Sequence[str], accept: str) -> HeaderList:
    """Return the header fields of a request that we have made."""
    fields = [_VERSION, ("content-type", "application/json"), ("accept", accept), _US]
    return fields + ([("anthropic-beta", ",".join(dict.fromkeys(betas)))] if betas else [])


def models_request(limit: int) -> UpstreamRequest:
    """Return the question for upstream's models, which costs nothing."""
    path = f"/v1/models?limit={limit}"
    return UpstreamRequest("GET", path, [_VERSION, _US], b"", patience=GET_SECONDS)


def query_values(target: str, name: str) -> List[str]:
    """Return the values that the query of a request target gives `name`."""
    _, question, query = target.partition("?")
    return urllib.parse.parse_qs(query).get(name, []) if question else []


def asks_deep(target: str) -> bool:
    """Return whether a health check is to ask upstream, too."""
    return "1" in query_values(target, "deep")


def asks_for_stream(body: JSON) -> bool:
    """Return whether an answer is to be streamed; null says no."""
    return body.get("stream") is not None and as_boolean(body["stream"], "stream")


def stored_id(target: str) -> str:
    """Return the id in the path of a stored response."""
    path = normalised_path(target)[len("/v1/responses/") :]
    return urllib.parse.unquote(re.sub(r"/(?:input_items|cancel)$", "", path))


def not_stored(id: str) -> NotStoredError:
    """Return the error for a response that is not kept for this client."""
    return NotStoredError(f"Response with id '{plain(id)}' not found.")


def item_page(items: Sequence[JSON], target: str) -> JSON:
    """Return the page of `items` that a query asks for by order, after and limit."""
    ordered = list(items) if "asc" in query_values(target, "order") else list(reversed(items))
    after = next(iter(query_values(target, "after")), "")
    ids = [item.get("id") for item in ordered]
    start = ids.index(after) + 1 if after in ids else 0
    limit = next(iter(query_values(target, "limit")), "20")
    size = int(limit) if re.fullmatch("[0-9]{1,9}", limit) else 20
    end = start + min(100, max(1, size))
    page = ordered[start:end]
    return {**one_page(page), "has_more": end < len(ordered)}


# What upstream answers when the payer is refused or has nothing left; 400 if it says so.
PAYER_REFUSED = frozenset({400, 401, 402, 403, 429})
BILLING_HEADER = "x-claude-shim-billing"


def _authorized(
    credential: Credential, call: UpstreamRequest, client: Dict[str, str], retries: RetryPolicy
) -> Conversation[UpstreamResponse]:
    """The answer to a request; after a 401 to a second try, if the credential can be renewed."""
    shown = credential.authorization(client)
    headers = with_authorization(call.headers, shown)
    response = yield from send_with_retries(call._replace(headers=headers), retries)
    if response.status != 401:
        return response
    try:
        newer = credential.authorization(client, rejected=shown)
    except BaseException:
        response.source.drop()
        raise
    if newer == shown:
        return response
    read_error_body(response)
    headers = with_authorization(call.headers, newer)
    return (yield from send_with_retries(call._replace(headers=headers), retries))


class GatheringSink(MessageAssembler):
    """A MessageAssembler that keeps the failure, for an answer that is given at the end."""

    error: Optional[ShimError] = None

    def fail(self, error: ShimError) -> bytes:
        self.error = error
        return b""


def calls_and_thinking(message: JSON) -> Tuple[List[str], List[JSON]]:
    """Return the ids of a message's calls, and its thinking blocks."""
    blocks = message["content"]
    ids = [str(block.get("id")) for block in blocks if is_client_tool_use(block)]
    return ids, thinking_of(blocks)


def json_response(status: int, body: JSON) -> Response:
    """Return an answer with a JSON body."""
    return Response(status, [("content-type", "application/json")], dumps(body))


ESTIMATED = ("x-claude-shim-estimate", "true")

# What counting tokens takes of a Messages request.
COUNTED_FIELDS = frozenset(
    "model messages system tools tool_choice thinking mcp_servers cache_control".split()
)

MAX_SMALL_BODY = 4 << 20


def read_error_body(response: UpstreamResponse) -> bytes:
    """Return a body that should be short, up to a limit; what arrived if it breaks off."""
    pieces: List[bytes] = []
    try:
        for piece in pieces_of(response.source):
            pieces.append(piece)
            if sum(map(len, pieces)) >= MAX_SMALL_BODY:
                break
        else:
            response.source.close()
            return b"".join(pieces)
    except ShimError:
        pass  # the status says what matters
    response.source.drop()
    return b"".join(pieces)[:MAX_SMALL_BODY]


def pieces_of(source: Source) -> Iterator[bytes]:
    """Yield a body to its end, in the pieces in which it comes."""
    while True:
        source.check_time(silent=0.0)
        if source.sock is not None and not source.ready():
            patience = min(source.silence_seconds, source.deadline - time.monotonic())
            if not readable([source.sock], patience):
                source.check_time(silent=source.silence_seconds)
        piece = source.read()
        if piece == b"":
            return
        if piece:
            yield piece


def parsed_or_none(body: bytes) -> Any:
    """Return a JSON value, or None for HTML error pages and the like."""
    try:
        return loads(body)
    except ValueError:
        return None


# ----------------------------------------------------------------------
# 13. HTTP server                                    uses: 0 1 4 9 11 12
# ----------------------------------------------------------------------
# Bytes -> Request, Response -> bytes. The accept loop is the standard library's; one thread, the
# relay, carries the bytes of all connections. Reading a request is ours (RFC 9112), because the
# standard library's parser loses header fields and takes an unread body for the next request.


class ServerLimits(NamedTuple):
    """What a client may take: bytes, and seconds."""

    max_body: int = 32 << 20  # Anthropic's own limit
    max_line: int = 16 << 10
    max_fields: int = 128
    idle_seconds: float = 60.0  # between two requests of a connection
    head_seconds: float = 15.0  # for the whole head: a deadline, not a pause between bytes
    body_pause_seconds: float = 20.0
    body_seconds: float = 300.0
    write_seconds: float = 60.0  # a reader that takes nothing for that long is gone
    heartbeat_seconds: float = 15.0  # of upstream's silence, before the client hears something
    max_connections: int = 10_000
    max_held: int = 512 << 20  # bytes of all bodies that are not whole yet
    max_workers: int = 64  # threads for what takes time before upstream answers
    max_concurrent: int = 256  # requests that are being answered
    max_large: int = 4  # of them, with a body over 1 MiB and before upstream answers
    max_waiting: int = 1024  # further ones, which wait for their turn
    wait_seconds: float = 60.0  # that long
    requests_per_second: float = 0.0  # none: as many as come
    drain_seconds: float = 30.0  # for running answers, when the server stops

    def part(self, number: int, count: int) -> ServerLimits:
        """Return the limits of one of `count` processes that serve together, by its number from 0.

        Together they take as much as one; but connections count in each, as descriptors do.
        """

        def share(limit: int) -> int:
            return limit * (number + 1) // count - limit * number // count

        return self._replace(
            max_held=max(self.max_body, share(self.max_held)),
            max_concurrent=max(1, share(self.max_concurrent)),
            max_large=max(1, share(self.max_large)),
            max_waiting=share(self.max_waiting),
            requests_per_second=self.requests_per_second / count,
        )


class Head(NamedTuple):
    """The head of a request."""

    method: str
    target: str  # path and query
    minor_version: int
    fields: Dict[str, List[str]]  # by name, in lower case

    def values(self, name: str) -> List[str]:
        """Return all values of a header field."""
        return self.fields.get(name, [])

    def tokens(self, name: str) -> List[str]:
        """Return the members of a list-valued header field, in lower case."""
        if name not in self.fields:
            return []
        members = ",".join(self.fields[name]).lower().split(",")
        return [member.strip() for member in members if member.strip()]

    def headers(self) -> Dict[str, str]:
        """Return the fields by name, repeated ones joined."""
        return {name: ", ".join(values) for name, values in self.fields.items()}

    def keeps_alive(self) -> bool:
        """Return whether the client wants the connection kept."""
        tokens = self.tokens("connection")
        return "close" not in tokens and (self.minor_version == 1 or "keep-alive" in tokens)


_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32} [\x21-\x7e]+ HTTP/[0-9]\.[0-9]")
_LENGTH = re.compile(r"[0-9]{1,18}")
SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}")


_OTHER_PROTOCOLS = (
    (b"\x16\x03", ProtocolError, "this port speaks plain HTTP, not TLS: use http://"),
    (
        b"PRI * HTTP/2.0",
        VersionNotSupportedError,
        "this port speaks HTTP/1.1 only: turn off HTTP/2 with prior knowledge",
    ),
)


def check_protocol(start: bytes) -> None:
    """Refuse the first bytes of another protocol, with a sentence for who set up the client."""
    for prefix, error, sentence in _OTHER_PROTOCOLS:
        if start.startswith(prefix):
            raise error(sentence)


def parsed_head(head: bytes) -> Head:
    """Return a request head given without its last empty line; a ProtocolError if it is malformed.

    Nothing is repaired: whatever two readers could read in two ways is refused.
    """
    line, *lines = head.split(b"\r\n")
    if not _REQUEST_LINE.fullmatch(line):
        check_protocol(line)
        raise ProtocolError("the request line is malformed")
    method, target, version = line.decode("ascii").split(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        check_protocol(line)
        raise VersionNotSupportedError(f"claude_shim speaks HTTP/1.1, not {version}")
    try:
        fields = header_fields(lines)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
    grouped = {name: [value] for name, value in fields}
    if len(grouped) < len(fields):
        grouped = {name: [] for name in grouped}
        for name, value in fields:
            grouped[name].append(value)
    if len(grouped.get("content-type", ())) > 1:
        raise ProtocolError("expected one Content-Type header")
    return _with_authority(Head(method, target, int(version[-1]), grouped))


def _with_authority(head: Head) -> Head:
    """Check Host; an absolute-form target replaces it (RFC 9112 3.2.2)."""
    hosts = head.values("host")
    if (len(hosts) != 1 or not hosts[0]) and (hosts or head.minor_version == 1):
        raise ProtocolError("expected one Host header")
    if head.target.startswith("/") or (head.target == "*" and head.method == "OPTIONS"):
        return head
    absolute = re.fullmatch(r"https?://([^/?#@]+)(/[^#]*|\?[^#]*)?", head.target, re.IGNORECASE)
    if not absolute:
        raise ProtocolError("the request target is malformed")
    authority, path = absolute.group(1), absolute.group(2) or "/"
    path = path if path.startswith("/") else f"/{path}"
    return head._replace(target=path, fields={**head.fields, "host": [authority]})


def request_framing(head: Head, max_body: int) -> Framing:
    """Return how the body of a request ends (RFC 9112 6); a ProtocolError if that is ambiguous."""
    codings, lengths = head.values("transfer-encoding"), head.values("content-length")
    content_coding(head)
    if codings:
        if lengths or head.minor_version == 0:
            raise ProtocolError("Transfer-Encoding together with Content-Length or HTTP/1.0")
        if [coding.lower() for coding in codings] != ["chunked"]:
            raise NotImplementedTransferError("the only transfer coding known here is chunked")
        return Framing(True, None, True)
    given = lengths[0] if lengths else "0"
    if len(set(lengths)) > 1 or not _LENGTH.fullmatch(given):
        raise ProtocolError("Content-Length is not one whole number")
    if int(given) > max_body:
        raise too_large(max_body)
    return Framing(False, int(given), True)


_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # how zlib is told the coding


def content_coding(head: Head) -> str:
    """Return the coding of the body, empty for none; UnsupportedEncodingError if it is not known.

    One coding only: each further one would be another factor between what comes and what it makes.
    """
    if "content-encoding" not in head.fields:
        return ""
    codings = [coding for coding in head.tokens("content-encoding") if coding != "identity"]
    if len(codings) > 1 or not set(codings) <= _WINDOW_BITS.keys():
        accepted = [("accept-encoding", "gzip, deflate")]
        raise UnsupportedEncodingError("the body may be in gzip or deflate only", headers=accepted)
    return "".join(codings)


def decompressed(body: bytes, coding: str, max_bytes: int) -> bytes:
    """Return `body` without its coding; a ProtocolError if that is over `max_bytes`, or not whole.

    Nothing may follow the stream, a second one neither: many short ones take quadratic time.
    """
    if not (coding and body):
        return body
    stream = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        content = stream.decompress(body, max_bytes + 1)
    except zlib.error:
        raise ProtocolError(f"the request body is not {coding}, as its header says") from None
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    if not stream.eof or stream.unused_data:
        raise ProtocolError(f"the request body is not one whole {coding} stream")
    return content


def too_large(max_body: int) -> RequestTooLargeError:
    """Return the error for a body over the limit."""
    return RequestTooLargeError(f"the request body is over {max_body} bytes (--max-body)")


def check_origin(
    head: Head, allowed_hosts: FrozenSet[str], allowed_origins: FrozenSet[str] = frozenset()
) -> None:
    """Refuse what a web page could send: a foreign Host (DNS rebinding), Origin or fetch site.

    Programs send no Origin; browsers do so with every request that crosses sites. OPTIONS
    only asks: it is answered, without permission.
    """
    hosts = head.values("host")
    host = host_name("".join(hosts))
    if hosts and host not in allowed_hosts and not is_loopback(host):
        message = f"the host {plain(host)} is not served here; add --allow-host {plain(host)}"
        raise ForbiddenError(message)
    origins, sites = head.values("origin"), head.values("sec-fetch-site")
    if head.method == "OPTIONS" or not (origins or sites):
        return
    if not (origins and allowed_origins.issuperset(origins)):
        names = [host_name(origin.partition("://")[2]) for origin in origins]
        foreign = any(name not in allowed_hosts and not is_loopback(name) for name in names)
        if foreign or {"cross-site", "same-site"}.intersection(sites):
            raise ForbiddenError(
                "web pages of other sites may not call claude_shim; see --allow-origin"
            )
    if origins and head.method == "POST" and not _is_preflighted(head):
        raise UnsupportedTypeError("a web page must send its body as application/json")


def _is_preflighted(head: Head) -> bool:
    """Whether a browser sends this POST of a page only after a preflight: no form can say these."""
    type_ = "".join(head.values("content-type")).partition(";")[0].strip().lower()
    return type_ == "application/json" or "anthropic-version" in head.fields


# What a page of an allowed origin may send and read beyond what every page may.
_SENT_BY_PAGES = (
    r"(?:anthropic|openai|x-stainless)-[a-z0-9-]{1,50}"
    r"|authorization|(?:x-)?api-key|x-claude-shim-key|x-request-id|idempotency-key|content-type|accept"
)
_RATE_LIMIT_KINDS = ("limit", "remaining", "reset")
_READ_BY_PAGES = (
    *("request-id", "x-request-id", "x-claude-shim-ignored", "x-claude-shim-estimate"),
    *("retry-after", "retry-after-ms", "x-should-retry"),
    *(
        f"x-ratelimit-{kind}-{unit}"
        for kind in _RATE_LIMIT_KINDS
        for unit in ("requests", "tokens")
    ),
    *(
        f"anthropic-ratelimit-{unit}-{kind}"
        for unit in ("requests", "tokens", "input-tokens", "output-tokens")
        for kind in _RATE_LIMIT_KINDS
    ),
)
_EXPOSED = [("access-control-expose-headers", ", ".join(_READ_BY_PAGES))]


def cross_origin_headers(head: Head, allowed_origins: FrozenSet[str]) -> HeaderList:
    """Return what lets a page of an allowed origin read the answer, or ask first (Fetch, CORS).

    Never for credentials of the browser: a page shows a client key, or none is needed.
    """
    if not allowed_origins:
        return []
    headers = [("vary", "Origin")]
    origin = "".join(head.values("origin"))
    if origin not in allowed_origins:
        return headers
    headers.append(("access-control-allow-origin", origin))
    if head.method != "OPTIONS":
        return headers + _EXPOSED
    route = route_of(normalised_path(head.target))
    names = head.tokens("access-control-request-headers")
    asked = [name for name in names if re.fullmatch(_SENT_BY_PAGES, name)]
    return [
        *headers,
        ("access-control-allow-methods", ", ".join(route.methods if route else ())),
        ("access-control-allow-headers", ", ".join(asked)),
        ("access-control-max-age", "600"),
    ]


@functools.lru_cache(maxsize=64)
def host_name(authority: str) -> str:
    """Return the host of `host:port`, in lower case and without brackets."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]@/\\]+)(?::[0-9]{1,5})?", authority.strip())
    return match.group(1).strip("[]").lower() if match else ""


@functools.lru_cache(maxsize=2)
def _http_date(second: int) -> str:
    days = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    months = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
    t = time.gmtime(second)
    day, month = days[t.tm_wday], months[t.tm_mon - 1]
    return (
        f"{day}, {t.tm_mday:02} {month} {t.tm_year} {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT"
    )


def response_head(status: int, headers: HeaderList, second: int) -> bytes:
    """Return the bytes of a response head; control characters in values become spaces."""
    phrase = _PHRASES.get(status, "Unknown")
    if not "".join(map(VALUE_OF, headers)).isprintable():
        headers = [(name, _UNSAFE_VALUE.sub(" ", value)) for name, value in headers]
    top = f"HTTP/1.1 {status} {phrase}\r\ndate: {_http_date(second)}\r\n{_FOR_BROWSERS}"
    return f"{top}{field_lines(headers)}\r\n".encode("latin-1", "replace")


# An answer that a browser shows after all is no page: it is not guessed to be one, runs and loads
# nothing, is in no frame (X-Frame-Options says less), in no foreign page, and is not kept.
_FOR_BROWSERS = (
    "x-content-type-options: nosniff\r\n"
    "cache-control: no-store\r\n"
    "content-security-policy: default-src 'none'; frame-ancestors 'none'\r\n"
    "cross-origin-resource-policy: same-origin\r\n"
)
_PHRASES = {int(status): status.phrase for status in http.HTTPStatus}
_UNSAFE_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class RequestReader:
    """Requests out of the bytes of a connection: `feed` them, then take `head` and `body`.

    Both are None as long as they are not whole; after `head`, `expect` says how the body ends.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._rest = b""  # what came and was not taken yet
        self._body = io.BytesIO()  # as far as it came, if not at once
        self._looked = 0  # bytes of a head that is not whole, as it was when last looked at
        self._wanted = 0  # bytes of the body that are still to come
        self._chunks: Optional[ChunkedDecoder] = None
        self._skipped = False  # RFC 9112 2.2 allows one empty line before a request

    def __len__(self) -> int:
        return len(self._rest)

    @property
    def held(self) -> int:
        """How many bytes are kept, of the body too."""
        return len(self._rest) + self._body.tell()

    @property
    def in_chunks(self) -> bool:
        """Whether the body that is read comes in chunks."""
        return self._chunks is not None and not self._chunks.done

    def feed(self, burst: bytes) -> None:
        """Take bytes as they come."""
        self._rest = self._rest + burst if self._rest else burst

    def head(self) -> Optional[Head]:
        """Return the next head; a ProtocolError if it is malformed or too large."""
        if self._rest.startswith(b"\r\n") and not self._skipped:
            self._rest, self._skipped = self._rest[2:], True
        if len(self._rest) < 2 * self._looked and b"\n" not in self._rest[self._looked :]:
            return None  # to look at all of it for each byte takes quadratic time
        head, empty, rest = self._rest.partition(b"\r\n\r\n")
        self._check_size(head, bool(empty))
        self._looked = 0 if empty else len(head)
        if not empty:
            return None
        self._rest, self._skipped = rest, False
        return parsed_head(head)

    def _check_size(self, head: bytes, complete: bool) -> None:
        limits = self._limits
        if not complete:
            check_protocol(head)
            if b"\n" in head.replace(b"\r\n", b""):
                raise ProtocolError("a line of the head ends in a bare LF")
        if len(head) <= limits.max_line and head.count(b"\r\n") <= limits.max_fields:
            return
        line, *fields = head.rstrip(b"\r\n").split(b"\r\n")
        if len(line) > limits.max_line:
            raise TargetTooLongError(f"the request line is over {limits.max_line} bytes")
        longest, total = max(map(len, fields), default=0), sum(map(len, fields))
        too_long = longest > limits.max_line or total > 4 * limits.max_line
        if len(fields) > limits.max_fields or too_long:
            raise HeadersTooLargeError("the header fields are too many or too long")

    def expect(self, framing: Framing) -> None:
        """Say how the body of the last head ends."""
        self._chunks = ChunkedDecoder() if framing.chunked else None
        self._wanted = framing.length or 0

    def body(self) -> Optional[bytes]:
        """Return the whole body; a ProtocolError if it is malformed or too large."""
        came, self._rest = self._rest, b""
        if self._chunks is None:
            piece, self._rest = came[: self._wanted], came[self._wanted :]
            self._wanted -= len(piece)
            whole = self._wanted == 0
        else:
            piece = self._chunks.feed(came)
            self._rest, whole = self._chunks.rest, self._chunks.done
        if self._body.tell() + len(piece) > self._limits.max_body:
            raise too_large(self._limits.max_body)
        if whole and not self._body.tell():
            return piece
        self._body.write(piece)
        if not whole:
            return None
        body, self._body = self._body.getvalue(), io.BytesIO()  # without a copy
        return body


# --- the relay: one thread carries the bytes of all connections


class Party:
    """Whoever the relay works for."""

    armed = math.inf  # when it is asked next what is due

    def on_ready(self) -> None:
        """Go on: the socket can be read or written."""

    def tick(self, now: float) -> float:
        """Do what is due by now; return when to be asked again, at the latest."""
        return math.inf

    def abort(self) -> None:
        """Give up, after a fault of ours."""


class Watch:
    """What the relay looks for at one socket, and for whom; None while it rests."""

    __slots__ = ("events", "number", "party", "sock")

    def __init__(self, sock: socket.socket, events: int, party: Party) -> None:
        self.sock, self.events, self.number = sock, events, sock.fileno()
        self.party: Optional[Party] = party


def epoll_of(selector: selectors.BaseSelector) -> Optional[select.epoll]:
    """Return the epoll object below a selector, which tells what is ready in a third of the time.

    None where there is none.
    """
    if sys.platform == "linux" and isinstance(selector, selectors.EpollSelector):
        return select.epoll.fromfd(os.dup(selector.fileno()))
    return None


class Relay(Party):
    """One thread that reads and writes for all connections, so that none costs a thread.

    Only `call` may be used from other threads; it makes a socket ready, of which this is the party.
    """

    def __init__(self, on_fault: Callable[[Exception, str], None]) -> None:
        self._on_fault = on_fault
        self._selector = selectors.DefaultSelector()
        self._epoll = epoll_of(self._selector)
        self._watched: Dict[object, Watch] = {}  # by socket
        self._numbered: Dict[int, Watch] = {}  # the same by descriptor
        # Others would have to be told of each socket that is closed.
        self._rests = type(self._selector).__name__ in ("EpollSelector", "KqueueSelector")
        self._calls: Deque[Tuple[Party, Callable[[], None]]] = deque()
        self._due: List[Tuple[float, int, Party]] = []  # a heap
        self._enough = 1000  # entries, before those are left out that count no more
        self._numbers = itertools.count()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self.watch(self._wakened, selectors.EVENT_READ, self)
        self._thread: Optional[threading.Thread] = None
        self._ended = False

    def start(self) -> None:
        """Begin to work."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="relay")
            self._thread.start()

    def stop(self) -> None:
        """End, after what was called before."""
        self.call(Party(), self._end)
        if self._thread:
            self._thread.join()
        self._selector.close()
        if self._epoll:
            self._epoll.close()
        self._waker.close()
        self._wakened.close()

    def on_ready(self) -> None:
        self._wakened.recv(1 << 12)

    def _end(self) -> None:
        self._ended = True

    def call(self, party: Party, function: Callable[[], None]) -> None:
        """Have a function of `party` called in the relay's thread; from any thread."""
        self._calls.append((party, function))
        with contextlib.suppress(OSError):  # it is awake, or has ended
            self._waker.send(b"x")

    def soon(self, party: Party, function: Callable[[], None]) -> None:
        """The same from the relay's own thread."""
        self._calls.append((party, function))

    def watch(self, sock: socket.socket, events: int, party: Party) -> None:
        """Tell `party` when its socket is ready; replaces what was said of the socket before."""
        watch = self._watched.get(sock)
        if watch is None:
            watch = Watch(sock, events, party)
            self._register(watch)
            self._watched[sock] = watch
        elif watch.events != events:
            self._selector.modify(sock, events, watch)
        watch.events, watch.party = events, party

    def _register(self, watch: Watch) -> None:
        try:
            self._selector.register(watch.sock, watch.events, watch)
        except KeyError:  # a socket of the same number was closed while it rested
            closed = self._selector.unregister(watch.sock).data  # by its number: the other has none
            del self._watched[closed.sock]
            self._selector.register(watch.sock, watch.events, watch)
        self._numbered[watch.number] = watch

    def unwatch(self, sock: socket.socket) -> None:
        """Look at a socket no more."""
        watch = self._watched.pop(sock, None)
        if watch:
            watch.party = None
            self._selector.unregister(sock)
            if self._numbered.get(watch.number) is watch:  # else the number is another's by now
                del self._numbered[watch.number]

    def rest(self, sock: socket.socket) -> None:
        """Look at a socket no more for now, so that to watch it again takes no system call.

        If it stirs it is looked at no more at all. It may be closed, by any thread.
        """
        if not self._rests:
            self.unwatch(sock)
        elif sock in self._watched:
            self._watched[sock].party = None

    def remind(self, when: float, party: Party) -> None:
        """Have `party` asked what is due at a time, or earlier."""
        if when < party.armed:
            party.armed = when
            if len(self._due) >= self._enough:
                self._due = [entry for entry in self._due if entry[0] == entry[2].armed]
                heapq.heapify(self._due)
                self._enough = max(1000, 2 * len(self._due))
            heapq.heappush(self._due, (when, next(self._numbers), party))

    def _run(self) -> None:
        nobody = Party()
        while not self._ended:
            self._guarded(nobody, self._turn)
        for party in [watch.party for watch in self._watched.values()]:
            if party:
                self._guarded(party, party.abort)

    def _turn(self) -> None:
        for watch in self._ready(self._patience()):
            if watch.party:
                self._guarded(watch.party, watch.party.on_ready)
            elif watch is self._watched.get(watch.sock):  # else one before it ended that
                self.unwatch(watch.sock)
        for _ in range(len(self._calls)):
            self._guarded(*self._calls.popleft())
        if self._due:
            self._ask_due(time.monotonic())

    def _ready(self, patience: Optional[float]) -> List[Watch]:
        if self._epoll is None:
            return [key.data for key, _ in self._selector.select(patience)]
        found, known = self._epoll.poll(patience), self._numbered
        # A closed one is told of, too, as long as a program that is being started still holds it.
        return [known[number] for number, _ in found if number in known]

    def _patience(self) -> Optional[float]:
        if self._calls:
            return 0.0
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def _ask_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            when, _, party = heapq.heappop(self._due)
            if when == party.armed:  # else it was asked earlier, and armed anew
                party.armed = math.inf
                self._guarded(party, functools.partial(self._tick, party, now))

    def _tick(self, party: Party, now: float) -> None:
        self.remind(party.tick(now), party)

    def _guarded(self, party: Party, function: Callable[[], None]) -> None:
        """One connection's fault must not cost another's."""
        try:
            function()
        except Exception as error:
            self._on_fault(error, "relay")
            try:
                party.abort()
            except Exception as second:
                self._on_fault(second, "relay")


class Workers:
    """A bounded pool of threads for what takes time: large bodies, new connections upstream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._work: Deque[Callable[[], None]] = deque()
        self._idle = 0
        self._threads: List[threading.Thread] = []
        self._changed = threading.Condition()
        self._stopped = False

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done as soon as a thread is free."""
        with self._changed:
            self._work.append(work)
            if self._idle >= len(self._work) or len(self._threads) >= self._limit:
                self._changed.notify()
                return
            thread = threading.Thread(target=self._run, name="worker", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system gives no more threads: the others do it
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._work or self._stopped)
                self._idle -= 1
                if not self._work:
                    return
                work = self._work.popleft()
            work()
            del work  # or it would keep its request until the next one

    def stop(self, seconds: float) -> None:
        """End the threads; those that are busy for longer are left behind."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class Gate(Party):
    """Lets so many requests upstream at a time, and so many in a second; the others wait in order.

    Few large ones at a time, as each takes many times its size while it is translated: the small
    ones overtake those. For the relay's thread only.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self._running: Set[Exchange] = set()
        self._large: Set[Exchange] = set()  # of those that run, until upstream answers
        self._waiting: OrderedDict[Exchange, None] = OrderedDict()
        self._next_start = 0.0

    def enter(self, exchange: Exchange) -> None:
        """Begin an exchange now or when its turn comes; OverloadedError when too many wait."""
        now = time.monotonic()
        if not self._waiting and self._open(now) and self._fits(exchange):
            self._start(exchange)
            exchange.begin()
            return
        if len(self._waiting) >= self.limits.max_waiting:
            raise OverloadedError(
                "too many requests are waiting in claude_shim already",
                headers=[("retry-after", "1")],
            )
        self._waiting[exchange] = None
        exchange.wait_for_turn()
        self.advance(exchange.relay)

    def _open(self, now: float) -> bool:
        return len(self._running) < self.limits.max_concurrent and now >= self._next_start

    def _fits(self, exchange: Exchange) -> bool:
        return not exchange.large or len(self._large) < self.limits.max_large

    def _start(self, exchange: Exchange) -> None:
        self._running.add(exchange)
        if exchange.large:
            self._large.add(exchange)
        if self.limits.requests_per_second:
            pause = 1 / self.limits.requests_per_second
            saved = time.monotonic() - max(0.0, 1.0 - pause)  # at most a second's worth at once
            self._next_start = max(self._next_start, saved) + pause

    def lighten(self, exchange: Exchange) -> None:
        """Know that the request of an exchange takes up no memory any longer."""
        if exchange in self._large:
            self._large.remove(exchange)
            self.advance(exchange.relay)

    def leave(self, exchange: Exchange) -> None:
        """Forget an exchange that is over, or that nobody waits for any longer."""
        self._running.discard(exchange)
        self._large.discard(exchange)
        if self._waiting:
            self._waiting.pop(exchange, None)
            self.advance(exchange.relay)

    def advance(self, relay: Relay) -> None:
        """Begin what may begin by now; `relay` asks again when more may."""
        relay.remind(self.tick(time.monotonic()), self)

    def tick(self, now: float) -> float:
        while self._waiting and self._open(now):
            exchange = next(filter(self._fits, self._waiting), None)
            if exchange is None:
                break
            del self._waiting[exchange]
            self._start(exchange)
            exchange.relay.soon(exchange, exchange.begin)  # it may be over at once, and leave
        return self._next_start if self._waiting and self._next_start > now else math.inf


_LARGE = 1 << 20
_TURN = 8  # bursts of one stream before others get their turn
_FULL = 256 << 10  # bytes that a slow reader has not taken: then upstream is not read either
_TAIL_SECONDS = 1.0  # for the last bytes of a body whose last event has come


class Errand(Party, Generic[Outcome]):
    """One conversation with upstream, in which the relay and workers take turns.

    `done` is called in the relay's thread with what it came to, or with the exception that ended
    it; after `cancel` only with what a worker brings too late.
    """

    def __init__(
        self,
        server: Server,
        keeper: Party,
        conversation: Conversation[Outcome],
        done: Callable[[Union[Outcome, Exception]], None],
    ) -> None:
        self._server, self._relay = server, server.relay
        self._keeper = keeper  # whoever asks this one what is due
        self._conversation = conversation
        self._done = done
        self._asked: Optional[UpstreamRequest] = None
        self._pending: Optional[UpstreamConnection] = None  # the head of its answer is awaited
        self._outcome: List[Union[Outcome, Exception]] = []
        self._with_worker = False
        self._over = False

    def begin(self, prompt: bool) -> None:
        """Set out; `prompt` if the first question takes no time to put."""
        if prompt:
            self._proceed(self._next(None))
        else:
            self._hand_over(None)

    def _next(self, answer: Answered) -> Optional[UpstreamRequest]:
        """The next question for upstream; None at the end."""
        try:
            if answer is None:
                return next(self._conversation)
            if isinstance(answer, UpstreamResponse):
                return self._conversation.send(answer)
            return self._conversation.throw(answer)
        except StopIteration as stop:
            self._outcome.append(stop.value)
        except Exception as error:
            self._outcome.append(error)
        return None

    def _proceed(self, question: Optional[UpstreamRequest]) -> None:
        if question is None:
            self._finish()
            return
        self._asked, upstream = question, self._server.app.upstream
        try:
            pending = upstream.begin(question, connects=False) if question.prompt() else None
        except (ShimError, ClientGone) as error:
            self._proceed(self._next(error))
            return
        if pending:
            self._await_head(pending)
        else:
            self._hand_over(question)

    def _finish(self) -> None:
        self._with_worker = False
        self._done(self._outcome.pop())

    # --- a worker's turn

    def _hand_over(self, given: Union[UpstreamRequest, Answered]) -> None:
        """Let a worker go on: with a question, or with upstream's answer."""
        self._with_worker = True
        self._server.workers.submit(lambda: self._work(given))

    def _work(self, given: Union[UpstreamRequest, Answered]) -> None:
        question = given if isinstance(given, UpstreamRequest) else self._next(given)
        while question is not None:
            answer = self._put(question)
            if answer is None:
                return
            question = self._next(answer)
        self._relay.call(self, self._finish)

    def _put(self, question: UpstreamRequest) -> Answered:
        """Upstream's answer, or why there is none; None if the relay waits for it."""
        if self._over:
            return ClientGone()
        upstream = self._server.app.upstream
        try:
            if question.delay:
                question.watch.wait(None, question.delay)
            self._asked = question = question._replace(delay=0.0)
            pending = upstream.begin(question, connects=True)
            if pending is None:
                return upstream.send(question)
        except Exception as error:
            return error
        self._relay.call(self, functools.partial(self._await_head, pending))
        return None

    # --- the head of upstream's answer

    def _await_head(self, pending: UpstreamConnection) -> None:
        self._with_worker = False
        if self._over:
            pending.drop()
            self._conversation.close()
            return
        self._pending = pending
        self._relay.watch(pending.sock, selectors.EVENT_READ, self)
        self._relay.remind(pending.head_deadline, self._keeper)

    def _head_came(self) -> UpstreamConnection:
        pending, self._pending = self._pending, None
        assert pending is not None
        self._relay.rest(pending.sock)
        return pending

    def on_ready(self) -> None:
        """Read the head."""
        if self._pending is None or self._asked is None:
            return
        try:
            answer = self._pending.answer()
        except ShimError as error:
            self._head_came().drop()
            self._hand_over(error)
            return
        except OSError as error:
            self._hand_over(self._head_came().failure(error) or self._asked._replace(fresh=True))
            return
        if answer is None:
            if self._pending.ready():  # TLS has more at hand, which the socket does not show
                self._relay.soon(self, self.on_ready)
            return
        self._head_came()
        if self._asked.prompt() and answer.status == 200 and answer.is_event_stream():
            self._proceed(self._next(answer))
        else:
            self._hand_over(answer)  # its body may take a while

    def tick(self, now: float) -> float:
        if self._pending is None:
            return math.inf
        if now < self._pending.head_deadline:
            return self._pending.head_deadline
        self._head_came().drop()
        self._hand_over(UpstreamTimeoutError(NO_ANSWER_IN_TIME))
        return math.inf

    # --- the end

    def cancel(self) -> None:
        """Nobody waits for the outcome any longer."""
        self._over = True
        if self._pending:
            self._head_came().drop()
        if not self._with_worker:
            self._conversation.close()
            self._done = _nothing  # it holds whoever holds this

    def abort(self) -> None:
        self._keeper.abort()


Answered = Union[UpstreamResponse, Exception, None]  # None: nothing was asked yet


class Pump(Party):
    """Carries one stream from upstream to its exchange."""

    def __init__(self, exchange: Exchange, stream: Stream) -> None:
        self.source, self.transform = stream
        self._exchange = exchange
        self._relay = exchange.relay
        self._watched: Optional[socket.socket] = None
        self._heard = self._beaten = time.monotonic()
        self._resuming: Optional[Errand[None]] = None
        self.over = False  # the client gets nothing more of it
        self._closed = False

    def on_ready(self) -> None:
        """Carry what is there; listen for more."""
        for _ in range(_TURN):
            if self.over or self._resuming or self._exchange.full:
                break
            if not self._carry():
                break
        else:
            self._relay.soon(self, self.on_ready)
        self.listen()

    def _carry(self) -> bool:
        """Carry one burst; whether more is at hand."""
        try:
            burst = self.source.read()
            resume = self.source.resumption() if burst == b"" else None
            if resume:
                self._resume(resume)
                return False
            made = b"" if burst is None else self.transform.feed(burst)
            made += self.transform.end() if burst == b"" else b""
        except Exception as error:  # the edge, where it becomes the end of this answer
            made, burst = self.transform.end(self._told(error)), b""
        self._deliver(made, ended=burst == b"")
        return not self.over and self.source.ready()  # also after events that nobody gets

    def _deliver(self, made: bytes, ended: bool) -> None:
        self._heard = time.monotonic()
        self.over = ended or self.transform.complete or self.transform.failed
        if made or self.over:
            self._beaten = self._heard
            self._exchange.deliver(self, made)

    def _resume(self, conversation: Conversation[None]) -> None:
        self.pause()
        exchange = self._exchange
        self._resuming = Errand(exchange.server, exchange.connection, conversation, self._resumed)
        self._resuming.begin(prompt=False)

    def _resumed(self, outcome: Optional[Exception]) -> None:
        self._resuming = None
        self._heard = time.monotonic()
        if self._closed:
            self.source.drop()
        elif isinstance(outcome, ClientGone):
            self._exchange.cancel()
        elif outcome is None:
            self.on_ready()
        else:
            self.fail(self._told(outcome))

    def _told(self, error: Exception) -> ShimError:
        """What the client is told of an error; a fault of ours is logged."""
        if isinstance(error, ShimError):
            return error.with_traceback(None)  # which would hold this pump, and all that it read
        self._exchange.log_fault(error)
        return ShimError("claude_shim failed on this answer")

    def fail(self, error: ShimError) -> None:
        """End the answer by an error that is not upstream's."""
        if not self.over:
            self._deliver(self.transform.end(error), ended=True)
            self.listen()

    def listen(self) -> None:
        """Wait for what is missing, unless the client has not taken the last yet."""
        if self.over and not self._closed:
            self._rest()
        if self._closed or self._resuming or (self._exchange.full and not self.over):
            self.pause()
        elif self.source.sock is not None and self._watched is None:
            self._watched = self.source.sock
            self._relay.watch(self._watched, selectors.EVENT_READ, self)

    def _rest(self) -> None:
        """Give the connection back as soon as the last bytes have come."""
        if not self.transform.complete:
            self.drop()
        elif self.source.rests():
            self._closed = True
            self.pause()
            self.source.close()
        else:
            self._relay.remind(time.monotonic() + _TAIL_SECONDS, self)

    def pause(self) -> None:
        """Read no more for now."""
        if self._watched is not None:
            self._relay.rest(self._watched)
            self._watched = None

    def drop(self) -> None:
        """Close upstream's connection: nobody wants the rest."""
        self.over = self._closed = True
        self.pause()
        if self._resuming:
            self._resuming.cancel()
        self.source.drop()

    def tick(self, now: float) -> float:
        """Of an answer that is over: the last bytes did not come."""
        if self.over and not self._closed:
            self.drop()
        return math.inf

    def beat(self, now: float) -> float:
        """Fill a silence, end too long a one; return when to look again."""
        if self.over:
            return math.inf
        resuming = self._resuming.tick(now) if self._resuming else math.inf
        if self._resuming or self._exchange.full:
            self._heard = now
        try:
            self.source.check_time(now - self._heard)
        except ShimError as error:
            self.fail(error)
            return math.inf
        pause = self._exchange.server.limits.heartbeat_seconds
        if now - self._beaten >= pause:
            self._beaten = now
            self._exchange.deliver(self, self.transform.heartbeat)
        silent = self._heard + self.source.silence_seconds
        return min(self._beaten + pause, silent, self.source.deadline, resuming)

    def abort(self) -> None:
        self.drop()
        self._exchange.abort()


_NO_RESPONSE = Response(0, [])


class Exchange(Party):
    """One request on its way: asked of the App, answered on its connection."""

    def __init__(self, connection: ClientConnection, request: Request, coding: str) -> None:
        self.server, self.connection = connection.server, connection
        self.relay = connection.server.relay
        self._request = request
        self._coding = coding  # of the request's body
        self.large = len(request.body) > _LARGE
        asked = self._decompressed() if coding else self.server.app.answering(request)
        self._errand = Errand(self.server, connection, asked, self._come)
        self._response = _NO_RESPONSE
        self._pumps: List[Pump] = []
        self._streams = False  # the head of the answer has gone out, or will with its first bytes
        self._deadline = math.inf  # of the wait for a turn
        self.over = False

    def wait_for_turn(self) -> None:
        """The gate is closed: wait in line, but not for ever."""
        self._deadline = time.monotonic() + self.server.limits.wait_seconds
        self.relay.remind(self._deadline, self.connection)

    def begin(self) -> None:
        """Ask the App; here if that takes no time."""
        if not self.over:
            self._deadline = math.inf
            self._errand.begin(prompt=self.server.app.prompt(self._request) and not self._coding)

    def _decompressed(self) -> Conversation[Response]:
        """What is asked of the App, in a worker's time."""
        body = decompressed(self._request.body, self._coding, self.server.limits.max_body)
        return (yield from self.server.app.answering(self._request._replace(body=body)))

    def _come(self, outcome: Union[Response, Exception]) -> None:
        if isinstance(outcome, Response):
            self._respond(outcome)
        elif isinstance(outcome, ClientGone):
            self.connection.gone = self.connection.gone or not self.over
            self.cancel()
        elif isinstance(outcome, ShimError):  # the body is not in its coding
            self.connection.break_off()
            self._respond(self.server.app.failure(outcome, self._request))
        else:  # the edge: one request's fault must not cost another's
            self._respond(self._fault(outcome))

    def _fault(self, error: Exception) -> Response:
        id = self._request.request_id
        self.server.log_fault(error, id)
        failure = ShimError(f"claude_shim failed on this request; its log says more ({id})")
        return self.server.app.failure(failure, self._request)

    # --- the answer

    @property
    def full(self) -> bool:
        """Whether the client has not taken enough of a stream yet to be given more."""
        return self._streams and self.connection.backlog > _FULL

    def _respond(self, response: Response) -> None:
        self._response = response
        self.server.gate.lighten(self)
        body = response.body
        if isinstance(body, Stream):
            streams = [body]
        else:
            streams = body.streams if isinstance(body, Gathered) else []
        if self.over or self.connection.gone:
            for stream in streams:
                stream.source.drop()
            self.cancel()
            return
        self._streams = isinstance(body, Stream)
        if self._streams:
            self.connection.begin_stream(response)
        self._pumps = [Pump(self, stream) for stream in streams]
        for pump in self._pumps:
            pump.on_ready()
        if not streams:
            self.connection.send_whole(response, self._request)
            self.finish("ok")
        if not self.over:
            now = time.monotonic()
            self.relay.remind(min(pump.beat(now) for pump in self._pumps), self.connection)

    def deliver(self, pump: Pump, made: bytes) -> None:
        """Take what a pump has made, and notice when the answer is whole or has failed."""
        if self.over:
            return
        if self._streams:
            complete = pump.over and pump.transform.complete
            self.connection.send_piece(made, complete)
            if pump.over and not complete:
                self.connection.break_off()
            if pump.over:
                self.finish("ok" if complete else "upstream failed")
        elif pump.over and (not pump.transform.complete or all(p.over for p in self._pumps)):
            self._gather()

    def _gather(self) -> None:
        body = self._response.body
        assert isinstance(body, Gathered)
        try:
            response = body.response()
            outcome = "ok" if response.status < 400 else "upstream failed"
        except Exception as error:
            response, outcome = self._fault(error), type(error).__name__
        self.connection.send_whole(response, self._request)
        self.finish(outcome, response)

    def relieved(self) -> None:
        """The client has taken some of what was left: read on."""
        for pump in self._pumps if self._streams else ():
            pump.on_ready()

    def log_fault(self, error: Exception) -> None:
        """Log a fault of ours in the middle of an answer."""
        self.server.log_fault(error, self._request.request_id)

    def tick(self, now: float) -> float:
        if now >= self._deadline:
            self._deadline = math.inf
            self.fail(never_begun(self.server.limits.wait_seconds))
        beats = [pump.beat(now) for pump in list(self._pumps)]
        return min([self._deadline, self._errand.tick(now), *beats])

    # --- the end

    def fail(self, error: ShimError) -> None:
        """End by an error of our own, whatever is going on."""
        if self._streams and not self.over:
            self._pumps[0].fail(error)
        elif not self.over:
            response = self.server.app.failure(error, self._request)
            self.connection.send_whole(response, self._request)
            self.finish(type(error).__name__, response)

    def finish(self, outcome: str, response: Optional[Response] = None) -> None:
        """Let go of what is still open; the connection may serve its next request."""
        if self.over:
            return
        self.over = True
        for pump in self._pumps:
            if not pump.over:
                pump.drop()
        self._errand.cancel()
        shown, model = response or self._response, self._response.model
        self.server.gate.leave(self)
        self._forget()
        self.connection.answered(shown.status, model or shown.model, outcome)

    def _forget(self) -> None:
        """Hold nothing that is large; a reminder may hold this for a minute."""
        self._pumps, self._response = [], _NO_RESPONSE
        self._request = self._request._replace(body=b"")

    def cancel(self) -> None:
        """The client is gone. A worker that has this still comes back, and finds it over."""
        self.finish("client gone")

    def abort(self) -> None:
        if not self.over:
            self.connection.abort()


def never_begun(seconds: float) -> OverloadedError:
    """Return the error for a request that waited for its turn in vain."""
    return OverloadedError(
        f"no turn came within {seconds:g} seconds: too many requests run already",
        headers=[("retry-after", "5")],
    )


def _nothing(*outcome: object) -> None:
    pass


class ClientConnection(socketserver.BaseRequestHandler, Party):
    """One connection of a client: requests in, answers out, in order. The relay has it."""

    server: Server
    request: socket.socket

    def setup(self) -> None:
        sock = self.request
        with contextlib.suppress(OSError):  # a Unix socket has no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.tls:
            self.request = sock = self.server.tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
        sock.setblocking(False)
        self._reader = RequestReader(self.server.limits)
        self._head: Optional[Head] = None  # of the request that is read or answered
        self._fields: Dict[str, str] = {}  # of it
        self._exchange: Optional[Exchange] = None
        self._out: Deque[memoryview] = deque()
        self.backlog = 0  # bytes of it
        self._sent_at = 0.0
        self._events = 0  # that the relay looks for
        self._more = False  # another request may have come already
        self._held = 0  # bytes of a body that is not whole, as the server counts them
        self._deadline = math.inf
        self._on_deadline: Callable[[], None] = self.close
        self._body_deadline = math.inf
        self._open = True  # for another request
        self._ending = False  # close when all is sent
        self._lingering: Optional[int] = None  # bytes that may still come, unread
        self.gone = False
        self.closed = False
        self._started = 0.0
        self._pending = b""  # the head of a stream, which goes out with its first bytes
        self._chunked = False
        self._key_name = self._request_id = ""

    def handle(self) -> None:
        """Give the connection to the relay."""
        self.server.relay.call(self, self._begin)

    def _begin(self) -> None:
        self.server.connections[self] = None
        if self.server.draining:
            self.close()
            return
        limits = self.server.limits
        first = limits.head_seconds if self.server.tls else limits.idle_seconds  # of the handshake
        self._until(first, self._idle_too_long)
        self._listen()

    def _until(self, seconds: float, then: Callable[[], None]) -> None:
        self._deadline, self._on_deadline = time.monotonic() + seconds, then
        self.server.relay.remind(self._deadline, self)

    def _idle_too_long(self) -> None:
        """Nothing has come; but the last answer may still be going out, which has its own limit."""
        if self._out:
            self._until(self.server.limits.idle_seconds, self._idle_too_long)
        else:
            self.close()

    def _listen(self) -> None:
        """Tell the relay what to look for."""
        leaving = self._ending and self._lingering is None
        busy = self._exchange is not None or self._more or leaving
        early = busy and len(self._reader) > PROMPT_BYTES
        events = 0 if early or self.gone else selectors.EVENT_READ
        events |= selectors.EVENT_WRITE if self._out else 0
        if events != self._events and not self.closed:
            self._events = events
            if events:
                self.server.relay.watch(self.request, events, self)
            else:
                self.server.relay.unwatch(self.request)

    def on_ready(self) -> None:
        """Send what is left to send, read what has come."""
        if self._out:
            self._send_on()
        if self._events & selectors.EVENT_READ and not self.closed:
            self._receive()

    def _send_on(self) -> None:
        self._flush()
        if self._exchange and self.backlog <= _FULL:
            self._exchange.relieved()
        elif self._more:
            self._read_on()

    def tick(self, now: float) -> float:
        if self.closed:
            return math.inf
        patience = self.server.limits.write_seconds
        if self._out and now - self._sent_at >= patience:
            self._send_on()  # the system may have taken a little from it, which it does not tell
        if self._out and now - self._sent_at >= patience:
            self._hung_up()  # a reader that takes nothing for that long
        if now >= self._deadline:
            self._deadline = math.inf
            self._on_deadline()
        stalled = self._sent_at + patience if self._out else math.inf
        answering = self._exchange.tick(now) if self._exchange else math.inf
        return min(self._deadline, stalled, answering)

    # --- reading

    def _receive(self) -> None:
        burst = self._received()
        while burst:
            if self._lingering is not None:
                self._lingering -= len(burst)
                if self._lingering < 0:
                    self.close()
                    return
            else:
                self._reader.feed(burst)
            burst = self._received() if holds_more(self.request) else None
        if burst == b"":
            self._hung_up()
        elif self._exchange or self._ending or self._more:
            self._listen()
        else:
            self._read_on()

    def _received(self) -> Optional[bytes]:
        """What came; None when nothing did, b"" when the client hung up."""
        size = _CHUNKED_READ if self._reader.in_chunks else _READ_BYTES
        try:
            return received_now(self.request, size)
        except OSError:
            return b""

    def _read_on(self) -> None:
        """Read the next request as far as it has come."""
        if self._exchange or self._ending or self.closed or self.backlog > _FULL:
            return
        self._more = False
        try:
            if self._head is None:
                self._read_head()
            body = self._reader.body() if self._head else None
            if self._head and body is None:
                self._await_body()
        except ShimError as error:
            self._refuse(error)
            return
        if body is not None:
            self._hold(0)
            self._deadline = math.inf
            self._exchange_begins(body)
        self._listen()

    def _read_head(self) -> None:
        limits = self.server.limits
        head = self._reader.head() if len(self._reader) else None
        if head is None:
            if not len(self._reader):
                self._until(limits.idle_seconds, self._idle_too_long)
            elif self._on_deadline != self._too_slow or self._deadline == math.inf:
                self._until(limits.head_seconds, self._too_slow)
            return
        self._started = time.monotonic()
        self._head, self._open = head, head.keeps_alive() and not self.server.draining
        self._request_id = self._id_of(head)
        self._fields = head.headers()
        check_origin(head, self.server.allowed_hosts, self.server.app.policy.allowed_origins)
        self._key_name = self.server.app.admit(head.method, head.target, self._fields)
        framing = request_framing(head, limits.max_body)
        self._reader.expect(framing)
        self._body_deadline = self._started + limits.body_seconds
        if framing.chunked or framing.length:
            self._let_come(head)

    def _let_come(self, head: Head) -> None:
        waits = "100-continue" in head.tokens("expect") and not len(self._reader)
        if waits and head.minor_version == 1:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _await_body(self) -> None:
        """Wait for the rest; OverloadedError if all bodies together are too much to hold."""
        self._hold(self._reader.held)
        if self.server.held > self.server.limits.max_held:
            raise OverloadedError(
                "too many large requests are on their way to claude_shim",
                headers=[("retry-after", "5")],
            )
        left = self._body_deadline - time.monotonic()
        self._until(min(left, self.server.limits.body_pause_seconds), self._too_slow)

    def _hold(self, size: int) -> None:
        """Count the bytes of a body that is not whole."""
        self.server.held += size - self._held
        self._held = size

    def _too_slow(self) -> None:
        self._refuse(RequestTimeoutError("the request did not come in time"))

    def _id_of(self, head: Head) -> str:
        """The client's own id if it is harmless, else a new one."""
        given = "".join(head.values("x-request-id"))
        return given if SAFE_REQUEST_ID.fullmatch(given) else self.server.new_request_id()

    def _exchange_begins(self, body: bytes) -> None:
        head = self._head
        assert head is not None
        watch = ClientWatch(self.request)
        asked = (head.method, head.target, self._fields, body, self._request_id, watch)
        request = Request(*asked, self._key_name)
        self._exchange = exchange = Exchange(self, request, content_coding(head))
        try:
            self.server.gate.enter(exchange)
        except ShimError as error:
            exchange.fail(error)

    def _hung_up(self) -> None:
        if self._exchange:
            self.gone = True
            self._out.clear()
            self._listen()
            self._exchange.cancel()
        else:
            self.close()

    # --- writing

    def _refuse(self, error: ShimError) -> None:
        """Answer without having read the body, so that the connection cannot be used again."""
        head = self._head or _NO_HEAD
        unread = head.values("transfer-encoding") or head.tokens("content-length") not in (
            [],
            ["0"],
        )
        self._open = self._open and not unread and not isinstance(error, ProtocolError)
        self._deadline = math.inf
        request = Request(head.method, head.target, head.headers(), b"", self._request_id)
        response = self.server.app.failure(error, request)
        self.send_whole(response, request)
        if head is _NO_HEAD:
            self.server.app.log.once(f"note: a request was refused: {error.message}")
        self.answered(response.status, "", type(error).__name__)

    def _headers(self, response: Response) -> HeaderList:
        head = self._head or _NO_HEAD
        shared = cross_origin_headers(head, self.server.app.policy.allowed_origins)
        headers = [*response.headers, *shared]
        if not self._open:
            headers.append(("connection", "close"))
        elif not head.minor_version:
            headers.append(("connection", "keep-alive"))
        return headers

    def send_whole(self, response: Response, request: Request) -> None:
        """Send an answer that is all there."""
        body = response.body if isinstance(response.body, bytes) else b""
        self._open = self._open and not self.server.draining
        headers = self._headers(response)
        if response.status not in (204, 304):
            headers.append(("content-length", str(len(body))))
        if request.request_id and "x-request-id" not in map(NAME_OF, headers):
            headers.append(("x-request-id", request.request_id))
        top = response_head(response.status, headers, int(time.time()))
        self._write(top if request.method == "HEAD" else top + body)

    def begin_stream(self, response: Response) -> None:
        """Prepare the head of an answer that goes out as it comes."""
        self._chunked = self._head is not None and self._head.minor_version == 1
        self._open = self._open and self._chunked and not self.server.draining
        headers = self._headers(response)
        if all(name != "content-type" for name, _ in headers):
            headers.append(("content-type", "text/event-stream; charset=utf-8"))
        headers.append(("x-accel-buffering", "no"))
        if self._chunked:
            headers.append(("transfer-encoding", "chunked"))
        self._pending = response_head(response.status, headers, int(time.time()))

    def send_piece(self, piece: bytes, complete: bool) -> None:
        """Send a piece of a stream, the first one with the head.

        Without the last chunk no client can take a broken answer for a whole one.
        """
        framed = chunk(piece) if self._chunked else piece
        if self._pending:
            framed, self._pending = self._pending + framed, b""
        self._write(framed + b"0\r\n\r\n" if complete and self._chunked else framed)

    def break_off(self) -> None:
        """Close after what was sent, which is not the whole answer."""
        self._open = False

    def _write(self, piece: bytes) -> None:
        if self.gone or self.closed or not piece:
            return
        sent = 0 if self._out else self._taken(piece)
        if sent == len(piece):
            return
        if not self._out:
            self._sent_at = time.monotonic()
            self.server.relay.remind(self._sent_at + self.server.limits.write_seconds, self)
        self._out.append(memoryview(piece)[sent:])
        self.backlog += len(piece) - sent
        self._listen()

    def _taken(self, piece: Union[bytes, memoryview]) -> int:
        """How many bytes the client takes now; all of them when it has gone."""
        try:
            return self.request.send(piece)
        except NOT_NOW:
            return 0
        except OSError:
            self._out.clear()
            self._hung_up()
            return len(piece)

    def _flush(self) -> None:
        while self._out:
            piece = self._out[0]
            sent = self._taken(piece)
            if not (self._out and sent):
                break
            self._sent_at = time.monotonic()
            self.backlog -= sent
            if sent == len(piece):
                self._out.popleft()
            else:
                self._out[0] = piece[sent:]
        if not self._out:
            self._listen()
            if self._ending:
                self._linger()

    # --- the end of an answer, and of the connection

    def answered(self, status: int, model: str, outcome: str) -> None:
        """Log the request; go on to the next one, or close."""
        head, self._head, self._exchange = self._head, None, None
        if head:
            record = Record(
                head.method,
                head.target.partition("?")[0],
                status,
                time.monotonic() - self._started,
                self._request_id,
                model,
                self._key_name,
                outcome,
            )
            self.server.log_request(record)
        self._key_name = self._request_id = ""
        self._hold(0)
        self._more = self._open and len(self._reader) > 0
        if self.gone:
            self.close()
        elif not self._open:
            self._end()
        elif self._more:
            self.server.relay.soon(self, self._read_on)
        else:
            self._until(self.server.limits.idle_seconds, self._idle_too_long)
        self._listen()

    def _end(self) -> None:
        self._ending = True
        if not self._out:
            self._linger()

    def _linger(self) -> None:
        """Read on for a moment: closing with unread bytes would destroy the answer on its way."""
        if self._lingering is None and not self.closed:
            self._lingering = _LINGER_BYTES
            self._reader = RequestReader(self.server.limits)
            with contextlib.suppress(OSError, ValueError):
                if isinstance(self.request, ssl.SSLSocket):
                    self.request.unwrap()  # says close_notify; does not wait for the other's
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.request, socket.SHUT_WR)
            self._until(_LINGER_SECONDS, self.close)
            self._listen()

    def drain(self) -> None:
        """The server is about to stop: no more requests."""
        self._open = False
        if self._exchange is None and self._head is None and not self._ending:
            self._end()

    def cut(self) -> None:
        """The server cannot wait any longer."""
        if self._exchange:
            self._exchange.fail(
                ShuttingDownError("claude_shim is being stopped; send the request again")
            )
        else:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if not self.closed:
            self.closed, self._on_deadline, self.armed = True, _nothing, math.inf
            self.server.relay.unwatch(self.request)
            with contextlib.suppress(OSError):  # wakes a worker that still has it
                socket.socket.shutdown(self.request, socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                self.request.close()
            self._hold(0)
            self.server.forget(self)

    @property
    def idle(self) -> bool:
        """Whether it waits for the next request, and not a byte of it has come."""
        busy = self._exchange or self._head or self._ending or self._out
        return not (busy or len(self._reader))

    def abort(self) -> None:
        """Close at once."""
        self.gone = True
        if self._exchange:
            self._exchange.cancel()
        self.close()


_NO_HEAD = Head("-", "/", 1, {})  # of a request that could not be read
_READ_BYTES = 64 << 10
_CHUNKED_READ = 16 << 10  # which may be thousands of chunks, while others wait
_LINGER_BYTES = 1 << 20
_LINGER_SECONDS = 1.0


class Letters(Party):
    """What is remembered in one of several processes, told to the others.

    Each has a box, a pair of datagram sockets: it reads from the first, all others write to the
    second. What does not fit in is lost, which costs a thought, and nobody waits.
    """

    def __init__(
        self, memory: ThinkingMemory, number: int, boxes: Sequence[Tuple[socket.socket, ...]]
    ) -> None:
        self._memory = memory
        self.box = boxes[number][0]
        self._others = [box[1] for box in boxes if box is not boxes[number]]
        memory.tell = self._tell

    def _tell(self, letter: bytes) -> None:
        for other in self._others if len(letter) <= _LETTER_BYTES else ():
            with contextlib.suppress(OSError):
                other.send(letter)

    def on_ready(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._memory.hear(self.box.recv(_LETTER_BYTES))


_LETTER_BYTES = 1 << 20


def letter_box() -> Tuple[socket.socket, socket.socket]:
    """Return the two ends of a box for Letters; neither ever waits."""
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (reader, writer):
        end.setblocking(False)
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LETTER_BYTES)
    return reader, writer


class Server(http.server.ThreadingHTTPServer):
    """Serves an App; a context manager that starts in a thread and stops when left.

    `host` is an address, `unix:PATH`, or `fd:N` for a listening socket that was inherited; `port` 0
    takes a free one; `url` says which. With a `tls` context it speaks HTTPS. OSError when the port
    is taken.
    """

    tls: Optional[ssl.SSLContext] = None

    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"  # elsewhere it lets others steal the port
    allow_reuse_port = False

    def __init__(
        self,
        app: App,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        limits: ServerLimits = ServerLimits(),  # noqa: B008 - immutable
        allowed_hosts: Iterable[str] = (),
    ) -> None:
        self.app, self.limits = app, limits
        self.allowed_hosts = frozenset(name.lower() for name in (*allowed_hosts, host))
        self.part = (0, 1)  # which of how many processes that serve together
        self._crowd: Union[List[int], memoryview] = [0]  # open connections of each of them
        self._accepted = self._closed = 0  # two, as each is counted in one thread only
        self.draining = False
        self.connections: Dict[ClientConnection, None] = {}  # the relay's, as is what they hold:
        self.held = 0
        self._stopping = threading.Event()
        self.emptied = threading.Event()  # no connection is left, and none will come
        self._thread: Optional[threading.Thread] = None
        self._id_prefix, self._id_numbers = _id_prefix(), itertools.count(1)
        self.gate = Gate(limits)
        self.workers = Workers(limits.max_workers)
        app.later = self.workers.submit
        self._host = host
        self.address_family = address_family(host)
        super().__init__((host, port), ClientConnection, bind_and_activate=False)
        self.relay = Relay(self.log_fault)
        try:
            self.server_bind()
            if not (app.policy.client_keys or self.private):
                message = f"{host} lets other machines spend your quota: set a client key first"
                raise ConfigError(message)
            self.server_activate()
        except BaseException:
            self.server_close()
            self.relay.stop()
            raise

    @property
    def private(self) -> bool:
        """Whether only this machine can connect."""
        return self.socket.family not in _NETWORK or is_loopback(self.server_name)

    @property
    def url(self) -> str:
        """The base URL for clients."""
        if self.socket.family not in _NETWORK:
            return f"unix:{self.server_name}"
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"{'https' if self.tls else 'http'}://{shown}:{port}"

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the standard library, which may take seconds."""
        kind, _, rest = self._host.partition(":")
        if kind == "unix":
            bind_unix(self.socket, rest)
        elif kind == "fd":
            self.socket.close()
            self.socket = socket.socket(fileno=int(rest))
        else:
            socketserver.TCPServer.server_bind(self)
        address = self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(address), 0
        if self.socket.family in _NETWORK:
            self.server_name, self.server_port = address[:2]

    def take_part(
        self, number: int, crowd: memoryview, boxes: Sequence[Tuple[socket.socket, ...]]
    ) -> None:
        """Be one of several servers on one socket, in a process that was forked before any served.

        `crowd` is memory that all see, and `boxes` are for their Letters. All wake up for a
        connection, and one of those that have the fewest takes it: left to chance (EPOLLEXCLUSIVE),
        the first would take all of a burst. Sockets of their own (SO_REUSEPORT) would have queues,
        which are lost with whoever dies.
        """
        self.part, self._crowd = (number, len(crowd)), crowd
        self._count()
        self.limits = self.gate.limits = self.limits.part(*self.part)
        self._id_prefix = _id_prefix()
        self._host = "fd"  # the socket is another's, as is the path of a Unix socket
        self.socket.setblocking(False)
        self.relay.stop()  # its selector is shared with the other process
        self.relay = Relay(self.log_fault)
        letters = Letters(self.app.memory, number, boxes)
        self.relay.watch(letters.box, selectors.EVENT_READ, letters)

    def _count(self) -> None:
        self._crowd[self.part[0]] = self._accepted - self._closed

    def forget(self, connection: ClientConnection) -> None:
        """Count a connection no more."""
        self.connections.pop(connection, None)
        self._closed += 1
        self._count()
        if self.draining and not self.connections:
            self.emptied.set()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `stop`."""
        self.relay.start()
        super().serve_forever(poll_interval)

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection; where descriptors run out, make room and come again later."""
        try:
            if len(self.connections) >= self.limits.max_connections:
                raise OSError(errno.EMFILE, "too many connections")
            if self._crowd[self.part[0]] > min(self._crowd):  # its server is awake, too, or busy
                self._stopping.wait(_COURTESY_SECONDS)
            accepted = super().get_request()
            self._accepted += 1
            self._count()
            return accepted
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.app.log.once("note: connections wait, as too many are open already")
                self.relay.call(Party(), self._close_idle)
                self._stopping.wait(0.05)
            raise  # which socketserver takes for nothing to do

    def _close_idle(self) -> None:
        idle = [connection for connection in self.connections if connection.idle]
        for connection in idle[:16]:
            connection.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, without a thread of its own: the relay carries it."""
        try:
            self.finish_request(request, client_address)
        except OSError:  # it was reset already
            self._accepted -= 1

    def new_request_id(self) -> str:
        """Return an id that no other request has; random bytes are drawn once, as they are slow."""
        return f"{self._id_prefix}_{next(self._id_numbers):x}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault that no request owns, in one line."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            self.log_fault(error, "connection")

    def log_request(self, record: Record) -> None:
        """Write the line of one request."""
        if not self.app.log.quiet:
            self.app.log.write(log_line(record))

    def log_fault(self, error: Exception, request_id: str) -> None:
        """Write where a fault of ours arose: a name and lines, no content."""
        lines, trace = [], error.__traceback__
        while trace is not None:
            lines.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
            trace = trace.tb_next
        where = " ".join(lines[-6:])
        self.app.log.write(f"fault {plain(request_id)} {type(error).__name__} at {where}")

    def start(self) -> Server:
        """Serve in a thread of its own; returns this server."""
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop accepting, end idle connections, let answers end in time, then cut them."""
        if self.draining:
            return
        self.draining = self.app.draining = True
        self._stopping.set()
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()
        if self._host.startswith("unix:"):
            with contextlib.suppress(OSError):
                os.unlink(self.server_name)
        self.relay.start()
        self._end_all(ClientConnection.drain, self.limits.drain_seconds)
        self._end_all(ClientConnection.cut, _CUT_SECONDS)
        self._end_all(ClientConnection.abort, _CUT_SECONDS)
        self.workers.stop(_CUT_SECONDS)
        self.relay.stop()
        self.app.close()

    def _end_all(self, end: Callable[[ClientConnection], None], seconds: float) -> None:
        """Have all connections end in a way; wait until they have, but not for longer."""

        def begin() -> None:
            for connection in list(self.connections):
                end(connection)
            if not self.connections:
                self.emptied.set()

        self.relay.call(Party(), begin)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:  # a signal that comes just before a wait does not end it
            if self.emptied.wait(min(seconds, 0.2)):
                break

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def __enter__(self) -> Server:
        return self.start()


def _id_prefix() -> str:
    return f"shim_{secrets.token_hex(8)}"


_CUT_SECONDS = 2.0
_COURTESY_SECONDS = 0.001
_NETWORK = (socket.AF_INET, socket.AF_INET6)


def address_family(host: str) -> int:
    """Return the family of sockets for a Server's `host`; ConfigError where there is none."""
    if host.startswith("unix:"):
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigError("this platform has no Unix sockets")
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in host and not host.startswith("fd:") else socket.AF_INET


def bind_unix(sock: socket.socket, path: str) -> None:
    """Bind to a path that only its owner can connect to; a socket that nobody serves is replaced.

    OSError when the path is taken.
    """
    with socket.socket(sock.family) as probe, contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)


# ----------------------------------------------------------------------
# 14. Command line                         uses: 0 1 2 3 8 9 10 11 12 13
# ----------------------------------------------------------------------
# OPTIONS is the only list of settings: the parser, the environment, the configuration file and the
# README's table come from it. Precedence: command line, environment, file, default.


class Settings(NamedTuple):
    """All settings, parsed; the fields are those of OPTIONS."""

    host: str
    port: int
    upstream: str
    base_url: str
    auth: str
    fallback_auth: str
    api_key_file: str
    setup_token_file: str
    allow_odd_token: bool
    bundle: str
    key_helper: str
    key_helper_ttl: float
    token_url: Tuple[str, ...]
    oauth_client_id: str
    oauth_scope: str
    client_key_file: str
    allow_host: Tuple[str, ...]
    allow_origin: Tuple[str, ...]
    alias: Dict[str, str]
    opus: str
    sonnet: str
    haiku: str
    prompt_cache: str
    strict: bool
    max_body: int
    responses_store: str
    retries: int
    connect_timeout: float
    first_byte_timeout: float
    silence_timeout: float
    total_timeout: float
    ca_file: str
    client_cert: str
    upstream_header: Tuple[Tuple[str, str], ...]
    allow_plain_http: bool
    unix: str
    tls_cert: str
    tls_key: str
    max_concurrent: int
    max_waiting: int
    requests_per_second: float
    drain_seconds: float
    workers: int
    quiet: bool


def _text(text: str) -> str:
    return text


def _flag(text: str) -> bool:
    value = text.strip().lower()
    if value not in ("1", "true", "yes", "on", "0", "false", "no", "off", ""):
        raise ValueError("expected yes or no")
    return value in ("1", "true", "yes", "on")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return parse


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port <= 65535:
        raise ValueError("expected a port from 0 to 65535")
    return port


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError("expected seconds over zero")
    if seconds > 1_000_000:
        raise ValueError("expected at most a million seconds")
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("expected a whole number")
    return int(text)


def _some(text: str) -> int:
    if _count(text) < 1:
        raise ValueError("expected a whole number from 1")
    return int(text)


def _rate(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        raise ValueError("expected a number from 0")
    return float(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})([kKmMgG]?)", text.strip())
    if not match or not int(match.group(1)):
        raise ValueError("expected a size such as 32M")
    return int(match.group(1)) << {"": 0, "k": 10, "m": 20, "g": 30}[match.group(2).lower()]


def _url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("expected a URL such as https://api.anthropic.com")
    if parts.username is not None:
        raise ValueError("a URL must not hold a password")
    if parts.port == 0:  # and ValueError for one that is none
        raise ValueError("expected a port over 0")
    return re.sub(r"/v1/?$", "", text.rstrip("/"))


def _token_urls(text: str) -> Tuple[str, ...]:
    urls = _names(text)
    if not urls:
        raise ValueError("expected a URL")
    for url in urls:
        _url(url)
        host = urllib.parse.urlsplit(url).hostname or ""
        if not url.startswith("https:") and not is_loopback(host):
            raise ValueError("a token endpoint must be https://")
    return urls


def _names(text: str) -> Tuple[str, ...]:
    return tuple(name for name in re.split(r"[\s,]+", text) if name)


def _hosts(text: str) -> Tuple[str, ...]:
    hosts = tuple(map(host_name, _names(text)))
    if not all(hosts) or "*" in text:
        raise ValueError("expected a host name such as my.example")
    return hosts


_ORIGIN = (
    r"(?!http:.*:80$|https:.*:443$)"
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?"
)


def _origins(text: str) -> Tuple[str, ...]:
    names = _names(text)
    if not all(re.fullmatch(_ORIGIN, name) for name in names):
        raise ValueError(
            "expected an origin as browsers write it, such as https://app.example:8443"
        )
    return names


def _aliases(text: str) -> Dict[str, str]:
    pairs = [pair.partition("=") for pair in _names(text)]
    if not all(name and target for name, _, target in pairs):
        raise ValueError("expected NAME=MODEL, where NAME may hold *")
    return {name: target for name, _, target in pairs}


def _header_lines(text: str) -> Tuple[Tuple[str, str], ...]:
    lines = [line.partition(":") for line in text.splitlines() if line.strip()]
    for name, colon, value in lines:
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name.strip()):
            raise ValueError("expected 'Name: value'")
        if name.strip().lower() in ("host", "content-length", "transfer-encoding", "connection"):
            raise ValueError(f"{name.strip()} is not yours to set")
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
            raise ValueError("a header value holds a control character")
    return tuple((name.strip(), value.strip()) for name, _, value in lines)


class Option(NamedTuple):
    """One setting: `--flag`, CLAUDE_SHIM_FLAG, `flag = ` in the configuration file."""

    flag: str
    parse: Callable[[str], Any]
    default: str
    help: str
    metavar: str = ""  # empty: a switch
    repeats: bool = False

    @property
    def field(self) -> str:
        """The field of Settings."""
        return self.flag.replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"CLAUDE_SHIM_{self.field.upper()}"


AUTH_MODES = tuple(kind for kind in KINDS if kind != "none")

OPTIONS: Tuple[Option, ...] = (
    Option(
        "host",
        _text,
        "127.0.0.1",
        "address to listen on; any but loopback needs a client key",
        "ADDR",
    ),
    Option("port", _port, "8765", "port to listen on; 0 takes a free one", "PORT"),
    Option(
        "upstream",
        _one_of("http", "echo"),
        "http",
        "http, or echo to try it without credential",
        "KIND",
    ),
    Option(
        "base-url",
        _url,
        "https://api.anthropic.com",
        "Messages API or a gateway that speaks it",
        "URL",
    ),
    Option(
        "auth",
        _one_of("auto", *AUTH_MODES),
        "auto",
        "the credential to use, see Credentials; auto takes the first that is there",
        "MODE",
    ),
    Option(
        "fallback-auth",
        _one_of("", *AUTH_MODES),
        "",
        "the credential to use when upstream refuses the first, or it is spent",
        "MODE",
    ),
    Option(
        "api-key-file", _text, "", "file that holds the API key; else ANTHROPIC_API_KEY", "FILE"
    ),
    Option(
        "setup-token-file",
        _text,
        "",
        "file that holds a setup token; else CLAUDE_CODE_OAUTH_TOKEN",
        "FILE",
    ),
    Option("allow-odd-token", _flag, "no", "take a setup token that does not look like one"),
    Option("bundle", _text, "", "file of an OAuth login; else the one that `login` writes", "FILE"),
    Option("key-helper", _text, "", "shell command that prints a key", "COMMAND"),
    Option("key-helper-ttl", _seconds, "300", "seconds until it is run again", "S"),
    Option(
        "token-url",
        _token_urls,
        f"{TOKEN_URL} {OLD_TOKEN_URL}",
        "where an OAuth login is renewed; a second one is asked if the first is a 404",
        "URL",
        True,
    ),
    Option("oauth-client-id", _text, OAUTH_CLIENT_ID, "client id of an OAuth login", "ID"),
    Option("oauth-scope", _text, OAUTH_SCOPE, "scopes that `login` asks for", "SCOPES"),
    Option(
        "client-key-file",
        _text,
        "",
        "keys that clients must show, one a line; else CLAUDE_SHIM_API_KEY",
        "FILE",
    ),
    Option(
        "allow-host", _hosts, "", "further name that clients may use for this host", "NAME", True
    ),
    Option(
        "allow-origin",
        _origins,
        "",
        "web pages that may call, by origin, as in https://app.example",
        "ORIGIN",
        True,
    ),
    Option(
        "alias",
        _aliases,
        "",
        "serve NAME (may hold *) by MODEL, as in 'gpt-4o*=sonnet'",
        "NAME=MODEL",
        True,
    ),
    Option("opus", _text, "", "model for the alias opus; default the newest", "MODEL"),
    Option("sonnet", _text, "", "model for the alias sonnet; default the newest", "MODEL"),
    Option("haiku", _text, "", "model for the alias haiku; default the newest", "MODEL"),
    Option(
        "prompt-cache",
        _one_of("off", "5m", "1h"),
        "5m",
        "automatic prompt caching: off, 5m or 1h",
        "TTL",
    ),
    Option("strict", _flag, "no", "refuse a field that would have no effect"),
    Option("max-body", _size, "32M", "largest request body", "SIZE"),
    Option(
        "responses-store",
        _text,
        "memory",
        "where answers of the Responses API can be named later: off, memory or a FILE (SQLite)",
        "PLACE",
    ),
    Option("retries", _count, "2", "tries after the first while upstream is overloaded", "N"),
    Option("connect-timeout", _seconds, "10", "seconds to reach upstream", "S"),
    Option("first-byte-timeout", _seconds, "300", "seconds until upstream starts to answer", "S"),
    Option("silence-timeout", _seconds, "300", "seconds of silence within an answer", "S"),
    Option("total-timeout", _seconds, "3600", "seconds for a whole answer", "S"),
    Option(
        "ca-file", _text, "", "further certificate authorities, PEM; else SSL_CERT_FILE", "FILE"
    ),
    Option("client-cert", _text, "", "client certificate and key for upstream, PEM", "FILE"),
    Option(
        "upstream-header",
        _header_lines,
        "",
        "header to add upstream, 'Name: value'",
        "HEADER",
        True,
    ),
    Option("allow-plain-http", _flag, "no", "send the key over http:// to another host"),
    Option(
        "unix", _text, "", "listen on a Unix socket at PATH instead, for this user only", "PATH"
    ),
    Option("tls-cert", _text, "", "certificate chain to serve HTTPS with, PEM", "FILE"),
    Option("tls-key", _text, "", "its key, if not in the same file", "FILE"),
    Option("max-concurrent", _some, "256", "requests answered at a time; others wait", "N"),
    Option("max-waiting", _count, "1024", "requests that may wait; others are refused", "N"),
    Option("requests-per-second", _rate, "0", "requests begun in a second; 0 is no limit", "N"),
    Option("drain-seconds", _seconds, "30", "seconds that a stop gives running answers", "S"),
    Option("workers", _some, "1", "processes that serve, for several processor cores", "N"),
    Option("quiet", _flag, "no", "no line per request on standard error"),
)


def config_path(environment: Dict[str, str]) -> str:
    """Return where the configuration file is looked for: never in the working directory."""
    if os.name == "nt":
        return os.path.join(environment.get("APPDATA", ""), "claude-shim", "config.ini")
    home = environment.get("HOME") or "/nonexistent"
    folder = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    return os.path.join(folder, "claude-shim", "config.ini")


def bundle_path(settings: Settings, environment: Dict[str, str]) -> str:
    """Return the file of the OAuth login: the one that was named, or the one of `login`."""
    if settings.bundle:
        return settings.bundle
    if os.name == "nt":
        return os.path.join(environment.get("LOCALAPPDATA", ""), "claude-shim", "oauth.json")
    home = environment.get("HOME") or "/nonexistent"
    folder = environment.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state")
    return os.path.join(folder, "claude-shim", "oauth.json")


def sealing_key_path(config: str) -> str:
    """Return where the key of the envelopes is kept: beside the configuration file."""
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(config)))
    return os.path.join(folder, "sealing.key")


class _Parser(argparse.ArgumentParser):
    """Quotes no value when it complains: it may be a key."""

    def error(self, message: str) -> NoReturn:
        super().error(re.split("['\"]", message)[0].rstrip())


def argument_parser(command: str = "serve") -> argparse.ArgumentParser:
    """Return the parser for what follows a word of COMMANDS: its switches, and OPTIONS."""
    others = ", ".join(name for name in COMMANDS if name != command)
    parser = _Parser(
        prog="claude_shim" if command == "serve" else f"claude_shim {command}",
        description=f"{COMMANDS[command].help}. Other commands: {others}.",
        epilog="Each option can also be set by an environment variable (--base-url by "
        "CLAUDE_SHIM_BASE_URL) or in the section [claude_shim] of the configuration file. "
        f"Exit code: {COMMANDS[command].exit_codes}, 2 after a wrong setting.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"claude_shim {__version__}")
    parser.add_argument(
        "--config", metavar="FILE", help="configuration file (INI); default: see README"
    )
    for switch, text in COMMANDS[command].switches.items():
        parser.add_argument(f"--{switch}", action="store_true", help=text)
    for option in OPTIONS:
        shown = f"{option.help} (default: {option.default})" if option.default else option.help
        if not option.metavar:
            parser.add_argument(
                f"--{option.flag}", action="store_const", const="yes", help=option.help
            )
        else:
            action = "append" if option.repeats else "store"
            parser.add_argument(
                f"--{option.flag}", action=action, metavar=option.metavar, help=shown
            )
    return parser


def parsed_words(command: str, words: Sequence[str]) -> argparse.Namespace:
    """Return what the words after one of COMMANDS say; a wrong one ends this process with code 2.

    Of that no more than the name of an option is repeated: it may be a key.
    """
    parser = argument_parser(command)
    arguments, wrong = parser.parse_known_args(words)
    if wrong:
        names = [word.partition("=")[0] for word in wrong]
        shown = ", ".join(name for name in names if re.fullmatch("--[A-Za-z_-]{1,40}", name))
        secret = re.search("key|token|secret|sk-", " ".join(wrong), re.IGNORECASE)
        what = f"no option {shown}" if shown else "a word that is neither an option nor a command"
        parser.error(f"there is {what}{_NO_KEYS_HERE if secret else ''}")
    return arguments


_NO_KEYS_HERE = (
    "; keys are not given here, where other users could read them: set ANTHROPIC_API_KEY for "
    "upstream or CLAUDE_SHIM_API_KEY for clients, or see --api-key-file and --client-key-file"
)


def settings_from(
    arguments: argparse.Namespace, environment: Dict[str, str], file: Dict[str, str]
) -> Settings:
    """Return the settings; ConfigError names the setting that is wrong and where it came from."""
    values: JSON = {}
    for option in OPTIONS:
        text, source = _given(option, arguments, environment, file)
        try:
            if "\0" in text:  # which only a file can hold
                raise ValueError("a NUL byte has no place here")
            if text.startswith("sk-"):
                raise ConfigError(f"{source}: this is a key; put it into a file and name that")
            values[option.field] = option.parse(text)
        except ValueError as error:
            got = "" if option.metavar in ("URL", "HEADER") else f", got {text!r}"  # may be secret
            raise ConfigError(f"{source}: {error}{got}") from None
    unknown = sorted(set(file) - {option.flag for option in OPTIONS})
    if unknown:
        raise ConfigError(f"the configuration file has an unknown setting: {unknown[0]}")
    return Settings(**values)


def _given(
    option: Option, arguments: argparse.Namespace, environment: Dict[str, str], file: Dict[str, str]
) -> Tuple[str, str]:
    given = getattr(arguments, option.field)
    if given is not None:
        return "\n".join(given) if isinstance(given, list) else given, f"--{option.flag}"
    if environment.get(option.variable):
        return environment[option.variable], f"environment variable {option.variable}"
    if option.flag in file:
        return file[option.flag], f"configuration file, {option.flag}"
    return option.default, f"default of --{option.flag}"


def config_values(path: Optional[str], environment: Dict[str, str]) -> Dict[str, str]:
    """Return the settings of the configuration file; ConfigError when it cannot be read."""
    file = path or config_path(environment)
    if path is None and not os.path.exists(file):
        return {}
    import configparser

    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    try:
        parser.read_string(read_text(file))
    except configparser.Error as error:
        raise ConfigError(f"{file}: {_ini_fault(error)}") from None
    if not parser.has_section("claude_shim"):
        raise ConfigError(f"{file} has no section [claude_shim]")
    return dict(parser.items("claude_shim"))


def _ini_fault(error: configparser.Error) -> str:
    """What is wrong, without the line itself, which may hold a secret."""
    import configparser

    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"line {error.lineno}: File contains no section headers"
    if isinstance(error, configparser.ParsingError):
        return f"line {', '.join(str(number) for number, _ in error.errors)}: not NAME = VALUE"
    return f"line {getattr(error, 'lineno', '?')}: this name already exists"


def read_text(path: str) -> str:
    """Return the text of a file; ConfigError with the reason when it cannot be read."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            return file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    except ValueError as error:  # no path at all
        raise ConfigError(f"cannot read {path!r}: {error}") from None


NO_CREDENTIAL = """claude_shim needs a credential for Claude. Give it one of:
  1. ANTHROPIC_API_KEY=sk-ant-...   an API key from platform.claude.com, in the environment
  2. --api-key-file FILE            the same, in a file that only you can read
  3. --auth passthrough             every client sends a key of its own
Logins, profiles and other kinds are in the README, under Credentials.
Or try it without any: python claude_shim.py --upstream echo"""


class Search(NamedTuple):
    """Where credentials are looked for."""

    settings: Settings
    environment: Dict[str, str]
    outside: Outside

    def variable(self, name: str) -> str:
        """Return a variable of the environment; one of white space is none."""
        return self.environment.get(name, "").strip()

    def exists(self, path: str) -> bool:
        """Return whether there is a file, though it may be of no use."""
        return os.path.lexists(os.path.expanduser(path))


class Found(NamedTuple):
    """A credential that is there; only `load` reads it."""

    kind: str
    source: str
    load: Callable[[], Credential]
    given: bool = False  # to claude_shim itself, by an option


def _found_bundle(search: Search) -> Optional[Found]:
    settings, outside = search.settings, search.outside
    path = bundle_path(settings, search.environment)
    if not settings.bundle and not search.exists(path):
        return None

    def load() -> Credential:
        return Renewed(BundleFile(path, oauth_client(settings), outside), outside)

    return Found("oauth-bundle", path, load, bool(settings.bundle))


def _found_setup_token(search: Search) -> Optional[Found]:
    path, odd = search.settings.setup_token_file, search.settings.allow_odd_token
    name = path or "CLAUDE_CODE_OAUTH_TOKEN"
    if not path and not search.variable(name):
        return None

    def load() -> Credential:
        text = read_secret_file(path) if path else search.variable(name)
        return AuthToken(checked_setup_token(text, name, odd), name, "setup-token")

    return Found("setup-token", name, load, bool(path))


def _found_api_key(search: Search) -> Optional[Found]:
    path = search.settings.api_key_file
    name = path or "ANTHROPIC_API_KEY"
    if not path and not search.variable(name):
        return None

    def load() -> Credential:
        text = _key_text(path, search.outside) if path else search.variable(name)
        return APIKey(checked_api_key(text, name), name)

    return Found("api-key", name, load, bool(path))


def _key_text(path: str, outside: Outside) -> str:
    """The text of a key file; secrets of containers are open to others, which is a warning here."""
    try:
        return read_secret_file(path)
    except ConfigError as error:
        text = read_text(path)
        outside.tell(f"warning: {error}")
        return text


def _found_auth_token(search: Search) -> Optional[Found]:
    name = "ANTHROPIC_AUTH_TOKEN"
    token = search.variable(name)
    return (
        Found("auth-token", name, lambda: AuthToken(checked_secret(token, name), name))
        if token
        else None
    )


def _found_helper(search: Search) -> Optional[Found]:
    command, seconds = search.settings.key_helper, search.settings.key_helper_ttl
    if not command:
        return None

    def load() -> Credential:
        return Renewed(Helper(command, seconds, search.outside), search.outside)

    return Found("helper", "--key-helper", load, True)


def _found_profile(search: Search) -> Optional[Found]:
    folder = profile_folder(search.environment)
    name = search.variable("ANTHROPIC_PROFILE")
    with contextlib.suppress(ConfigError):
        name = name or read_text(os.path.join(folder, "active_config")).strip()
    name = name or "default"
    path = os.path.join(folder, "configs", f"{name}.json")
    if not search.variable("ANTHROPIC_PROFILE") and not search.exists(path):
        return None
    return Found("profile", path, lambda: profile_credential(search, folder, name))


def _found_federation(search: Search) -> Optional[Found]:
    rule = search.variable("ANTHROPIC_FEDERATION_RULE_ID")
    if not rule:
        return None
    names = ("federation_rule_id", "organization_id", "service_account_id", "workspace_id", "scope")
    fields = {name: search.variable(f"ANTHROPIC_{name.upper()}") for name in names}

    def identity() -> str:
        path = search.variable("ANTHROPIC_IDENTITY_TOKEN_FILE")
        return read_text(path) if path else search.variable("ANTHROPIC_IDENTITY_TOKEN")

    def load() -> Credential:
        return federated(search, search.settings.base_url, fields, identity)

    return Found("federation", "ANTHROPIC_FEDERATION_RULE_ID", load)


def federated(
    search: Search, base_url: str, fields: Dict[str, str], identity: Callable[[], str]
) -> Credential:
    """Return workload identity; ConfigError when a part of it is missing."""
    for name in ("federation_rule_id", "organization_id"):
        if not fields.get(name):
            raise ConfigError(f"workload identity needs {name} (ANTHROPIC_{name.upper()})")
    checked_secret(identity(), "the identity token")
    client = OAuthClient(_token_urls(f"{base_url}/v1/oauth/token"))
    given = {name: value for name, value in fields.items() if value}
    return Renewed(Federation(client, given, identity, search.outside), search.outside)


def profile_folder(environment: Dict[str, str]) -> str:
    """Return where the profiles of Anthropic's SDK and `ant` are."""
    if environment.get("ANTHROPIC_CONFIG_DIR"):
        return environment["ANTHROPIC_CONFIG_DIR"]
    if os.name == "nt":
        return os.path.join(environment.get("APPDATA", ""), "Anthropic")
    return os.path.join(environment.get("HOME") or "/nonexistent", ".config", "anthropic")


def profile_credential(search: Search, folder: str, name: str) -> Credential:
    """Return the credential of a profile; ConfigError names what is wrong with it."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{plain(name)} is no name of a profile")
    path = os.path.join(folder, "configs", f"{name}.json")
    try:
        profile = as_object(loads(read_text(path).encode()), "the profile")
        details = as_object(profile.get("authentication"), "authentication")
        base_url = _url(str(profile.get("base_url") or search.settings.base_url))
        urls = _token_urls(f"{base_url}/v1/oauth/token")
    except (ShimError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if details.get("type") == "user_oauth":
        named = details.get("credentials_path") or os.path.join("credentials", f"{name}.json")
        tokens = os.path.join(folder, os.path.expanduser(str(named)))
        workspace = str(profile.get("workspace_id") or "")
        client = OAuthClient(
            urls,
            str(details.get("client_id") or OAUTH_CLIENT_ID),
            headers=[("anthropic-beta", OAUTH_BETA)],
            beside=[("anthropic-workspace-id", workspace)] if workspace else [],
            repair="run `ant auth login`",
        )
        return Renewed(BundleFile(tokens, client, search.outside, "profile"), search.outside)
    return _federated_profile(search, base_url, {**profile, **details})


def _federated_profile(search: Search, base_url: str, profile: JSON) -> Credential:
    token = profile.get("identity_token")
    if profile.get("type") != "oidc_federation" or not isinstance(token, dict):
        raise ConfigError("the profile is neither user_oauth nor oidc_federation")
    if token.get("source") != "file" or not isinstance(token.get("path"), str):
        raise ConfigError("the profile takes its identity token from no file")
    names = ("federation_rule_id", "organization_id", "service_account_id", "workspace_id", "scope")
    fields = {name: str(profile.get(name) or "") for name in names}
    return federated(search, base_url, fields, lambda: read_text(token["path"]))


def _found_claude_code(search: Search) -> Optional[Found]:
    config = search.variable("CLAUDE_SECURESTORAGE_CONFIG_DIR") or search.variable(
        "CLAUDE_CONFIG_DIR"
    )
    home = search.environment.get("HOME") or search.environment.get("USERPROFILE") or "/nonexistent"
    path = os.path.join(config or os.path.join(home, ".claude"), ".credentials.json")
    service = keychain_service(config) if sys.platform == "darwin" else ""
    if not search.exists(path) and not (service and _in_keychain(service, search.outside)):
        return None

    def load() -> Credential:
        return Renewed(ClaudeCode(path, service, search.outside), search.outside)

    return Found("claude-code", path, load)


def _in_keychain(service: str, outside: Outside) -> bool:
    """Whether there is an entry; without -w nobody is asked for leave to read it."""
    with contextlib.suppress(OSError):
        return outside.run(["/usr/bin/security", "find-generic-password", "-s", service])[0] == 0
    return False


FINDERS: Dict[str, Callable[[Search], Optional[Found]]] = {
    "oauth-bundle": _found_bundle,
    "setup-token": _found_setup_token,
    "api-key": _found_api_key,
    "auth-token": _found_auth_token,
    "helper": _found_helper,
    "federation": _found_federation,
    "profile": _found_profile,
    "claude-code": _found_claude_code,
}


def found_credentials(search: Search) -> List[Found]:
    """Return what is there, best first: what an option of ours names, then in D7's order."""
    found = [each for each in (find(search) for find in FINDERS.values()) if each]
    return sorted(found, key=lambda each: not each.given)


def pinned_credential(search: Search, mode: str) -> Credential:
    """Return the credential of one kind; ConfigError when there is none."""
    if mode == "passthrough":
        return Passthrough()
    found = FINDERS[mode](search)
    if found is None:
        raise ConfigError(nothing_found(mode))
    return found.load()


def nothing_found(mode: str) -> str:
    """Return what to tell when there is no credential for an --auth."""
    if mode == "auto":
        return NO_CREDENTIAL
    return f"there is no {KINDS[mode].name} to use; give it by {KINDS[mode].given}"


def credential_from(
    settings: Settings, environment: Dict[str, str], outside: Outside
) -> Credential:
    """Return what pays upstream; ConfigError when there is nothing."""
    if settings.upstream == "echo":
        return NoCredential()
    search = Search(settings, environment, outside)
    if settings.auth != "auto":
        return pinned_credential(search, settings.auth)
    found = found_credentials(search)
    if not found:
        raise ConfigError(nothing_found(settings.auth))
    for other in found[1:]:
        unused = Description(other.kind, other.source)
        outside.tell(f"note: also found, not used: {unused} (--auth {other.kind} takes it)")
    return found[0].load()


def fallback_from(
    settings: Settings, environment: Dict[str, str], outside: Outside, first: Credential
) -> Optional[Credential]:
    """Return who pays when the first credential does not; ConfigError if that is the same."""
    if not settings.fallback_auth or settings.upstream == "echo":
        return None
    kind = first.describe().kind
    if kind == settings.fallback_auth:
        raise ConfigError(f"--fallback-auth: {kind} is used anyway")
    if kind == "passthrough":  # a client without a key of its own would spend yours
        raise ConfigError("--fallback-auth: with --auth passthrough you would pay for everybody")
    return pinned_credential(Search(settings, environment, outside), settings.fallback_auth)


CLAUDE_AI_NOTICE = (
    "notice: this token is of a claude.ai subscription, which Anthropic's terms reserve for its "
    "own apps: requests may be refused, or billed as extra usage. Other programs are meant to use "
    "an API key or a profile of `ant auth login`; the supported way to use a subscription is the "
    "`claude` program"
)


def client_keys_from(settings: Settings, environment: Dict[str, str]) -> ClientKeys:
    """Return the keys that clients must show; ConfigError for an open host without one."""
    if settings.client_key_file:
        text = read_text(settings.client_key_file)
        return ClientKeys(parsed_client_keys(text, settings.client_key_file))
    key = environment.get("CLAUDE_SHIM_API_KEY", "")
    if key.strip():
        return ClientKeys({"env": checked_secret(key, "CLAUDE_SHIM_API_KEY")})
    if not (settings.unix or is_loopback(settings.host)):
        raise ConfigError(
            f"--host {settings.host} lets other machines spend your quota: set CLAUDE_SHIM_API_KEY "
            "or --client-key-file first"
        )
    return ClientKeys()


def tls_context(settings: Settings, url: str) -> Optional[ssl.SSLContext]:
    """Return a TLS context for `url`; ConfigError when a file of it cannot be used."""
    if not url.startswith("https:"):
        return None
    context = ssl.create_default_context()
    if settings.ca_file:
        _trust(context, ("--ca-file", settings.ca_file))
    if settings.client_cert:
        both = ("--client-cert", settings.client_cert)
        _show(context, both, both)
    return context


NamedFile = Tuple[str, str]  # the option that names it, and its path


def _trust(context: ssl.SSLContext, authorities: NamedFile) -> None:
    try:
        context.load_verify_locations(os.path.expanduser(authorities[1]))
    except (OSError, ValueError) as error:
        raise _tls_fault(authorities, "certificate", error) from None


def _show(context: ssl.SSLContext, certificate: NamedFile, key: NamedFile) -> None:
    file, key_file = (os.path.expanduser(path) for _, path in (certificate, key))
    try:
        context.load_cert_chain(file, key_file, _no_password)
    except (OSError, ValueError) as error:  # which does not say of which file
        _trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate)
        raise _tls_fault(key, "private key", error) from None


def _no_password() -> str:
    raise OSError("the key is encrypted")


def _tls_fault(file: NamedFile, part: str, error: Exception) -> ConfigError:
    said = getattr(error, "strerror", None) or str(error)
    if isinstance(error, ssl.SSLError):  # whose own text is for programmers
        reason = (error.reason or "").replace("_", " ").lower()
        said = f"no usable {part}" + (f" ({reason})" if reason else "")
    return ConfigError(f"{' '.join(file)}: {said}")


def upstream_from(settings: Settings) -> Upstream:
    """Return the upstream; ConfigError when it would show the key on the network."""
    if settings.upstream == "echo":
        return EchoUpstream()
    parts = urllib.parse.urlsplit(settings.base_url)
    plain_text = parts.scheme == "http" and not is_loopback(parts.hostname or "")
    if plain_text and not settings.allow_plain_http:
        raise ConfigError(
            "--base-url is http:// to another host, which shows the key; use https://"
        )
    limits = Limits(
        settings.connect_timeout,
        settings.first_byte_timeout,
        settings.silence_timeout,
        settings.total_timeout,
    )
    return HTTPUpstream(
        settings.base_url,
        limits=limits,
        extra_headers=settings.upstream_header,
        context=tls_context(settings, settings.base_url),
    )


TOKEN_SECONDS = 30.0
MAX_TOKEN_BYTES = 1 << 20


def token_post(settings: Settings, seconds: float = TOKEN_SECONDS) -> TokenPost:
    """Return how token endpoints are asked: as upstream is, over a connection of its own."""

    def post(request: TokenRequest) -> TokenAnswer:
        parts = urllib.parse.urlsplit(request.url)
        headers = [
            ("content-type", "application/json"),
            ("accept", "application/json"),
            ("user-agent", f"claude-shim/{__version__}"),
            *request.headers,
        ]
        call = UpstreamRequest("POST", parts.path, headers, request.body(), patience=seconds)
        try:
            context = tls_context(settings, request.url)
            upstream = HTTPUpstream(f"{parts.scheme}://{parts.netloc}", context=context)
        except ConfigError as error:
            raise UpstreamUnreachableError(str(error)) from None
        with contextlib.closing(upstream):
            return _read_token_answer(upstream.send(call))

    return post


def _read_token_answer(response: UpstreamResponse) -> TokenAnswer:
    body = b""
    try:
        for piece in pieces_of(response.source):
            body += piece
            if len(body) > MAX_TOKEN_BYTES:
                raise UpstreamCutError("the token endpoint does not stop to answer")
    finally:
        response.source.drop()
    return TokenAnswer(response.status, response.headers, body)


def outside(settings: Settings, log: Log) -> Outside:
    """Return the world for a credential."""
    return Outside(token_post(settings), log.write, log.hide)


def oauth_client(settings: Settings) -> OAuthClient:
    """Return who asks for the tokens of an OAuth login."""
    return OAuthClient(settings.token_url, settings.oauth_client_id, settings.oauth_scope)


def header_secrets(settings: Settings) -> List[str]:
    """Return what --upstream-header may have of secrets: all that is longer than a word."""
    return [value for _, value in settings.upstream_header if len(value) >= 8]


def payers_from(
    settings: Settings, environment: Dict[str, str], log: Log
) -> Tuple[Credential, Optional[Credential]]:
    """Return who pays, and who does when the first does not; the log masks what they hold."""
    world = outside(settings, log)
    credential = credential_from(settings, environment, world)
    fallback = fallback_from(settings, environment, world, credential)
    for payer in filter(None, (credential, fallback)):
        log.learn(payer.secrets())
        if KINDS[payer.describe().kind].claude_ai:
            log.once(CLAUDE_AI_NOTICE)
    return credential, fallback


def policy_from(settings: Settings, keys: ClientKeys, fallback: Optional[Credential]) -> Policy:
    """Return what the settings say about requests."""
    lines = {line: getattr(settings, line) for line in LINES if getattr(settings, line)}
    return Policy(
        keys,
        {**settings.alias, **lines},
        settings.prompt_cache,
        settings.strict,
        RetryPolicy(settings.retries),
        settings.upstream != "echo",
        allowed_origins=frozenset(settings.allow_origin),
        responses_store=settings.responses_store,
        fallback=fallback,
    )


def limits_from(settings: Settings) -> ServerLimits:
    """Return what the settings say about load; ConfigError if that is too little for all."""
    if settings.workers > 1 and not hasattr(os, "fork"):
        raise ConfigError("--workers: this system cannot fork, so only one process can serve")
    if settings.workers > settings.max_concurrent:
        most = f"--max-concurrent is {settings.max_concurrent}"
        raise ConfigError(f"--workers {settings.workers}: none would be left for some, {most}")
    return ServerLimits(
        max_body=settings.max_body,
        max_connections=max(16, descriptor_limit() // 2 - 32),  # one more each goes upstream
        max_concurrent=settings.max_concurrent,
        max_waiting=settings.max_waiting,
        requests_per_second=settings.requests_per_second,
        drain_seconds=settings.drain_seconds,
    )


def secrets_of(settings: Settings, keys: ClientKeys) -> List[str]:
    """Return what must never be shown, apart from what a credential holds."""
    return [*keys.secrets(), *header_secrets(settings)]


def server_from(
    settings: Settings, environment: Dict[str, str], log_to: TextIO, config: Optional[str] = None
) -> Server:
    """Return the server, bound but not serving yet; ConfigError when a setting is wrong.

    `config` is the configuration file in use, if it is not the usual one.
    """
    keys = client_keys_from(settings, environment)
    log = Log(log_to, secrets_of(settings, keys), settings.quiet)
    credential, fallback = payers_from(settings, environment, log)
    context = listener_context(settings)
    app = App(upstream_from(settings), credential, policy_from(settings, keys, fallback), log)
    app.sealing_key_file = sealing_key_path(config or config_path(environment))
    if settings.responses_store not in ("off", "memory"):
        with store_for_use():
            app.store.check()
    limits, host = limits_from(settings), listening_host(settings, environment)
    try:
        server = Server(app, host, settings.port, limits=limits, allowed_hosts=settings.allow_host)
    except (OSError, OverflowError) as error:
        raise ConfigError(_cannot_listen(settings, error)) from None
    server.tls = context
    return server


def reconfigure(server: Server, settings: Settings, environment: Dict[str, str]) -> None:
    """Let a running server follow new settings; what it listens on and asks stays.

    ConfigError, and nothing changes, when a setting is wrong.
    """
    keys = client_keys_from(settings, environment)
    limits = limits_from(settings).part(*server.part)
    app, former = server.app, server.app.payers()
    for payer in former:
        payer.settle()
    app.log.learn(secrets_of(settings, keys))
    credential, fallback = payers_from(settings, environment, app.log)
    app.credential, app.policy = credential, policy_from(settings, keys, fallback)
    server.limits = server.gate.limits = limits
    server.relay.call(server.gate, functools.partial(server.gate.advance, server.relay))
    for payer in former:
        payer.close()


def listening_host(settings: Settings, environment: Dict[str, str]) -> str:
    """Return a Server's `host`: systemd's socket (sd_listen_fds(3)), a path or an address."""
    if environment.get("LISTEN_PID") == str(os.getpid()):
        if environment.get("LISTEN_FDS") != "1":
            raise ConfigError("expected one socket from systemd (LISTEN_FDS=1)")
        return "fd:3"
    return f"unix:{os.path.expanduser(settings.unix)}" if settings.unix else settings.host


def listener_context(settings: Settings) -> Optional[ssl.SSLContext]:
    """Return the TLS context to serve with; ConfigError when its files cannot be used."""
    if not settings.tls_cert:
        if settings.tls_key:
            raise ConfigError("--tls-key needs --tls-cert: without, this would be plain HTTP")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate = ("--tls-cert", settings.tls_cert)
    _show(
        context, certificate, ("--tls-key", settings.tls_key) if settings.tls_key else certificate
    )
    return context


def descriptor_limit() -> int:
    """Return how many files and sockets may be open, after raising it as far as that is free."""
    try:
        import resource
    except ImportError:  # Windows, where a selector takes 512 sockets
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


@contextlib.contextmanager
def store_for_use() -> Iterator[None]:
    """Turn what is wrong with a store of responses into a ConfigError."""
    try:
        yield
    except (StoreFault, OSError) as error:
        raise ConfigError(f"--responses-store: {error}") from None


def _cannot_listen(settings: Settings, error: Exception, taker: str = "") -> str:
    where = settings.unix or f"{settings.host}:{settings.port}"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        flag = "--unix" if settings.unix else "--port"
        return f"{where} is taken by {taker or 'another program'}; choose another {flag}"
    reason = getattr(error, "strerror", None) or error
    return f"cannot listen on {where}: {reason}"


def _callers(keys: ClientKeys) -> str:
    return "only with a client key" if keys else "any program on this machine"


def welcome(server: Server) -> str:
    """Return what is printed at the start: who listens, who pays, and how clients find it."""
    app = server.app
    callers = _callers(app.policy.client_keys)
    key = "your-client-key" if app.policy.client_keys else "anything"
    clients = [
        f"  OpenAI      export OPENAI_BASE_URL={server.url}/v1 OPENAI_API_KEY={key}",
        f"  Anthropic   export ANTHROPIC_BASE_URL={server.url} ANTHROPIC_API_KEY={key}",
    ]
    if not server.url.startswith("http"):
        clients = [f"  to try it   curl --unix-socket {server.server_name} http://localhost/health"]
    return "\n".join(
        [
            f"claude_shim {__version__} listening on {server.url}",
            f"  upstream    {app.upstream.url}",
            f"  credential  {app.credential.describe()}",
            f"  callers     {callers}",
            *clients,
        ]
    )


def shown_settings(settings: Settings) -> str:
    """Return the settings, one a line, without the values of headers."""
    shown = settings._asdict()
    shown["upstream_header"] = tuple(name for name, _ in settings.upstream_header)
    return "\n".join(f"{name.replace('_', '-')} = {value}" for name, value in shown.items())


def no_core_dumps() -> None:
    """See to it that a crash writes no secrets to a file."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Interrupts:
    """Handles signals to stop: the first raises KeyboardInterrupt, a second one ends at once."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self, number: int, frame: Any) -> None:
        if self._asked:
            os._exit(130)
        self._asked = True
        raise KeyboardInterrupt


def serve(server: Server, reload: Callable[[], bool], ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then let answers end; a second one ends at once.

    `ready` is called when signals are heeded.
    """
    interrupts = Interrupts()
    signal.signal(signal.SIGINT, interrupts)
    signal.signal(signal.SIGTERM, interrupts)
    if hasattr(signal, "SIGHUP"):
        again = functools.partial(follow, server, reload)
        signal.signal(signal.SIGHUP, lambda number, frame: threading.Thread(target=again).start())
    serve_until_interrupted(server, ready)


def serve_until_interrupted(server: Server, ready: Callable[[], None]) -> None:
    """Serve until a signal raises KeyboardInterrupt, then let answers end."""
    with contextlib.suppress(KeyboardInterrupt):
        ready()
        server.app.start()
        server.serve_forever(poll_interval=0.2)
    server.stop()


def follow(server: Server, reload: Callable[[], bool]) -> None:
    """Have a server that runs follow the settings as they are now."""
    if reload():
        server.app.start()
        server.app.log.write("note: the configuration was read again")


# --- several processes


class Child(NamedTuple):
    """A process that serves, as its parent sees it."""

    pid: int
    line: socket.socket  # to it, for the words below; its end is the end of the other side
    began: float


_READ_AGAIN, _END = b"r", b"e"


class Supervisor:
    """The parent of `count` processes that serve on one socket; it only looks after them.

    It has no thread, since a fork takes none along. What a child is told comes over its line, not
    by a signal, which a terminal or systemd may send to parent and children alike.
    """

    STEADY_SECONDS = 2.0  # who lives longer has not failed to start
    MAX_FAILURES = 6  # in a row, while no child is steady
    MAX_PAUSE = 10.0  # seconds before the next start

    def __init__(self, server: Server, count: int, reload: Callable[[], bool]) -> None:
        import mmap

        self._server, self._reload = server, reload
        self._crowd = memoryview(mmap.mmap(-1, 4 * count)).cast("I")
        self._boxes = [letter_box() for _ in range(count)]
        self._log = server.app.log
        self._orphaned = False  # of a child
        self._leavings = contextlib.ExitStack()  # what must be gone at the end
        self._children: Dict[int, Child] = {}
        self._due = dict.fromkeys(range(count), 0.0)  # when a child is to be started, by number
        self._failures = 0
        self._signalled, self._signals = socket.socketpair()
        self._end = math.inf  # when those are killed that still drain
        self._code = 0
        self._on_signal = {
            signal.SIGINT: self._stop,
            signal.SIGTERM: self._stop,
            signal.SIGHUP: self._tell_to_read,
        }
        self._signals.setblocking(False)
        signal.set_wakeup_fd(self._signals.fileno())
        for number in self._on_signal:
            signal.signal(number, _nothing)  # `run` reads what came
        server.app.sealing_key()  # which is random where it cannot be kept in a file
        for end in (self._signals, self._signalled, *itertools.chain(*self._boxes)):
            self._leavings.enter_context(end)
        if server.app.store.place != "off":
            with store_for_use():
                self._share(server.app.store)

    def _share(self, store: ResponseStore) -> None:
        folder = ""
        if store.place == "memory":
            import tempfile

            private = tempfile.TemporaryDirectory(prefix="claude-shim-")
            folder = self._leavings.enter_context(private)
        store.share(os.path.join(folder, "responses.sqlite3"))

    def run(self, ready: Callable[[], None]) -> int:
        """Serve until SIGINT or SIGTERM, then let answers end; returns the exit code."""
        with self._leavings:
            ready()
            while self._children or self._due:
                self._look_after()
            signal.set_wakeup_fd(-1)
        return self._code

    def _look_after(self) -> None:
        now = time.monotonic()
        for number in list(self._due):
            if self._due.get(number, math.inf) <= now:
                try:
                    self._start(number)
                except OSError as error:  # no process, or no descriptor, is left
                    self._failed(number, f"could not be started ({error.strerror})")
        if now >= self._end:
            self._kill()
        lines = {child.line: number for number, child in self._children.items()}
        next_due = min([self._end, *self._due.values()])
        for sock in readable([self._signalled, *lines], next_due - now):
            if sock in lines:
                self._bury(lines[sock])
            else:
                for byte in sock.recv(64):
                    self._on_signal[signal.Signals(byte)]()

    # --- the beginning of a child

    def _start(self, number: int) -> None:
        del self._due[number]
        ours, theirs = socket.socketpair()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._on_signal)  # until it has its own handlers
        try:
            pid = os.fork()
            if not pid:
                ours.close()
                self._be_a_child(number, theirs)
        except OSError:
            ours.close()
            raise
        else:
            self._children[number] = Child(pid, ours, time.monotonic())
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._on_signal)

    def _be_a_child(self, number: int, line: socket.socket) -> NoReturn:
        code = 0
        try:
            self._serve_as(number, line)
        except KeyboardInterrupt:
            pass  # before it served
        except Exception as error:
            code = 1
            self._server.log_fault(error, "worker")
        finally:
            os._exit(code)

    def _serve_as(self, number: int, line: socket.socket) -> None:
        self._leave_home()
        self._server.take_part(number, self._crowd, self._boxes)
        threading.Thread(target=self._listen, args=(line,), daemon=True).start()
        serve_until_interrupted(self._server, _nothing)
        if self._orphaned:  # nobody else is left to do it
            self._leavings.close()

    def _leave_home(self) -> None:
        """Let go of what is the parent's; above all of the lines to other children."""
        signal.set_wakeup_fd(-1)
        for sock in (self._signals, self._signalled, *(c.line for c in self._children.values())):
            sock.close()
        for number in self._on_signal:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, interrupt_once)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._on_signal)

    def _listen(self, line: socket.socket) -> None:
        """What a child does beside serving: hear its parent, to its end."""
        word = line.recv(1)
        try:
            while word == _READ_AGAIN:
                follow(self._server, self._reload)
                word = line.recv(1)
        finally:
            self._orphaned = not word
            os.kill(os.getpid(), signal.SIGTERM)

    # --- its end

    def _bury(self, number: int) -> None:
        child = self._children.pop(number)
        child.line.close()
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        if self._end < math.inf:
            self._code = self._code or int(code != 0)
            return
        if time.monotonic() - child.began >= self.STEADY_SECONDS:
            self._failures = 0
        self._failed(number, f"ended by {f'signal {-code}' if code < 0 else f'code {code}'}")

    def _failed(self, number: int, how: str) -> None:
        """Start another one in a while; or give up, when none comes to work."""
        now = time.monotonic()
        self._log.write(f"note: worker {number + 1} of {len(self._crowd)} {how}")
        self._failures += 1
        steady = any(now - c.began >= self.STEADY_SECONDS for c in self._children.values())
        if self._failures >= self.MAX_FAILURES and not steady:
            self._log.write("error: workers end as soon as they start, so this is the end")
            self._code = 1
            self._stop()
        else:
            self._due[number] = now + self.pause_after(self._failures)

    @classmethod
    def pause_after(cls, failures: int) -> float:
        """Return the seconds until the next start after so many failures in a row."""
        return min(0.1 * (1 << min(failures, 10)), cls.MAX_PAUSE)  # no float holds 2**1024

    # --- signals

    def _tell_to_read(self) -> None:
        if self._reload():
            self._tell(_READ_AGAIN)

    def _tell(self, word: bytes) -> None:
        for child in self._children.values():
            with contextlib.suppress(OSError):  # it has just ended
                child.line.send(word)

    def _stop(self) -> None:
        if self._end < math.inf:  # asked a second time
            self._kill()
            self._code = 130
            return
        self._due.clear()
        self._end = time.monotonic() + self._server.limits.drain_seconds + _LAST_SECONDS
        self._server.stop()
        self._tell(_END)

    def _kill(self) -> None:
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        self._end = sys.float_info.max  # not twice


_LAST_SECONDS = 90.0  # for children to cut what did not end, and to save a login just renewed


def interrupt_once(number: int, frame: Any) -> None:
    """Raise KeyboardInterrupt at the first signal of a kind; others say nothing new."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


# --- the commands: each returns its exit code


class Terminal:
    """The user of a command: what is said and asked, and a browser if one is at hand."""

    patience = 300.0  # seconds in which a login has to come back from the browser

    def __init__(self, environment: Dict[str, str]) -> None:
        self._environment = environment

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def ask(self, question: str) -> str:
        """Return the line that is typed in answer; nothing if nobody is there, or it is no text."""
        try:
            return input(question)
        except (EOFError, UnicodeError):
            return ""

    def browse(self, url: str) -> bool:
        """Return whether a browser was opened where its user can see it; some return only later."""
        import webbrowser

        if not has_screen(self._environment, sys.platform):
            return False
        for name in SECRET_VARIABLES:  # a browser has no business with them
            os.environ.pop(name, None)
        opened: List[bool] = []
        opening = threading.Thread(target=lambda: opened.append(webbrowser.open(url)), daemon=True)
        opening.start()
        opening.join(2.0)
        return opened != [False]


def has_screen(environment: Dict[str, str], platform: str) -> bool:
    """Return whether a browser of this machine would be seen by who types: not over SSH."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    screen = platform in ("darwin", "win32") or any(environment.get(name) for name in displays)
    return screen and not environment.get("SSH_CONNECTION")


class Call(NamedTuple):
    """What a command is called with."""

    settings: Settings
    environment: Dict[str, str]
    switches: FrozenSet[str]
    terminal: Terminal
    clock: Callable[[], float] = time.time
    run: Callable[[Sequence[str]], Tuple[int, str]] = run_program
    settings_now: Optional[Callable[[], Settings]] = None  # to read them again
    config: Optional[str] = None  # the configuration file, if it is not the usual one

    def world(self, log: Log) -> Outside:
        """Return what a credential needs of the world."""
        return outside(self.settings, log)._replace(clock=self.clock, run=self.run)


def run_server(call: Call) -> int:
    """Serve until a signal, or only say what the settings come to."""
    settings, environment = call.settings, call.environment
    if "check-config" in call.switches:
        world = call.world(Log())
        credential = credential_from(settings, environment, world)
        fallback_from(settings, environment, world, credential)
        client_keys_from(settings, environment)
        limits_from(settings)
        upstream_from(settings).close()
        call.terminal.say(f"{shown_settings(settings)}\ncredential = {credential.describe()}")
        return 0
    server = server_from(settings, environment, sys.stderr, call.config)

    def reload() -> bool:
        """Whether the settings are right, and so in use from now on."""
        try:
            now = call.settings_now() if call.settings_now else settings
            reconfigure(server, now, environment)
        except ConfigError as error:
            server.app.log.write(f"note: the configuration stays as it was: {error}")
            return False
        return True

    ready = functools.partial(call.terminal.say, welcome(server))
    if settings.workers > 1:
        return Supervisor(server, settings.workers, reload).run(ready)
    serve(server, reload, ready)
    return 0


# --- login and logout

CALLBACK_PAGES = {
    200: "claude_shim has its answer. You can close this page.",
    400: "This is not the answer that claude_shim waits for.",
    403: "The login was not granted. You can close this page.",
}
_CALLBACK_HEADERS = [
    ("content-type", "text/html; charset=utf-8"),
    ("content-security-policy", "default-src 'none'"),
    ("referrer-policy", "no-referrer"),  # the address holds the code
    ("connection", "close"),
]


class CallbackListener:
    """Waits on 127.0.0.1, at a free port, for the browser to come back with the code.

    A hit that is not the answer gets a 400 and the wait goes on: any web page can send one. Nor
    does a connection that says nothing hold up another; browsers open some in advance.
    """

    MAX_HEAD = 16 << 10

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(1.0)
        self._port: int = self._server.getsockname()[1]
        self._heads: Dict[socket.socket, bytes] = {}
        self.redirect_uri = f"http://localhost:{self._port}/callback"  # by the registered name

    def __enter__(self) -> CallbackListener:
        return self

    def __exit__(self, *exception: object) -> None:
        for sock in (self._server, *self._heads):
            sock.close()

    def code(self, attempt: LoginAttempt, seconds: float) -> str:
        """Return the code of the right callback; LoginError if it was denied or did not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for sock in readable([self._server, *self._heads], deadline - time.monotonic()):
                if sock is self._server:
                    self._accept()
                elif code := self._read(sock, attempt):
                    return code
        raise LoginError("the browser did not come back in time; run login again")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.settimeout(1.0)
            self._heads[connection] = b""

    def _read(self, connection: socket.socket, attempt: LoginAttempt) -> str:
        """The code, if the head is whole now and holds it."""
        burst = b""
        with contextlib.suppress(OSError):
            burst = connection.recv(_PIECE)
        head, end, _ = (self._heads.pop(connection) + burst).partition(b"\r\n\r\n")
        if burst and not end and len(head) < self.MAX_HEAD:
            self._heads[connection] = head
            return ""
        try:
            code = attempt.code_called_back(self._query(head))
        except (ProtocolError, WrongCallbackError):
            _show_page(connection, 400)
            return ""
        except LoginError:
            _show_page(connection, 403)
            raise
        _show_page(connection, 200)
        return code

    def _query(self, head: bytes) -> str:
        request = parsed_head(head)
        path, _, query = request.target.partition("?")
        host = "".join(request.values("host")).lower()
        ours = host in (f"localhost:{self._port}", f"127.0.0.1:{self._port}")  # no DNS rebinding
        if not ours or (request.method, path) != ("GET", "/callback"):
            raise WrongCallbackError()
        return query


def _show_page(connection: socket.socket, status: int) -> None:
    title = "<!doctype html><html lang=en><meta charset=utf-8><title>claude_shim</title>"
    page = f"{title}<p>{CALLBACK_PAGES[status]}</p>\n".encode("ascii")
    headers = [*_CALLBACK_HEADERS, ("content-length", str(len(page)))]
    with connection, contextlib.suppress(OSError):
        connection.sendall(response_head(status, headers, int(time.time())) + page)
        connection.shutdown(socket.SHUT_WR)


LOGIN_NOTICE = """\
This logs in with a Claude account and keeps its tokens in {path}.
Anthropic's terms reserve the tokens of Claude accounts (Free, Pro, Max) for Claude Code and its own
apps: what claude_shim sends with them may be refused or billed as extra usage. Never use them for
other people. Within the terms are an API key (ANTHROPIC_API_KEY), `ant auth login`, and for a
subscription the `claude` program itself."""
LOGGED_IN = """\
Logged in. The tokens are in {path} and are renewed from there.
With --auth auto they come before any API key: `claude_shim status` shows what is used."""


def login(call: Call) -> int:
    """Log in with a Claude account; 1 if that ended without tokens."""
    path = bundle_path(call.settings, call.environment)
    call.terminal.say(LOGIN_NOTICE.format(path=path))
    if "yes" not in call.switches and call.terminal.ask("Go on? [y/N] ")[:1] not in ("y", "Y"):
        call.terminal.say("Nothing was done. (--yes goes on without asking.)")
        return 1
    client = oauth_client(call.settings)._replace(repair="start again")
    try:
        attempt, code = _agreed(call, client)
        bundle = granted(call.world(Log()), client, attempt.token_fields(code, client.id))
        _keep_login(path, bundle)
    except (LoginError, ShimError) as error:
        call.terminal.say(f"Not logged in: {error}.")
        return 1
    call.terminal.say(LOGGED_IN.format(path=path))
    return 0


def _keep_login(path: str, bundle: Bundle) -> None:
    try:
        with locked_login(path):
            write_secret_file(path, bundle_text(bundle, {}))
    except OSError as error:
        raise LoginError(f"cannot write {path}: {error.strerror}") from None


def _agreed(call: Call, client: OAuthClient) -> Tuple[LoginAttempt, str]:
    """The attempt that its user agreed to, and the code that says so."""
    if "no-browser" not in call.switches:
        with CallbackListener() as listener:
            attempt = _login_attempt(listener.redirect_uri)
            url = attempt.url(AUTHORIZE_URL, client.id, client.scope)
            if call.terminal.browse(url):
                call.terminal.say(f"Agree in the browser. If none opened, use --no-browser.\n{url}")
                return attempt, listener.code(attempt, call.terminal.patience)
    attempt = _login_attempt(MANUAL_REDIRECT_URL)
    url = attempt.url(AUTHORIZE_URL, client.id, client.scope)
    call.terminal.say(f"Open this page, agree, and paste the line CODE#STATE that it shows.\n{url}")
    with contextlib.suppress(WrongCallbackError):
        return attempt, attempt.code_pasted(call.terminal.ask("CODE#STATE: "))
    raise LoginError("that is not the whole line CODE#STATE of this login; run login again")


def _login_attempt(redirect_uri: str) -> LoginAttempt:
    return LoginAttempt(redirect_uri, secrets.token_urlsafe(32), secrets.token_urlsafe(32))


def logout(call: Call) -> int:
    """Revoke the login that `login` wrote and delete it; 1 if it could not be revoked."""
    path = os.path.realpath(os.path.expanduser(bundle_path(call.settings, call.environment)))
    if not os.path.exists(path):
        call.terminal.say(f"There is no login in {path}.")
        return 0
    try:
        with locked_login(path):
            finish_write(path, parsed_bundle)  # the tokens in force, if a renewal was killed
            fault = _revoked(call, parsed_bundle(read_secret_file(path), path))
            os.unlink(path)
    except (OSError, ShimError) as error:
        raise ConfigError(f"{path} could not be deleted: {error}") from None
    call.terminal.say(f"Deleted {path}.")
    if fault:
        advice = "They end by themselves, or at once if you log out everywhere at claude.ai."
        call.terminal.say(f"The tokens were not revoked: {fault}.\n{advice}")
    return 1 if fault else 0


def _revoked(call: Call, bundle: Bundle) -> str:
    """Why the tokens of a login could not be revoked (RFC 7009); nothing if they were."""
    client = oauth_client(call.settings)
    kind = "refresh_token" if bundle.refresh_token else "access_token"
    fields = {"token": getattr(bundle, kind), "token_type_hint": kind, "client_id": client.id}
    try:
        answer = call.world(Log()).post(TokenRequest(f"{client.urls[0]}/revoke", fields))
    except ShimError as error:
        return error.message
    return "" if answer.status == 200 else f"the endpoint answered with status {answer.status}"


# --- status


class Standing(NamedTuple):
    """Where one credential stands."""

    kind: str
    source: str
    use: str  # used, fallback or unused
    because: str
    state: str = "usable"  # or expired, or broken
    fault: str = ""  # what to do about that
    notes: Tuple[str, ...] = ()
    token: str = ""  # masked
    expires_at: Optional[float] = None
    expires: str = ""
    payer: str = ""

    def __str__(self) -> str:
        lines = [
            ("from", self.source),
            ("token", self.token),
            ("expires", self.expires),
            ("payer", self.payer),
            *(("note", note) for note in self.notes),
            (self.state, self.fault),
        ]
        head = f"{KINDS[self.kind].name}: {self.use}, {self.because}"
        return "\n".join([head, *(f"  {name:8} {text}" for name, text in lines if text)])


_NOT_LOOKED_FOR: Dict[str, Callable[[], Credential]] = {
    "passthrough": Passthrough,
    "none": NoCredential,
}


def standings(call: Call) -> List[Standing]:
    """Return where each credential that is there stands, best first; upstream is not asked."""
    settings = call.settings
    told: List[str] = []
    hidden: List[str] = []
    world = call.world(Log())._replace(tell=told.append, hide=hidden.append)
    found = found_credentials(Search(settings, call.environment, world))
    used = "none" if settings.upstream == "echo" else settings.auth
    if used == "auto" and found:
        used = found[0].kind
    if used in _NOT_LOOKED_FOR:
        found.insert(0, Found(used, "", _NOT_LOOKED_FOR[used]))
    rows = []
    for each in found:
        told.clear()
        hidden.clear()
        row = Standing(each.kind, each.source, *_use(each, used, settings))
        row = _loaded(row, each, call.clock(), hidden)
        rows.append(row._replace(notes=tuple(told)))
    return rows


def _use(found: Found, used: str, settings: Settings) -> Tuple[str, str]:
    """Whether a credential is used, and why."""
    asked = settings.auth != "auto" or settings.upstream == "echo"
    if found.kind == used:
        return "used", "as it was asked for" if asked or found.given else "as the first there is"
    if found.kind == settings.fallback_auth:
        return "fallback", "for what upstream refuses to the first"
    reason = "was asked for" if asked else "comes first"
    return "unused", f"{KINDS[used].name} {reason}; --auth {found.kind} takes this"


def _loaded(standing: Standing, found: Found, now: float, hidden: List[str]) -> Standing:
    try:
        credential = found.load()
    except ConfigError as error:
        return standing._replace(state="broken", fault=str(error))
    told, tokens = credential.describe(), [*credential.secrets(), *hidden]
    expired = told.expires_at is not None and told.expires_at <= now and not told.renews
    return standing._replace(
        source=told.source,
        state="expired" if expired else "usable",
        fault=f"renew it by {KINDS[told.kind].given}" if expired else "",
        token=masked(tokens[0]) if tokens else "",
        expires_at=told.expires_at or None,
        expires=expiry_in_words(told, now),
        payer=told.payer,
    )


def masked(secret: str) -> str:
    """Return what tells a secret from others: its kind, and the end of a long one."""
    kind = re.match(r"sk-ant-[a-z]+[0-9]*-", secret)
    return f"{kind.group() if kind else ''}...{secret[-4:] if len(secret) >= 40 else ''}"


def expiry_in_words(told: Description, now: float) -> str:
    """Return when a credential expires, and whether that matters; empty if it is not known."""
    if told.expires_at is None:
        return ""
    if not told.expires_at:
        return "not known before it is asked for"
    left = told.expires_at - now
    words = f"in {span(left)}" if left > 0 else f"{span(-left)} ago"
    return f"{words}, renewed by itself" if told.renews else words


def span(seconds: float) -> str:
    """Return a length of time in the largest unit that fits."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"


_STATUS_CODES = {"usable": 0, "broken": 1, "expired": 3}


def status(call: Call) -> int:
    """Tell which credentials there are; 0 if the one in use is usable, 1 if not, 3 if expired."""
    rows = standings(call)
    used = [row for row in rows if row.use == "used"]
    if "json" in call.switches:
        call.terminal.say(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        missing = [] if used else [nothing_found(call.settings.auth)]
        call.terminal.say("\n\n".join([*map(str, rows), *missing]))
    return _STATUS_CODES[used[0].state] if used else 1


# --- doctor


class Answer(NamedTuple):
    """What upstream said to a question that costs nothing."""

    url: str
    status: int = 0  # there was no answer
    date: str = ""
    reason: str = ""


class Examination(NamedTuple):
    """What the checks look at."""

    call: Call
    rows: List[Standing]
    fault: str  # why upstream was shown no credential, where it should have been
    answer: Answer
    python: Tuple[int, ...] = sys.version_info[:3]


class Finding(NamedTuple):
    """What a check found."""

    verdict: str  # ok, note (requests work all the same) or fault
    sentence: str


def examination(call: Call) -> Examination:
    """Return what there is to check; a login is renewed if it has to be, and upstream is asked."""
    settings, environment, fault = call.settings, call.environment, ""
    log = Log(None, header_secrets(settings))
    credential: Credential = NoCredential()
    try:
        chosen = credential_from(settings, environment, call.world(log))
        fallback_from(settings, environment, call.world(log), chosen)
        for secret in chosen.secrets():
            log.hide(secret)
        if not isinstance(chosen, Passthrough):
            _check_renewable(chosen)
            chosen.authorization({})
            credential = chosen
    except (ConfigError, ShimError) as error:
        fault = log.masked(str(error))
    with contextlib.closing(credential):
        answer = _asked(settings, credential, log)
    return Examination(call, standings(call), fault, answer)


def _check_renewable(credential: Credential) -> None:
    """ConfigError if a login is due that cannot be written: it would be lost with this process."""
    told = credential.describe()
    if credential.ready() or told.kind not in ("oauth-bundle", "profile"):
        return
    try:
        with locked_login(told.source):
            finish_write(told.source, parsed_bundle)
            write_secret_file(told.source, read_secret_file(told.source))
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"the login of {told.source} cannot be written: {reason}") from None


def _asked(settings: Settings, credential: Credential, log: Log) -> Answer:
    try:
        with contextlib.closing(upstream_from(settings)) as upstream:
            asking = _authorized(credential, models_request(1), {}, NO_RETRIES)
            response = driven(asking, upstream)
            body = parsed_or_none(read_error_body(response))
    except (ConfigError, ShimError) as error:
        return Answer(settings.base_url, reason=log.masked(str(error)))
    reason = log.masked(upstream_error(response.status, body).message)[:300]
    shown = "".join(letter if letter.isprintable() else " " for letter in reason)
    return Answer(upstream.url, response.status, response.header("date"), shown)


def _check_python(seen: Examination) -> Iterator[Finding]:
    shown = f"Python {'.'.join(map(str, seen.python))}"
    if seen.python < (3, 9):
        yield Finding("fault", f"{shown} is too old: claude_shim needs 3.9 or newer")
    else:
        yield Finding("ok", shown)


def _check_credential(seen: Examination) -> Iterator[Finding]:
    if seen.fault:
        yield Finding("fault", seen.fault)
    for row in seen.rows:
        if row.use == "used" and not seen.fault:
            yield Finding("ok", str(Description(row.kind, row.source)))
        if row.use == "used" and KINDS[row.kind].claude_ai:
            yield Finding("note", CLAUDE_AI_NOTICE.partition(": ")[2])
        if row.use == "used" and row.kind == "claude-code" and seen.call.settings.auth == "auto":
            yield Finding("note", "nothing else was found; if that was not meant, give an API key")
        yield from (Finding("note", note) for note in row.notes)


def _check_others(seen: Examination) -> Iterator[Finding]:
    for row in seen.rows:
        if row.use != "used":
            shown = f"{Description(row.kind, row.source)}: {row.use}, {row.because}"
            yield Finding("note", f"{shown} ({row.fault})" if row.fault else shown)


def _check_proxy(seen: Examination) -> Iterator[Finding]:
    try:
        proxies = proxies_for(seen.call.settings.base_url)
    except ConfigError as error:
        yield Finding("fault", str(error))
        return
    for proxy in proxies.values():
        address = proxy.rpartition("@")[2]  # without the password
        yield Finding("ok", f"upstream is reached through {address}")


def _check_certificates(seen: Examination) -> Iterator[Finding]:
    environment = seen.call.environment
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if environment.get(name) and not os.path.exists(environment[name]):
            yield Finding("note", f"{name} names what is not there, so no authority is trusted")
    others = ("NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    named = {environment[name]: name for name in others if environment.get(name)}
    for path, name in named.items() if not seen.call.settings.ca_file else ():
        advice = f"if upstream needs it, give --ca-file {path}"
        yield Finding("note", f"{name} is for other programs: {advice}")


def _check_upstream(seen: Examination) -> Iterator[Finding]:
    settings, (url, status, _, reason) = seen.call.settings, seen.answer
    target = urllib.parse.urlsplit(url)
    unshown = seen.fault or settings.auth == "passthrough"
    if is_loopback(target.hostname or "") and target.port == settings.port:
        yield Finding(
            "fault", f"--base-url is where claude_shim itself listens, port {target.port}"
        )
    elif not status:
        yield Finding("fault", reason)
    elif status == 404 or (status in (200, 401) and unshown):
        yield Finding("ok", f"{url} answers; the credential was not tried")
    elif status == 200:
        yield Finding("ok", f"{url} takes the credential")
    else:
        yield Finding("fault", f"{url} answers with status {status}: {reason}")


CLOCK_TOLERANCE = 60.0  # seconds; logins are renewed that long before their end


def _check_clock(seen: Examination) -> Iterator[Finding]:
    import email.utils

    with contextlib.suppress(ValueError, TypeError, IndexError):
        theirs = email.utils.parsedate_to_datetime(seen.answer.date).timestamp()
        ahead = seen.call.clock() - theirs
        shown = f"{span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} upstream's"
        if abs(ahead) <= CLOCK_TOLERANCE:
            yield Finding("ok", "this clock agrees with upstream's")
        else:
            yield Finding("note", f"this clock is {shown}: logins end at the wrong time; set it")


def _check_callers(seen: Examination) -> Iterator[Finding]:
    path = seen.call.settings.client_key_file
    try:
        keys = client_keys_from(seen.call.settings, seen.call.environment)
    except ConfigError as error:
        yield Finding("fault", str(error))
        return
    yield Finding("ok", _callers(keys))
    try:
        if path:
            read_secret_file(path)
    except ConfigError as error:
        yield Finding("note", str(error))


def _check_port(seen: Examination) -> Iterator[Finding]:
    settings = seen.call.settings
    if settings.unix:  # it takes no port
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE  # maybe by a claude_shim that serves
        taker = port_owner(settings.port) if taken else ""
        yield Finding("note" if taken else "fault", _cannot_listen(settings, error, taker))
    else:
        yield Finding("ok", f"{settings.host}:{settings.port} is free")


def port_owner(port: int) -> str:
    """Return the program that listens on a TCP port and its process id, as far as /proc tells."""
    import glob

    tables = [_read_or_empty(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    wanted = {f"socket:[{inode}]" for table in tables for inode in listening_inodes(table, port)}
    for link in glob.glob("/proc/[0-9]*/fd/*") if wanted else ():
        with contextlib.suppress(OSError):
            if os.readlink(link) in wanted:
                process = link.split("/")[2]
                return f"{plain(_read_or_empty(f'/proc/{process}/comm').strip())} ({process})"
    return ""


def _read_or_empty(path: str) -> str:
    try:
        return read_text(path)
    except ConfigError:
        return ""


def listening_inodes(table: str, port: int) -> List[str]:
    """Return the inodes of the sockets that listen on `port`, of the text of /proc/net/tcp."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return [row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"]


CHECKS: Dict[str, Callable[[Examination], Iterator[Finding]]] = {
    "python": _check_python,
    "credential": _check_credential,
    "others": _check_others,
    "proxy": _check_proxy,
    "certificates": _check_certificates,
    "upstream": _check_upstream,
    "clock": _check_clock,
    "callers": _check_callers,
    "port": _check_port,
}


def doctor(call: Call) -> int:
    """Check what a request needs, and tell in sentences what to mend; 0 if one would work."""
    seen = examination(call)
    found = [(name, *finding) for name, check in CHECKS.items() for finding in check(seen)]
    faults = [sentence for _, verdict, sentence in found if verdict == "fault"]
    if "json" in call.switches:
        rows = [dict(zip(("check", "verdict", "sentence"), row)) for row in found]
        call.terminal.say(json.dumps({"works": not faults, "checks": rows}, indent=2))
    else:
        lines = [f"{verdict:6} {name:13} {sentence}" for name, verdict, sentence in found]
        ending = (
            "No request would work before that is mended." if faults else "A request would work."
        )
        call.terminal.say("\n".join([*lines, ending]))
    return 1 if faults else 0


class Command(NamedTuple):
    """A first word of the command line, with switches of its own beside OPTIONS."""

    run: Callable[[Call], int]  # gives the exit code
    help: str
    exit_codes: str
    switches: Dict[str, str] = {}


_JSON_SWITCH = {"json": "print JSON, for programs"}

COMMANDS: Dict[str, Command] = {
    "serve": Command(
        run_server,
        "Let any program that speaks OpenAI's or Anthropic's API use Claude",
        "0 after a signal",
        {"check-config": "print the settings and exit"},
    ),
    "login": Command(
        login,
        "Log in with a Claude account",
        "0 logged in, 1 not",
        {
            "no-browser": "print the page's address and take the line that the page shows",
            "yes": "go on without asking",
        },
    ),
    "logout": Command(
        logout, "Revoke and delete what login wrote", "0 gone, 1 deleted here but not revoked"
    ),
    "status": Command(
        status,
        "Tell which credentials there are, which is used, and who pays",
        "0 the one in use is usable, 1 there is none, 3 it has expired",
        _JSON_SWITCH,
    ),
    "doctor": Command(
        doctor,
        "Check what a request needs, and tell what to mend",
        "0 a request would work, 1 it would not",
        _JSON_SWITCH,
    ),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; its exit code, or 2 after a wrong setting, told in a sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0] in COMMANDS else "serve"
    arguments = parsed_words(name, words)
    given = [word for word in COMMANDS[name].switches if getattr(arguments, word.replace("-", "_"))]
    environment = dict(os.environ)
    no_core_dumps()

    def settings() -> Settings:
        return settings_from(arguments, environment, config_values(arguments.config, environment))

    try:
        call = Call(
            settings(),
            environment,
            frozenset(given),
            Terminal(environment),
            settings_now=settings,
            config=arguments.config,
        )
        return COMMANDS[name].run(call)
    except ConfigError as error:
        print(f"claude_shim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
