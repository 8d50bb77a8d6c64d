"""An upstream that fails on demand, and clients that judge what comes of it; for check files.

Each request carries the fault that upstream is to commit. Standard library only.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from wire import connected, enough_files, post

JSON = dict[str, Any]
SILENCE = 1.0  # seconds until the shim gives up a silent upstream
RESET = struct.pack("ii", 1, 0)

FAULTS = {
    "none": 40,
    "reset before the head": 3, "close before the head": 3, "cut": 14, "reset": 6,
    "stale": 6,  # the answer is right, then the kept connection is closed
    "1xx": 3, "status": 10, "html": 3, "gzip": 2, "type": 2, "garbage": 2, "bad event": 2,
    "error event": 3, "bad chunk": 3, "long head": 1, "long line": 0.03, "lengths": 2,
    "stall before the head": 1, "stall": 2, "slow": 4, "refuse": 0.05,
}  # fmt: skip


class API(NamedTuple):
    """One of the dialects of the shim, as its clients see it."""

    path: str
    end: bytes  # in a stream that came to its end
    told: bytes  # in one that failed


CHAT = API("/v1/chat/completions", b"data: [DONE]\n", b'data: {"error":')
RESPONSES = API("/v1/responses", b"event: response.completed\n", b"event: response.failed\n")
MESSAGES = API("/v1/messages", b"event: message_stop\n", b"event: error\n")  # relayed
APIS = (CHAT, RESPONSES, MESSAGES)


class Plan(NamedTuple):
    """One request: what upstream is told to do, and what the client does."""

    number: int
    fault: str
    place: float  # where in the answer
    words: int
    streamed: bool
    api: API
    vanish: float  # seconds after which the client is gone; 0: it stays

    def text(self) -> str:
        return "".join(f"w{self.number}.{i} \u4e16" for i in range(self.words))

    def body(self) -> bytes:
        told = json.dumps([self.number, self.fault, self.place, self.words])
        messages = [{"role": "user", "content": f"<<{told}>>"}]
        asked = {"input": messages} if self.api == RESPONSES else {"messages": messages}
        stream = {"stream": True} if self.streamed else {}
        limit = {"max_tokens": 100} if self.api == MESSAGES else {}
        return json.dumps({"model": "opus", **asked, **stream, **limit}).encode()


# --- upstream -------------------------------------------------------------------------------------


def events(plan: Plan) -> list[bytes]:
    usage = {"input_tokens": 3, "output_tokens": 1}
    message = {"id": f"msg_{plan.number}", "type": "message", "role": "assistant", "content": [],
               "model": "claude-opus-5-5", "stop_reason": None, "usage": usage}  # fmt: skip
    made: list[JSON] = [{"type": "message_start", "message": message}]
    block = {"type": "text", "text": ""}
    made.append({"type": "content_block_start", "index": 0, "content_block": block})
    for i in range(plan.words):
        delta = {"type": "text_delta", "text": f"w{plan.number}.{i} \u4e16"}
        made.append({"type": "content_block_delta", "index": 0, "delta": delta})
    made.append({"type": "content_block_stop", "index": 0})
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    made.append({"type": "message_delta", "delta": delta, "usage": {"output_tokens": 9}})
    made.append({"type": "message_stop"})
    dumped = [json.dumps(e, separators=(",", ":"), ensure_ascii=False) for e in made]
    pairs = zip(made, dumped)
    return [f"event: {event['type']}\ndata: {text}\n\n".encode() for event, text in pairs]


def whole(plan: Plan) -> bytes:
    content = [{"type": "text", "text": plan.text()}]
    usage = {"input_tokens": 3, "output_tokens": 9}
    return json.dumps({"id": f"msg_{plan.number}", "type": "message", "role": "assistant",
                       "model": "claude-opus-5-5", "content": content, "stop_reason": "end_turn",
                       "stop_sequence": None, "usage": usage}).encode()  # fmt: skip


def head(status: int, kind: str, *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status} x", f"content-type: {kind}", "request-id: req_1", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def sized(status: int, kind: str, body: bytes, *fields: str) -> bytes:
    return head(status, kind, f"content-length: {len(body)}", *fields) + body


def answer(plan: Plan, streamed: bool) -> bytes:
    """The regular answer."""
    if not streamed:
        return sized(200, "application/json", whole(plan))
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events(plan)]
    return head(200, "text/event-stream", "transfer-encoding: chunked") + b"".join(chunks) + END


END = b"0\r\n\r\n"
KINDS = {429: "rate_limit_error", 529: "overloaded_error", 500: "api_error", 503: "api_error",
         400: "invalid_request_error", 401: "authentication_error"}  # fmt: skip


class Made(NamedTuple):
    """What goes over the wire, and what then becomes of the connection."""

    raw: bytes
    end: str = "keep"  # or close, reset, stall
    pause: float = 0.0  # in the middle


def made(plan: Plan, streamed: bool) -> Made:
    """The answer with the fault of the plan."""
    good = answer(plan, streamed)
    at = int(plan.place * len(good))
    middle = good.find(b"\r\n\r\n") + 4
    statuses = list(KINDS)
    status = statuses[int(plan.place * len(statuses))]
    error = {"type": "error", "error": {"type": KINDS[status], "message": "scripted"}}
    html = b"<html><h1>Bad gateway</h1></html>"
    half = good[: max(middle + 5, at)]
    table = {
        "none": lambda: Made(good),
        "reset before the head": lambda: Made(b"", "reset"),
        "close before the head": lambda: Made(b"", "close"),
        "cut": lambda: Made(good[:at], "close"),
        "reset": lambda: Made(good[:at], "reset"),
        "stale": lambda: Made(good, "close"),
        "1xx": lambda: Made(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 300 + good),
        "status": lambda: Made(
            sized(status, "application/json", json.dumps(error).encode(), "retry-after-ms: 2")
        ),
        "html": lambda: Made(sized(200 if plan.place < 0.5 else 502, "text/html", html)),
        "gzip": lambda: Made(
            sized(200, "text/event-stream", gzip.compress(good), "content-encoding: gzip")
        ),
        "type": lambda: Made(sized(200, "text/plain", b"all is well")),
        "garbage": lambda: Made(b"\x16\x03\x01\0\xff SSH-2.0 \r\n\r\n" * 3, "close"),
        "bad event": lambda: Made(
            good[:middle] + b"a\r\ndata: {x\n\n\r\n" + good[middle:] if streamed else half,
            "close",
        ),
        "error event": lambda: Made(with_error_event(good, streamed)),
        "bad chunk": lambda: Made(half + b"\r\nxyz\r\n" * streamed, "close"),
        "long head": lambda: Made(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 80_000, "stall"),
        "long line": lambda: Made(with_long_line(good, streamed), "close"),
        "lengths": lambda: Made(
            head(200, "application/json", "content-length: 5", "content-length: 6") + b"12345"
        ),
        "stall before the head": lambda: Made(b"", "stall"),
        "stall": lambda: Made(half, "stall"),
        "slow": lambda: Made(good, "keep", 0.1 + plan.place / 3),
        "refuse": lambda: Made(b"", "refuse"),
        "hold": lambda: Made(good[:at], "hold"),
    }
    return table[plan.fault]()


def with_error_event(good: bytes, streamed: bool) -> bytes:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    event = f"event: error\ndata: {json.dumps(error)}\n\n".encode()
    if not streamed:
        return sized(529, "application/json", json.dumps(error).encode())
    start = good.index(b"\r\n", good.index(b"event: content_block_start")) + 2
    return good[:start] + b"%x\r\n%b\r\n" % (len(event), event) + END


def with_long_line(good: bytes, streamed: bool) -> bytes:
    if not streamed:
        return sized(200, "text/plain", b"x" * 100)
    middle = good.find(b"\r\n\r\n") + 4
    piece = b"data: " + b"x" * (1 << 20)
    return good[:middle] + b"%x\r\n%b\r\n" % (len(piece), piece) * 17


class FakeUpstream:
    """Serves plans. It runs in a process of its own; `control` says when to close everything."""

    def __init__(self, control: Any) -> None:
        self.control = control
        self.sockets: set[socket.socket] = set()
        self.lock = threading.Lock()
        self.port = 0
        self.seen: list[int] = []
        self.left: dict[int, float] = {}  # when a connection that was held open was closed
        self.listener = self.listening()
        self.port = self.listener.getsockname()[1]

    def listening(self) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(512)
        return listener

    def run(self) -> None:
        threading.Thread(target=self.accept, daemon=True).start()
        self.control.send(self.port)
        answers = {"close": self.close_all, "left": self.left.copy, "seen": self.seen.copy}
        while True:
            self.control.send(answers[self.control.recv()]())

    def close_all(self) -> int:
        with self.lock:
            sockets = list(self.sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        return len(sockets)

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                time.sleep(0.01)  # refused for a moment
                continue
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def refuse(self) -> None:
        """Nobody listens, for a moment."""
        listener = self.listener
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        time.sleep(0.05)
        with self.lock:
            if self.listener is listener:
                self.listener = self.listening()

    def serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self.sockets.add(sock)
        with contextlib.suppress(OSError), sock:
            while self.exchange(sock):
                pass
        with self.lock:
            self.sockets.discard(sock)

    def exchange(self, sock: socket.socket) -> bool:
        buffer = b""
        while b"\r\n\r\n" not in buffer:
            piece = sock.recv(1 << 16)
            if not piece:
                return False
            buffer += piece
        top, _, body = buffer.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", top, re.I)
        while len(body) < (int(length[1]) if length else 0):
            body += sock.recv(1 << 16)
        told = re.search(rb"<<(.*?)>>", body)
        if not told:  # the list of models
            sock.sendall(sized(404, "application/json", b"{}"))
            return True
        number, fault, place, words = json.loads(told[1].replace(b'\\"', b'"'))
        plan = Plan(number, fault, place, words, False, CHAT, 0.0)
        self.seen.append(number)
        return self.send(sock, made(plan, json.loads(body).get("stream") is True), plan)

    def send(self, sock: socket.socket, answer: Made, plan: Plan) -> bool:
        middle = len(answer.raw) // 2 if answer.pause else 0
        if middle:
            sock.sendall(answer.raw[:middle])
            time.sleep(answer.pause)
        sock.sendall(answer.raw[middle:])
        if answer.end == "refuse":
            self.refuse()
        if answer.end == "stall":
            sock.settimeout(SILENCE * 5)
            assert not sock.recv(1)  # the shim has had enough, or its client has
        if answer.end == "hold":
            sock.settimeout(30)
            with contextlib.suppress(ConnectionError):
                sock.recv(1)
            self.left[plan.number] = time.monotonic()
        if answer.end in ("reset", "refuse"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return answer.end == "keep"


def serve_plans(control: Any) -> None:
    enough_files()
    FakeUpstream(control).run()


# --- clients --------------------------------------------------------------------------------------


class Broken(Exception):
    """The connection ended before the answer did."""


class Gone(Exception):
    """This client vanished, as it was told to."""


class Client:
    """One client: request after request, on a kept connection as long as that lasts."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sock: Optional[socket.socket] = None
        self.buffer = b""
        self.deadline = 0.0

    def asked(self, plan: Plan) -> tuple[int, bytes, bool]:
        """Status, body, and whether it was as long as it said."""
        if self.sock is None:
            self.sock, self.buffer = connected(self.port), b""
        self.deadline = time.monotonic() + (plan.vanish or 30)
        self.sock.sendall(post(plan.api.path, plan.body()).replace(b"Connection: close\r\n", b""))
        try:
            return self.read()
        except socket.timeout:
            self.close()
            if plan.vanish:
                raise Gone from None
            raise

    def fill(self) -> None:
        assert self.sock is not None
        self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
        try:
            piece = self.sock.recv(1 << 16)
        except ConnectionError as error:
            raise Broken(str(error)) from None
        if not piece:
            raise Broken("closed")
        self.buffer += piece

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self.fill()
        found, _, self.buffer = self.buffer.partition(mark)
        return found

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.fill()
        found, self.buffer = self.buffer[:size], self.buffer[size:]
        return found

    def read(self) -> tuple[int, bytes, bool]:
        top = self.until(b"\r\n\r\n").lower()
        status, pieces = int(top[9:12]), []
        length = re.search(rb"\r\ncontent-length: (\d+)", top)
        try:
            if length:
                pieces.append(self.exactly(int(length[1])))
            while not length:
                size = int(self.until(b"\r\n"), 16)
                pieces.append(self.exactly(size))
                self.exactly(2)
                if not size:
                    break
        except Broken:
            rest = self.buffer
            self.close()
            return status, b"".join([*pieces, rest]), False
        if b"\r\nconnection: close" in top:
            self.close()
        return status, b"".join(pieces), True

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
        self.sock = None


def judged(plan: Plan, status: int, body: bytes, complete: bool) -> str:
    """`right`, `error` or `cut off` (no client can take that for whole); else what is wrong."""
    if body in FOREIGN and plan.api == MESSAGES:
        return "error" if status >= 400 else "right"  # handed on as it came, with its type
    if status >= 400:
        told = complete and json.loads(body).get("error", {}).get("message")
        return "error" if told else f"an error that does not say so: {status} {body[:300]!r}"
    if plan.streamed:
        return judged_stream(plan, body, complete)
    if not complete:
        return "cut off"
    right = said(plan.api, json.loads(body)) == plan.text()
    return "right" if right else f"a wrong answer: {body[:300]!r}"


FOREIGN = (b"all is well", b"<html><h1>Bad gateway</h1></html>", b"x" * 100)


def said(api: API, answer: JSON) -> str:
    """The text of a whole answer; with a remark if it did not end regularly."""
    if api == CHAT:
        choice = answer["choices"][0]
        text, regular = choice["message"]["content"], choice["finish_reason"] == "stop"
    elif api == RESPONSES:
        text = "".join(item["content"][0]["text"] for item in answer["output"])
        regular = answer["status"] == "completed"
    else:
        text, regular = answer["content"][0]["text"], answer["stop_reason"] == "end_turn"
    return str(text) if regular else f"(not ended regularly) {text}"


def judged_stream(plan: Plan, body: bytes, complete: bool) -> str:
    ended, told = plan.api.end in body, plan.api.told in body
    if not ended:
        return "error" if told else f"cut off without a word ({complete}): {body[-300:]!r}"
    if told:
        return f"an error, and an end: {body[-300:]!r}"
    if plan.fault == "bad event" and plan.api == MESSAGES:
        return "right"  # relayed byte for byte, for the client to see
    lines = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
    events = [json.loads(line) for line in lines if line != b"[DONE]"]
    text, finish = "".join(map(piece, events)), [f for f in map(finished, events) if f]
    right = text == plan.text() and len(finish) == 1 and finish[0] in REGULAR and complete
    return "right" if right else f"ends, and is not whole: {complete} {body[-300:]!r}"


REGULAR = ("stop", "end_turn", "completed")


def piece(event: JSON) -> str:
    """The text that an event of any dialect adds."""
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    if event.get("type") == "content_block_delta":
        return str(event["delta"].get("text", ""))
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))


def finished(event: JSON) -> str:
    """The reason why an answer ended, in the event that tells it."""
    if event.get("type") == "message_delta":
        return str(event["delta"]["stop_reason"])
    if event.get("type") in ("response.completed", "response.incomplete"):
        return str(event["response"]["status"])
    return "".join(choice.get("finish_reason") or "" for choice in event.get("choices", ()))


# --- the upstream's process ----------------------------------------------------------------------


class Upstream:
    """The fake in its process: its port, and what it is told."""

    def __init__(self, control: Any) -> None:
        self.control, self.port = control, control.recv()

    def told(self, word: str) -> Any:
        self.control.send(word)
        return self.control.recv()


@contextlib.contextmanager
def failing_upstream() -> Iterator[Upstream]:
    enough_files()
    control, other = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=serve_plans, args=(other,))
    process.start()
    try:
        yield Upstream(control)
    finally:
        process.kill()
        process.join()
