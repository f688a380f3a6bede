"""A Hub on this machine, for the real clients: models and datasets, commits, tags, large files, private repositories.

    with Hub() as hub:
        hub.fail("POST", r"/commit/", 500)  # the next commit is answered 500, the one after it is carried out
        done = python("from huggingface_hub import HfApi; ...", hub.url, tmp_path, hub.token)
        assert hub.files("org/toy", "v1.0.0")["README.md"] == b"..."

Faults: `fail`, `cut` (in mid-upload or mid-download), `lose` (carried out, but the answer never comes), `delay`, and
`when`, which calls a function of the test before a request is carried out. `times=math.inf` is for ever; the rules of
one request apply in the order they were made. `log` has what was asked, without tokens. Everything is in memory.
"""

import hashlib
import os
import re
import secrets
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import fresh
from hub_routes import ROUTES
from hub_server import Request, handler, large


class File(NamedTuple):
    sha256: str
    size: int
    large: bool  # LFS


@dataclass
class Commit:
    oid: str
    title: str
    message: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """Branches and tags are {name: oid of a commit}; every commit knows all its files."""

    id: str
    type: str  # "dataset" or "model"
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag, an oid or the first seven or more digits of one."""
        revision = re.sub("^refs/(heads|tags)/", "", revision)
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and len(revision) >= 7:
            oid = next((oid for oid in self.commits if oid.startswith(revision)), None)
        return self.commits.get(oid)

    def history(self, revision: str) -> list[Commit]:
        """The commits that led to a revision, the newest first."""
        found, oid = [], self.find(revision).oid
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.parents[oid]
        return found

    def add(self, branch: str, files: dict[str, File], title: str, message: str = "") -> Commit:
        """Puts a commit with these files, all there are, on top of a branch."""
        parent = self.branches.get(branch)
        oid = hashlib.sha1(repr((self.id, parent, sorted(files.items()), title, secrets.token_hex(8))).encode())
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        commit = Commit(oid.hexdigest(), title, message, date, dict(files))
        self.commits[commit.oid], self.parents[commit.oid] = commit, parent
        self.branches[branch] = commit.oid
        return commit


class Account(NamedTuple):
    """What a token stands for. `scopes` is {namespace: permissions} and only of role "fineGrained"."""

    user: str
    role: str  # "read", "write" or "fineGrained"
    scopes: dict[str, list[str]]


class Rule(NamedTuple):
    method: str | None
    path: re.Pattern
    kind: str  # "fail", "cut", "lose" or "when"
    value: object


class Hub:
    """The server, running from `with` to its end on a port of its own at 127.0.0.1.

    `token` may write as user "tester", who belongs to `orgs`; `read_token` is the same user's, for reading alone;
    `stranger_token` may write but is another user's, who belongs to no organisation.
    """

    def __init__(self, orgs: tuple[str, ...] = ("org",)):
        self.orgs = orgs
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, Repo] = {}  # "datasets/org/name" or "models/org/name"
        self.blobs: dict[str, bytes] = {}  # by sha256
        self.log: list[Request] = []
        self.lock = threading.RLock()
        self._rules: list[list] = []  # [Rule, how often it still applies]
        self.token = self.add_token("write")
        self.read_token = self.add_token("read")
        self.stranger_token = self.add_token("write", user="stranger")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self, ROUTES))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    # What is there

    def repo(self, repo: str, repo_type: str = "dataset") -> Repo:
        return self.repos[f"{repo_type}s/{repo}"]

    def files(self, repo: str, revision: str = "main", repo_type: str = "dataset") -> dict[str, bytes]:
        """{path: content} of a revision, without the `.gitattributes` that every repository is born with."""
        files = self.repo(repo, repo_type).find(revision).files
        return {path: self.blobs[file.sha256] for path, file in files.items() if path != ".gitattributes"}

    def tags(self, repo: str, repo_type: str = "dataset") -> dict[str, str]:
        """{tag: oid of its commit}"""
        return dict(self.repo(repo, repo_type).tags)

    def commits(self, repo: str, revision: str = "main", repo_type: str = "dataset") -> list[Commit]:
        """The newest first; the last is the one that a repository is born with."""
        return self.repo(repo, repo_type).history(revision)

    # What others do to it

    def add_token(self, role: str, user: str = "tester", scopes: dict[str, list[str]] | None = None) -> str:
        """A new token; `scopes` as {"org": ["repo.write"]} are for role "fineGrained"."""
        token = f"hf_{secrets.token_hex(17)}"
        self.accounts[token] = Account(user, role, scopes or {})
        return token

    def create(self, repo: str, private: bool = False, repo_type: str = "dataset") -> Repo:
        with self.lock:
            made = self.repos[f"{repo_type}s/{repo}"] = Repo(repo, repo_type, private)
            made.add("main", {".gitattributes": self.store(b"*.parquet filter=lfs\n", False)}, "initial commit")
            return made

    def commit(self, repo: str, files: dict[str, bytes | None], message="by hand", repo_type="dataset") -> str:
        """Commits to main past the network (None removes a file) and returns the oid; makes a missing repository."""
        with self.lock:
            found = self.repos.get(f"{repo_type}s/{repo}") or self.create(repo, repo_type=repo_type)
            all_files = dict(found.find("main").files)
            for path, data in files.items():
                if data is None:
                    del all_files[path]
                else:
                    all_files[path] = self.store(data, large(path, len(data)))
            return found.add("main", all_files, message).oid

    def store(self, data: bytes, is_large: bool) -> File:
        file = File(hashlib.sha256(data).hexdigest(), len(data), is_large)
        self.blobs[file.sha256] = data
        return file

    # Faults. Paths are searched for a regular expression, `method` None is any.

    def fail(self, method: str | None, path: str, status: int = 500, times: float = 1, headers: dict | None = None):
        """Answers `status` instead, e.g. 429 with headers={"Retry-After": "1"}; nothing is carried out."""
        self._rules.append([Rule(method, re.compile(path), "fail", (status, headers or {})), times])

    def cut(self, path: str, after: int = 0, times: float = 1, method: str | None = None):
        """Closes the connection once `after` bytes of the body came in, or went out where the request has none."""
        self._rules.append([Rule(method, re.compile(path), "cut", after), times])

    def lose(self, method: str | None, path: str, times: float = 1):
        """Carries the request out and closes the connection instead of answering."""
        self._rules.append([Rule(method, re.compile(path), "lose", None), times])

    def delay(self, method: str | None, path: str, seconds: float, times: float = 1):
        self.when(method, path, lambda: time.sleep(seconds), times)

    def when(self, method: str | None, path: str, do: Callable[[], object], times: float = 1):
        """Calls `do` (to kill the client, to commit meanwhile) once a request came in, before it is carried out."""
        self._rules.append([Rule(method, re.compile(path), "when", do), times])

    def clear(self):
        """Forgets the faults and the log."""
        with self.lock:
            self._rules.clear()
            self.log.clear()

    def rules(self, method: str, path: str) -> list[Rule]:
        """The rules that apply to a request now, each counted as used."""
        with self.lock:
            found = []
            for entry in self._rules:
                rule, times = entry
                if times >= 1 and rule.method in (None, method) and rule.path.search(path):
                    entry[1] -= 1
                    found.append(rule)
                    if rule.kind in ("fail", "cut", "lose"):
                        break
            return found


# Clients read their settings when they are imported: each runs in a process of its own


def environment(endpoint: str, home: str | Path, token: str | None = None, **variables: str) -> dict[str, str]:
    """The variables of a process that talks to this Hub, with caches of its own under `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
    return {
        **{key: value for key, value in kept.items() if not key.upper().endswith("_PROXY")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token or "",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def python(
    code: str, endpoint: str, home: str | Path, token: str | None = None, *arguments: str, **variables: str
) -> subprocess.CompletedProcess:
    """Runs Python code with `environment`, arguments in sys.argv[1:]; text of both outputs; 300 seconds at most."""
    return fresh.run(textwrap.dedent(code), *arguments, env=environment(endpoint, home, token, **variables))
