"""Chaos: 64 clients through the shim to an upstream that fails in every way it can.

    python check_chaos.py [--long] [--seed N]

For 20 seconds and until 10,000 requests (--long: 100,000). Each request carries the fault that
upstream is to commit, picked at random; each answer must be complete and right, or an explicit
error. Some clients vanish, while they wait or in the middle of a stream. Afterwards the shim must
hold what it held before. Standard library only; the seed is printed.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Optional

from faults import (
    APIS,
    CHAT,
    FAULTS,
    MESSAGES,
    SILENCE,
    Client,
    Gone,
    Plan,
    Upstream,
    answer,
    failing_upstream,
    judged,
)
from wire import LONG, SEED, Shim, back_to, check, connected, held, post, run, shim

CLIENTS, SECONDS, REQUESTS = 64, 20, 100_000 if LONG else 10_000


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
        streamed, api = chance.random() < 0.6, chance.choice(APIS)
        words = chance.randint(1, 30)
        return Plan(number, fault, chance.random(), words, streamed, api, vanish)

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


def let_go(upstream: Upstream, server: Shim) -> None:
    """Ends idle connections to upstream: that they are closed is noticed by the next request."""
    upstream.told("close")
    time.sleep(0.2)
    calm, client = Plan(0, "none", 0.0, 3, True, CHAT, 0.0), Client(server.port)
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
    """The same answer, cut before each of its bytes, in all dialects, streamed and not."""
    for streamed, api in itertools.product((True, False), APIS):
        plan = Plan(1, "cut", 0.0, 3, streamed, api, 0.0)
        size = len(answer(plan, streamed or api != MESSAGES))  # to translate, a stream is asked for
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
    phases = list(itertools.product((True, False), APIS, range(10)))
    gone: dict[int, float] = {}
    with failing_upstream() as upstream, shim_before(upstream, "--retries", "0") as server:
        for number, (streamed, api, phase) in enumerate(phases * (10 if LONG else 2), 1):
            plan = Plan(number, "hold", phase / 10, 5, streamed, api, 0.0)
            client = Client(server.port)
            client.sock = connected(server.port)
            client.sock.sendall(post(api.path, plan.body()))
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
