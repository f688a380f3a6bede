"""The protocol that `hub.Hub` speaks: what the real `huggingface_hub` and `datasets` ask for, and nothing else."""

import base64
import hashlib
import json
import re
from itertools import takewhile
from urllib.parse import parse_qs, unquote

import yaml
from hub_server import FAULTS, Answer, error, git_oid, large


REPO = r"/api/(?P<types>datasets|models)/(?P<id>[^/]+/[^/]+)"
FILE = r"/(?P<types>datasets/|)(?P<id>[^/]+/[^/]+)"
ROUTES = []


def route(method: str, path: str, access: str | None = None):
    """Registers a function of (call, *groups of `path`). `access` "read" or "write" looks the repository up first."""

    def keep(function):
        ROUTES.append((method, re.compile(path), access, function))
        return function

    return keep


def problems(text: str) -> list[str]:
    """What is wrong with the metadata of a README, as the Hub would answer to `validate-yaml`."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]

    def listed(key: str) -> list:
        value = data.get(key) or []
        return value if isinstance(value, list) else [value]

    wrong = []
    for key in ("pretty_name", "license_name", "license_link"):
        if not isinstance(data.get(key, ""), str):
            wrong.append(f'"{key}" must be a string')
    for key in ("tags", "task_categories", "size_categories", "source_datasets", "language", "configs"):
        if not isinstance(data.get(key, []), list | str):
            wrong.append(f'"{key}" must be an array')
    for name in listed("license"):
        if not re.fullmatch(
            r"(?:apache|mit|bsd|cc|gpl|lgpl|agpl|odc|odbl|pddl|other|unknown|openrail)[-\w.+]*", str(name)
        ):
            wrong.append(f'"license" must be one of those the Hub knows, not {name!r}')
    for size in listed("size_categories"):
        if size not in ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M"):
            wrong.append(f'"size_categories" must be one of n<1K, 1K<n<10K, ..., not {size!r}')
    seen = [entry.get("config_name") for entry in listed("configs") if isinstance(entry, dict)]
    if None in seen or len(set(seen)) < len(seen):
        wrong.append('"configs" must have a "config_name" each, and no two the same')
    return wrong


@route("GET", "/api/whoami-v2")
def whoami(call):
    if call.account is None:
        raise error(401, "Invalid username or password.")
    user, role, scopes = call.account
    token = {"displayName": "test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
    if role == "fineGrained":
        scoped = [
            {"entity": {"type": "user" if name == user else "org", "name": name}, "permissions": permissions}
            for name, permissions in scopes.items()
        ]
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in call.hub.orgs if call.mine(name)]
    auth = {"type": "access_token", "accessToken": token}
    return {"type": "user", "name": user, "fullname": user, "orgs": orgs, "auth": auth}


@route("POST", "/api/validate-yaml")
def validate_yaml(call):
    wrong = problems(call.json["content"])
    raise Answer(400 if wrong else 200, {"errors": [{"message": text} for text in wrong], "warnings": []})


@route("POST", "/api/repos/create")
def create_repo(call):
    asked = call.json
    namespace = asked.get("organization") or (call.account and call.account.user) or ""
    call.writable(namespace)
    id, kind = f"{namespace}/{asked['name']}", asked.get("type") or "model"
    url = f"{call.hub.url}/{'datasets/' if kind == 'dataset' else ''}{id}"
    if f"{kind}s/{id}" in call.hub.repos:
        raise Answer(409, {"error": f"You already created this {kind} repo: {id}", "url": url})
    call.hub.create(id, asked.get("private") is True or asked.get("visibility") == "private", kind)
    return {"url": url, "name": id}


@route("DELETE", "/api/repos/delete")
def delete_repo(call):
    namespace = call.json.get("organization") or (call.account and call.account.user) or ""
    call.open(f"{call.json.get('type') or 'model'}s", f"{namespace}/{call.json['name']}", "write")
    del call.hub.repos[f"{call.repo.type}s/{call.repo.id}"]


@route("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?", "read")
def info(call, revision):
    commit, repo = call.commit(revision or "main"), call.repo
    readme = call.hub.blobs[commit.files["README.md"].sha256].decode() if "README.md" in commit.files else ""
    found = re.match(r"---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if call.query.get("blobs"):
        siblings = [{"rfilename": path, **entry(call, commit, path)} for path in sorted(commit.files)]
    about = {"id": repo.id, "sha": commit.oid, "private": repo.private, "gated": False, "disabled": False}
    about |= {"author": repo.id.split("/")[0], "lastModified": commit.date, "createdAt": commit.date, "tags": []}
    return about | {"siblings": siblings, "cardData": yaml.safe_load(found[1]) if found else {}}


@route("GET", REPO + r"/auth-check(?P<write>/write)?", "read")
def auth_check(call, write):
    if write:
        call.writable(call.repo.id.split("/")[0])


@route("GET", REPO + "/refs", "read")
def refs(call):
    def listed(names: dict[str, str], kind: str) -> list[dict]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

    return {"branches": listed(call.repo.branches, "heads"), "tags": listed(call.repo.tags, "tags"), "converts": []}


@route("GET", REPO + "/commits/(?P<revision>[^/]+)", "read")
def commits(call, revision):
    found = call.repo.history(call.commit(revision).oid)
    author = [{"user": "tester"}]
    return [
        {"id": it.oid, "title": it.title, "message": it.message, "date": it.date, "authors": author} for it in found
    ]


def entry(call, commit, path: str) -> dict:
    """A file or a folder as trees list it."""
    if path not in commit.files:
        inside = repr([file for name, file in sorted(commit.files.items()) if name.startswith(f"{path}/")])
        about = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(inside.encode()).hexdigest()}
    else:
        file = commit.files[path]
        about = {"type": "file", "path": path, "size": file.size, "oid": git_oid(call.hub.blobs[file.sha256])}
        if file.large:
            about["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    if call.query.get("expand", "").lower() in ("true", "1") and path in commit.files:
        unchanged = takewhile(lambda it: it.files.get(path) == file, call.repo.history(commit.oid))
        last = list(unchanged)[-1]
        about["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return about


@route("GET", REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "read")
def tree(call, revision, folder):
    commit, prefix = call.commit(revision), f"{unquote(folder)}/" if folder else ""
    inside = [path for path in commit.files if path.startswith(prefix)]
    if prefix and not inside:
        raise error(404, f"{prefix} does not exist on {revision}", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
    names = {path for path in inside if "/" not in path[len(prefix) :]}
    for path in inside:
        parts = path[len(prefix) :].split("/")[:-1]
        names |= {prefix + "/".join(parts[: depth + 1]) for depth in range(len(parts))}
    if call.query.get("recursive", "").lower() in ("true", "1"):
        names |= set(inside)
    else:
        names = {name for name in names if "/" not in name[len(prefix) :]}
    return [entry(call, commit, name) for name in sorted(names)]


@route("POST", REPO + "/paths-info/(?P<revision>[^/]+)", "read")
def paths_info(call, revision):
    commit = call.commit(revision)
    is_json = "json" in call.headers.get("Content-Type", "")
    asked = call.json["paths"] if is_json else parse_qs(call.body.decode())["paths"]
    known = [path for path in asked if any(name == path or name.startswith(f"{path}/") for name in commit.files)]
    return [entry(call, commit, path) for path in known]


@route("POST", REPO + "/preupload/(?P<revision>[^/]+)", "write")
def preupload(call, revision):
    there, answer = call.commit(revision).files, []
    for asked in call.json["files"]:
        path, known = asked["path"], there.get(asked["path"])
        is_large = large(path, asked["size"])
        about = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        if known:
            about["oid"] = known.sha256 if known.large else git_oid(call.hub.blobs[known.sha256])
        answer.append(about)
    return {"files": answer}


@route("POST", FILE + r"\.git/info/lfs/objects/batch", "write")
def lfs_batch(call):
    answer, url = [], f"{call.hub.url}/lfs/{call.repo.type}s/{call.repo.id}"
    for asked in call.json["objects"]:
        if asked["oid"] not in call.hub.blobs:
            steps = {"upload": {"href": f"{url}/{asked['oid']}"}, "verify": {"href": f"{url}/verify"}}
            asked = {**asked, "actions": steps}
        answer.append(asked)
    return {"transfer": "basic", "objects": answer}


@route("PUT", "/lfs/[a-z]+/[^/]+/[^/]+/(?P<oid>[0-9a-f]{64})")  # a signed address: no token
def lfs_upload(call, oid):
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise error(400, "The content does not have the sha256 of its address")
    call.hub.store(call.body, True)


@route("POST", "/lfs/(?P<types>[a-z]+)/(?P<id>[^/]+/[^/]+)/verify", "write")
def lfs_verify(call):
    if len(call.hub.blobs.get(call.json["oid"], b"")) != call.json["size"]:
        raise error(404, "Not uploaded")


@route("POST", REPO + "/commit/(?P<branch>[^/]+)", "write")
def commit(call, branch):
    branch = unquote(branch)
    if branch not in call.repo.branches:
        raise error(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    files, header = dict(call.repo.find(branch).files), {}
    for line in filter(None, call.body.splitlines()):
        key, value = (asked := json.loads(line))["key"], asked["value"]
        if key == "header":
            header, parent = value, value.get("parentCommit")
            if parent and not call.repo.branches[branch].startswith(parent):
                raise error(412, FAULTS[412])
        elif key == "file":
            files[value["path"]] = call.hub.store(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in call.hub.blobs:
                raise error(400, f"LFS object of {value['path']} was never uploaded")
            files[value["path"]] = call.hub.store(call.hub.blobs[value["oid"]], True)
        elif key in ("deletedFile", "deletedFolder"):
            path = value["path"].rstrip("/")
            gone = {name for name in files if name == path or name.startswith(f"{path}/")}
            if not gone:
                raise error(404, "A file with this name doesn't exist", "EntryNotFound")
            files = {name: file for name, file in files.items() if name not in gone}
    made = call.repo.add(branch, files, header["summary"], header.get("description", ""))
    prefix = "datasets/" if call.repo.type == "dataset" else ""
    url = f"{call.hub.url}/{prefix}{call.repo.id}/commit/{made.oid}"
    return {"success": True, "commitOid": made.oid, "commitUrl": url}


@route("POST", REPO + "/tag/(?P<revision>[^/]+)", "write")
def create_tag(call, revision):
    tag, target = call.json["tag"], call.commit(revision).oid
    if tag in call.repo.tags:
        raise error(409, "Tag reference exists already")
    if not re.fullmatch(r"[\w.][\w./+-]*", tag):
        raise error(400, f"Invalid tag name {tag!r}")
    call.repo.tags[tag] = target


@route("DELETE", REPO + "/(?P<kind>tag|branch)/(?P<name>[^/]+)", "write")
def delete_ref(call, kind, name):
    names = call.repo.tags if kind == "tag" else call.repo.branches
    if unquote(name) not in names or (kind, name) == ("branch", "main"):
        raise error(404, f"{kind} {unquote(name)} not found", "RevisionNotFound")
    del names[unquote(name)]


@route("POST", REPO + "/branch/(?P<name>[^/]+)", "write")
def create_branch(call, name):
    if unquote(name) in call.repo.branches:
        raise error(409, "Reference already exists")
    call.repo.branches[unquote(name)] = call.commit(call.json.get("startingPoint") or "main").oid


@route("GET", FILE + "/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)", "read")
def resolve(call, revision, path):
    commit, path = call.commit(revision), unquote(path)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        raise error(404, "Entry not found", "EntryNotFound", **headers)
    file = commit.files[path]
    data = call.hub.blobs[file.sha256]
    headers |= {"ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if file.large:
        headers |= {"ETag": f'"{file.sha256}"', "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if not asked:
        raise Answer(200, data, headers)
    start, end = asked.groups()
    first = int(start) if start else max(0, len(data) - int(end))
    last = min(int(end), len(data) - 1) if start and end else len(data) - 1
    if first > last:
        raise Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    raise Answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})
