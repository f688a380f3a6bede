"""Publishing against a Hub on this machine, through the real clients, each in a process of its own."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
from hub import Hub, environment, python
from test_results import about, trained

from edc_hub import hub_errors, results
from edc_hub.errors import InputError


_WORKER = """
    import contextlib, io, json, os, sys, time, traceback

    slept, sleep = [], time.sleep
    time.sleep = lambda seconds: (slept.append(seconds), sleep(min(seconds, 0.02)))
    from edc_hub import publish
    from huggingface_hub import constants

    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ["HF_TOKEN"], slept[:] = asked["token"], []
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if asked["code"] is None:
                status = publish.main(asked["argv"])
            else:
                sys.argv[1:] = asked["argv"]
                try:
                    exec(asked["code"], {"__name__": "__main__"})
                except SystemExit as error:
                    status = error.code
                except BaseException:
                    status = traceback.print_exc() or 1
        said = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "slept": slept}
        print("\\n@" + json.dumps(said), flush=True)
"""


class Publisher:
    """`edc-hub publish` in one process that stays: importing takes longer than all the rest. It does not wait."""

    def __init__(self, hub, home, **variables):
        self.hub, self.said = hub, []
        env = environment(hub.url, home, hub.token, **variables)
        self.process = fresh.start(textwrap.dedent(_WORKER), env=env, talks=True)
        self.process.stdout.readline()

    def __call__(self, *argv, token=None, code=None):
        argv = [str(word) for word in argv]
        asked = {"argv": argv, "token": self.hub.token if token is None else token, "code": code}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                self.said.append(line)
                return SimpleNamespace(**json.loads(line[1:]))
        return None  # killed

    def run(self, code, *argv, token=""):
        """Runs Python code there, without a token unless one is given; a failed one has its traceback in `err`."""
        return self(*argv, token=token, code=textwrap.dedent(code))

    def close(self):
        """Its end; returns what libraries said past sys.stderr."""
        self.process.stdin.close()
        return self.process.wait(30).stderr


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def publish(hub, tmp_path_factory):
    publisher = Publisher(hub, tmp_path_factory.mktemp("home") / "one")
    yield publisher
    publisher.close()


@pytest.fixture(scope="module")
def second(hub, tmp_path_factory):
    """Another machine's publisher, and its reader: of what a test published it has nothing."""
    publisher = Publisher(hub, tmp_path_factory.mktemp("home") / "two")
    yield publisher
    publisher.close()


@pytest.fixture(scope="module")
def others(dataset, tmp_path_factory):
    """The same run with other label epochs: data of a later version."""
    return changed_data(dataset, tmp_path_factory.mktemp("others") / "dataset")


@pytest.fixture
def name(hub, request):
    """A repository of this test alone; whatever a test did, every state that readers could see was whole."""
    hub.clear()
    hub.blobs.clear()  # so that every test uploads
    id = "org/" + re.sub(r"\W+", "-", request.node.name)[-60:].strip("-")
    yield id
    hub.clear()
    if f"datasets/{id}" in hub.repos:
        for commit in hub.commits(id):
            assert_whole(hub.files(id, commit.oid))
        for tag in hub.tags(id):
            assert "manifest.json" in hub.files(id, tag)


def assert_whole(files):
    """All files of a set, or none: those of the manifest, no others, with the recipe and a card that is theirs."""
    data = {path for path in files if re.match(r"(images|soft_labels\w*)/", path)}
    if "manifest.json" not in files:
        assert not data
        return
    manifest = json.loads(files["manifest.json"])
    assert data == set(manifest["files"])
    assert {path: hashlib.sha256(files[path]).hexdigest() for path in data} == {
        path: file["sha256"] for path, file in manifest["files"].items()
    }
    assert hashlib.sha256(files["recipe.yaml"]).hexdigest() == manifest["recipe_sha256"]
    assert all(f"sha256:{value}" in files["README.md"].decode() for value in manifest["configs"].values())


def changed_data(folder, to):
    """A copy of a dataset folder with its labels the other way round, and the manifest and card that belong to it."""
    import pyarrow.parquet as pq

    shutil.copytree(folder, to)
    manifest = json.loads((to / "manifest.json").read_text())
    path = next(path for path in manifest["files"] if path.startswith("soft_labels/"))
    table = pq.read_table(to / path)
    pq.write_table(table.take(list(range(len(table)))[::-1]), to / path)
    sha, old = hashlib.sha256((to / path).read_bytes()).hexdigest(), manifest["configs"]["soft_labels"]
    manifest["files"][path] = {"sha256": sha, "bytes": (to / path).stat().st_size, "rows": len(table)}
    manifest["configs"]["soft_labels"] = hashlib.sha256(sha.encode()).hexdigest()
    (to / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    card = (to / "README.md").read_text().replace(old, manifest["configs"]["soft_labels"])
    (to / "README.md").write_text(card)
    return to


def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "dataset"))


def edit(folder, text="measured"):
    """What an evaluation does to a folder."""
    (folder / "results.json").write_text(json.dumps({"about": text}))


def commits(hub, id):
    """Titles of what was committed since the repository was made, the newest first."""
    return [commit.title for commit in hub.commits(id)][:-1]


def asked(hub, method, path):
    return [request for request in hub.log if request.method == method and re.search(path, request.path)]


# What a user sees


def test_a_run_becomes_one_commit_and_one_tag_on_it(hub, publish, dataset, name):
    done = publish(dataset.parent, name)
    assert (done.status, done.out) == (0, f"{hub.url}/datasets/{name}/tree/v1.0.0\n"), done.err
    assert "misses accuracies: run edc-hub evaluate and edc-hub showcase, then publish again" in done.err
    assert commits(hub, name) == ["v1.0.0"]
    assert hub.tags(name) == {"v1.0.0": hub.commits(name)[0].oid}
    files = hub.files(name, "v1.0.0")
    local = {path.relative_to(dataset).as_posix(): path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    assert set(files) == set(local)
    assert {path for path in files if files[path] != local[path]} <= {"README.md"}
    assert f'load_dataset("{name}"' in files["README.md"].decode()


def test_the_same_content_again_does_nothing_and_says_so(hub, publish, dataset, name):
    publish(dataset, name)
    hub.clear()
    again = publish(dataset, name)
    assert again.status == 0 and "already; nothing to do" in again.err
    assert not asked(hub, "POST", "/(commit|tag|preupload|create)")
    hub.commit(name, {"README.md": hub.files(name)["README.md"] + b"\n## Mine\n\nWords.\n"})  # people may edit
    assert "nothing to do" in publish(dataset, name).err
    assert "nothing to do" in publish(dataset, name, "--tag", "v1.0.0").err


def test_results_are_a_patch_and_data_a_minor_version(hub, publish, dataset, others, name, tmp_path):
    folder = copy(dataset, tmp_path)
    publish(folder, name)
    edit(folder)
    assert publish(folder, name).out.endswith("/tree/v1.0.1\n")
    assert publish(others, name).out.endswith("/tree/v1.1.0\n")
    assert "results.json" not in hub.files(name)  # they were of other data
    assert "results.json" in hub.files(name, "v1.0.1")
    assert commits(hub, name) == ["v1.1.0", "v1.0.1", "v1.0.0"]


def test_a_published_card_shows_what_its_results_hold_and_nothing_else(hub, publish, dataset, name, tmp_path):
    folder = copy(dataset, tmp_path)
    found = results.summarise(trained("set", 0.52), about())
    results.write(found, folder)
    assert "misses accuracies: run edc-hub showcase, then" in publish(folder, name).err
    assert "| **resnet18** | condensed set | 3 | 52.4 ± 0.4 |" in hub.files(name)["README.md"].decode()
    (folder / "README.md").write_text(hub.files(name)["README.md"].decode())  # which has the table
    (folder / "results.json").unlink()
    assert "evaluate and edc-hub showcase" in publish(folder, name).err
    assert "resnet18** |" not in hub.files(name)["README.md"].decode() and "results.json" not in hub.files(name)
    (folder / "results.json").write_text('{"about": ')
    damaged = publish(folder, name)
    assert damaged.status == 2 and damaged.err.endswith("results.json: damaged; remove it and measure again\n")


def test_other_classes_or_a_newer_format_are_a_major_version(publish, dataset, name, tmp_path):
    folder = copy(dataset, tmp_path)
    publish(folder, name)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": "2.0"}))
    assert publish(folder, name).out.endswith("/tree/v2.0.0\n")


def test_other_content_under_a_tag_is_refused_with_the_next_free_version(hub, publish, dataset, others, name):
    publish(dataset, name)
    before = hub.tags(name)
    refused = publish(others, name, "--tag", "v1.0.0")
    assert refused.status == 2 and "v1.0.0" in refused.err and "--tag v1.1.0" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert hub.tags(name) == before and commits(hub, name) == ["v1.0.0"]
    assert publish(others, name, "--tag", "v1.1.0").status == 0
    assert hub.tags(name).items() > before.items()


def test_what_people_added_to_the_card_stays(hub, publish, dataset, others, name):
    publish(dataset, name)
    hub.commit(name, {"README.md": hub.files(name)["README.md"] + b"\n## Mine\n\nWords.\n"})
    assert publish(others, name).status == 0
    assert "## Mine\n\nWords." in hub.files(name, "v1.1.0")["README.md"].decode()
    assert "nothing to do" in publish(others, name).err


def test_a_dry_run_shows_operations_and_writes_nothing(hub, publish, dataset, name):
    plan = publish(dataset, name, "--dry_run")
    assert plan.status == 0 and f"datasets/{name}" not in hub.repos
    size = (dataset / "manifest.json").stat().st_size
    assert re.search(rf"add +manifest.json +{size:,} bytes", plan.out)
    assert plan.out.startswith(f"create    dataset {name}\n") and plan.out.endswith("tag       v1.0.0\n")
    assert not [request for request in hub.log if request.method not in ("GET", "HEAD")]
    publish(dataset, name)
    assert "nothing to do" in publish(dataset, name, "--dry_run").out


def test_a_private_repository_is_private_and_a_public_one_is_not_taken_for_it(hub, publish, dataset, others, name):
    publish(dataset, name, "--private")
    assert hub.repo(name).private
    assert publish(others, name, "--private").status == 0
    public = f"{name[:50]}-public"
    publish(dataset, public)
    refused = publish(others, public, "--private")
    assert refused.status == 2 and "is public" in refused.err and commits(hub, public) == ["v1.0.0"]


def test_other_peoples_repositories_are_left_alone(hub, publish, dataset, name):
    hub.commit(name, {"README.md": b"# mine\n", "data/train-0.parquet": b"rows"})
    refused = publish(dataset, name)
    assert refused.status == 2 and "left alone" in refused.err and commits(hub, name) == ["by hand"]
    del hub.repos[f"datasets/{name}"]


def test_a_folder_that_is_not_what_its_manifest_says_is_refused(hub, publish, dataset, name, tmp_path):
    folder = copy(dataset, tmp_path)
    file = next(folder.glob("soft_labels/*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    refused = publish(folder, name)
    assert refused.status == 2 and file.name in refused.err and f"datasets/{name}" not in hub.repos
    file.unlink()
    assert publish(folder, name).status == 2
    (folder / "manifest.json").write_text("{}")
    refused = publish(folder, name)
    assert refused.status == 2 and "not the manifest of a condensed set" in refused.err
    assert "no finished set" in publish(tmp_path.parent, name).err


def test_wrong_words_are_answered_in_one_line(publish, dataset):
    for argv, said in (
        ([dataset], "expected RUN and ORG/NAME"),
        ([dataset, "nameonly"], "write ORG/NAME"),
        ([dataset, "org/a--b"], "'org/a--b' is no name of a repository; write ORG/NAME (Cannot have --"),
        ([dataset, "../x"], "'../x' is no name of a repository"),
        ([dataset, "org/a", "--observers", "org/b.git"], "'org/b.git' is no name of a repository"),
        ([dataset, "org/name", "--tag", "1.0"], "--tag v1.0.0"),
        ([dataset, "org/name", "--tags", "v1.0.0"], "did you mean 'tag'"),
        (["/nowhere/at/all", "org/name"], "run: no finished set in /nowhere/at/all"),
    ):
        done = publish(*argv)
        assert done.status == 2 and said in done.err and len(done.err.splitlines()) == 1


# Readers


def test_a_tag_loads_on_another_machine_and_a_streamed_set_keeps_no_table(hub, publish, second, dataset, others, name):
    publish(dataset, name)
    publish(others, name)  # main is another version
    code = """
    import sys
    from pathlib import Path
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from edc_hub import CondensedSet
    from huggingface_hub import DatasetCard, constants, snapshot_download
    id, folder = sys.argv[1:]
    there, here = CondensedSet.load(id, revision="v1.0.0", streaming=True), CondensedSet.load(folder, streaming=True)
    (table, soft), (own, logits) = there.views(1), here.views(1)
    assert (soft == logits).all() and all((table[key] == own[key]).all() for key in own)
    kept = Path(constants.HF_HUB_CACHE).glob(f"datasets--{id.replace('/', '--')}/snapshots/*/**/*")
    assert {path.name for path in kept if path.is_file()} <= {"manifest.json", "recipe.yaml"}
    at = {"split": "train", "revision": "v1.0.0"}
    assert sorted(get_dataset_config_names(id, revision="v1.0.0")) == ["images", "soft_labels"]
    for config, rows in (("images", 10), ("soft_labels", 20)):
        there, here = load_dataset(id, config, **at), load_dataset(folder, config, split="train")
        assert there.features == here.features and len(there) == rows
        raw = (there.with_format("arrow"), here.with_format("arrow"))
        assert raw[0][:].equals(raw[1][:])  # the bytes of images too
        streamed = load_dataset(id, config, streaming=True, **at)
        assert streamed.features == there.features
        assert [row.get("image_id") for row in streamed] == there["image_id"][:]
    assert load_dataset(id, **at).features == load_dataset(id, "images", **at).features  # the default
    one = load_dataset(id, "soft_labels", filters=[("epoch", "==", 1)], **at)
    assert set(one["epoch"]) == {1} and len(one) == 10
    assert load_dataset(id, "soft_labels", split="train")["epoch"][:] == there["epoch"][::-1]  # of main
    folder_there = Path(snapshot_download(id, repo_type="dataset", revision="v1.0.0"))
    assert len(list(folder_there.rglob("*.parquet"))) == len(list(Path(folder).rglob("*.parquet")))
    for path, revision, word in ((id, "v9", "Revision 'v9'"), ("org/none", None, "doesn't exist")):
        try:
            load_dataset(path, revision=revision)
        except DatasetNotFoundError as error:
            assert word in str(error)
        else:
            raise AssertionError("found")
    card = DatasetCard.load(id)
    card.validate()
    assert {config["config_name"] for config in card.data.configs} == {"images", "soft_labels"}
    ours, local = CondensedSet.load(id, revision="v1.0.0"), CondensedSet.load(folder)
    assert (ours.images == local.images).all() and (ours.views(1)[1] == local.views(1)[1]).all()
    """
    done = second.run(code, name, dataset)
    assert done.status == 0, done.err
    assert any(request.status == 206 for request in hub.log)  # a part of a file


def test_a_full_disk_while_downloading_is_one_line_and_the_next_call_succeeds(publish, second, dataset, name):
    publish(dataset, name)
    size = max(file.stat().st_size for file in dataset.glob("*/*.parquet"))
    code = """
    import resource, sys
    from edc_hub import CondensedSet
    from edc_hub.errors import InputError
    id, most = sys.argv[1], int(sys.argv[2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        CondensedSet.load(id).images
        CondensedSet.load(id).views(0)
    except InputError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert CondensedSet.load(id).images.shape[0] == 10
    assert len(CondensedSet.load(id).views(0)[1]) == 10
    """
    done = second.run(code, name, size // 2)
    assert done.status == 0, done.err
    assert "cannot write" in done.out and len(done.out.splitlines()) == 1


def test_a_condensed_set_pushes_itself_and_what_was_loaded_goes_on_to_another_name(hub, second, dataset, name):
    code = """
    import sys
    from edc_hub import CondensedSet
    folder, id = sys.argv[1:]
    assert CondensedSet.load(folder).push(id) == "v1.0.0"
    assert CondensedSet.load(id, revision="v1.0.0").push(id + "-fork") == "v1.0.0"
    """
    done = second.run(code, dataset, name, token=hub.token)
    assert done.status == 0, done.err
    first, fork = hub.files(name), hub.files(f"{name}-fork")
    assert {path for path in first if first[path] != fork[path]} == {"README.md"}


def test_observers_are_published_before_the_set_that_names_them(hub, publish, second, toy_run, name, tmp_path):
    runs, nets = Path(shutil.copytree(toy_run.parent, tmp_path / "runs")), f"{name[:40]}-nets"
    run = runs / toy_run.name
    planned = publish(run, name, "--observers", nets, "--dry_run")
    assert planned.out.index(f"create    model {nets}-plain") < planned.out.index(f"create    dataset {name}")
    assert "add       observers.json" in planned.out and not hub.repos.keys() & {
        f"models/{nets}-plain",
        f"datasets/{name}",
    }
    done = publish(run, name, "--observers", nets)
    ids = [f"{nets}-{net}" for net in ("plain", "other")]
    addresses = [*(f"{hub.url}/{id}/tree/v1.0.0" for id in ids), f"{hub.url}/datasets/{name}/tree/v1.0.0"]
    assert done.status == 0 and sorted(done.out.split()) == sorted(addresses), done.err
    assert done.out.split()[-1] == addresses[-1]
    found = json.loads(hub.files(name)["observers.json"])
    for id, net in zip(ids, ("plain", "other"), strict=True):
        size = len(hub.files(id, repo_type="model")["model.safetensors"])
        assert found[f"{net}@3"] == {"weights": f"{id}@v1.0.0", "arch": "convnet", "bytes": size}
        assert f"| weights of {net}@3 | `{id}@v1.0.0`, convnet, " in hub.files(name)["README.md"].decode()
    assert publish(run, name, "--observers", nets).err.count("nothing to do") == 3
    assert publish(run, name).err.count("nothing to do") == 1
    other = f"{name[:40]}-more"
    refused = publish(run, name, "--observers", other, "--tag", "v1.0.0")  # before its observers are there
    assert refused.status == 2 and "--tag v1.0.1" in refused.err and f"models/{other}-plain" not in hub.repos
    code = """
    import sys
    import torch
    from accelerate import PartialState
    from pathlib import Path
    from edc_hub import CondensedSet, documents, recipes, source, teachers
    from edc_hub.protocol import Evaluation
    from edc_hub.work import Session, Store
    id, run, place = sys.argv[1:]
    session = lambda place: Session(Store(Path(place)), PartialState(cpu=True), torch.device("cpu"))
    real = recipes.resolve(documents.load(Path(run) / "recipe.yaml")).source
    section, x = Evaluation(labels="online"), torch.rand(4, 3, 8, 8)
    theirs = teachers.Teachers(CondensedSet.load(id), section, real, session(place))
    own = teachers.Teachers(CondensedSet.load(run + "/dataset"), section, real, session(run + "/../artifacts"))
    assert torch.equal(theirs.teach(x, {}), own.teach(x, {})) and len(theirs.fingerprints) == 2
    """
    shared = second.run(code, name, run, tmp_path / "artifacts")
    assert shared.status == 0, shared.err


def test_a_published_set_is_evaluated_beside_controls_made_again(publish, second, toy_run, name, tmp_path):
    """On another machine, as somebody who has the real set and nothing of ours."""
    runs, nets = Path(shutil.copytree(toy_run.parent, tmp_path / "runs")), f"{name[:40]}-nets"
    assert publish(runs / toy_run.name, name, "--observers", nets).status == 0
    code = """
    import sys
    from edc_hub import evaluate
    id, real, out = sys.argv[1:]
    sys.exit(evaluate.main([
        "--dataset", id, "--revision", "v1.0.0", "--source.path", real, "--output_dir", out, "--seeds", "0",
        "--controls", "initial,random", "--threads", "1", "--device", "cpu",
    ]))
    """
    done = second.run(code, name, toy_run.parent.parent / "toy", tmp_path / "out")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert (found["about"]["set"]["id"], found["about"]["set"]["revision"]) == (name, "v1.0.0")
    (rows,) = (student["rows"] for student in found["students"].values())
    assert {row: figures["n"] for row, figures in rows.items()} == {"set": 1, "initial": 1, "random": 2}
    assert not found["about"]["unavailable"].keys() & {"initial", "random"}


def test_a_set_without_stored_views_is_not_published_without_its_observers(hub, publish, dataset, name, tmp_path):
    folder = copy(dataset, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["soft_labels"]["codec"] = "observers"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused = publish(folder, name)
    assert refused.status == 2 and "--observers ORG/NAME" in refused.err and len(refused.err.splitlines()) == 1
    assert f"datasets/{name}" not in hub.repos


def test_a_card_whose_metadata_a_person_broke_is_one_line(publish, dataset, name, tmp_path):
    folder = copy(dataset, tmp_path)
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("---\n", "---\npretty: My set: small\n", 1))
    refused = publish(folder, name)
    assert refused.status == 2 and "its metadata is broken YAML" in refused.err and len(refused.err.splitlines()) == 1


def test_a_token_file_that_cannot_be_read_is_one_line(hub, dataset, tmp_path):
    (tmp_path / "home/token").mkdir(parents=True)  # in the place of the file
    code = """
    import sys
    from edc_hub import doctor, evaluate
    sys.exit(10 * doctor.main([]) + evaluate.main(["--dataset", "org/none"]))
    """
    done = python(code, hub.url, tmp_path / "home")
    assert done.returncode == 12 and "Traceback" not in done.stderr
    assert "token: Is a directory; make it readable, or set HF_TOKEN" in done.stdout
    assert "token cannot be read (Is a directory)" in done.stderr


@pytest.mark.parametrize("kind", [ConnectionError, TimeoutError])
def test_a_connection_that_breaks_below_xet_is_tried_again_and_then_said_in_one_line(monkeypatch, kind):
    """hf_xet raises the builtin errors, without a number."""
    asked, said = [], []
    monkeypatch.setattr(hub_errors.time, "sleep", asked.append)
    url = "https://huggingface.co/api/datasets/org/set-404/xet-write-token/main"

    def broken():
        raise kind(f"Network error: error sending request for url ({url})")

    for reading, text in ((None, "HF_ENDPOINT: .* cannot be reached"), ("", "neither a folder here nor a data set")):
        with pytest.raises(InputError, match=text), hub_errors.plain("org/toy", reading):
            hub_errors.steady(broken, said.append)
    assert asked == [1, 2, 4, 8] * 2 and len(said) == 8


def test_pictures_that_a_version_has_no_more_are_removed(hub, publish, dataset, name, tmp_path):
    folder = copy(dataset, tmp_path)
    (folder / "assets/curves.png").write_bytes(b"curves")
    edit(folder)
    publish(folder, name)
    assert publish(dataset, name).out.endswith("/tree/v1.0.1\n")
    assert not {"assets/curves.png", "results.json"} & set(hub.files(name))
    assert "assets/curves.png" in hub.files(name, "v1.0.0")


def test_commits_before_the_newest_version_are_not_asked_for_one_by_one(hub, publish, dataset, others, name):
    publish(dataset, name)
    card = hub.files(name)["README.md"]
    for number in range(20):
        hub.commit(name, {"README.md": card + f"\n## Mine\n\n{number}\n".encode()})
    publish(others, name)
    hub.log.clear()
    edit(others)
    try:
        assert publish(others, name).out.endswith("/tree/v1.1.1\n")
    finally:
        (others / "results.json").unlink()
    assert len(asked(hub, "GET", "/tree/")) <= 4


def test_a_model_without_a_snapshot_it_had_is_a_minor_version(hub, second, name):
    code = """
    import sys
    from edc_hub import hub
    from edc_hub.versions import File, Version
    paths = ["edc_hub.json", "model.safetensors", "snapshots/epoch-1.safetensors"]
    files = {path: File.read(path, b"{}") for path in paths}
    for kept in (paths, paths[:2]):
        done = hub.publish(Version(sys.argv[1], "model", paths[0], {path: files[path] for path in kept}))
        print(done.tag)
    """
    done = second.run(code, name, token=hub.token)
    assert done.out.split() == ["v1.0.0", "v1.1.0"], done.err


def test_what_the_hub_would_refuse_is_said_before_a_run_and_its_plan_shows_the_rest(
    hub, publish, second, dataset, name
):
    code = """
    import sys
    from pathlib import Path
    from edc_hub import publish
    from edc_hub.errors import InputError
    from edc_hub.recipe import Recipe
    def ask(**section):
        recipe = Recipe(hub={"push": True, **section})
        for call in (lambda: publish.planned(recipe, {"images": 2e6, "soft_labels": 3e6}),
                     lambda: publish.before(recipe, Path("/nowhere"))):
            try:
                print(call())
            except InputError as error:
                print("refused", error)
        print("----")
    id, theirs = sys.argv[1:]
    ask(id=id + "-new", tag="v3.0.0", private=True, observers="org/nets")
    ask(id=id)
    ask(id=id, tag="v1.0.0")
    ask(id=id, private=True)
    ask(id=theirs)
    """
    publish(dataset, name)
    theirs = f"{name[:40]}-theirs"
    hub.commit(theirs, {"data/train-0.parquet": b"rows"})
    done = second.run(code, name, theirs, token=hub.token)
    assert done.status == 0, done.err
    new, known, taken, public, others = done.out.split("----\n")[:-1]
    assert new.startswith(f"create    dataset {name}-new (private)\n") and "tag       v3.0.0\nNone" in new
    assert re.search(r"add       soft_labels/train-\*.parquet +3.0 MB", new) and "create" not in known
    assert "tag       what follows v1.0.0" in known and "refused" not in known
    assert taken.count("refused tag: v1.0.0") == 2 and public.count("refused private:") == 2
    assert others.count("left alone") == 2
    del hub.repos[f"datasets/{theirs}"]


# What goes wrong on the way

STEPS = {
    "whoami": ("GET", "/whoami"),
    "info": ("GET", r"/api/datasets/[^/]+/[^/]+$"),
    "create": ("POST", "/repos/create"),
    "refs": ("GET", "/refs"),
    "commits": ("GET", "/commits/"),
    "tree": ("GET", "/tree/"),
    "card": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/lfs/"),
    "verify": ("POST", "/verify"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
}


@pytest.mark.parametrize("fault", ["500", "429", "cut", "lost"])
@pytest.mark.parametrize("step", STEPS)
def test_a_passing_fault_at_any_step_is_survived(hub, publish, dataset, name, step, fault):
    method, path = STEPS[step]
    if fault == "500":
        hub.fail(method, path, 500, times=2)
    elif fault == "429":
        hub.fail(method, path, 429, headers={"Retry-After": "7"})
    elif fault == "cut":
        hub.cut(path, after=20, method=method)
    else:
        hub.lose(method, path)
    done = publish(dataset, name)
    assert done.status == 0, done.err
    assert hub.tags(name) == {"v1.0.0": hub.commits(name)[0].oid} and commits(hub, name) == ["v1.0.0"]
    if fault == "429":
        assert any(7 <= seconds <= 8 for seconds in done.slept)


@pytest.mark.parametrize("step", ["create", "refs", "commit", "tag"])
def test_a_fault_that_stays_ends_in_one_line_and_the_next_call_goes_on(hub, publish, dataset, others, name, step):
    publish(dataset, name)
    if step == "create":
        del hub.repos[f"datasets/{name}"]
    before = dict(hub.tags(name)) if step != "create" else {}
    hub.clear()
    hub.fail(*STEPS[step], 503, times=math.inf)
    stopped = publish(others, name)
    assert stopped.status == 2 and "503" in stopped.err.splitlines()[-1] and "Traceback" not in stopped.err
    assert len(asked(hub, *STEPS[step])) <= 5 and sum(stopped.slept) < 120
    if step != "create":
        assert hub.tags(name) == before
    hub.clear()
    assert publish(others, name).status == 0
    assert len(commits(hub, name)) == len(hub.tags(name)) == (1 if step == "create" else 2)


def test_no_network_is_one_line(publish, hub, dataset, name):
    hub.cut(".*", times=math.inf)
    done = publish(dataset, name)
    assert done.status == 2 and "cannot be reached" in done.err.splitlines()[-1] and "Traceback" not in done.err


@pytest.mark.parametrize("step", ["whoami", "info", "create", "preupload", "commit", "tag"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_one_line_with_what_to_do(hub, publish, dataset, name, step, status):
    hub.fail(*STEPS[step], status, times=math.inf)
    done = publish(dataset, name)
    last = done.err.splitlines()[-1]
    assert done.status == 2 and str(status) in last and "hf auth login" in last and "Traceback" not in done.err
    assert sum(done.slept) == 0  # not tried again
    hub.clear()
    assert publish(dataset, name).status == 0 and len(commits(hub, name)) == 1


def test_tokens_that_may_not_write_are_named_before_anything_is_sent(hub, publish, second, dataset, name):
    for token, said in (
        ("", "no token"),
        ("hf_unknown", "does not know the token"),
        (hub.read_token, "may only read"),
        (hub.stranger_token, "may not write there"),
        (hub.add_token("fineGrained", scopes={"tester": ["repo.write"]}), f"may write to tester, not to {name}"),
        ("hf_tökén", "characters that no token has"),
    ):
        done = publish(dataset, name, token=token)
        assert done.status == 2 and said in done.err and len(done.err.splitlines()) == 1
        assert not token or token not in done.err
    assert f"datasets/{name}" not in hub.repos
    code = "import sys; from edc_hub import evaluate; sys.exit(evaluate.main(['--dataset', 'org/none']))"
    read = second.run(code, token="hf_tökén")
    assert read.status == 2 and "characters that no token has" in read.err and "tökén" not in read.err


# Others who write


def test_a_commit_in_between_is_noticed_and_planned_anew(hub, publish, dataset, others, name):
    publish(dataset, name)
    hub.when("POST", "/commit/", lambda: hub.commit(name, {"NOTES.md": b"theirs"}))
    done = publish(others, name)
    assert done.status == 0 and "somebody else" in done.err
    assert commits(hub, name) == ["v1.1.0", "by hand", "v1.0.0"] and hub.files(name)["NOTES.md"] == b"theirs"


def test_another_version_in_between_is_never_mixed_with_ours(hub, publish, second, dataset, others, name, tmp_path):
    # the client leaves out what main has already: were it asked before theirs and sent after, theirs would stay
    publish(dataset, name)
    folder = copy(dataset, tmp_path)
    edit(folder)
    hub.when("POST", "/commit/", lambda: second(others, name))
    done = publish(folder, name)
    assert done.status == 0
    assert commits(hub, name) == ["v1.2.0", "v1.1.0", "v1.0.0"]  # ours after theirs: other data
    assert json.loads(hub.files(name)["results.json"])


def test_a_tag_in_between_is_not_moved(hub, publish, dataset, others, name):
    publish(dataset, name)
    theirs = hub.commits(name)[0].oid
    hub.when("POST", "/tag/", lambda: hub.repo(name).tags.update({"v1.1.0": theirs}))
    done = publish(others, name, "--tag", "v1.1.0")
    assert done.status == 2 and "never moves" in done.err and hub.tags(name)["v1.1.0"] == theirs
    free = re.search(r"--tag (v\S+),", done.err)[1]
    assert publish(others, name, "--tag", free).status == 0
    assert len(commits(hub, name)) == 2  # the commit that was there


def test_a_default_tag_taken_in_between_gives_the_next(hub, publish, dataset, others, name):
    publish(dataset, name)
    theirs = hub.commits(name)[0].oid
    hub.when("POST", "/tag/", lambda: hub.repo(name).tags.update({"v1.1.0": theirs}))
    assert publish(others, name).out.endswith("/tree/v1.2.0\n")
    assert hub.tags(name)["v1.1.0"] == theirs and len(commits(hub, name)) == 2


@pytest.mark.parametrize("same", [True, False])
def test_two_publishers_at_once_give_whole_versions(hub, publish, second, dataset, others, name, same):
    hub.delay("POST", "/(commit|tag|create)", 0.1, times=math.inf)
    done = []
    jobs = ((publish, dataset), (second, dataset if same else others))
    threads = [threading.Thread(target=lambda job=job: done.append(job[0](job[1], name))) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.status for each in done] == [0, 0], [each.err for each in done]
    assert len(commits(hub, name)) == len(hub.tags(name)) == (1 if same else 2)
    assert sorted(each.out.split("/")[-1].strip() for each in done) == (
        ["v1.0.0", "v1.0.0"] if same else sorted(hub.tags(name))
    )


# Processes that die


@pytest.mark.parametrize("step", ["upload", "commit", "tag"])
def test_killed_at_any_step_the_next_call_goes_on(hub, publish, dataset, others, name, tmp_path, step):
    publish(dataset, name)
    dying = Publisher(hub, tmp_path / "home")
    hub.clear()
    hub.when(*STEPS[step], lambda: os.kill(dying.process.pid, signal.SIGKILL))
    hub.fail(*STEPS[step], 500)  # what it asked for last is not carried out
    assert dying(others, name) is None
    dying.process.wait(30)
    assert list(hub.tags(name)) == ["v1.0.0"] and len(commits(hub, name)) == (2 if step == "tag" else 1)
    hub.clear()
    ours = hub.commits(name)[0].oid
    hub.commit(name, {"NOTES.md": b"since"})
    assert publish(others, name).out.endswith("/tree/v1.1.0\n")
    if step == "tag":  # that very commit, whatever was committed since
        assert hub.tags(name)["v1.1.0"] == ours and len(commits(hub, name)) == 3
        assert not asked(hub, "PUT", "/lfs/")
    else:
        assert hub.tags(name)["v1.1.0"] == hub.commits(name)[0].oid


def test_uploaded_files_are_not_sent_again(hub, publish, dataset, name):
    hub.fail("POST", "/commit/", 503, times=math.inf)
    publish(dataset, name)
    sent = asked(hub, "PUT", "/lfs/")
    assert len(sent) == len(set(sent)) >= 2
    hub.clear()
    assert publish(dataset, name).status == 0 and not asked(hub, "PUT", "/lfs/")


# Settings


def test_an_endpoint_without_xet_names_the_setting(hub, dataset, name, tmp_path):
    code = "import sys; from edc_hub import publish; sys.exit(publish.main(sys.argv[1:]))"
    command = (code, hub.url, tmp_path / "home", hub.token, str(dataset), name)
    done = python(*command, HF_HUB_DISABLE_XET="0")
    assert done.returncode == 2 and "HF_HUB_DISABLE_XET=1" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    offline = python(*command, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE" in offline.stderr.splitlines()[-1]


def test_the_token_is_nowhere(hub, dataset, others, name, tmp_path):
    seen = []

    def processes():
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(place.read_bytes())
            except OSError:
                pass  # it ended

    home = tmp_path / "home"
    publisher = Publisher(hub, home, HF_DEBUG="1")
    hub.when("PUT", "/lfs/", processes)
    hub.when("POST", "/commit/", processes)
    hub.fail("POST", "/commit/", 500)
    publisher(dataset, name)
    for status in (401, 403, 400, 404, 409, 418):
        hub.fail("POST", "/commit/", status, times=math.inf, headers={"X-Error-Message": f"no: Bearer {hub.token}"})
        assert publisher(others, name).status in (1, 2)
        hub.clear()
    publisher(dataset, name, "--token", hub.token)
    texts = {"said": "".join(publisher.said), "errors": publisher.close(), "log": repr(hub.log)}
    texts |= {"processes": b"\n".join(seen).decode(errors="replace")}
    for folder in (dataset, others, home):
        texts |= {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
    texts |= {path: data.decode("latin-1") for path, data in hub.files(name).items()}
    texts |= {commit.oid: commit.title + commit.message for commit in hub.commits(name)}
    assert seen and not [place for place, text in texts.items() if hub.token in text]
