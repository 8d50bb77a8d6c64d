"""What the checks of the wire share: a shim in a process of its own, raw sockets, a small runner.

    python check_NAME.py [--long] [--seed N] [words of titles]

The shim is reached as its clients reach it: through sockets. What it holds (threads, descriptors,
memory) is read from /proc; where there is none, those checks say so and are left out.
Standard library only, as the check files live in different environments.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import select
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional

import harness

HERE = os.path.dirname(os.path.abspath(__file__))
SHIM_FILE = os.environ.get("SHIM_FILE", os.path.join(HERE, "..", "claude_shim.py"))
SHIM_PYTHON = os.environ.get("SHIM_PYTHON", sys.executable)
LONG = "--long" in sys.argv
HAS_PROC = os.path.isdir("/proc/self/fd")
JSON = dict[str, Any]
POOL = 64  # threads that the shim may keep for later (claude_shim.ServerLimits.max_workers)


def option(name: str, default: int) -> int:
    """The number that follows --name on the command line."""
    words = sys.argv[1:]
    return int(words[words.index(name) + 1]) if name in words else default


SEED = option("--seed", random.SystemRandom().randrange(1 << 32))


# --- the shim -------------------------------------------------------------------------------------


class Shim(NamedTuple):
    """A running shim."""

    port: int
    pid: int
    log: str  # path of its standard error
    process: Optional[subprocess.Popen[bytes]] = None

    def exit_code(self, seconds: float) -> int:
        """What it ends with, within so many seconds."""
        assert self.process
        return self.process.wait(seconds)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_lines(self) -> list[str]:
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read().splitlines()


@contextlib.contextmanager
def shim(
    *options: str, max_files: int = 0, timed: bool = False, ends: bool = False, **environment: str
) -> Iterator[Shim]:
    """A shim of its own; afterwards its log may not tell of a fault.

    One that is `timed` runs without Python's own checks, as in use; one that `ends` is ended by who
    uses it.
    """
    checks = [] if timed else ["-X", "dev"]
    command = [SHIM_PYTHON, *checks, SHIM_FILE, "--port", "0", *options]
    if max_files:
        command = ["sh", "-c", 'ulimit -n "$0" && exec "$@"', str(max_files), *command]
    with harness.running(command, **environment) as (process, url, log):
        yield Shim(int(url.rpartition(":")[2]), process.pid, log, process)
        assert ends or process.poll() is None, f"the shim ended by itself: {process.returncode}"


class Held(NamedTuple):
    """What a process holds at a moment."""

    threads: int
    descriptors: int
    rss_kib: int


def held(pid: int) -> Held:
    """What the process holds now; zeros where there is no /proc."""
    if not HAS_PROC:
        return Held(0, 0, 0)
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        rss = re.search(r"VmRSS:\s+(\d+)", file.read())
    threads = len(os.listdir(f"/proc/{pid}/task"))
    return Held(threads, len(os.listdir(f"/proc/{pid}/fd")), int(rss[1]) if rss else 0)


def cpu_seconds(pid: int) -> float:
    """The processor time a process has used."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def back_to(base: Held, pid: int, *, seconds: float = 10.0, spare: int = 0) -> Held:
    """What is held once it is as at `base`, its pool apart; AssertionError if never."""
    deadline = time.monotonic() + seconds
    while True:
        now = held(pid)
        if now.threads <= base.threads + POOL and now.descriptors <= base.descriptors + spare:
            return now
        if time.monotonic() > deadline:
            raise AssertionError(f"not let go after {seconds:.0f} s: {now}, at first {base}")
        time.sleep(0.1)


def enough_files(wanted: int = 8192) -> None:
    """Lets this process, and the shims it starts, open more files than usual."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- raw HTTP -------------------------------------------------------------------------------------


def connected(port: int, *, buffer: int = 0) -> socket.socket:
    """A connection to the shim; `buffer` bounds what the kernel takes in for us."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def received(sock: socket.socket, *, silence: float = 10.0) -> tuple[bytes, bool]:
    """All bytes until the other side closes (True) or is silent for some seconds (False)."""
    pieces, poll = [], select.poll()
    poll.register(sock, select.POLLIN)
    while poll.poll(silence * 1000):
        try:
            piece = sock.recv(1 << 16)
        except ConnectionError:
            return b"".join(pieces), True
        if not piece:
            return b"".join(pieces), True
        pieces.append(piece)
    return b"".join(pieces), False


def exchanged(port: int, raw: bytes, *, silence: float = 10.0) -> tuple[bytes, bool]:
    """Sends bytes, returns what came back and whether the shim closed the connection."""
    with connected(port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(raw)
        return received(sock, silence=silence)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of a POST that closes its connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Answer(NamedTuple):
    """One answer of the shim, as a strict client reads it."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool  # as long as its head said


_STATUS = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*\r\n")


def answers(raw: bytes) -> list[Answer]:
    """The answers in the bytes of a connection; AssertionError for what is no HTTP."""
    found = []
    while raw:
        line = _STATUS.match(raw)
        head, mark, rest = raw.partition(b"\r\n\r\n")
        assert line and mark, f"no answer in HTTP: {raw[:200]!r}"
        status, headers = int(line[1]), {}
        for field in head.split(b"\r\n")[1:]:
            name, colon, value = field.decode("latin-1").partition(":")
            assert colon and re.fullmatch(r"[a-z0-9-]+", name), f"a broken field: {field!r}"
            headers[name] = value.strip()
        body, raw, whole = split_body(status, headers, rest)
        if status >= 200:
            found.append(Answer(status, headers, body, whole))
    return found


def split_body(status: int, headers: dict[str, str], rest: bytes) -> tuple[bytes, bytes, bool]:
    """The body, what follows it, and whether it was whole."""
    if status < 200 or status in (204, 304):
        return b"", rest, True
    if headers.get("transfer-encoding") == "chunked":
        return split_chunked(rest)
    if "content-length" not in headers:
        return rest, b"", True
    length = int(headers["content-length"])
    return rest[:length], rest[length:], len(rest) >= length


def split_chunked(rest: bytes) -> tuple[bytes, bytes, bool]:
    pieces = []
    while True:
        size = re.match(rb"([0-9a-f]+)\r\n", rest)
        if not size:
            return b"".join(pieces), b"", False
        length = int(size[1], 16)
        piece, rest = rest[size.end() : size.end() + length], rest[size.end() + length :]
        pieces.append(piece)
        if length == 0 or rest[:2] != b"\r\n":
            return b"".join(pieces), rest[2:], length == 0 and rest[:2] == b"\r\n"
        rest = rest[2:]


# --- checks ---------------------------------------------------------------------------------------

_checks: list[tuple[str, Callable[[], Any]]] = []


def check(title: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a check; what it returns is printed as its figures."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        _checks.append((title, function))
        return function

    return register


def run(name: str) -> int:
    """Runs the registered checks, one line each; the exit code."""
    numbers = {str(SEED)}
    words = [w for w in sys.argv[1:] if not w.startswith("--") and w not in numbers]
    failed = 0
    for title, function in _checks:
        if words and not any(word in title for word in words):
            continue
        begun = time.monotonic()
        try:
            figures = function()
        except Exception as error:
            failed += 1
            print(f"FAIL {name}: {title}")
            for frame in traceback.extract_tb(error.__traceback__)[-3:]:
                print(f"     {os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}")
            for line in f"{type(error).__name__}: {error}".splitlines()[:60]:
                print("     " + line[:2000])
        else:
            shown = f": {figures}" if figures else ""
            print(f"ok   {name}: {title}{shown} ({time.monotonic() - begun:.1f} s)")
        sys.stdout.flush()
    return 1 if failed else 0


def all_of(problems: list[str]) -> None:
    """AssertionError with all the problems, if there are any."""
    if problems:
        raise AssertionError("\n".join([f"{len(problems)} problems", *problems[:40]]))
