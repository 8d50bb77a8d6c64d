"""Chaos: 64 clients through the shim to an upstream that fails in every way it can.

    python check_chaos.py [--long] [--seed N]

For 20 seconds and until 10,000 requests (--long: 100,000). Each request carries the fault that
upstream is to commit, picked at random; each answer must be complete and right, or an explicit
error. Some clients vanish, while they wait or in the middle of a stream. Afterwards the shim must
hold what it held before. Standard library only; the seed is printed.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import multiprocessing
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from wire import LONG, SEED, Shim, back_to, check, connected, enough_files, held, post, run, shim

JSON = dict[str, Any]
CLIENTS, SECONDS, REQUESTS = 64, 20, 100_000 if LONG else 10_000
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


class Plan(NamedTuple):
    """One request: what upstream is told to do, and what the client does."""

    number: int
    fault: str
    place: float  # where in the answer
    words: int
    streamed: bool
    openai: bool
    vanish: float  # seconds after which the client is gone; 0: it stays

    def text(self) -> str:
        return "".join(f"w{self.number}.{i} \u4e16" for i in range(self.words))

    def body(self) -> bytes:
        told = json.dumps([self.number, self.fault, self.place, self.words])
        messages = [{"role": "user", "content": f"<<{told}>>"}]
        more = {"stream": True} if self.streamed else {}
        limit = {} if self.openai else {"max_tokens": 100}
        return json.dumps({"model": "opus", "messages": messages, **more, **limit}).encode()


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
        answers = {"close": self.close_all, "left": self.left.copy}
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
            sock.sendall(sized(200, "application/json", b'{"data": []}'))
            return True
        number, fault, place, words = json.loads(told[1].replace(b'\\"', b'"'))
        plan = Plan(number, fault, place, words, False, False, 0.0)
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
            sock.settimeout(20)
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
        path = "/v1/chat/completions" if plan.openai else "/v1/messages"
        self.sock.sendall(post(path, plan.body()).replace(b"Connection: close\r\n", b""))
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
    if status == 502 and not plan.openai and plan.fault == "html" and relayed(plan, body):
        return "error"
    if status >= 400:
        told = complete and json.loads(body).get("error", {}).get("message")
        return "error" if told else f"an error that does not say so: {status} {body[:300]!r}"
    if plan.streamed:
        return judged_stream(plan, body, complete)
    if not complete:
        return "cut off"
    if plan.openai:
        choice = json.loads(body)["choices"][0]
        right = (choice["message"]["content"], choice["finish_reason"]) == (plan.text(), "stop")
    else:
        right = relayed(plan, body)
    return "right" if right else f"a wrong answer: {body[:300]!r}"


FOREIGN = (b"all is well", b"<html><h1>Bad gateway</h1></html>", b"x" * 100)


def relayed(plan: Plan, body: bytes) -> bool:
    """A relay hands on what is no Messages answer, too, with its content type."""
    if plan.fault in ("type", "html", "long line"):
        return body in FOREIGN
    return bool(json.loads(body)["content"][0]["text"] == plan.text())


def judged_stream(plan: Plan, body: bytes, complete: bool) -> str:
    lines = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
    if not plan.openai and plan.fault in ("type", "html") and relayed(plan, body):
        return "right"
    ended = b"[DONE]" in lines if plan.openai else b"event: message_stop\n" in body
    if not complete and not ended:
        told = b'data: {"error":' in body if plan.openai else b"event: error\n" in body
        return "error" if told else f"cut off without a word: {body[-300:]!r}"
    if not ended:
        told = b'"error"' in body
        return "error" if told else f"ends as if it were whole: {body[-300:]!r}"
    if b'"error":' in body:
        return f"an error, and an end: {body[-300:]!r}"
    if plan.fault == "bad event" and not plan.openai:
        return "right"  # relayed byte for byte, for the client to see
    text, finish = "", []
    for line in lines:
        event = json.loads(line) if line != b"[DONE]" else {}
        for choice in event.get("choices", ()):
            text += choice["delta"].get("content") or ""
            finish += [choice["finish_reason"]] if choice["finish_reason"] else []
        text += event.get("delta", {}).get("text", "")
        finish += [event["delta"]["stop_reason"]] if event.get("type") == "message_delta" else []
    right = text == plan.text() and finish in (["stop"], ["end_turn"]) and complete
    return "right" if right else f"ends, and is not whole: {complete} {body[-300:]!r}"


class Crowd:
    """All clients and what became of their requests."""

    def __init__(self, port: int) -> None:
        self.port, self.end = port, time.monotonic() + SECONDS
        self.outcomes: Counter[str] = Counter()
        self.by_fault: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.lock = threading.Lock()
        self.number = 0
        self.slowest = (0.0, "")

    def plan(self, chance: random.Random) -> Optional[Plan]:
        with self.lock:
            if self.number >= REQUESTS and time.monotonic() > self.end:
                return None
            self.number += 1
            number = self.number
        fault = chance.choices(list(FAULTS), list(FAULTS.values()))[0]
        vanish = chance.random() * 0.3 if chance.random() < 0.06 else 0.0
        streamed, openai = chance.random() < 0.6, chance.random() < 0.6
        words = chance.randint(1, 30)
        return Plan(number, fault, chance.random(), words, streamed, openai, vanish)

    def client(self, index: int) -> None:
        chance, client = random.Random(SEED * 1000 + index), Client(self.port)
        while (plan := self.plan(chance)) and len(self.problems) < 20:
            begun = time.monotonic()
            try:
                outcome = judged(plan, *client.asked(plan))
            except Gone:
                outcome = "vanished"
            except Exception as error:
                outcome = f"no answer: {type(error).__name__} {error}"
                client.close()
            spent = time.monotonic() - begun
            with self.lock:
                self.slowest = max(self.slowest, (spent, plan.fault))
                self.count(plan, outcome)
        client.close()

    def count(self, plan: Plan, outcome: str) -> None:
        known = outcome in ("right", "error", "cut off", "vanished")
        self.outcomes[outcome if known else "WRONG"] += 1
        self.by_fault[plan.fault, outcome] += 1
        if not known:
            self.problems.append(f"{plan}: {outcome}")

    def run(self) -> float:
        threads = [threading.Thread(target=self.client, args=(n,)) for n in range(CLIENTS)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - begun


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


def let_go(upstream: Upstream, server: Shim) -> None:
    """Ends idle connections to upstream: that they are closed is noticed by the next request."""
    upstream.told("close")
    time.sleep(0.2)
    calm, client = Plan(0, "none", 0.0, 3, True, True, 0.0), Client(server.port)
    assert judged(calm, *client.asked(calm)) == "right"
    client.close()


OPTIONS = ["--quiet", "--retries", "1", "--connect-timeout", "2",
           "--silence-timeout", str(SILENCE), "--first-byte-timeout", str(SILENCE)]  # fmt: skip


@contextlib.contextmanager
def shim_before(upstream: Upstream, *options: str) -> Iterator[Shim]:
    """A shim that afterwards must hold what it held before."""
    url = f"http://127.0.0.1:{upstream.port}"
    with shim("--base-url", url, "--quiet", "--connect-timeout", "2", *options) as server:
        let_go(upstream, server)
        base = held(server.pid)
        yield server
        let_go(upstream, server)
        back_to(base, server.pid, spare=1)


@check("64 clients before an upstream that fails: right, or an explicit error; then all is let go")
def chaos() -> str:
    with failing_upstream() as upstream, shim_before(upstream, *OPTIONS) as server:
        first = held(server.pid)
        crowd = Crowd(server.port)
        seconds = crowd.run()
        wrong = crowd.problems
        assert not wrong, "\n".join([f"{crowd.outcomes['WRONG']} wrong (seed {SEED})", *wrong[:8]])
        refused = crowd.by_fault["none", "error"]
        assert refused < crowd.number / 100, f"{refused} errors without a fault"
        last = held(server.pid)
    rate = crowd.number / seconds
    return (
        f"{crowd.number:,} requests, {rate:,.0f}/s, seed {SEED}; {dict(crowd.outcomes)}; slowest "
        f"{crowd.slowest[0]:.1f} s ({crowd.slowest[1]}); {refused} errors beside others' faults; "
        f"first {first}, last {last}"
    )


def each_offset() -> Iterator[Plan]:
    """The same answer, cut before each of its bytes, in both dialects, streamed and not."""
    for streamed, openai in itertools.product((True, False), (True, False)):
        plan = Plan(1, "cut", 0.0, 3, streamed, openai, 0.0)
        size = len(answer(plan, streamed or openai))  # upstream is asked for a stream, to translate
        for offset, fault in itertools.product(range(size), ("cut", "reset")):
            yield plan._replace(place=(offset + 0.5) / size, fault=fault)


@check("an answer cut before each of its bytes is never taken for a whole one")
def every_offset() -> str:
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    plans, lock = each_offset(), threading.Lock()

    def work() -> None:
        client = Client(port)
        while True:
            with lock:
                plan = next(plans, None)
            if plan is None or len(problems) > 10:
                return client.close()
            try:
                outcome = judged(plan, *client.asked(plan))
            except Exception as error:
                outcome = f"no answer: {type(error).__name__} {error}"
                client.close()
            with lock:
                known = outcome in ("right", "error", "cut off")
                outcomes[outcome if known else "WRONG"] += 1
                problems.extend([] if known else [f"{plan}: {outcome}"])

    with failing_upstream() as upstream, shim_before(upstream, "--retries", "0") as server:
        port = server.port
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems, "\n".join(problems)
    return f"{sum(outcomes.values()):,} cuts: {dict(outcomes)}"


@check("a client that vanishes, in any phase: its upstream connection is closed within a second")
def vanished() -> str:
    phases = list(itertools.product((True, False), (True, False), range(10)))
    gone: dict[int, float] = {}
    with failing_upstream() as upstream, shim_before(upstream, "--retries", "0") as server:
        for number, (streamed, openai, phase) in enumerate(phases * (10 if LONG else 3), 1):
            plan = Plan(number, "hold", phase / 10, 5, streamed, openai, 0.0)
            client = Client(server.port)
            client.sock = connected(server.port)
            path = "/v1/chat/completions" if openai else "/v1/messages"
            client.sock.sendall(post(path, plan.body()))
            client.sock.settimeout(0.05)  # some phases show nothing to the client
            with contextlib.suppress(socket.timeout):
                client.sock.recv(1 << 16)
            gone[number] = time.monotonic()
            client.close()
        time.sleep(1.5)
        left = upstream.told("left")
        late = [number for number in gone if number not in left]
        assert not late, f"{len(late)} of {len(gone)} upstream connections still open: {late[:9]}"
        delays = sorted(left[number] - gone[number] for number in gone)
        assert delays[-1] < 1.0, f"closed only after {delays[-1]:.2f} s"
    return f"{len(delays)} times; closed after {delays[-1] * 1000:.0f} ms at most"


if __name__ == "__main__":
    print(f"seed {SEED}")
    sys.exit(run("chaos"))
