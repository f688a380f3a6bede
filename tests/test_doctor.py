"""`edc-hub doctor`: with the real client against a Hub on this machine, and without any network."""

import json
from collections import namedtuple

import pytest
from hub import Hub, python
from toys import write_parquet

from edc_hub import checks, doctor


def findings(out):
    """(ok or FAIL, rest of the line) by the name of the check; the last of a name counts."""
    rows = [line.split(None, 1) for line in out.splitlines()]
    names = [*("edc_hub", "versions", "cpu", "gpu", "endpoint", "xet", "token"), "runs", "hub cache", "data cache"]
    found = {}
    for mark, rest in rows:
        name = next(name for name in (*names, "source", "weights") if rest.startswith(name))
        found[name] = mark, rest.removeprefix(name).strip()
    return found


CALLS = """
import json, os, sys
from edc_hub import doctor

for token, *argv in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    print("status", doctor.main(argv))
    print("----")
"""


def asked(hub, home, calls, **variables):
    """The command called several times in one process; (status, findings) of each, and all it printed."""
    done = python(CALLS, hub.url, home, None, json.dumps(calls), **variables)
    assert done.returncode == 0, done.stderr
    parts = [part.split("status ") for part in done.stdout.split("----\n")[:-1]]
    return [(int(status), findings(out)) for out, status in parts], done.stdout + done.stderr


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_parquet(folder, {"train": [0, 1], "test": [0, 1]})
    with Hub() as found:
        files = [path for path in folder.rglob("*") if path.is_file()]
        found.commit("org/toy", {str(path.relative_to(folder)): path.read_bytes() for path in files})
        yield found


def test_a_hub_a_token_that_writes_a_source_and_weights_that_are_there_are_well(hub, tmp_path):
    hub.commit("org/net", {"model.safetensors": b"x" * 1000}, repo_type="model")
    nets = [("resnet18", "org/net"), ("resnet18", "org/net/model.safetensors@main")]
    nets += [("timm/resnet18", "org/net"), ("resnet18", "org/none")]
    every = [word for stage in ("relabel", "synthesize", "initialize") for word in (f"--{stage}.observers", "null")]
    fine = hub.add_token("fineGrained", scopes={"org": ["repo.content.read", "repo.write"]})
    poor = hub.add_token("fineGrained", scopes={"org": ["repo.content.read"]})
    reach = ["digits", "--source.path", "org/toy"]
    calls = [
        (hub.token, *reach),
        (hub.token, "digits", "--source.path", "org/none"),
        (hub.token, *reach, "--source.test_split", "validation"),
        (hub.read_token,),
        (fine,),
        (poor,),
        ("hf_wrong",),
        ("",),
        ("", "digits"),
        *(("", "digits", "--observers.networks", f"[{{name: a, arch: {a}, weights: {w}}}]", *every) for a, w in nets),
    ]
    requests = len(hub.log)
    results, said = asked(hub, tmp_path, calls, HF_HUB_DISABLE_XET="1")
    well, missing, split, read, writes, reads, wrong, none, local, *weights = results
    assert well[0] == 0, said
    assert well[1]["token"] == ("ok", "of tester, role write") and well[1]["xet"][0] == "ok"
    assert well[1]["endpoint"] == ("ok", f"{hub.url} answers")
    commit = hub.commits("org/toy")[0].oid
    assert well[1]["source"] == ("ok", f"org/toy at commit {commit[:12]}: splits train, test")
    assert missing[0] == 1 and missing[1]["source"][0] == "FAIL" and "check the spelling" in missing[1]["source"][1]
    assert split[0] == 1 and split[1]["source"][1].endswith("no 'validation'; write another source.test_split")
    assert read[0] == 1 and "role read; publishing needs one that may write" in read[1]["token"][1]
    assert writes[0] == 0 and writes[1]["token"][1] == "of tester, role fineGrained, writes to: org"
    assert reads[0] == 1 and "writes to: nothing; publishing" in reads[1]["token"][1]
    assert wrong[0] == 1 and "run `hf auth login`" in wrong[1]["token"][1]
    assert none[0] == 1 and none[1]["token"][1].startswith("none; publishing and private sets need one")
    assert local[0] == 0 and local[1]["token"][0] == "warn"  # a run on the digits asks nobody
    (own, own_file, no_config, no_net) = [found["weights"] for _, found in weights]
    assert own == ("ok", "a: org/net") and own_file[0] == "ok" and no_config[0] == no_net[0] == "FAIL"
    assert "org/net has no edc_hub.json or config.json on the Hub" in no_config[1]
    assert no_net[1].startswith("weights: cannot get org/none from the Hub (")
    for token in (hub.token, hub.read_token, fine, poor, "hf_wrong"):
        assert token not in said
    fetched = {request.path for request in hub.log[requests:] if request.method == "GET"}
    assert not [path for path in fetched if path.endswith(".parquet") or "org/net/resolve" in path]  # no data


def test_another_hub_with_xet_on_and_one_that_is_broken(hub, tmp_path):
    hub.fail("GET", r"/api/datasets\?|/api/datasets$", 503, times=99)
    hub.fail("GET", "whoami", 503, times=99)
    ((status, found),), _ = asked(hub, tmp_path, [(hub.token,)], HF_HUB_DISABLE_XET="0")
    assert status == 1
    assert found["xet"][0] == "FAIL" and "set HF_HUB_DISABLE_XET=1" in found["xet"][1]
    assert found["endpoint"][0] == "FAIL" and "HTTP 503; try again later" in found["endpoint"][1]
    assert found["token"][0] == "FAIL" and "cannot be checked (HTTP 503)" in found["token"][1]


def test_without_a_network_each_failing_line_says_what_to_do(capsys):
    push = ["--hub.push", "true", "--hub.id", "some/name"]
    for argv, mark in (([], "FAIL"), (["digits"], "warn"), (["digits", *push], "FAIL"), (["cifar10"], "FAIL")):
        assert doctor.main(argv) == (mark == "FAIL")  # HF_HUB_OFFLINE is set for the tests
        found = findings(capsys.readouterr().out)
        assert found["endpoint"][0] == found["token"][0] == mark and "unset it" in found["endpoint"][1]
    assert doctor.main(["digits", *push]) == 1
    found = findings(capsys.readouterr().out)
    assert found["source"] == ("ok", "sklearn/digits: splits train, test")
    assert {name for name, (mark, _) in found.items() if mark == "FAIL"} <= {"endpoint", "token", "gpu"}
    assert all("; " in text for mark, text in found.values() if mark == "FAIL")


def test_weights_that_are_not_there_are_found(capsys):
    network = "[{name: a, arch: resnet18, weights: ./none.safetensors}]"
    keys = ["--observers.networks", network, "--relabel.observers", "null", "--synthesize.observers", "null"]
    assert doctor.main(["digits", *keys, "--initialize.observers", "null"]) == 1
    assert findings(capsys.readouterr().out)["weights"][1].startswith("weights: no file ./none.safetensors; give")


def test_a_wrong_recipe_is_status_2(capsys):
    assert doctor.main(["digits", "--ipcc", "3"]) == 2
    assert "ipcc: unknown key" in capsys.readouterr().err
    assert doctor.main(["--ipc", "3"]) == 2
    assert "keys only after it" in capsys.readouterr().err


def test_under_a_launcher_one_process_looks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert doctor.main(["digits"]) == 0 and capsys.readouterr().out == ""


def test_help_says_what_is_checked(capsys):
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--help"])
    assert stopped.value.code == 0
    assert "edc-hub doctor [RECIPE]" in capsys.readouterr().out


def test_a_library_that_is_missing_or_old_is_named(monkeypatch):
    asked_for = ["torch>=2.9", "datasets>=99.1", "no-such-library>=1.0", 'ruff>=0.14; extra == "test"']
    monkeypatch.setattr(checks.importlib.metadata, "requires", lambda _: asked_for)
    *_, found = checks.versions()
    assert found.remedy == "pip install --upgrade 'datasets>=99.1' 'no-such-library>=1.0'"
    assert "no-such-library missing" in found.text and "ruff" not in found.text


def test_a_full_disk_and_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(10**10, 10**10, 10**8))
    assert all("0.1 GB free" in it.text and it.remedy.startswith("free some") for it in checks.disk(None))
    (tmp_path / "file").touch()
    recipe = doctor._recipe(["digits", "--output_dir", str(tmp_path / "file" / "run")])
    first, *_ = checks.disk(recipe)
    assert first.text.endswith("cannot be written") and "--output_dir" in first.remedy
