"""Many connections at once: what a request beside them takes, and what the shim holds for them.

    python check_load.py [words of titles]

The figures depend on the machine; the bounds are wide, so that only a collapse fails. Standard
library only; memory and processor time need /proc.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from wire import (
    HEALTH,
    LAST,
    LONG,
    Held,
    answers,
    back_to,
    check,
    connected,
    cpu_seconds,
    enough_files,
    exchanged,
    held,
    post,
    received,
    run,
    shim,
)

ECHO = ("--upstream", "echo", "--quiet")
ASKED = json.dumps({"model": "opus", "messages": [{"role": "user", "content": "hello"}]}).encode()
WORST = 1.0  # seconds that no request may take, on any machine


class Times:
    """Seconds that requests took."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = sorted(seconds)

    def part(self, share: float) -> float:
        return self.seconds[min(len(self.seconds) - 1, math.ceil(share * len(self.seconds)) - 1)]

    def __str__(self) -> str:
        parts = ((0.5, "p50"), (0.99, "p99"), (1.0, "max"))
        return ", ".join(f"{name} {self.part(share) * 1000:.1f} ms" for share, name in parts)


def asked(port: int, count: int = 200) -> Times:
    """Requests one after the other, each on a connection of its own."""
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        raw, _ = exchanged(port, post("/v1/chat/completions", ASKED))
        seconds.append(time.perf_counter() - begun)
        assert answers(raw)[0].status == 200, raw
    times = Times(seconds)
    assert times.part(1.0) < WORST, f"a request took too long: {times}"
    return times


@contextlib.contextmanager
def opened(port: int, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections; each may send something first, and get an answer if it is whole."""
    socks: list[socket.socket] = []
    try:
        for number in range(count):
            socks.append(connected(port))
            if first:
                socks[number].sendall(first)
        yield socks
    finally:
        for sock in socks:
            sock.close()


@contextlib.contextmanager
def idle(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Half of them have had an answer, half have never sent a byte."""
    with opened(port, count - count // 2) as fresh, opened(port, count // 2, HEALTH) as used:
        for sock in used:
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        yield fresh + used


def per_connection(base: Held, now: Held, count: int) -> str:
    kib = (now.rss_kib - base.rss_kib) / count
    return f"{now.threads} threads, {now.rss_kib / 1024:.0f} MiB ({kib:.1f} KiB a connection)"


@check("alone")
def alone() -> str:
    with shim(*ECHO, timed=True) as server:
        asked(server.port, 20)
        return str(asked(server.port))


@check("500 idle connections, and a request is served at once")
def beside_idle() -> str:
    enough_files()
    with shim(*ECHO, timed=True) as server:
        asked(server.port, 20)
        base = held(server.pid)
        with idle(server.port, 500):
            times, now = asked(server.port), held(server.pid)
        back_to(base, server.pid)
        return f"{times}; {per_connection(base, now, 500)}"


@check("200 connections at once, each with a request")
def at_once() -> str:
    with shim(*ECHO, timed=True) as server:
        asked(server.port, 20)
        with contextlib.ExitStack() as stack:
            poll, waiting, seconds = select.poll(), {}, []
            begun = time.perf_counter()
            for _ in range(200):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", server.port))
                poll.register(sock, select.POLLOUT)
                waiting[sock.fileno()] = sock
            while len(seconds) < 200:
                for number, event in poll.poll(10_000):
                    if event & select.POLLOUT:
                        waiting[number].sendall(post("/v1/chat/completions", ASKED))
                        poll.modify(number, select.POLLIN)
                    else:
                        assert waiting[number].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
                        seconds.append(time.perf_counter() - begun)
                        poll.unregister(number)
        return str(Times(seconds))


# --- slow clients ---------------------------------------------------------------------------------


class Dripping:
    """Sends each connection a byte of a head every second, until left."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self.socks, self.over = socks, threading.Event()
        self.thread = threading.Thread(target=self.drip)

    def drip(self) -> None:
        text, at = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 500, 0
        while not self.over.wait(1.0):
            for sock in self.socks:
                with contextlib.suppress(OSError):
                    sock.sendall(text[at : at + 1])
            at += 1

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: Any) -> None:
        self.over.set()
        self.thread.join()


HALF = post("/v1/messages", b"x" * 90_000)[:-45_000]


@check("500 idle, 500 slow and 200 half bodies, and requests beside them")
def beside_slow() -> str:
    enough_files()
    with shim(*ECHO, timed=True) as server:
        asked(server.port, 20)
        base = held(server.pid)
        with contextlib.ExitStack() as stack:
            stack.enter_context(idle(server.port, 500))
            stack.enter_context(Dripping(stack.enter_context(opened(server.port, 500, b"P"))))
            stack.enter_context(opened(server.port, 200, HALF))
            time.sleep(2)
            times, now = asked(server.port, 300), held(server.pid)
        back_to(base, server.pid)
        return f"{times}; {per_connection(base, now, 1200)}"


# --- live streams ---------------------------------------------------------------------------------

PAUSE = 0.05  # seconds between two events of a stream
START = b"""event: message_start
data: {"type":"message_start","message":{"id":"m","type":"message","role":"assistant",\
"model":"claude-opus-5-5","content":[],"stop_reason":null,"usage":{"input_tokens":1}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

"""
STOP = b"""event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":5}}

event: message_stop
data: {"type":"message_stop"}

"""


def token(text: str) -> bytes:
    delta = '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%s"}}'
    return b"event: content_block_delta\ndata: " + (delta % text).encode() + b"\n\n"


def stream_upstream(port: Any, seconds: float) -> None:
    """Answers each request by a stream whose tokens are the times at which they were sent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                top = await reader.readuntil(b"\r\n\r\n")
                length = [
                    line.split(b":")[1] for line in top.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                ]  # fmt: skip
                await reader.readexactly(int(length[0]) if length else 0)
                if not top.startswith(b"POST"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + START)
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    writer.write(token(f"{time.monotonic():.6f} "))
                    await writer.drain()
                    await asyncio.sleep(PAUSE)
                writer.write(STOP)
                await writer.drain()
                writer.close()
                return

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    enough_files()
    asyncio.run(main())


@contextlib.contextmanager
def streaming(seconds: float) -> Iterator[int]:
    """An upstream of such streams; yields its port."""
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=stream_upstream, args=(there, seconds)
    )
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


class Readers:
    """Reads many streams in one thread and notes how old each token is."""

    def __init__(self, port: int, count: int) -> None:
        self.delays: list[float] = []
        self.ended = self.whole = 0
        self.socks = [connected(port) for _ in range(count)]
        body = json.dumps({**json.loads(ASKED), "stream": True}).encode()
        for sock in self.socks:
            sock.sendall(post("/v1/chat/completions", body))
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        poll = select.poll()
        open_ones = {sock.fileno(): (sock, bytearray()) for sock in self.socks}
        for number in open_ones:
            poll.register(number, select.POLLIN)
        while open_ones:
            for number, _ in poll.poll(10_000):
                sock, kept = open_ones[number]
                piece = sock.recv(1 << 16)
                now = time.monotonic()
                kept += piece
                *lines, rest = bytes(kept).split(b"\n")
                kept[:] = rest
                for line in lines:
                    text = line.partition(b'"content":"')[2].partition(b'"')[0].strip()
                    self.delays += [now - float(text)] if text else []
                    self.whole += line == b"data: [DONE]"
                if not piece:
                    poll.unregister(number)
                    del open_ones[number]
                    sock.close()


@check("1,000 idle connections and 100 live streams, and requests beside them")
def beside_streams() -> str:
    enough_files()
    with streaming(8.0) as upstream_port:
        url = f"http://127.0.0.1:{upstream_port}"
        with shim("--base-url", url, "--quiet", timed=True) as server:
            exchanged(server.port, post("/v1/embeddings", b"{}"))
            base = held(server.pid)
            with idle(server.port, 1000):
                used = cpu_seconds(server.pid)
                readers = Readers(server.port, 100)
                time.sleep(2)
                times, now = health(server.port), held(server.pid)
                readers.thread.join()
                used = cpu_seconds(server.pid) - used
            assert readers.whole == 100, f"{readers.whole} of 100 streams came to their end"
            delays = Times(readers.delays)
            return (
                f"a request beside them {times}; a token {delays} ({len(delays.seconds):,} tokens, "
                f"{used / len(delays.seconds) * 1e6:.0f} us of processor each); "
                f"{per_connection(base, now, 1100)}"
            )


def health(port: int, count: int = 100) -> Times:
    """The same where upstream is not the echo."""
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        raw, _ = exchanged(port, LAST)
        seconds.append(time.perf_counter() - begun)
        assert answers(raw)[0].status == 200, raw
    assert max(seconds) < WORST, f"a request took too long: {Times(seconds)}"
    return Times(seconds)


# --- large bodies ---------------------------------------------------------------------------------


def peak_mib(pid: int) -> float:
    """The most memory that a process has held."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def posted(port: int, body: bytes) -> int:
    """The status of the answer to a large body."""
    with connected(port) as sock:
        sock.settimeout(60)
        with contextlib.suppress(ConnectionError):
            sock.sendall(post("/v1/chat/completions", body))
        raw, _ = received(sock, silence=60)
    return answers(raw)[0].status


@check("a body of 32 MiB that would be millions of values is refused, and costs less than 200 MiB")
def many_values() -> str:
    body = b'{"model":"opus","messages":[' + b"[]," * ((32 << 20) // 3 - 20) + b"[]]}"
    with shim(*ECHO, timed=True) as server:
        asked(server.port, 5)
        before, begun = peak_mib(server.pid), time.monotonic()
        status, seconds = posted(server.port, body), time.monotonic() - begun
        grown = peak_mib(server.pid) - before
    assert 400 <= status < 500, status
    assert grown < 200, f"{grown:.0f} MiB more"
    return f"{status} after {seconds:.1f} s, {grown:.0f} MiB more"


MIB, MOST = (31, 1536) if LONG else (8, 512)


@check(f"8 bodies of {MIB} MiB at once stay under {MOST} MiB, and requests beside them are served")
def large_bodies() -> str:
    turns = [("user", "x" * (MIB << 20)), ("assistant", "y"), ("user", "hello")]
    messages = [{"role": role, "content": text} for role, text in turns]
    body = json.dumps({"model": "opus", "messages": messages}).encode()
    with shim(*ECHO, timed=True) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked(server.port, 5)
        begun, beside = time.monotonic(), []
        posts = [pool.submit(posted, server.port, body) for _ in range(8)]
        while not all(one.done() for one in posts):
            asked_at = time.perf_counter()
            exchanged(server.port, LAST)
            beside.append(time.perf_counter() - asked_at)
            time.sleep(0.05)
        seconds, peak = time.monotonic() - begun, peak_mib(server.pid)
        statuses = [one.result() for one in posts]
    assert set(statuses) <= {200, 429, 503} and 200 in statuses, statuses
    assert peak < MOST, f"{peak:.0f} MiB; {statuses} after {seconds:.1f} s"
    return f"{statuses} after {seconds:.1f} s, {peak:.0f} MiB at most; beside them {Times(beside)}"


# --- no descriptors left --------------------------------------------------------------------------


@check("no descriptors left: accepting pauses, nothing spins, and then it goes on")
def no_descriptors() -> str:
    enough_files()
    with shim(*ECHO, max_files=64, timed=True) as server:
        asked(server.port, 5)
        with opened(server.port, 200, HEALTH) as socks:
            time.sleep(0.5)
            used = cpu_seconds(server.pid)
            time.sleep(3.0)
            used = cpu_seconds(server.pid) - used
            poll = select.poll()
            for sock in socks:
                poll.register(sock, select.POLLIN)
            served = len(poll.poll(0))
        begun = time.monotonic()
        raw, _ = exchanged(server.port, post("/v1/chat/completions", ASKED))
        seconds = time.monotonic() - begun
        assert answers(raw)[0].status == 200
        assert used < 0.5, f"{used:.2f} s of processor in 3 s without a free descriptor"
        lines = len(server.log_lines())
        assert lines < 100, f"{lines} lines in the log"
    return f"{served} of 200 served, {used:.2f} s of processor in 3 s; then {seconds * 1000:.0f} ms"


if __name__ == "__main__":
    sys.exit(run("load"))
