"""Slow clients are cut at the stated deadlines: slowhttptest, else a client of our own.

    python check_slow.py [--long]

The server runs with deadlines of some seconds (--long: as shipped; that takes six minutes).
slowhttptest comes from the system, else out of Debian's package, unpacked into a temporary folder;
where neither can be had, the same is sent by this file, and said so. Standard library only.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional

import harness
from wire import (
    HEALTH,
    LAST,
    LONG,
    SHIM_FILE,
    SHIM_PYTHON,
    Held,
    answers,
    back_to,
    check,
    connected,
    exchanged,
    held,
    run,
)

# The limits of claude_shim.ServerLimits: shortened for the gate.
LIMITS = {} if LONG else {
    "idle_seconds": 4.0, "head_seconds": 4.0, "body_pause_seconds": 2.0, "body_seconds": 6.0,
    "write_seconds": 3.0,
}  # fmt: skip
SHIPPED = {
    "idle_seconds": 60.0, "head_seconds": 15.0, "body_pause_seconds": 20.0, "body_seconds": 300.0,
    "write_seconds": 60.0,
}  # fmt: skip
DEADLINES = {**SHIPPED, **LIMITS}
LATE = 3.0  # seconds: slowhttptest takes one to connect, and counts once a second
CONNECTIONS = 50

SERVE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("claude_shim", sys.argv[1])
shim = sys.modules["claude_shim"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shim)
limits = shim.ServerLimits(**eval(sys.argv[2]))
policy = shim.Policy(live_models=False)
with shim.Server(shim.App(shim.EchoUpstream(), policy=policy), limits=limits) as server:
    print("listening on", server.url, flush=True)
    sys.stdin.read()
"""


class Slow(NamedTuple):
    port: int
    pid: int


@contextlib.contextmanager
def slow_server() -> Iterator[Slow]:
    """`Server` on the echo, with the limits above."""
    with tempfile.TemporaryDirectory(prefix="shim-home-") as home:
        process = subprocess.Popen(
            [SHIM_PYTHON, "-c", SERVE, SHIM_FILE, repr(LIMITS)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=harness.clean_environment(home),
        )  # fmt: skip
        try:
            url = harness.listening_url(process)
            yield Slow(int(url.rpartition(":")[2]), process.pid)
        finally:
            process.kill()
            process.wait()


# --- slowhttptest ---------------------------------------------------------------------------------


def slowhttptest(folder: str) -> Optional[str]:
    """Path of the program, or None."""
    found = shutil.which("slowhttptest")
    if found or not shutil.which("apt-get"):
        return found
    commands = (["apt-get", "-q", "download", "slowhttptest"], ["sh", "-c", "dpkg -x *.deb ."])
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        if done.returncode:
            return None
    path = os.path.join(folder, "usr/bin/slowhttptest")
    works = subprocess.run([path, "-h"], capture_output=True, check=False).returncode == 0
    return path if works else None


def all_closed_after(program: str, folder: str, options: list[str], limit: float) -> float:
    """Seconds until the shim had closed the last connection, as slowhttptest counts."""
    length = int(limit + LATE + 5)
    command = [program, "-c", str(CONNECTIONS), "-r", "200", "-l", str(length), "-g", "-o", "slow"]
    told = subprocess.run([*command, *options], cwd=folder, capture_output=True, check=True).stdout
    with open(os.path.join(folder, "slow.csv"), encoding="ascii") as file:
        rows = [[int(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    shown = f"{rows[-1]} (second, closed, pending, connected, available)"
    assert b"No open connections left" in told, f"never all closed: {shown}"
    assert max(row[3] for row in rows) == CONNECTIONS, f"never all connected: {rows}"
    return rows[-1][0] + 1.0


# --- and without it -------------------------------------------------------------------------------


def closed_after(port: int, first: bytes, drop: bytes, pause: float, limit: float) -> float:
    """Seconds until the shim closed the last of our own connections."""
    socks = [connected(port) for _ in range(CONNECTIONS)]
    begun = dropped = time.monotonic()
    for sock in socks:
        sock.sendall(first)
        sock.setblocking(False)
    while socks:
        assert time.monotonic() - begun < limit + LATE, f"{len(socks)} not closed"
        if drop and time.monotonic() - dropped > pause:
            dropped = time.monotonic()
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.send(drop)
        socks = [sock for sock in socks if not was_closed(sock)]
        time.sleep(0.05)
    return time.monotonic() - begun


def was_closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    sock.close()
    return True


POST = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4096\r\n\r\n"


class Kind(NamedTuple):
    """One way to be slow."""

    path: str
    options: list[str]  # of slowhttptest
    own: tuple[bytes, bytes, float]  # first bytes, then what, every so many seconds
    limits: tuple[str, ...]  # the deadlines, of which the first to pass ends it


CHAT = "/v1/chat/completions"
KINDS = {
    "head": Kind("/health", ["-H", "-i", "1"], (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X", 1),
                 ("head_seconds",)),
    "body": Kind(CHAT, ["-B", "-i", "1", "-x", "8"], (POST, b"x", 1), ("body_seconds",)),
    "body that stops": Kind(CHAT, ["-B", "-i", "600"], (POST + b"x", b"", 1),
                            ("body_pause_seconds", "body_seconds")),
}  # fmt: skip


def cut(kind: Kind) -> str:
    limit = min(DEADLINES[name] for name in kind.limits)
    with slow_server() as server, tempfile.TemporaryDirectory(prefix="shim-slow-") as folder:
        exchanged(server.port, HEALTH, silence=0.2)
        base = back_to(held(server.pid), server.pid)
        program = slowhttptest(folder)
        if program:
            url = f"http://127.0.0.1:{server.port}{kind.path}"
            seconds = all_closed_after(program, folder, [*kind.options, "-u", url], limit)
        else:
            seconds = closed_after(server.port, *kind.own, limit)
        assert seconds <= limit + LATE, f"closed after {seconds} s, the deadline is {limit} s"
        back_to(base, server.pid)
    who = "slowhttptest" if program else "own client (no slowhttptest here)"
    return f"{CONNECTIONS} closed after {seconds:.0f} s, deadline {limit:.0f} s, {who}"


def register(name: str, kind: Kind) -> Callable[[], str]:
    return check(f"a slow {name} is cut")(lambda: cut(kind))


for _name, _kind in KINDS.items():
    register(_name, _kind)


@check("idle connections are closed")
def idle() -> str:
    with slow_server() as server:
        seconds = closed_after(server.port, HEALTH, b"", 1, DEADLINES["idle_seconds"])
    return f"{CONNECTIONS} closed after {seconds:.1f} s, deadline {DEADLINES['idle_seconds']:.0f} s"


@check("a reader that takes nothing is cut, and others are served meanwhile")
def slow_read() -> str:
    """By a client of our own: slowhttptest reads on, byte by byte, and that is its right."""
    text = "x" * 4_000_000
    body = json.dumps({"model": "opus", "messages": [{"role": "user", "content": text}]}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with slow_server() as server:
        base: Held = back_to(held(server.pid), server.pid)
        socks = [connected(server.port, buffer=4096) for _ in range(5)]
        for sock in socks:
            sock.sendall(head.encode() + body)
        begun, slowest = time.monotonic(), 0.0
        limit = DEADLINES["write_seconds"] + LATE + 3
        while held(server.pid).descriptors > base.descriptors:
            assert time.monotonic() - begun < limit, f"not cut after {limit} s"
            asked = time.monotonic()
            raw, _ = exchanged(server.port, LAST)
            assert answers(raw)[0].status == 200
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.1)
        seconds = time.monotonic() - begun
        for sock in socks:
            sock.close()
    return f"cut after {seconds:.1f} s; the slowest request beside them {slowest * 1000:.0f} ms"


if __name__ == "__main__":
    sys.exit(run("slow"))
