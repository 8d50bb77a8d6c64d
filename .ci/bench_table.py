"""What .ci/bench compares: rows, targets, accepted ratios, and how they are printed.

A ratio is taken within a round; the median over the rounds is what a target is compared with.

A row got worse when even the best of its rounds is worse than the accepted ratio by more than the
row's allowance (10 %), and that against every side it has an accepted ratio to. So the noise is
what this run shows: the wider the rounds spread, the nearer their best is to what it was. And a
base that had a good day makes nothing of ours worse.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

Rounds = Sequence[dict]  # each {side: {load: sample}}
Figures = list  # of Optional[float], one a round
TOO_SLOW = {"too slow": True}  # the sample of one that could not keep up: its figure is infinite


class Target(NamedTuple):
    """What a ratio (a figure, where there is no base) must reach, and where that is asked."""

    limit: float
    base: str
    asked: str


@dataclass(frozen=True)
class Row:
    """A figure from a round's samples, and what is asked of it."""

    label: str
    load: str
    value: Callable[[dict, dict], float]  # (sample, the upstream's own sample)
    more_is_better: bool = False
    targets: Sequence[Target] = ()
    allowance: Optional[float] = 0.1  # None: not compared with what was accepted


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    side: str  # whose ratios
    bases: Sequence[str]  # to whom
    rows: Sequence[Row]


def rate(of: str) -> Callable:
    return lambda sample, upstream: sample[of + "_per_s"]


def added_ms(of: str) -> Callable:
    return lambda sample, upstream: (sample[of] - upstream[of]) / 1e3


def ms(of: str) -> Callable:
    return lambda sample, upstream: sample[of] / 1e3


def cpu_us_per(of: str) -> Callable:  # us each are ms a thousand, too
    return lambda sample, upstream: sample["cpu"] / sample[of] * 1e6


def mib(sample: dict, upstream: dict) -> float:
    return sample["resident"] / 2**20


def kib_a_stream(sample: dict, upstream: dict) -> float:
    return (sample["resident"] - sample["idle"]) / sample["connects"] / 2**10


# Targets "6.N" are the rows of the last table in speed.md, "2" those of issue 2. Where one names a
# gateway that is not in the run, it is said by one that is, by their columns of the first table
# there: the FastAPI shim is Python as the naive one is, so by that (added ms 2.65 / 2.99); the Go
# handler parses bodies as the naive one does and nginx does not, so for a body by that as well
# (added ms 13.3 / 17); but what it streams a second as a compiled program by nginx (44,783 /
# 2,313,508 and 45,085 / 1,801,538), whose figures hang least on threads.
FASTAPI = 2.65 / 2.99
GO_BODY = 13.3 / 17
GO_EVENTS, GO_EVENTS_32 = 44_783 / 2_313_508, 45_085 / 1_801_538

MEMORY = Row("resident idle, MiB", "start", mib, targets=[Target(30, "", "6.8")])
MAIN = (
    Row("added latency p50, ms", "requests 1", added_ms("p50_us"), targets=[
        Target(4, "nginx", "6.1"),
        Target(FASTAPI / 8, "naive", "6.1, 1/8 of the FastAPI shim"),
        Target(0.5, "naive", "2"),
    ]),
    Row("added time to first token p50, ms", "first 1", added_ms("first_p50_us"), targets=[
        Target(4, "nginx", "6.2"),
    ]),
    Row("requests/s, 1 connection", "requests 1", rate("requests"), True, [
        Target(2.5, "naive", "2"),
    ]),
    Row("requests/s, 32 connections", "requests 32", rate("requests"), True, [
        Target(0.2, "nginx", "6.3"), Target(5, "naive", "6.3"), Target(2.5, "naive", "2"),
    ]),
    Row("CPU us a request, 1 connection", "requests 1", cpu_us_per("requests")),
    Row("CPU us a request, 32 connections", "requests 32", cpu_us_per("requests")),
    Row("events/s, 1 stream", "stream 1", rate("events"), True, [
        Target(0.15, "nginx", "6.4"), Target(10, "naive", "6.4, 2"),
        Target(5 * GO_EVENTS, "nginx", "6.4, 5x the Go handler"),
    ]),
    Row("events/s, 32 streams", "stream 32", rate("events"), True, [
        Target(0.15, "nginx", "6.4"), Target(10, "naive", "6.4, 2"),
        Target(5 * GO_EVENTS_32, "nginx", "6.4, 5x the Go handler"),
    ]),
    Row("CPU us an event, 1 stream", "stream 1", cpu_us_per("events")),
    Row("CPU us an event, 32 streams", "stream 32", cpu_us_per("events")),
    Row("CPU ms/1,000 tokens, 300 at 20 ms", "300 at 20 ms", cpu_us_per("events_in_time"), targets=[
        Target(1.9, "nginx", "6.7"),
    ]),
    # No p99 is compared with what was accepted: on a shared machine it is the machine's, and that
    # of the same nginx was 1.4, 9.5 and 21 ms within a day.
    Row("token delay p99, ms, 300 at 20 ms", "300 at 20 ms", ms("delay_p99_us"), allowance=None),
    Row("added token delay p99, ms", "300 at 20 ms", added_ms("delay_p99_us"), targets=[
        Target(5, "", "6.5"),
    ], allowance=None),
    Row("token delay p99, ms, 1,000 at 50 ms", "1000 at 50 ms", ms("delay_p99_us"), targets=[
        Target(5, "", "6.6"),
    ], allowance=None),
    Row("token delay p99, ms, 600 at 20 ms", "600 at 20 ms", ms("delay_p99_us"), targets=[
        Target(10, "", "6.6"),
    ], allowance=None),
    MEMORY,
    Row("KiB a stream, 1,000 streams", "1000 at 50 ms", kib_a_stream, targets=[
        Target(40, "", "6.8"),
    ]),
    Row("added ms, 1 MB of text", "1 MB", added_ms("p50_us"), targets=[
        Target(GO_BODY, "naive", "6.10, the Go handler"),
    ]),
    Row("added ms, 10 MB of images", "10 MB", added_ms("p50_us"), targets=[
        Target(5, "nginx", "6.10"),
    ]),
    Row("added ms, 100 tools", "100 tools", added_ms("p50_us")),
    Row("added ms, 500 tools", "500 tools", added_ms("p50_us")),
)  # fmt: skip
START = (
    Row("start-up to first answer, ms", "start", lambda s, _: s["seconds"] * 1e3, targets=[
        Target(1.5, "bare", "6.9"),
    ]),
)  # fmt: skip
RESPONSES = (
    Row("Responses/s, 1 connection", "requests 1", rate("requests"), True),
    Row("Responses/s, 32 connections", "requests 32", rate("requests"), True),
    Row("added time to first token p50, ms", "first 1", added_ms("first_p50_us")),
    Row("events/s, 1 stream", "stream 1", rate("events"), True),
    Row("events/s, 32 streams", "stream 32", rate("events"), True),
    Row("CPU us each, 1 connection", "requests 1", cpu_us_per("requests")),
    Row("CPU us each, 32 connections", "requests 32", cpu_us_per("requests")),
    Row("CPU us an event, 1 stream", "stream 1", cpu_us_per("events"), targets=[
        Target(1.5, "ours", "3"),
    ]),
    Row("CPU us an event, 32 streams", "stream 32", cpu_us_per("events"), targets=[
        Target(1.5, "ours", "3"),
    ]),
)  # fmt: skip
WORKERS = (
    Row("requests/s, 32 connections", "requests 32", rate("requests"), True, [
        Target(1.7, "1 worker", "6.11"),
    ]),
    Row("events/s, 32 streams", "stream 32", rate("events"), True, [
        Target(1.7, "1 worker", "6.11"),
    ]),
)  # fmt: skip
# What is compared with another of ours has nginx for a base, too: what the other gained makes it no
# worse.
TABLES = (
    Table("chat", ("upstream", "nginx", "naive", "ours"), "ours", ("nginx", "naive"),
          MAIN),
    Table("start", ("bare", "nginx", "naive", "ours"), "ours", ("bare", "naive"), START),
    Table("start, cached", ("bare", "ours", "ours -m"), "ours -m", ("bare", "ours"),
          (*START, MEMORY)),
    Table("workers", ("nginx", "1 worker", "2 workers"), "2 workers", ("1 worker", "nginx"),
          WORKERS),
    Table("Responses", ("nginx", "ours", "Responses"), "Responses", ("ours", "nginx"), RESPONSES),
)  # fmt: skip

PEERS = (
    Row("added latency p50, ms", "requests 1", added_ms("p50_us")),
    Row("added time to first token p50, ms", "first 1", added_ms("first_p50_us")),
    Row("requests/s, 1 connection", "requests 1", rate("requests"), True),
    Row("requests/s, 32 connections", "requests 32", rate("requests"), True),
    Row("CPU us a request, 32 connections", "requests 32", cpu_us_per("requests")),
    Row("events/s, 1 stream (of 800)", "stream 1", rate("events"), True),
    Row("events/s, 32 streams (of 50)", "stream 32", rate("events"), True),
    Row("resident idle, MiB", "start", mib),
    Row("start-up to first answer, ms", "start", lambda s, _: s["seconds"] * 1e3),
)
PEERS_TABLE = Table("peers", ("naive", "Portkey", "LiteLLM", "ours"), "ours",
                    ("Portkey", "LiteLLM"), PEERS)  # fmt: skip


# ---- figures -------------------------------------------------------------------------------------


def figures(row: Row, rounds: Rounds, side: str) -> Figures:
    """The side's figure in each round; None where it was not measured."""
    return [figure(row, each.get(side, {}), each.get("upstream", {})) for each in rounds]


def figure(row: Row, samples: dict, upstream: dict) -> Optional[float]:
    sample = samples.get(row.load)
    if sample is None:
        return None
    return math.inf if sample == TOO_SLOW else row.value(sample, upstream.get(row.load, {}))


def ratios(row: Row, rounds: Rounds, side: str, base: str) -> Figures:
    """To the base's figure of the same round; None where there is none, or noise hides it."""
    pairs = zip(figures(row, rounds, side), figures(row, rounds, base))
    return [o / b if o is not None and b and 0 < b < math.inf else None for o, b in pairs]


def known(values: Figures) -> list[float]:
    return [value for value in values if value is not None]


# ---- judgement -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    label: str
    target: Target
    more_is_better: bool
    values: Sequence[float]

    @property
    def met(self) -> Optional[bool]:
        """None when it was not measured."""
        if not self.values:
            return None
        value = statistics.median(self.values)
        return value >= self.target.limit if self.more_is_better else value <= self.target.limit


def verdicts(tables: Sequence[Table], rounds: Rounds) -> list[Verdict]:
    found = []
    for table in tables:
        for row in table.rows:
            for target in row.targets:
                if target.base:
                    values = ratios(row, rounds, table.side, target.base)
                else:
                    values = figures(row, rounds, table.side)
                label = f"{table.title}: {row.label}"
                found.append(Verdict(label, target, row.more_is_better, known(values)))
    return found


def guarded(tables: Sequence[Table], rounds: Rounds) -> Iterator[tuple[Row, str, dict]]:
    """What is compared with accepted ratios: (row, its name, {base: the ratios of the rounds})."""
    for table in tables:
        for row in table.rows:
            if row.allowance is not None:
                seen = {base: known(ratios(row, rounds, table.side, base)) for base in table.bases}
                measured = {base: values for base, values in seen.items() if values}
                yield row, f"{table.title}: {row.label}", measured


def medians(tables: Sequence[Table], rounds: Rounds) -> dict[str, float]:
    """Label -> ratio, rounded to three digits: what --accept writes."""
    return {
        f"{name} / {base}": float(f"{statistics.median(values):.3g}")
        for _, name, seen in guarded(tables, rounds)
        for base, values in seen.items()
        if statistics.median(values) < math.inf
    }


def fell(row: Row, values: Sequence[float], accepted: float) -> bool:
    """Whether even the best round is worse than what was accepted, beyond the allowance."""
    assert row.allowance is not None
    if row.more_is_better:
        return max(values) < accepted / (1 + row.allowance)
    return min(values) > max(accepted, 0) * (1 + row.allowance)


def worse(tables: Sequence[Table], rounds: Rounds, accepted: dict[str, float]) -> list[str]:
    """A line for each ratio of each row that got worse than accepted."""
    lines = []
    for row, name, seen in guarded(tables, rounds):
        known_bases = [base for base in seen if f"{name} / {base}" in accepted]
        limits = {base: accepted[f"{name} / {base}"] for base in known_bases}
        if limits and all(fell(row, seen[base], limit) for base, limit in limits.items()):
            lines += [
                f"{name} / {base}: {with_spread(seen[base])}, accepted {number(limit)}"
                for base, limit in limits.items()
            ]
    return lines


# ---- print ---------------------------------------------------------------------------------------


def number(value: float) -> str:
    if math.isinf(value):
        return "too slow"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (size > 1e3 and abs(value) >= size):
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def cell(values: Sequence[float]) -> str:
    return with_spread(values) if any(values) else "-"  # what the upstream adds to itself


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join(
            [label.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))]
        ).rstrip()
        for label, *cells in lines
    ]


def table_lines(table: Table, rounds: Rounds) -> list[str]:
    """The table, empty where nobody was measured."""
    columns = [
        side for side in table.columns if any(known(figures(r, rounds, side)) for r in table.rows)
    ]
    bases = [base for base in table.bases if base in columns]
    if table.side not in columns:
        return []
    lines = [[table.title, *columns, *(f"{table.side} / {base}" for base in bases)]]
    for row in table.rows:
        cells = [cell(known(figures(row, rounds, side))) for side in columns]
        cells += [with_spread(known(ratios(row, rounds, table.side, base))) for base in bases]
        lines.append([row.label, *cells])
    return aligned(lines)


def verdict_lines(found: Sequence[Verdict]) -> list[str]:
    lines = [["target", "asked in", "asked", "seen", ""]]
    words = {True: "met", False: "MISSED", None: "NOT MEASURED"}
    for verdict in found:
        sign = ">=" if verdict.more_is_better else "<="
        base = f" x {verdict.target.base}" if verdict.target.base else ""
        asked = f"{sign} {number(verdict.target.limit)}{base}"
        seen = with_spread(verdict.values)
        lines.append([verdict.label, verdict.target.asked, asked, seen, words[verdict.met]])
    return aligned(lines)


def ceiling(sample: Any) -> float:
    """How much faster a second worker can be where it has only what upstream and load leave it."""
    return 2 * sample["cpu_of_run"] / (sample["cpu_of_run"] + sample["cpu_of_others"])
