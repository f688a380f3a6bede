"""How `hub.Hub` answers over HTTP: bodies, errors as the Hub words them, who may do what, and faults."""

import hashlib
import json
import re
import socket
import sys
import traceback
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".parquet", ".safetensors", ".arrow", ".bin", ".npy", ".png", ".webp", ".jpg", ".zip")
LARGE_SIZE = 10_000_000  # bytes, from here on every file is kept as LFS


def large(path: str, size: int) -> bool:
    """Whether a file is kept as LFS."""
    return size > 0 and (path.endswith(LARGE) or size >= LARGE_SIZE)


def git_oid(data: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Request(NamedTuple):
    """One answered request; the path with its query; status 0 where the connection was closed instead."""

    method: str
    path: str
    status: int


class Answer(Exception):
    """What is sent back: (status, body, headers); a body that is no bytes goes as JSON."""

    def __init__(self, status: int = 200, body=None, headers: dict | None = None):
        self.status, self.headers = status, dict(headers or {})
        if not isinstance(body, bytes):
            self.headers.setdefault("Content-Type", "application/json")
            body = json.dumps({} if body is None else body).encode()
        self.body = body


def error(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """An error as the Hub words it: the client reads the headers, people the body."""
    named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return Answer(status, {"error": message}, {**named, **headers})


FAULTS = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you do not have the rights to do this",
    409: "Conflict: this exists already",
    412: "A commit has happened since. Please refresh and try again.",
    429: "Too many requests",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
    503: "Service Unavailable",
}


class Call:
    """A request that came in: `hub`, `account` (None: anonymous), `repo` (where the route is about one), `json`."""

    def __init__(self, hub, path: str, headers, body: bytes):
        split = urlsplit(path)
        self.hub, self.path, self.headers, self.body, self.repo = hub, split.path, headers, body, None
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        token = re.sub("^[Bb]earer ", "", headers.get("Authorization", ""))
        self.account = hub.accounts.get(token)
        if token and self.account is None:
            raise error(401, FAULTS[401])

    @property
    def json(self):
        return json.loads(self.body or b"{}")

    def mine(self, namespace: str) -> bool:
        """Whether the account belongs to a namespace."""
        user = self.account and self.account.user
        return user is not None and (namespace == user or (user == "tester" and namespace in self.hub.orgs))

    def writable(self, namespace: str) -> None:
        if self.account is None:
            raise error(401, "Invalid username or password.")
        allowed = self.account.role == "write" or "repo.write" in self.account.scopes.get(namespace, [])
        if not allowed:
            raise error(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.mine(namespace):
            raise error(403, f'You don\'t have the rights to create or change a repository under "{namespace}"')

    def open(self, types: str, id: str, access: str) -> None:
        """Finds `self.repo`; to who may not see it, it is not there."""
        self.repo = self.hub.repos.get(f"{types.rstrip('/') or 'models'}/{unquote(id)}")
        namespace = id.split("/")[0]
        if self.repo is None or (self.repo.private and not self.mine(namespace)):
            if self.account is None:  # the client knows this error without its code over https alone
                raise error(401, "Invalid username or password.", "RepoNotFound")
            raise error(404, "Repository not found", "RepoNotFound")
        if access == "write":
            self.writable(namespace)

    def commit(self, revision: str):
        """The commit that a revision stands for, still quoted as in the path."""
        found = self.repo.find(unquote(revision))
        if found is None:
            raise error(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return found


class _Closed(Exception):
    """The connection is closed on purpose."""


def handler(hub, routes: list[tuple]) -> type[BaseHTTPRequestHandler]:
    """The class that serves one connection to `hub`; `routes` are (method, path, access, function)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def serve(self):
            rules = hub.rules(self.command, self.path)
            has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
            cut = next((rule.value for rule in rules if rule.kind == "cut"), None)
            try:
                body = self.read(cut if has_body else None)
                answer = self.answer(rules, body)
                if any(rule.kind == "lose" for rule in rules):
                    raise _Closed
                self.send(answer, cut)
            except _Closed:
                self.drop()
            else:
                hub.log.append(Request(self.command, self.path, answer.status))

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

        def drop(self):
            """Closes the connection as a broken network would."""
            hub.log.append(Request(self.command, self.path, 0))
            self.close_connection = True
            try:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster

        def read(self, cut: int | None) -> bytes:
            """The body; with `cut`, that many bytes of it before the connection is closed."""
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length if cut is None else min(cut, length))
                if cut is not None:
                    raise _Closed
                if len(body) < length:
                    raise _Closed  # the client is gone
                return body
            body = b""
            while (size := int(self.rfile.readline().split(b";")[0] or b"0", 16)) and (cut is None or len(body) < cut):
                body += self.rfile.read(size)
                self.rfile.readline()
            if cut is not None:
                raise _Closed
            self.rfile.readline()
            return body

        def answer(self, rules: list, body: bytes) -> Answer:
            for rule in rules:
                if rule.kind == "when":
                    rule.value()
                elif rule.kind == "fail":
                    status, headers = rule.value
                    return error(status, FAULTS.get(status, "a fault"), None, **headers)
            method = "GET" if self.command == "HEAD" else self.command
            try:
                with hub.lock:
                    call = Call(hub, self.path, self.headers, body)
                    for asked, path, access, function in routes:
                        found = path.fullmatch(call.path) if asked == method else None
                        if found:
                            groups = found.groupdict()
                            if access:
                                call.open(groups.pop("types"), groups.pop("id"), access)
                            return Answer(200, function(call, **groups))
                return error(404, "Sorry, we can't find the page you are looking for.")
            except Answer as answer:
                return answer
            except Exception:
                print(traceback.format_exc(), file=sys.stderr)
                return error(500, "the test's Hub has a bug, see stderr")

        def send(self, answer: Answer, cut: int | None):
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body if cut is None else answer.body[:cut])
            if cut is not None:
                raise _Closed

        def log_message(self, *_):
            pass

    return Handler
