#!/usr/bin/env python3
"""A fake Anthropic API that refuses whatever the real one would refuse, and remembers it.

    python fake_upstream.py            serve; prints `listening on http://127.0.0.1:PORT`
    python fake_upstream.py --self-test  feed the validator bad bodies, see each one caught

Needs the environment that .ci/clients makes (anthropic, pydantic, jsonschema). For the test
process: `GET /__requests` lists all that came in, `POST /__reset` forgets it. An entry holds
`method`, `path`, `headers` (pairs), `body` (base64), `status`, `refused` (the validator's
sentence or null), `request_id`, `finished` and `aborted` (the peer hung up on the answer).
What it answers: see scenarios.py.
"""

from __future__ import annotations

import base64
import collections
import gzip
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import scenarios
from messages_rules import ALIASES, MODELS, VERSIONS, Call, Ledger, Model, Rejected, refusal
from messages_rules import find_model as known_model
from sdk_types import type_error

JSON = dict[str, Any]
KEY_PREFIX = "sk-ant-api03-"
DRAG_SECONDS = 0.1  # between the events of [[slow]]
HANG_SECONDS = 30

ERRORS = {
    400: ("invalid_request_error", "messages: a scripted refusal"),
    401: ("authentication_error", "invalid x-api-key"),
    402: ("billing_error", "There is an issue with your organization's billing."),
    403: ("permission_error", "Your API key does not have permission to use this resource."),
    404: ("not_found_error", "model: claude-scripted"),
    413: ("request_too_large", "Request exceeds the maximum size"),
    429: ("rate_limit_error", "This request would exceed your organization's rate limit."),
    500: ("api_error", "Internal server error"),
    504: ("timeout_error", "Request timed out"),
    529: ("overloaded_error", "Overloaded"),
}


# --- checking a request ---------------------------------------------------------------------------


def check_headers(headers: dict[str, list[str]]) -> tuple[str, frozenset[str]]:
    """Version and betas; raises Rejected."""
    credentials = headers.get("x-api-key", []) + headers.get("authorization", [])
    if len(credentials) != 1:
        raise Rejected(f"{len(credentials)} credential headers", 401, "authentication_error")
    if not credentials[0].removeprefix("Bearer ").startswith(KEY_PREFIX):
        raise Rejected("invalid x-api-key", 401, "authentication_error")
    version = headers.get("anthropic-version", [""])
    if len(version) != 1 or version[0] not in VERSIONS:
        raise Rejected(f"anthropic-version: {version} is not a valid version")
    betas = [b.strip() for value in headers.get("anthropic-beta", []) for b in value.split(",")]
    return version[0], frozenset(b for b in betas if b)


def check_call(raw: bytes, headers: dict[str, list[str]], *, count: bool, ledger: Ledger) -> Call:
    """The parsed request; raises Rejected with the first thing the API would refuse."""
    version, betas = check_headers(headers)
    if not headers.get("content-type", [""])[0].startswith("application/json"):
        raise Rejected("content-type: Input should be 'application/json'")
    body = renamed(parsed(raw))
    model = known_model(body.get("model", ""))
    complaint = type_error(body, count=count, beta=bool(betas))
    if complaint:
        raise Rejected(complaint)
    call = Call(ledger.expand(body), model, version, betas, count)
    complaint = stream_complaint(body, count=count) or refusal(call, ledger)
    if complaint:
        raise Rejected(complaint)
    return call


def parsed(raw: bytes) -> JSON:
    try:
        text = raw.decode("utf-8")
        body = json.loads(text, parse_constant=refuse_constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # a lone surrogate has no UTF-8
    except ValueError as error:
        raise Rejected(f"The request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise Rejected("The request body is not a JSON object")
    return body


def renamed(body: JSON) -> JSON:
    """`output_format`, the old name of `output_config.format`, is still taken."""
    if "output_format" not in body:
        return body
    kept = {k: v for k, v in body.items() if k != "output_format"}
    return {
        **kept,
        "output_config": {**body.get("output_config", {}), "format": body["output_format"]},
    }


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def stream_complaint(body: JSON, *, count: bool) -> str | None:
    if "stream" not in body:
        return None
    if count:
        return "stream: Extra inputs are not permitted"
    return None if isinstance(body["stream"], bool) else "stream: Input should be a valid boolean"


# --- models ---------------------------------------------------------------------------------------


def model_object(model: Model) -> JSON:
    yes = {"supported": True}
    types = ("adaptive", "enabled", "disabled", "between_tools")
    levels = {level: {"supported": level in model.effort}
              for level in ("low", "medium", "high", "xhigh", "max")}  # fmt: skip
    edits = ("clear_thinking_20251015", "clear_tool_uses_20250919", "compact_20260112")
    return {
        "type": "model", "id": model.id, "display_name": model.id.replace("-", " ").title(),
        "created_at": "2026-10-01T00:00:00Z", "lifecycle": model.lifecycle,
        "deprecated_at": None if model.lifecycle == "active" else "2026-06-01T00:00:00Z",
        "retires_at": None, "line": model.line,
        "max_input_tokens": model.max_input_tokens, "max_tokens": model.max_tokens,
        "capabilities": {
            "batch": yes, "citations": yes, "code_execution": yes, "image_input": yes,
            "pdf_input": yes, "structured_outputs": yes,
            "server_tools": {**yes, "web_search": yes, "web_fetch": yes, "code_execution": yes},
            "context_management": {**yes, **dict.fromkeys(edits, yes)},
            "effort": {"supported": bool(model.effort), **levels},
            "thinking": {**yes, "types": {t: {"supported": t in model.thinking} for t in types}},
        },
    }  # fmt: skip


def model_page(query: dict[str, list[str]]) -> JSON:
    every = [model_object(m) for m in MODELS.values() if m.listed]
    limit = int(query.get("limit", ["20"])[0])
    names = [m["id"] for m in every]
    start = names.index(query["after_id"][0]) + 1 if "after_id" in query else 0
    page = every[start : start + limit]
    return {
        "data": page, "has_more": start + limit < len(every),
        "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
    }  # fmt: skip


# --- the server -----------------------------------------------------------------------------------


class Fake(ThreadingHTTPServer):
    """The server and its memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.ledger = Ledger()
        self.reset()

    def reset(self) -> None:
        self.records: list[JSON] = []
        self.tries: collections.Counter[str] = collections.Counter()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Fake
    record: JSON

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/__requests":
            with self.server.lock:
                self.record = {"request_id": "none"}
                return self.send_json(200, list(self.server.records))
        return self.recorded(b"", self.get)

    def do_POST(self) -> None:
        raw = self.read_body()
        if self.path == "/__reset":
            with self.server.lock:
                self.server.reset()
            self.record = {"request_id": "none"}
            return self.send_json(200, {})
        return self.recorded(raw, self.post)

    do_HEAD = do_PUT = do_PATCH = do_DELETE = do_POST

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", "").lower():
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def recorded(self, raw: bytes, respond: Any) -> None:
        self.record: JSON = {
            "method": self.command, "path": self.path, "headers": self.headers.items(),
            "body": base64.b64encode(raw).decode(), "status": None, "refused": None,
            "finished": False, "aborted": False,
        }  # fmt: skip
        with self.server.lock:
            self.server.records.append(self.record)
            self.record["request_id"] = f"req_fake{len(self.server.records):04}"
        try:
            respond(raw)
        except Rejected as error:
            if (self.command, error.status) != ("GET", 404):
                self.record["refused"] = f"{error.status} {error}"
            self.send_error_json(error.status, error.kind, str(error))
        except OSError:
            self.record["aborted"] = True
            self.close_connection = True
        self.record["finished"] = True

    # --- paths

    def get(self, raw: bytes) -> None:
        url = urlsplit(self.path)
        check_headers(self.header_lists())
        name = re.sub(r"^/v1/models/", "", url.path)
        if url.path == "/v1/models":
            return self.send_json(200, model_page(parse_qs(url.query)))
        if name != url.path:
            return self.send_json(200, model_object(known_model(ALIASES.get(name, name))))
        if url.path in ("/v1/messages/batches", "/v1/files", "/v1/skills"):
            return self.send_json(200, {"data": [], "has_more": False})
        raise Rejected(f"Not found: {url.path}", 404, "not_found_error")

    def post(self, raw: bytes) -> None:
        path = urlsplit(self.path).path
        if path in ("/v1/messages", "/v1/messages/count_tokens") and self.command == "POST":
            return self.messages(raw, count=path.endswith("count_tokens"))
        check_headers(self.header_lists())
        if path == "/v1/messages/batches":
            return self.send_json(200, batch_object(parsed(raw)))
        raise Rejected(f"Not found: {path}", 404, "not_found_error")

    def messages(self, raw: bytes, *, count: bool) -> None:
        with self.server.lock:
            call = check_call(raw, self.header_lists(), count=count, ledger=self.server.ledger)
            script = scenarios.script_of(call.messages)
            if self.scripted_fault(script):
                return None
            made = scenarios.answer(call, self.server.ledger)
        stream = scenarios.events(call, made, script.marks)
        if count:
            return self.send_json(200, {"input_tokens": 10 + len(raw) // 4})
        if "hang" in script.marks:
            self.wait_for_hang_up()
        if call.body.get("stream"):
            return self.send_stream(stream, made.ending, script.marks)
        if made.ending == "message_stop":
            return self.send_json(200, scenarios.message_of(stream))
        return self.drop()

    # --- answers

    def header_lists(self) -> dict[str, list[str]]:
        lists: dict[str, list[str]] = {}
        for name, value in self.headers.items():
            lists.setdefault(name.lower(), []).append(value)
        return lists

    def scripted_fault(self, script: scenarios.Script) -> bool:
        """Carries out [[error ...]] and [[cut-head]]; False when neither applies (any more)."""
        name = next((n for n in ("error", "cut-head") if n in script.marks), None)
        if name is None:
            return False
        words = script.marks[name].split()
        key = f"{name} {script.marks[name]} {script.text}"
        self.server.tries[key] += 1
        times = next((int(w[1:]) for w in words if re.fullmatch(r"x\d+", w)), None)
        if times is not None and self.server.tries[key] > times:
            return False
        if name == "cut-head":
            self.drop()
            return True
        status = int(words[0])
        headers = dict(w.split("=", 1) for w in words[1:] if re.fullmatch(r"[a-z-]+=\S+", w))
        rest = [w for w in words[1:] if "=" not in w and not re.fullmatch(r"x\d+", w)]
        if rest == ["html"]:
            self.send_body(status, "text/html", b"<html><h1>scripted</h1></html>", headers)
        else:
            kind, message = ERRORS.get(status, ("api_error", "Something else"))
            self.send_error_json(status, kind, " ".join(rest) or message, headers)
        return True

    def send_error_json(self, status: int, kind: str, message: str, headers: Any = None) -> None:
        error = {"type": "error", "error": {"type": kind, "message": message},
                 "request_id": self.record["request_id"]}  # fmt: skip
        self.send_json(status, error, headers)

    def send_json(self, status: int, body: Any, headers: Any = None) -> None:
        self.send_body(status, "application/json", json.dumps(body).encode(), headers)

    def send_body(self, status: int, kind: str, raw: bytes, headers: Any = None) -> None:
        self.begin(status, kind, headers)
        if "gzip" in self.headers.get("accept-encoding", ""):
            raw = gzip.compress(raw)
            self.send_header("content-encoding", "gzip")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def begin(self, status: int, kind: str, headers: Any = None) -> None:
        self.record["status"] = status
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("request-id", self.record["request_id"])
        self.send_header("anthropic-organization-id", "org-of-the-fake")
        for name, value in (("requests", 50), ("tokens", 100_000)):
            self.send_header(f"anthropic-ratelimit-{name}-limit", str(value))
            self.send_header(f"anthropic-ratelimit-{name}-remaining", str(value - 1))
            self.send_header(f"anthropic-ratelimit-{name}-reset", "2026-11-21T12:00:00Z")
        for name, value in (headers or {}).items():
            self.send_header(name, value)

    def send_stream(self, stream: Iterator[JSON], ending: str, marks: dict[str, str]) -> None:
        self.begin(200, "text/event-stream; charset=utf-8")
        self.send_header("cache-control", "no-cache")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in pieces(stream, marks):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if "slow" in marks:
                time.sleep(DRAG_SECONDS)
        if ending == "stall":
            self.wait_for_hang_up()
        if ending in ("cut", "stall"):
            return self.drop()
        self.wfile.write(b"0\r\n\r\n")
        return None

    def wait_for_hang_up(self) -> None:
        self.connection.settimeout(HANG_SECONDS)
        if self.connection.recv(1) == b"":
            raise ConnectionResetError

    def drop(self) -> None:
        """Cuts the connection with a reset, as a crashed peer does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def pieces(stream: Iterator[JSON], marks: dict[str, str]) -> Iterator[bytes]:
    end = "\r\n" if "crlf" in marks else "\n"
    written = (
        f"event: {event['type']}{end}data: {json.dumps(event, ensure_ascii=False)}{end}{end}"
        for event in stream
    )
    if "lump" in marks:
        yield "".join(written).encode()
        return
    for text in written:
        raw = text.encode()
        yield from (bytes([byte]) for byte in raw) if "bytes" in marks else [raw]


def batch_object(body: JSON) -> JSON:
    counts = {"succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    return {
        "id": "msgbatch_01", "type": "message_batch", "processing_status": "in_progress",
        "request_counts": {"processing": len(body["requests"]), **counts},
        "created_at": "2026-11-21T10:00:00Z", "expires_at": "2026-11-22T10:00:00Z",
        "ended_at": None, "archived_at": None, "cancel_initiated_at": None, "results_url": None,
    }  # fmt: skip


def main() -> int:
    if "--self-test" in sys.argv:
        import self_test

        return self_test.main()
    server = Fake()
    print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    server.serve_forever()
    return 0


def exit_with_parent() -> None:
    """Standard input is a pipe from the parent: its end is the end of us."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
