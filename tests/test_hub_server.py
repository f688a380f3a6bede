import http.client
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from hub import Hub, environment, python


START = """
import sys
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi
from huggingface_hub.errors import *

def refused(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except HfHubHTTPError as error:
        return error.response.status_code, type(error).__name__
    raise AssertionError("not refused")

api, data = HfApi(), dict(repo_type="dataset")
"""


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def run(code, hub, home, token=None, *arguments, **variables):
    """Runs the code after START; the test fails where the code does."""
    done = python(START + code, hub.url, home, token, *arguments, **variables)
    assert done.returncode == 0, done.stderr


def asked(hub, method, path, body=None, **headers):
    """(status, headers, body) of one request made by hand."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_the_client_commits_and_tags(hub, tmp_path):
    (tmp_path / "large.bin").write_bytes(b"x" * 3_000_000)
    run(
        """
assert api.whoami()["auth"]["accessToken"]["role"] == "write"
api.create_repo("org/toy", **data)
assert refused(api.create_repo, "org/toy", **data)[0] == 409
assert api.create_repo("org/toy", exist_ok=True, **data).repo_id == "org/toy"
born = api.dataset_info("org/toy").sha

def files():
    return [Add("README.md", b"---\\nlicense: mit\\n---\\nhello"), Add("a/large.bin", sys.argv[1]), Add("b.txt", b"")]

one = api.create_commit("org/toy", files(), commit_message="one", parent_commit=born, **data)
again = api.create_commit("org/toy", files(), commit_message="again", parent_commit=born, **data)
assert again.oid == one.oid, "nothing changed"
stale = [Add("c.txt", b"c")]
assert refused(api.create_commit, "org/toy", stale, commit_message="c", parent_commit=born, **data)[0] == 412
api.create_tag("org/toy", tag="v1.0.0", revision=one.oid, **data)
assert refused(api.create_tag, "org/toy", tag="v1.0.0", revision=born, **data)[0] == 409
api.create_tag("org/toy", tag="v1.0.0", revision=born, exist_ok=True, **data)
two = api.create_commit("org/toy", [Delete("a/"), Add("c.txt", b"c")], commit_message="two", **data)
refs = api.list_repo_refs("org/toy", **data)
assert [(it.name, it.target_commit) for it in refs.tags] == [("v1.0.0", one.oid)]
assert [(it.name, it.target_commit) for it in refs.branches] == [("main", two.oid)]
found = api.list_repo_commits("org/toy", **data)
assert [(it.commit_id, it.title) for it in found[:2]] == [(two.oid, "two"), (one.oid, "one")]
assert [it.commit_id for it in api.list_repo_commits("org/toy", revision="v1.0.0", **data)] == [one.oid, born]
tree = {it.path: it for it in api.list_repo_tree("org/toy", revision="v1.0.0", recursive=True, expand=True, **data)}
assert set(tree) == {".gitattributes", "README.md", "a", "a/large.bin", "b.txt"}
assert tree["a/large.bin"].lfs.size == 3_000_000 and tree["README.md"].lfs is None
assert [tree[it].last_commit.oid for it in (".gitattributes", "b.txt")] == [born, one.oid]
assert [it.path for it in api.get_paths_info("org/toy", ["a", "no"], revision=one.oid[:8], **data)] == ["a"]
assert api.file_exists("org/toy", "c.txt", **data) and not api.file_exists("org/toy", "d.txt", **data)
api.create_branch("org/toy", branch="x/y", revision="v1.0.0", **data)
assert api.file_exists("org/toy", "a/large.bin", revision="x/y", **data)
api.delete_branch("org/toy", branch="x/y", **data)
api.delete_tag("org/toy", tag="v1.0.0", **data)
assert refused(api.dataset_info, "org/toy", revision="v1.0.0") == (404, "RevisionNotFoundError")
try:
    api.create_commit("org/toy", [Add("README.md", b"---\\nlicense: mine\\n---\\n")], commit_message="no", **data)
except ValueError as error:
    assert "license" in str(error)
else:
    raise AssertionError("metadata is not checked")
api.create_tag("org/toy", tag="v1.0.0", revision=one.oid, **data)
api.create_repo("org/net")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="org/net")
api.delete_repo("org/net")
assert not api.repo_exists("org/net") and api.repo_exists("org/toy", **data)
""",
        hub,
        tmp_path / "home",
        hub.token,
        str(tmp_path / "large.bin"),
    )
    assert hub.files("org/toy").keys() == {"README.md", "b.txt", "c.txt"}
    assert hub.files("org/toy", "v1.0.0")["a/large.bin"] == b"x" * 3_000_000
    assert [it.title for it in hub.commits("org/toy")] == ["two", "one", "initial commit"]
    assert hub.tags("org/toy") == {"v1.0.0": hub.commits("org/toy")[1].oid}
    assert hub.token not in repr(hub.log)
    assert [it.status for it in hub.log if "/tag/" in it.path and it.method == "POST"] == [200, 409, 409, 200]


def test_who_may_do_what(hub, tmp_path):
    hub.create("org/hidden", private=True)
    hub.commit("org/hidden", {"a.txt": b"a"})
    hub.commit("org/toy", {"a.txt": b"a"})
    run(
        """
write, read, stranger, fine = sys.argv[1:5]
add = dict(path_or_fileobj=b"b", path_in_repo="b.txt", **data)
for name in (api.dataset_info, lambda *it, **named: api.hf_hub_download(*it, "a.txt", **data, **named)):
    assert refused(name, "org/hidden", token=False) == (401, "RepositoryNotFoundError")
    assert refused(name, "org/hidden", token=stranger) == (404, "RepositoryNotFoundError")
    name("org/hidden", token=read)
    name("org/toy", token=False)
assert refused(api.dataset_info, "org/none", token=read) == (404, "RepositoryNotFoundError")
assert refused(api.dataset_info, "org/toy", token="hf_wrong") == (401, "HfHubHTTPError")
assert refused(api.whoami, token="hf_wrong")[0] == 401
assert refused(api.upload_file, repo_id="org/toy", token=False, **add)[0] == 401
assert refused(api.upload_file, repo_id="org/toy", token=read, **add)[0] == 403
assert refused(api.upload_file, repo_id="org/toy", token=stranger, **add)[0] == 403
assert refused(api.create_repo, "org/new", token=read)[0] == 403
assert refused(api.create_repo, "others/new", token=write)[0] == 403
api.upload_file(repo_id="org/toy", token=fine, **add)
assert refused(api.create_repo, "tester/new", token=fine)[0] == 403
api.create_repo("org/secret", private=True, token=write, **data)
assert api.create_repo("mine", token=write).repo_id == "tester/mine"
""",
        hub,
        tmp_path,
        None,
        *(hub.token, hub.read_token, hub.stranger_token, hub.add_token("fineGrained", scopes={"org": ["repo.write"]})),
    )
    assert hub.repo("org/secret").private and not hub.repo("tester/mine", "model").private


def test_the_client_meets_the_faults_that_were_ordered(hub, tmp_path):
    hub.commit("org/toy", {"large.bin": b"y" * 11_000_000})
    hub.fail("POST", "/preupload/", 500)
    hub.cut(r"^/lfs/.*[0-9a-f]{64}$", after=100_000)
    hub.fail("POST", "/tag/", 429, headers={"Retry-After": "1"})
    hub.cut("/resolve/.*large.bin", after=10_600_000, method="GET")  # the client keeps 10 MiB at a time
    hub.lose("POST", "/commit/")
    hub.when("POST", "/branch/", lambda: hub.commit("org/toy", {"other.txt": b"other"}))
    run(
        """
from huggingface_hub.utils import httpx

try:
    api.upload_file(path_or_fileobj=b"z" * 3_000_000, path_in_repo="up.bin", repo_id="org/toy", **data)
except httpx.TransportError:
    pass
else:
    raise AssertionError("the answer came")
try:
    api.create_tag("org/toy", tag="v1", **data)
except HfHubHTTPError as error:
    assert error.response.status_code == 429 and error.response.headers["Retry-After"] == "1"
else:
    raise AssertionError("not refused")
api.create_tag("org/toy", tag="v1", **data)
assert open(api.hf_hub_download("org/toy", "large.bin", **data), "rb").read() == b"y" * 11_000_000
before = api.dataset_info("org/toy").sha
api.create_branch("org/toy", branch="dev", **data)
assert api.dataset_info("org/toy").sha != before
""",
        hub,
        tmp_path,
        hub.token,
    )
    assert hub.files("org/toy", "v1")["up.bin"] == b"z" * 3_000_000  # the lost commit was carried out, once
    assert len(hub.commits("org/toy", "v1")) == 3
    assert [it.status for it in hub.log if "/preupload/" in it.path] == [500, 200]
    assert [it.status for it in hub.log if it.method == "PUT"] == [0, 200]
    downloads = [it.status for it in hub.log if it.method == "GET" and "large.bin" in it.path]
    assert downloads == [0, 206]  # the client went on where it was cut


@pytest.mark.parametrize(
    ("asked_range", "status", "start", "stop"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=90-", 206, 90, 100),
        ("bytes=-5", 206, 95, 100),
        ("bytes=95-200", 206, 95, 100),
    ],
)
def test_a_part_of_a_file(hub, asked_range, status, start, stop):
    content = bytes(range(100))
    hub.commit("org/toy", {"a/b.bin": content})
    path = "/datasets/org/toy/resolve/main/a/b.bin"
    answered, headers, body = asked(hub, "GET", path, Range=asked_range)
    assert (answered, body) == (status, content[start:stop])
    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/100"
    assert asked(hub, "GET", path, Range="bytes=100-")[0] == 416
    answered, headers, body = asked(hub, "HEAD", path)
    assert (answered, body, headers["Content-Length"], headers["X-Linked-Size"]) == (200, b"", "100", "100")


def test_what_is_missing_is_named_for_the_client(hub):
    hub.commit("org/toy", {"a.txt": b"a"})
    token = {"Authorization": f"Bearer {hub.read_token}"}
    for path, code in [
        ("/datasets/org/toy/resolve/main/b.txt", "EntryNotFound"),
        ("/datasets/org/toy/resolve/v9/a.txt", "RevisionNotFound"),
        ("/api/datasets/org/toy/tree/main/none", "EntryNotFound"),
        ("/api/datasets/org/none", "RepoNotFound"),
        ("/info?dataset=org/toy", None),
    ]:
        status, headers, _ = asked(hub, "GET", path, **token)
        assert (status, headers["X-Error-Code"]) == (404, code), path


@pytest.mark.parametrize(
    ("metadata", "wrong"),
    [
        ("license: mit\nsize_categories: [n<1K]", None),
        ("license: mine", "license"),
        ("size_categories: [small]", "size_categories"),
        ("pretty_name: [a]", "pretty_name"),
        ("configs: [{config_name: a}, {config_name: a}]", "configs"),
        ("a: [", "YAML"),
    ],
)
def test_metadata_is_checked(hub, metadata, wrong):
    body = json.dumps({"content": f"---\n{metadata}\n---\ntext", "repoType": "dataset"})
    status, _, answer = asked(hub, "POST", "/api/validate-yaml", body)
    messages = [it["message"] for it in json.loads(answer)["errors"]]
    assert (status, len(messages)) == ((400, 1) if wrong else (200, 0))
    assert not wrong or wrong in messages[0]


def test_a_rule_applies_as_often_as_it_says(hub):
    hub.commit("org/toy", {"a.txt": b"a"})
    hub.fail("GET", "/refs", 503, times=2)
    hub.fail(None, "/commits/", 403, times=math.inf)
    hub.delay("GET", "/tree/", 0.2)
    assert [asked(hub, "GET", "/api/datasets/org/toy/refs")[0] for _ in range(3)] == [503, 503, 200]
    assert [asked(hub, "GET", "/api/datasets/org/toy/commits/main")[0] for _ in range(3)] == [403] * 3
    assert asked(hub, "GET", "/api/datasets/org/toy/tree/main")[0] == 200
    assert hub.log[0] == ("GET", "/api/datasets/org/toy/refs", 503) and len(hub.log) == 7
    hub.clear()
    assert asked(hub, "GET", "/api/datasets/org/toy/commits/main")[0] == 200 and len(hub.log) == 1


def test_of_many_commits_on_one_parent_one_is_made(hub):
    parent = hub.commit("org/toy", {"a.txt": b"a"})
    token = {"Authorization": f"Bearer {hub.token}"}

    def commit(number):
        lines = [
            {"key": "header", "value": {"summary": str(number), "parentCommit": parent}},
            {"key": "file", "value": {"path": "a.txt", "content": "Yg==", "encoding": "base64"}},
        ]
        body = "\n".join(map(json.dumps, lines))
        return asked(hub, "POST", "/api/datasets/org/toy/commit/main", body, **token)[0]

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(commit, range(8))) == [200] + [412] * 7
    assert hub.files("org/toy") == {"a.txt": b"b"}


def test_a_client_gets_nothing_of_this_process_but_what_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("https_proxy", "http://nowhere")
    found = environment("http://here", tmp_path, HF_HUB_DISABLE_XET="0")
    assert (found["HF_ENDPOINT"], found["HF_TOKEN"], found["HF_HUB_DISABLE_XET"]) == ("http://here", "", "0")
    assert not {"HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "https_proxy"} & set(found)
