"""The main job as a user runs it: real processes, real kills, real `datasets`."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import fresh
import pytest
import torch
import yaml
from helpers_evaluation import MACHINE, NAMES, condensed, write_source
from safetensors.torch import load_file, save_file
from toys import write_parquet

from edc_hub import condense, disk, launch, pictures, plan, recipes, source, work
from edc_hub.recipe import Recipe


RECIPE = {
    "name": "digits",
    "ipc": 2,
    "source": {"path": "sklearn/digits", "size": 8},
    "observers": {
        "train": {"epochs": 2, "snapshots": [1], "batch": 50, "augment": "pad_crop", "pad": 1, "flip": False},
        "networks": [
            {"name": "plain", "arch": "convnet", "args": {"depth": 2, "width": 16, "norm": "batch"}},
            {"name": "wide", "arch": "convnet", "args": {"depth": 1, "width": 24, "norm": "instance"}},
        ],
    },
    "moments": {"rows": 500},
    "synthesize": {"iterations": 12, "block": 8, "flatness": {"kind": "logits"}},
    "relabel": {"epochs": 4, "batch": 10, "rand_augment": 2, "flip": False, "random_draws": 2},
}
RECIPE["relabel"]["observers"] = ["plain@1", "wide"]
FILES = ["dataset", "controls/initial", *(f"controls/random/{draw}" for draw in range(2))]
ALL = ["--relabel.observers", "null"]
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def arguments(recipe, runs, *more):
    common = ["--output_dir", str(runs / "run"), "--threads", "1", "--device", "cpu", "--checkpoint_seconds", "0"]
    return [str(recipe), *common, *more]


def digests(runs):
    """sha256 of every file of the set and its controls."""
    found = {}
    for folder in FILES:
        for path in sorted((runs / "run" / folder).rglob("*")):
            if path.is_file():
                found[str(path.relative_to(runs))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """An undisturbed run in one process of its own."""
    runs = tmp_path_factory.mktemp("one")
    done = fresh.run("edc_hub.condense", *arguments(recipe, runs), env=ENVIRONMENT, module=True)
    assert done.returncode == 0, done.stderr
    return runs, done


def test_a_run_ends_with_a_set_that_load_dataset_reads(finished):
    runs, done = finished
    folder = done.stdout.strip()
    assert folder == str(runs / "run" / "dataset")  # stdout holds the result and nothing else
    images = datasets.load_dataset(folder, split="train")
    assert images.num_rows == 20
    assert images["label"] == [label for label in range(10) for _ in range(2)]
    assert images.features["label"].names == [str(label) for label in range(10)]
    assert images[0]["image"].size == (8, 8) and images[0]["image"].mode == "RGB"
    assert images["image_id"] == list(range(20)) and images["ipc_index"] == [0, 1] * 10
    views = datasets.load_dataset(folder, "soft_labels", split="train")
    assert views.num_rows == 80 and sorted(set(views["epoch"])) == [0, 1, 2, 3]
    for epoch in range(4):
        of_epoch = [row for row, e in zip(views["image_id"], views["epoch"], strict=True) if e == epoch]
        assert sorted(of_epoch) == list(range(20))


def test_a_run_says_what_each_stage_took_and_how_to_load_the_set(finished):
    runs, done = finished
    facts = json.loads((runs / "run" / "run.json").read_text())
    for stage in ("observers", "moments", "initialize", "synthesize", "relabel", "control initial"):
        assert f"\n{stage}" in done.stderr and facts["seconds"][stage] >= 0
    assert f"edc-hub evaluate --dataset {runs / 'run'}" in done.stderr
    assert "load_dataset(" in done.stderr and facts["processes"] == 1 and facts["threads"] == 1


def test_a_run_that_was_killed_tells_the_time_of_all_its_calls(tmp_path, monkeypatch):
    more, save, saved = ("--relabel.controls", "false", "--checkpoint_seconds", "0"), work.Store.save, []

    def killed(store, unit, *made):
        saved.append(unit)
        if len(saved) == 2:
            raise KeyboardInterrupt
        time.sleep(0.5)
        save(store, unit, *made)

    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(work.Store, "save", killed)
        condensed(tmp_path, "first", *more)
    run = tmp_path / "runs/first"
    assert [unit.stage for unit in saved] == ["observers"] * 2 and not (run / "run.json").exists()
    before = json.loads((run / ".seconds.json").read_text())["observers"]
    condensed(tmp_path, "first", *more)
    assert json.loads((run / "run.json").read_text())["seconds"]["observers"] >= before >= 0.5
    assert not (run / ".seconds.json").exists()


def test_the_time_that_another_recipe_took_in_the_folder_is_not_a_run_s(tmp_path, session):
    recipe = recipes.parse(["digits"], prog="condense").recipe
    launch.keep(recipe, tmp_path)
    (tmp_path / ".seconds.json").write_text('{"observers": 5.0}')
    for given, seconds in ((recipe, {"observers": 5.0}), (recipe.model_copy(update={"seed": 1}), {})):
        clock = pictures.Clock(session)
        clock.resume(given, tmp_path)
        assert clock.seconds == seconds


def test_the_controls_have_the_schema_of_the_set_and_other_images(finished):
    runs, _ = finished
    rows = {folder: datasets.load_dataset(str(runs / "run" / folder), split="train") for folder in FILES}
    assert len({str(found.features) for found in rows.values()}) == 1
    pixels = {folder: found[0]["image"].tobytes() for folder, found in rows.items()}
    assert pixels["dataset"] != pixels["controls/initial"]
    assert rows["dataset"]["source_rows"] == rows["controls/initial"]["source_rows"]
    draws = [tuple(map(tuple, rows[f"controls/random/{draw}"]["source_rows"])) for draw in range(2)]
    assert draws[0] != draws[1]


def test_control_images_are_the_real_images_of_their_source_rows(finished):
    from edc_hub import source
    from edc_hub.condensed import CondensedSet
    from edc_hub.recipe import Source

    runs, _ = finished
    real = source.load(Source(path="sklearn/digits", size=8))
    for folder in FILES[1:]:
        condensed = CondensedSet.load(runs / "run" / folder)
        rows = datasets.load_dataset(str(runs / "run" / folder), split="train")["source_rows"]
        rows = torch.tensor([row for (row,) in rows])
        assert torch.equal(condensed.images, real.images(rows))
        assert torch.equal(condensed.labels, real.labels[rows])


def test_the_published_recipe_names_nothing_of_this_machine(finished):
    runs, _ = finished
    text = (runs / "run" / "dataset" / "recipe.yaml").read_text()
    for word in ("output_dir", "threads", "device", "checkpoint_seconds", str(runs)):
        assert word not in text
    assert yaml.safe_load(text)["synthesize"]["iterations"] == 12


def test_the_same_command_again_finds_everything_and_changes_nothing(finished, recipe):
    runs, _ = finished
    before = digests(runs)
    stamps = {path: path.stat().st_mtime_ns for path in (runs / "artifacts").rglob("*.safetensors")}
    measured = (runs / "run" / "run.json").read_text()
    assert condense.main(arguments(recipe, runs)) == 0
    assert digests(runs) == before
    assert {path: path.stat().st_mtime_ns for path in (runs / "artifacts").rglob("*.safetensors")} == stamps
    assert (runs / "run" / "run.json").read_text() == measured  # not the time of finding it


def test_two_processes_give_the_bytes_of_one(finished, recipe, tmp_path):
    done = fresh.ranks(2, "edc_hub.condense", *arguments(recipe, tmp_path), env=ENVIRONMENT)
    assert [one.returncode for one in done] == [0, 0], done
    assert digests(tmp_path) == digests(finished[0])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2


def test_torchrun_ends_with_what_its_processes_say(finished, recipe, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["-m", "edc_hub.condense"]
    how = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 300}
    before = digests(finished[0])
    done = subprocess.run([*launcher, *arguments(recipe, finished[0])], **how)  # finds what one process made
    assert done.returncode == 0 and done.stdout.split() == [str(finished[0] / "run/dataset")], done.stderr
    assert digests(finished[0]) == before
    done = subprocess.run([*launcher, *arguments(recipe, tmp_path, "--ipc", "ten")], **how)
    assert done.returncode == 1 and "ipc: expected an integer, got 'ten'; write e.g. --ipc 10" in done.stderr


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from edc_hub import card, condense, condensed, initialize, labels, moments, observers, source, synthesize  # once, here
import datasets, torch, transformers
argv, runs, whole, chance = json.loads(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), random.Random(0)

def attempt(seconds):
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(condense.main(argv))
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0, status
            runs.rename(runs.with_name(f"{runs.name}-{len(list(runs.parent.iterdir()))}"))  # the next begins anew
            return True
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)

kills = 0
while kills < 10:
    kills += attempt(chance.uniform(0.02, 0.4) * whole) is None
attempt(600)
"""


def test_ten_kills_at_random_moments_and_the_same_command_give_the_bytes_of_an_undisturbed_run(
    finished, recipe, tmp_path
):
    runs = tmp_path / "runs"
    whole = sum(json.loads((finished[0] / "run/run.json").read_text())["seconds"].values())
    argv = (json.dumps(arguments(recipe, runs)), runs, whole)
    done = fresh.run(KILLED, *argv, env=ENVIRONMENT, timeout=1500)  # 20 s alone
    assert done.returncode == 0, done.stderr
    places = sorted(tmp_path.iterdir())
    for place in places:
        assert digests(place) == digests(finished[0])
        assert not list(place.rglob("*.progress")) and not list((place / "artifacts").rglob("*.tmp"))


def test_runs_share_what_they_have_in_common(finished, recipe):
    runs, _ = finished
    before = {path.name for path in (runs / "artifacts").rglob("*.safetensors")}
    other = ["--output_dir", str(runs / "other"), "--synthesize.iterations", "3", "--relabel.controls", "false"]
    assert condense.main([*arguments(recipe, runs), *other]) == 0
    added = {path for path in (runs / "artifacts").rglob("*.safetensors") if path.name not in before}
    assert {path.parent.name for path in added} == {"blocks", "views"}
    (runs / "other").rename(runs.parent / f"{runs.name}-other")  # out of the way of the other tests


def refused(capsys, argv):
    """Runs the command in this process; returns its one line of error."""
    assert condense.main(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--synthesize.iteratons", "3"], "synthesize.iteratons: unknown key; did you mean 'iterations'?"),
        (["--ipc", "1000"], "ipc"),
        (["--source.path", "no/such/folder/here"], "source.path: "),
        (["--source.train_split", "training"], "source.train_split: "),
        (["--source.label_column", "digit"], "source.label_column: "),
        ([*ALL, "--observers.networks", "[{name: a, arch: resnet19}]"], "resnet19"),
        ([*ALL, "--observers.networks", "[{name: a, arch: resnet18, weights: no.safetensors}]"], "no.safetensors"),
        (
            ["--dry_run", *ALL, "--observers.networks", "[{name: a, arch: convnet, weights: no.safetensors}]"],
            "observers.networks: a: weights: no file no.safetensors",
        ),
        (["--device", "cuda"], "device: cuda is asked for"),
        (["--output_dir", "~nosuchuser/x"], "output_dir: no home folder for ~nosuchuser/x; write the path in full"),
        (["--output_dir", "a" * 300], "is too long for a path; write a shorter one"),
        (["--source.path", f"/{'a' * 300}"], "is too long for a path; write a shorter one"),
        (["--source.path", "a\0b"], "source.path: 'a\\x00b' is no path: embedded null byte"),
        ([*ALL, "--observers.networks", "[{name: a, arch: resnet18, weights: ~nosuchuser/x}]"], "a: weights: no home"),
        ([*ALL, "--observers.networks", '[{name: a, arch: b, weights: "/a\\0b"}]'], "a text with a zero byte"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_status_2(recipe, tmp_path, capsys, more, expected):
    assert expected in refused(capsys, arguments(recipe, tmp_path, *more))


def test_a_finished_run_is_not_replaced_where_its_source_has_other_images_now(tmp_path, capsys):
    run = condensed(tmp_path, "first", "--relabel.controls", "false")
    before = (run / "dataset/manifest.json").read_bytes()
    again = [str(tmp_path / "toy.yaml"), "--output_dir", str(run), *MACHINE, "--relabel.controls", "false"]
    write_parquet(tmp_path / "toy", {"train": [0, 1, 2] * 12, "test": [0, 1, 2]}, names=NAMES)
    capsys.readouterr()
    line = refused(capsys, again)
    assert f"{run} is finished, of other images than toy has now; give this run another output_dir" in line
    assert (run / "dataset/manifest.json").read_bytes() == before
    write_source(tmp_path / "toy")  # as it was
    assert condense.main(again) == 0 and (run / "dataset/manifest.json").read_bytes() == before
    for damaged in ("", "{}", "[]"):  # is made again from what is there
        (run / "dataset/manifest.json").write_text(damaged)
        assert condense.main(again) == 0 and (run / "dataset/manifest.json").read_bytes() == before


def test_a_finished_set_is_not_replaced_by_one_of_other_weights_of_the_same_file_name(tmp_path, capsys):
    store = condensed(tmp_path, "trained", "--relabel.controls", "false").parent / "artifacts/observers"
    (trained,) = (load_file(file) for file in store.glob("plain-*.safetensors"))
    trained = {key.removeprefix("3/"): value for key, value in trained.items()}
    for place, more in (("one", 0), ("other", 0.01)):
        (tmp_path / place).mkdir()
        state = trained | {"classifier.bias": trained["classifier.bias"] + more}
        save_file(state, tmp_path / place / "net.safetensors")

    def argv(place):
        net = {"name": "plain", "arch": "convnet", "args": {"depth": 1, "width": 8, "norm": "batch"}}
        net["weights"] = str(tmp_path / place / "net.safetensors")
        return ["--relabel.controls", "false", "--observers.networks", json.dumps([net])]

    run = condensed(tmp_path, "first", *argv("one"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.json"}
    again = [str(tmp_path / "toy.yaml"), "--output_dir", str(run), *MACHINE]
    capsys.readouterr()
    assert "is finished, of other images or labels" in refused(capsys, [*again, *argv("other")])
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "one").rename(tmp_path / "moved")
    assert condense.main([*again, *argv("moved")]) == 0
    assert "moved/net.safetensors" in (run / "recipe.yaml").read_text()


def test_a_run_folder_in_use_is_refused(recipe, tmp_path, capsys):
    with disk.lock(tmp_path / "run"):
        assert f"is being written by process {os.getpid()}" in refused(capsys, arguments(recipe, tmp_path))


@pytest.mark.parametrize("mine", ["dataset/photo.png", "controls/random/1/photo.png", "recipe.yaml"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(recipe, tmp_path, capsys, mine):
    file = tmp_path / "run" / mine
    file.parent.mkdir(parents=True)
    file.write_text("name: mine")
    line = refused(capsys, arguments(recipe, tmp_path))
    name = "recipe.yaml" if mine == "recipe.yaml" else mine.removesuffix("/photo.png")
    assert f"output_dir: {tmp_path / 'run' / name} is not of a run and would be replaced" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file] and file.read_text() == "name: mine"


def test_a_dry_run_prints_the_plan_and_writes_nothing(recipe, tmp_path, capsys):
    assert condense.main(arguments(recipe, tmp_path, "--dry_run")) == 0
    out, err = capsys.readouterr()
    assert "no values of its own" not in err  # for the digits edc has some
    for what in ("plain looking at images", "wide in training", "moments of plain", "synthesis by wide", "views"):
        assert f"measuring {what}\n" in err
    for word in ("observers", "moments", "initialize", "synthesize", "relabel", "images", "soft_labels", "disk"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_stream_reads_no_further_than_its_first_images(session, monkeypatch):
    made = Recipe.model_validate({"ipc": 1, "source": {"streaming": True}, "moments": {"batch": 20}})
    real, seen = source.load(made.source), []
    read = real.source.read
    monkeypatch.setattr(real.source, "read", lambda rows: seen.extend(rows) or read(rows))
    plan.project(made, real, {}, session)
    assert seen == list(range(20))


def test_a_projection_is_steps_times_seconds_and_rows_times_bytes(session, monkeypatch):
    monkeypatch.setattr(plan, "seconds_of", lambda *_: 1.0)
    net = {"name": "a", "arch": "convnet", "args": {"depth": 1, "width": 8}, "train": {"epochs": 3, "batch": 50}}
    section = {"ipc": 2, "observers": {"networks": [net]}, "moments": {"batch": 50}}
    section |= {"synthesize": {"iterations": 12, "block": 10}, "relabel": {"epochs": 4, "controls": False}}
    made = Recipe.model_validate(section)
    real = source.load(made.source)
    found, count = plan.project(made, real, plan.untrained(made, 10, session), session), len(real.rows())
    whole = {"observers": 3 * count / 50, "moments": count / 50, "initialize": 0, "synthesize": 12 * 2}
    assert found == pytest.approx(whole | {"relabel": (1 + 1) / 50 * 4 * 20})  # a look and a view
    view = 2 + 4 + 4 * 2 + 1 + (4 + 4 * 2 + 1 + 4 * 2 + 4)  # epoch, image, crop, flip, and the mix
    assert plan.sizes(made, real.images(real.rows()[:32]), 20, 10)["soft_labels"] == (80, 80 * (view + 2 * 10))


def test_what_a_killed_run_was_building_is_not_taken_for_somebody_elses(tmp_path):
    for left in ("controls/random/.2.host.77.tmp", ".dataset.host.77.tmp"):
        (tmp_path / left / "images").mkdir(parents=True)
    launch.refuse_what_is_not_ours(tmp_path)


def test_the_examples_of_the_readme_run_as_they_stand(finished, tmp_path, monkeypatch):
    (tmp_path / "runs/digits-edc-ipc10").parent.mkdir()
    (tmp_path / "runs/digits-edc-ipc10").symlink_to(finished[0] / "run")
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parent.parent / "README.md"
    train, replay, method = [part.split("```")[0] for part in readme.read_text().split("```python\n")[1:]]
    assert train.count("range(30)") == 1
    names: dict = {}
    exec(train.replace("range(30)", "range(2)"), names)
    assert names["loss"].isfinite()
    exec(replay, names)
    assert names["pixels"].shape == (20, 3, 8, 8) and names["logits"].shape == (20, 10)
    exec(method, names)
    pair = torch.tensor([0, 100], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    task = SimpleNamespace(initial=SimpleNamespace(images=pair), recipe=SimpleNamespace(ipc=2), options={"share": 0.2})
    assert names["blend"](task)[:, 0, 0, 0].tolist() == [10, 90]


def test_a_data_set_is_no_folder_for_a_run(toy_run, capsys):
    before = {path: path.read_bytes() for path in toy_run.rglob("*") if path.is_file()}
    for inside in ("dataset", "controls/random/0"):
        argv = [str(toy_run / "recipe.yaml"), "--output_dir", str(toy_run / inside), *MACHINE]
        for more in ([], ["--dry_run"]):
            assert f"output_dir: {toy_run / inside} is a data set" in refused(capsys, [*argv, *more])
    assert {path: path.read_bytes() for path in toy_run.rglob("*") if path.is_file()} == before


def test_artifacts_lie_beside_a_run_in_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "runs/one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs/one")
    for given, place in ((".", "runs"), ("..", "."), ("./", "runs"), ("one", "runs/one"), ("../one", "runs")):
        folder = launch.artifacts(recipes.parse(["digits", "--output_dir", given], prog="condense").recipe)
        assert folder.resolve() == (tmp_path / place / "artifacts").resolve(), given


def test_a_run_on_a_data_set_that_the_method_does_not_know_says_so(toy_run, capsys):
    line = "method edc: it has no values of its own for 'toy'; "
    for recipe, said in ((toy_run.parent.parent / "toy.yaml", True), (toy_run / "recipe.yaml", False)):
        argv = [str(recipe), "--output_dir", str(toy_run.parent / "none"), *MACHINE, "--dry_run"]
        assert condense.main(argv) == 0
        assert (line in capsys.readouterr().err) == said  # all values of a resolved recipe are its own
