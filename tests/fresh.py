"""Processes of their own that begin with torch imported and nothing of Hugging Face or of this package.

    done = run("import datasets, sys; print(sys.argv[1:])", "a", env={**os.environ, "HF_HOME": "…"})
    first, second = ranks(2, "edc_hub.sweep", "digits", env=…)  # a module; as torchrun starts them
    asked = start("print(input())", env=…, talks=True)  # asked.stdin, asked.stdout

Importing torch and the like takes longer than most of what tests do in such a process. So one server a test worker
imports it, and each process is forked from that server: with its own environment, working folder, standard streams and
end. What reads its settings when it is imported (huggingface_hub, datasets, transformers, edc_hub) is imported there
anew; but for edc_hub, that too is there for processes whose settings are the worker's own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path


SHARED = """
import gc
gc.disable()
import fsspec, jinja2.sandbox, matplotlib.figure, numpy, pandas, PIL.Image, pyarrow.dataset, pyarrow.parquet, pydantic
import scipy.stats, sklearn.cluster, sklearn.datasets, torch, torch._dynamo, torchvision, yaml
"""
OURS = "import accelerate, datasets, timm, transformers"
SERVER = """
import contextlib, gc, json, os, runpy, signal, sys

gc.freeze()  # a process's end looked through all that was imported here, for two seconds
gc.enable()
running = set()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' end ends the input
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        running.remove(asked["wait"])
    elif child := os.fork():
        print(child, flush=True)
        running.add(child)
    else:
        break
else:
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)

# in the child
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["env"])
for stream, place in enumerate((asked["in"], asked["out"], asked["err"])):
    os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND if stream else os.O_RDONLY), stream)
sys.path.insert(0, "")
if asked["module"]:
    sys.argv = [asked["code"], *asked["arguments"]]
    runpy.run_module(asked["code"], run_name="__main__", alter_sys=True)
else:
    sys.argv = ["-c", *asked["arguments"]]
    exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a module ends as it does for a user; code has said all, and a whole end takes a second
"""


def _settings(env: dict) -> dict:
    return {key: value for key, value in env.items() if key.startswith("HF_")}


OWN = _settings(os.environ)
KEPT = {**{key: value for key, value in os.environ.items() if key not in OWN}, "OMP_NUM_THREADS": "1"}


@cache
def _server(ours: bool):
    """A server and its lock; the one with our settings is a process of the other."""
    if ours:
        return Started(OURS + SERVER, (), {**KEPT, **OWN}, None, False, True, ours=False), threading.Lock()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SHARED + SERVER], env=KEPT, **pipes), threading.Lock()


def _ask(ours: bool, **asked) -> int:
    server, lock = _server(ours)
    with lock:
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())


class Started:
    """A process that runs; `pid` is also its group. Where it talks, `stdin` and `stdout` lead to it."""

    def __init__(
        self, code: str, arguments: tuple, env: dict, cwd: str | Path | None, module: bool, talks: bool, ours: bool
    ):
        self._folder, self._ours = Path(tempfile.mkdtemp(prefix="edc-hub-tests-")), ours
        self.code, place = code, {name: str(self._folder / name) for name in ("in", "out", "err")}
        for name in place:
            os.mkfifo(place[name]) if talks and name != "err" else Path(place[name]).touch()
        asked = {"code": code, "module": module, "arguments": [str(word) for word in arguments], "env": env}
        self.pid = _ask(ours, **asked, **place, cwd=str(cwd or os.getcwd()))
        if talks:
            self.stdin, self.stdout = open(place["in"], "w"), open(place["out"])

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """Its status and what it said, to us but for what was read of `stdout`; killed after so many seconds."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        try:
            status = _ask(self._ours, wait=self.pid)
        finally:
            late.cancel()
        out = self.stdout.read() if hasattr(self, "stdout") else (self._folder / "out").read_text(encoding="utf-8")
        said = [out, (self._folder / "err").read_text(encoding="utf-8")]
        shutil.rmtree(self._folder)
        return subprocess.CompletedProcess(self.code, status, *said)


def start(
    code: str, *arguments, env: dict, cwd: str | Path | None = None, module: bool = False, talks: bool = False
) -> Started:
    """Starts Python code, or a module as with `-m`."""
    return Started(code, arguments, env, cwd, module, talks, ours=_settings(env) == OWN)


def run(code: str, *arguments, env: dict, cwd: str | Path | None = None, module: bool = False, timeout: float = 300):
    """Runs Python code, or a module, to its end; text of both outputs."""
    return start(code, *arguments, env=env, cwd=cwd, module=module).wait(timeout)


def ranks(count: int, code: str, *arguments, env: dict, module: bool = True, timeout: float = 300) -> list:
    """Runs a module, or code, in so many processes of one group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    envs = [{**env, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [start(code, *arguments, env=one, module=module) for one in envs]
    return [one.wait(timeout) for one in started]
