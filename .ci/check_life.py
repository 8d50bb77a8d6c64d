"""Waiting, stopping, reloading: nothing is lost when places run out or the shim is told to end.

    python check_life.py [words of titles]

Before the upstream of faults.py, which holds streams open or answers slowly. Standard library only.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator

from faults import APIS, CHAT, MESSAGES, Plan, Upstream, failing_upstream, judged
from wire import (
    HEALTH,
    LAST,
    Shim,
    all_of,
    answers,
    check,
    connected,
    enough_files,
    exchanged,
    post,
    received,
    run,
    shim,
)


@contextlib.contextmanager
def before(
    *options: str, ends: bool = False, **environment: str
) -> Iterator[tuple[Upstream, Shim]]:
    """A shim with these options, and its upstream."""
    enough_files()
    with failing_upstream() as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        with shim("--base-url", url, *options, ends=ends, **environment) as server:
            yield upstream, server


def begun(port: int, plan: Plan) -> socket.socket:
    """A connection on which the plan was asked for."""
    sock = connected(port)
    sock.sendall(post(plan.api.path, plan.body()))
    return sock


def ended(plan: Plan, sock: socket.socket) -> str:
    """What the client makes of the answer, once it has come."""
    raw, _ = received(sock, silence=30)
    sock.close()
    if not raw:
        return "nothing"
    answer = answers(raw)[0]
    return judged(plan, answer.status, answer.body, answer.whole)


def until(condition: str, test: object, seconds: float = 10.0) -> None:
    """Waits for a condition; AssertionError when it does not come."""
    assert callable(test)
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline, f"{condition}: not within {seconds} s"
        time.sleep(0.02)


def held_open(upstream: Upstream, port: int, count: int) -> dict[Plan, socket.socket]:
    """So many streams that have begun and do not go on, in both dialects."""
    plans = [Plan(n, "hold", 0.6, 5, True, APIS[n % 3], 0.0) for n in range(1, count + 1)]
    open_ones = {plan: begun(port, plan) for plan in plans}
    for sock in open_ones.values():
        assert sock.recv(12) == b"HTTP/1.1 200"
    return open_ones


# --- waiting --------------------------------------------------------------------------------------


@check("1,000 requests at once through 64 places: all are answered")
def queue() -> str:
    with before("--max-concurrent", "64", "--max-waiting", "2000", "--quiet") as (_, server):
        plans = [Plan(n, "slow", 0.0, 3, n % 2 == 0, APIS[n % 3], 0.0) for n in range(1000)]
        start = time.monotonic()
        socks = [(plan, begun(server.port, plan)) for plan in plans]
        found = Counter(ended(plan, sock) for plan, sock in socks)
        assert found == {"right": 1000}, found
        return f"{dict(found)} in {time.monotonic() - start:.1f} s, each 0.1 s and more upstream"


@check("more than may wait: the rest are told when to come again, and none is dropped")
def full() -> str:
    with before("--max-concurrent", "4", "--max-waiting", "20", "--quiet") as (_, server):
        plans = [Plan(n, "slow", 0.0, 3, False, APIS[n % 3], 0.0) for n in range(200)]
        socks = [(plan, begun(server.port, plan)) for plan in plans]
        found: Counter[str] = Counter()
        for plan, sock in socks:
            answer = answers(received(sock)[0])[0]
            sock.close()
            found[judged(plan, answer.status, answer.body, answer.whole)] += 1
            if answer.status != 200:
                assert answer.status in ((429, 503) if plan.api != MESSAGES else (429, 529)), answer
                assert float(answer.headers.get("retry-after", "nan")) > 0, answer
        assert set(found) == {"right", "error"} and found["right"] >= 24, found
        return f"{dict(found)}"


@check("who vanishes while waiting is never asked for upstream, and its place is free")
def vanished_in_queue() -> str:
    with before("--max-concurrent", "1", "--max-waiting", "50", "--quiet") as (upstream, server):
        (sock,) = held_open(upstream, server.port, 1).values()
        plans = [Plan(n, "none", 0.0, 3, False, APIS[n % 3], 0.0) for n in range(50, 70)]
        waiting = [begun(server.port, plan) for plan in plans]
        time.sleep(0.5)
        for one in waiting:
            one.close()
        last = Plan(99, "none", 0.0, 3, False, CHAT, 0.0)
        stays = begun(server.port, last)
        time.sleep(0.5)
        sock.close()
        start = time.monotonic()
        assert ended(last, stays) == "right"
        seconds, seen = time.monotonic() - start, upstream.told("seen")
        assert seen == [1, 99], f"upstream saw {seen}"
        return f"20 vanished, the next answered {seconds * 1000:.0f} ms after the place was free"


# --- stopping -------------------------------------------------------------------------------------


@check("SIGTERM: running streams come to their end, idle connections close, nobody new is taken")
def drained() -> str:
    with before("--quiet", ends=True) as (_, server):
        plans = [Plan(n, "slow", 0.99, 20, n % 2 > 0, APIS[n % 3], 0.0) for n in range(1, 51)]
        socks = [(plan, begun(server.port, plan)) for plan in plans]
        idle = [connected(server.port) for _ in range(20)]
        for sock in idle[:10]:
            sock.sendall(HEALTH)
            assert sock.recv(1 << 16)
        time.sleep(0.2)
        start = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        found = Counter(ended(plan, sock) for plan, sock in socks)
        for sock in idle:
            sock.settimeout(5)
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
            sock.close()
        code, seconds = server.exit_code(10), time.monotonic() - start
        assert found == {"right": 50}, found
        assert code == 0, code
        return f"50 streams whole, exit code 0 after {seconds:.1f} s"


@check("while draining: nobody new is served, and health is not ready")
def refuses_new() -> str:
    with before("--quiet", ends=True) as (upstream, server):
        kept = connected(server.port)
        kept.sendall(HEALTH)
        assert kept.recv(1 << 16)
        open_ones = held_open(upstream, server.port, 3)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.5)
        try:
            raw, _ = exchanged(server.port, LAST)
            outcome = str(answers(raw)[0].status) if raw else "closed"
        except ConnectionRefusedError:
            outcome = "refused"
        assert outcome in ("refused", "closed", "503"), outcome
        os.kill(server.pid, signal.SIGTERM)
        server.exit_code(5)
        for sock in (*open_ones.values(), kept):
            sock.close()
        return f"a new connection is {outcome}"


@check("--drain-seconds over: each stream gets an error of its dialect, no end that looks regular")
def drain_over() -> str:
    with before("--quiet", "--drain-seconds", "1", ends=True) as (upstream, server):
        open_ones = held_open(upstream, server.port, 40)
        start = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        found = Counter()
        for plan, sock in open_ones.items():
            raw, _ = received(sock, silence=15)
            sock.close()
            regular = plan.api.end in raw or raw.endswith(b"\r\n0\r\n\r\n")
            right = plan.api.told in raw and not regular
            found["an error" if right else f"not told: {raw[-200:]!r}"] += 1
        code, seconds = server.exit_code(10), time.monotonic() - start
        all_of([text for text in found if text != "an error"])
        assert seconds < 4, f"{seconds:.1f} s"
        return f"40 told, exit code {code} after {seconds:.1f} s"


@check("a second SIGTERM ends it at once")
def twice() -> str:
    with before("--quiet", ends=True) as (upstream, server):
        open_ones = held_open(upstream, server.port, 5)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.3)
        start = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        code, seconds = server.exit_code(5), time.monotonic() - start
        for sock in open_ones.values():
            sock.close()
        assert seconds < 2, f"{seconds:.1f} s"
        return f"exit code {code} after {seconds:.2f} s"


# --- reloading ------------------------------------------------------------------------------------


def status_with(port: int, key: str) -> int:
    plan = Plan(7, "none", 0.0, 2, False, CHAT, 0.0)
    raw, _ = exchanged(port, post(plan.api.path, plan.body(), f"Authorization: Bearer {key}"))
    return answers(raw)[0].status


@check("SIGHUP: keys are read anew, and a running stream does not notice")
def reloaded() -> str:
    with tempfile.TemporaryDirectory(prefix="shim-keys-") as folder:
        path = os.path.join(folder, "keys")

        def write(text: str) -> None:
            with open(path, "w", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
                file.write(text)

        write("first-key-of-the-test\n")
        with before("--quiet", "--client-key-file", path) as (_, server):
            plan = Plan(1, "slow", 0.99, 20, True, CHAT, 0.0)
            sock = connected(server.port)
            key = "Authorization: Bearer first-key-of-the-test"
            sock.sendall(post(plan.api.path, plan.body(), key))
            time.sleep(0.1)
            write("second-key-of-the-test\n")
            os.kill(server.pid, signal.SIGHUP)
            until("the new key", lambda: status_with(server.port, "second-key-of-the-test") == 200)
            assert status_with(server.port, "first-key-of-the-test") == 401
            assert ended(plan, sock) == "right"
    return "the new key is taken, the old one is not, the stream is whole"


# --- what is no HTTP ------------------------------------------------------------------------------


@check("bytes of TLS, HTTP/2, SSH and empty lines are closed at once, and the log says what came")
def other_protocols() -> str:
    firsts = {
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
        "SSH": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "lines": b"\n" * 1000,
    }
    with shim("--upstream", "echo") as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        came = dict(zip(firsts, pool.map(lambda raw: exchanged(server.port, raw), firsts.values())))
        lines = [line for line in server.log_lines() if not line.startswith("GET /health")]
        all_of([f"{name} is left open" for name, (_, closed) in came.items() if not closed])
        assert len(lines) < 30, lines
        told = {name: answers(raw)[0].status if raw else 0 for name, (raw, _) in came.items()}
    return f"{told}; {len(lines)} lines in the log"


if __name__ == "__main__":
    sys.exit(run("life"))
