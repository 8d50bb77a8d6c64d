"""The gateways that `.ci/bench --peers` measures beside ours: how they are installed and started.

Each is installed once, into a folder of its own in ~/.cache/claude-shim-bench; to have a newer one,
or to be rid of them, remove that. One that cannot be had here is noted, and not measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench_servers import Bench, Kind, WrongAnswer

CACHE = Path.home() / ".cache" / "claude-shim-bench"
PEERS = ("Portkey", "LiteLLM")
# Portkey fails at every stream with what npm takes for the second today ("TypeError: immutable").
PORTKEY = {
    "dependencies": {"@portkey-ai/gateway": "1.15.2"},
    "overrides": {"@hono/node-server": "1.13.8"},
}
LITELLM = """\
model_list:
  - model_name: claude-sonnet-5-5
    litellm_params:
      model: anthropic/claude-sonnet-5-5
      api_base: {upstream}
      api_key: sk-ant-api03-bench
"""


def run(*command: object) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WrongAnswer(f"cannot be installed: {error}") from None
    if done.returncode:
        raise WrongAnswer(f"cannot be installed: {' '.join(done.stderr.split())[-300:]}")


def litellm(folder: Path) -> None:
    python = folder / "bin" / "python"
    if shutil.which("uv"):
        run("uv", "venv", "-q", "--python", sys.executable, folder)
        run("uv", "pip", "install", "-q", "--python", python, "litellm[proxy]")
    else:
        run(sys.executable, "-m", "venv", folder)
        run(python, "-m", "pip", "install", "-q", "litellm[proxy]")


def portkey(folder: Path) -> None:
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps(PORTKEY))
    run("npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", folder)


def installed(name: str, install: Callable[[Path], None]) -> Path:
    """The folder that it is in; put there only when the installation was complete."""
    place = CACHE / name
    if not (place / "complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        install(place)
        (place / "complete").touch()
    return place


def portkey_kind(bench: Bench) -> Kind:
    place = installed("portkey", portkey) / "node_modules/@portkey-ai/gateway/build"
    node = shutil.which("node")
    command = [node, place / "start-server.js", "--headless"]
    core, host = (bench.gateway_core,), f"x-portkey-custom-host: {bench.upstream_url}/v1"
    headers = ("x-portkey-provider: anthropic", host)
    return Kind(
        "Portkey", lambda port: [*command, f"--port={port}"], "chat", core, bench.env, headers
    )


def litellm_kind(bench: Bench) -> Kind:
    place = installed("litellm", litellm)
    config = bench.folder / "litellm.yaml"
    config.write_text(LITELLM.format(upstream=bench.upstream_url))
    command = [place / "bin" / "litellm", "--config", config, "--num_workers", 1]
    command += ["--host", "127.0.0.1", "--port"]
    env = {
        **bench.env,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing fetched
        "LITELLM_MASTER_KEY": "sk-bench",  # it refuses to start without one, or with a weak one
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    return Kind("LiteLLM", lambda port: [*command, port], "chat", (bench.gateway_core,), env)


def kinds(bench: Bench, allowing: Callable) -> dict[str, Kind]:
    """Those that can be had here, by name; `allowing` notes why one cannot."""
    found = {}
    for name, kind in zip(PEERS, (portkey_kind, litellm_kind)):
        with allowing(name):
            found[name] = kind(bench)
    return found
