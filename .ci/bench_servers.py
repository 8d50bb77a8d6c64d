"""What .ci/bench starts, and what it sends there: servers, loads, samples."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = "claude-sonnet-5-5"
STARTS = 1000  # paced streams begun in a second

# What "Claude" answers, cut into deltas of about five tokens. It is Markdown with line ends, some
# quotes and a few characters beyond ASCII, since that is what makes or breaks a fast path.
PROSE = """\
A gateway takes a request in one dialect, says it again in another, and hands the answer back while
it is still being written. That sounds easy, and for a single client it is.

## What makes it slow

1. **A new connection for each request.** The handshake costs more than the translation does.
2. **Parsing what need not be parsed.** Most events carry a few words of text and nothing else, so
it is enough to find the words and put them into the other frame.
3. **A system call for each event.** A burst that came in one piece can go out in one piece.

Say a model writes 80 tokens a second and 600 people read along: then 48,000 tokens pass each
second — and none of them may wait for another. "Fast enough" means that nobody notices the gateway
at all, neither at the first word nor at the last.

```python
for burst in upstream:
    client.send(translate(burst))
```

Whoever sits in a café in Zürich on a slow line must not slow down the others either; what cannot
be sent now is kept until it can be, up to a limit, and then the reading stops too.
"""

# The least that can be started and answer: what start-up is compared with.
BARE = """\
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

# A pass-through as it is set up for event streams: one process, connections kept on both sides,
# nothing kept back in either direction.
NGINX = """\
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr error;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_max_body_size 0; client_body_buffer_size 1m;
    keepalive_requests 1000000000;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream claude {{
        server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://claude; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 300;
        }}
    }}
}}
"""


class CannotMeasure(Exception):
    """This machine lacks something that the bench needs."""


class WrongAnswer(Exception):
    """A server did not answer as it must."""


class TooSlow(WrongAnswer):
    """A server could not keep up with a pace."""


# ---- loads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One kind of traffic: so many connections, each asking for answers of so many deltas.

    `pace`: milliseconds between the deltas, each connection then asks once. `ask`: what else a
    request holds, by the name of its dialect.
    """

    name: str
    connections: int
    deltas: int
    stream: bool = False
    pace: int = 0
    ask: Callable[[str], dict] = lambda dialect: {}


@dataclass(frozen=True)
class Dialect:
    """How a server is asked, and the names that bench_load.c has for its answers."""

    name: str
    path: str
    whole: str
    streamed: str
    limit: str = "max_tokens"  # the field that says how many deltas are wanted


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("messages", "/v1/messages", "messages", "messages"),
        Dialect("chat", "/v1/chat/completions", "chat", "chunks"),
        Dialect("responses", "/v1/responses", "response", "events", "max_output_tokens"),
    )
}


def prompt(dialect: str, content: Any) -> dict:
    if dialect == "responses":  # not stored, as Codex asks: what chat completions do, too
        return {"input": content, "store": False}
    return {"messages": [{"role": "user", "content": content}]}


def long_text(dialect: str) -> dict:
    return prompt(dialect, PROSE * (2**20 // len(PROSE.encode())))


def images(dialect: str) -> dict:
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4096
    data = base64.b64encode(png[: 2**20 * 15 // 16]).decode()  # 8 of 1.25 MiB
    source = {"type": "base64", "media_type": "image/png", "data": data}
    part: dict = {"type": "image", "source": source}
    if dialect == "chat":
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
    return prompt(dialect, [{"type": "text", "text": "What is this?"}, *[part] * 8])


def tools(count: int) -> Callable[[str], dict]:
    kinds = {"path": "string", "lines": "integer", "exact": "boolean"}
    fields = {
        name: {"type": kind, "description": f"The {name} that is wanted."}
        for name, kind in kinds.items()
    }
    schema = {"type": "object", "properties": fields, "required": ["path"]}

    def ask(dialect: str) -> dict:
        named = [
            {"name": f"tool_{i}", "description": "Reads lines of a file and says what is in them."}
            for i in range(count)
        ]
        if dialect == "chat":
            each = [{"type": "function", "function": {**t, "parameters": schema}} for t in named]
        else:
            each = [{**t, "input_schema": schema} for t in named]
        return {"tools": each}

    return ask


def pieces(kind: str) -> list[str]:
    text = PROSE if kind == "prose" else re.sub(r"[^A-Za-z0-9.,: ]+", " ", PROSE)
    return re.findall(r"(?:\s*\S+){1,4}\s*?", text)


# ---- processes -----------------------------------------------------------------------------------


def family(pid: int) -> Iterator[int]:
    """A process and its living descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children (workers), ended threads included.

    The clock is the one that clock_getcpuclockid(3) names: exact, where /proc/PID/stat has ticks.
    """
    total = 0.0
    for each in family(pid):
        with contextlib.suppress(OSError):
            total += time.clock_gettime(~each << 3 | 2)
    return total


def resident_bytes(pid: int) -> int:
    total = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{each}/status").read_text()
            total += int(re.search(r"VmRSS:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    return total


def core_seconds(core: int) -> tuple[float, float]:
    """(busy, stolen by other machines) of one core since boot."""
    stat = Path("/proc/stat").read_text()
    line = re.search(rf"^cpu{core} (.*)$", stat, re.M)[1]  # type: ignore[index]
    user, nice, system, _, _, irq, soft, stolen, *_ = (int(ticks) for ticks in line.split())
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / tick, stolen / tick


def favour(pid: int) -> None:
    """Lets other work disturb a process less; only root may, others measure as it comes."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, -15)
        # Linux shares the processor between sessions first, where it groups them.
        Path(f"/proc/{pid}/autogroup").write_text("-15")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Kind:
    """A server to start: by what command, how it is asked, on which cores."""

    name: str
    command: Callable[[int], Sequence[object]]  # for a port
    dialect: str
    cores: Sequence[int]
    env: dict
    headers: Sequence[str] = ()


class Server:
    """A child process that has answered once; a context manager, killed with all its own.

    `started` is the sample of that: seconds until then, and the memory after it.
    """

    def __init__(self, kind: Kind, folder: Path, port: int):
        self.kind, self.name, self.port = kind, kind.name, port
        self.log = folder / f"{kind.name}.log"
        self.command = [str(word) for word in kind.command(port)]

    def __enter__(self) -> Server:
        with open(self.log, "wb") as log:
            began = time.monotonic()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.kind.env,
                start_new_session=True,
            )
        self.pid = self.process.pid
        os.sched_setaffinity(self.pid, self.kind.cores)
        favour(self.pid)
        try:
            self._ask_once(began + 90)
            seconds = time.monotonic() - began
            time.sleep(0.1)
            self.started = {"seconds": seconds, "resident": resident_bytes(self.pid)}
        except BaseException:
            self.__exit__()
            raise
        return self

    def _ask_once(self, give_up: float) -> None:
        dialect = DIALECTS[self.kind.dialect]
        fields = {"model": MODEL, dialect.limit: 16, **prompt(dialect.name, "hi")}
        headers = dict(line.split(": ", 1) for line in self.kind.headers)
        headers |= {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while True:
            try:
                connection.connect()
                break
            except ConnectionRefusedError:
                if self.process.poll() is not None or time.monotonic() > give_up:
                    raise WrongAnswer(f"{self.name} did not start\n{self.tail()}") from None
                time.sleep(0.001)
        try:
            connection.request("POST", dialect.path, json.dumps(fields), headers)
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise WrongAnswer(f"{self.name}: {error!r} at start\n{self.tail()}") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise WrongAnswer(f"{self.name}: {answer.status} {said!r} at start\n{self.tail()}")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


class Bench:
    """The tools, compiled, and what servers there are to start."""

    def __init__(self, options: Any, folder: str):
        self.options, self.folder = options, Path(folder)
        cores = sorted(os.sched_getaffinity(0))
        self.load_core, self.gateway_core = cores[0], cores[min(1, len(cores) - 1)]
        # Two workers and the one they are compared with have the same two cores, which they share
        # with upstream and load only where there are no more.
        self.worker_cores = cores[1:3] if len(cores) > 2 else cores
        self.spare = 10.0 if options.quick else 30.0  # seconds to take disturbed samples again
        os.sched_setaffinity(0, {self.load_core})
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if most != resource.RLIM_INFINITY and most < 4096:
            raise CannotMeasure(f"1,000 streams need 4,096 open files: ulimit -Hn is {most}")
        (self.folder / "home").mkdir()
        self.env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder / "home"),
            "ANTHROPIC_API_KEY": "sk-ant-api03-bench",
        }
        self.pieces = self.folder / "pieces"
        self.pieces.write_text(
            "".join(json.dumps(piece, ensure_ascii=False) + "\n" for piece in pieces(options.text))
        )
        self.load_tool = self._compile("bench_load.c")
        self.upstream_tool = self._compile("bench_upstream.c")
        self.upstream_port = free_port()
        self.upstream_url = f"http://127.0.0.1:{self.upstream_port}"
        self.kinds = {kind.name: kind for kind in self._kinds()}

    def _compile(self, source: str) -> Path:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if not compiler:
            raise CannotMeasure("no C compiler: apt-get install gcc libc6-dev")
        program = self.folder / Path(source).stem
        subprocess.run([compiler, "-O2", "-o", program, HERE / source], check=True)
        return program

    def _kinds(self) -> Iterator[Kind]:
        options = self.options
        bare = self.folder / "bare.py"
        bare.write_text(BARE)
        tool = [self.upstream_tool, self.pieces, options.burst]

        def translator(*script: object) -> Callable:
            command = [options.python, *script, "--base-url", self.upstream_url, "--port"]
            return lambda port: [*command, port]

        # As many streams at once as the bench opens: ours has a limit where the others have none.
        copy = shutil.copy(options.shim, self.folder / "claude_shim.py")  # it may be edited now
        shim = (copy, "--max-concurrent", "2048")
        one, both = {self.gateway_core}, self.worker_cores
        yield self.kind("upstream", lambda port: [tool[0], port, *tool[1:]], {self.load_core})
        yield self.kind("bare", lambda port: [options.python, bare, port], one)
        yield self.kind("naive", translator(options.naive), one, "chat")
        yield self.kind("ours", translator(*shim), one, "chat")
        yield self._cached(copy, translator("-m", "claude_shim"), one)
        yield self.kind("1 worker", translator(*shim), both, "chat")
        yield self.kind("2 workers", translator(*shim, "--workers", "2"), both, "chat")
        if options.nginx:
            yield self.kind("nginx", self._nginx, one)

    def _cached(self, shim: str, command: Callable, cores: Any) -> Kind:
        """Ours in the form that Python keeps, as an installed command starts it, too."""
        subprocess.run([self.options.python, "-m", "py_compile", shim], check=True)
        env = {**self.env, "PYTHONPATH": str(self.folder)}
        return Kind("ours -m", command, "chat", tuple(cores), env)

    def kind(self, name: str, command: Callable, cores: Any, dialect: str = "messages") -> Kind:
        return Kind(name, command, dialect, tuple(cores), self.env)

    def _nginx(self, port: int) -> list:
        place = self.folder / "nginx"
        place.mkdir(exist_ok=True)
        config = NGINX.format(port=port, upstream=self.upstream_port)
        (place / "nginx.conf").write_text(config)
        return [self.options.nginx, "-p", place, "-c", place / "nginx.conf", "-e", "stderr"]

    def start(self, name: str) -> Server:
        port = self.upstream_port if name == "upstream" else free_port()
        return Server(self.kinds[name], self.folder, port)

    def stop_paced(self) -> None:
        """Tells the upstream to let its paced streams end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=30)
        connection.request("GET", "/stop")
        connection.getresponse().read()
        connection.close()

    def body(self, dialect: Dialect, load: Load, deltas: int) -> Path:
        path = self.folder / f"body of {load.name} in {dialect.name}, {deltas}"
        if path.exists():
            return path
        stream = load.stream or dialect.whole == dialect.streamed
        fields = {"model": MODEL, "stream": stream, dialect.limit: deltas}
        said = f"hi pace={load.pace}" if load.pace else "hi"
        fields |= prompt(dialect.name, said) | load.ask(dialect.name)
        path.write_text(json.dumps(fields, ensure_ascii=False))
        return path

    def sample(self, server: Server, dialect: Dialect, load: Load, seconds: float) -> dict:
        """One run of one load: the tool's figures, and CPU time and memory of the server.

        `cpu` is that of all of the run, or for paced streams of the time that is measured;
        `resident` is that at its end, `idle` that after the start.
        """
        deltas = int((10 + seconds) * 1e3 / load.pace) if load.pace else load.deltas
        arguments = [
            server.port,
            dialect.path,
            dialect.streamed if load.stream else dialect.whole,
            self.pieces,
            self.body(dialect, load, deltas),
            deltas,
            load.connections,
            seconds,
            STARTS if load.pace else 0,
            *server.kind.headers,
        ]
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, at, resident = [cpu_seconds(server.pid)], [time.monotonic()], 0
        with subprocess.Popen(
            [str(word) for word in (self.load_tool, *arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as tool:
            assert tool.stdout and tool.stderr
            favour(tool.pid)
            for line in tool.stdout:
                cpu.append(cpu_seconds(server.pid))  # at "begin", at "end", and when all is done
                at.append(time.monotonic())
                if line == "end\n":
                    resident = resident_bytes(server.pid)
                    self.stop_paced()
            said = tool.stderr.read()
        if tool.returncode or server.process.poll() is not None:
            if load.pace:
                self.stop_paced()
            error = TooSlow if tool.returncode == 3 else WrongAnswer
            raise error(f"{server.name}, {dialect.path}, {load.name}: {said}{server.tail()}")
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            **json.loads(line),
            "cpu": (cpu[2] - cpu[1]) / (at[2] - at[1]) * seconds if load.pace else cpu[-1] - cpu[0],
            "cpu_of_run": cpu[-1] - cpu[0],
            "cpu_of_load": now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime,
            "resident": resident,
            "idle": server.started["resident"],
        }
