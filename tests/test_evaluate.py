"""The evaluation as a user runs it: one tiny set, real students, real processes where these matter."""

import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import fresh
import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from accelerate import tracking
from helpers_evaluation import MACHINE, NAMES, STUDENT, condensed, write_source
from hub import Hub, python
from safetensors.torch import save_file
from torchvision.transforms import v2
from toys import png, write_parquet

from edc_hub import comparison, controls, disk, evaluate, launch, lessons, record, students, teachers, trials, work
from edc_hub.condensed import CondensedSet
from edc_hub.encoding import encode
from edc_hub.errors import InputError
from edc_hub.recipe import Images


ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
FEW = ["--seeds", "0", "--controls", "[]"]


@pytest.fixture(scope="module")
def two(toy_run):
    """A second set, of another seed, beside the first run."""
    return condensed(toy_run.parent.parent, "second", "--seed", "1", "--relabel.random_draws", "1")


@pytest.fixture
def lonely(toy_run, tmp_path):
    """A copy of the set away from its run."""
    shutil.copytree(toy_run / "dataset", tmp_path / "lonely")
    return tmp_path / "lonely"


def run(folder, *more, source=None, out=None):
    """Runs the command in this process; its results.json."""
    argv = ["--dataset", str(folder), *MACHINE, *map(str, more)]
    argv += ["--source.path", str(source)] if source else []
    argv += ["--output_dir", str(out)] if out else []
    assert evaluate.main(argv) == 0
    place = out or (folder if (folder / "controls").is_dir() else folder.parent) / "evaluation"
    return json.loads((place / "results.json").read_text())


def refused(capsys, *argv):
    """Runs the command in this process; its one line of error."""
    capsys.readouterr()
    assert evaluate.main([*map(str, argv), *MACHINE]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0].removeprefix("edc-hub: error: ")


def bench(folder, session, *more):
    parsed = comparison.parse(["--dataset", str(folder), *more])
    return trials.Bench(parsed.comparison, parsed.sets, session, session.store.root.parent)


def told(folder, session, *more, facts=({},)):
    """What results say beside their figures, of students of these facts that nobody trained."""
    parsed = comparison.parse(["--dataset", str(folder), *more])
    made = bench(folder, session, *more)
    trial = trials.Trial("set", "any", 0, 0, 0, made.sets[0])
    done = [trials.Done(trial, {}, {"device": "CPU", "images": 6, "bytes": 1, **own}) for own in facts]
    return record.about(parsed, made, done, session)


def same(results):
    """What must not depend on who made it and how fast."""
    content = json.loads(json.dumps(results))
    content["about"].pop("hardware")
    for student in content["students"].values():
        for row in student["rows"].values():
            for each in row["each"]:
                each.pop("seconds")
    return content


def units(runs):
    return {path: path.stat().st_mtime_ns for path in (runs / "artifacts/students").glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(toy_run, two):
    """All rows of two sets, two students and two seeds; what stdout said."""
    import contextlib
    import io

    from edc_hub import networks  # noqa: F401

    students = json.dumps([STUDENT, {**STUDENT, "name": "wide", "args": {"depth": 1, "width": 12}}])
    argv = [f"{toy_run},{two}", "--seeds", "0,1", "--upper_bound", "--upper_bound_epochs", "1", "--curve_points", "2"]
    argv = ["--dataset", *argv, "--evaluation.students", students, *MACHINE]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert evaluate.main(argv) == 0
    return SimpleNamespace(
        argv=argv, out=out.getvalue(), results=json.loads((toy_run / "evaluation/results.json").read_text())
    )


# Rows


def test_every_student_is_trained_on_every_set_with_every_seed_and_on_all_controls(whole):
    assert set(whole.results["students"]) == {"narrow", "wide"}
    for student in whole.results["students"].values():
        counts = {row: found["n"] for row, found in student["rows"].items()}
        pairs = dict.fromkeys(("set", "initial", "hard_mixed", "hard_unmixed"), 4)
        pairs |= dict.fromkeys(("real_mixed", "real_unmixed"), 2)  # a second set's would be the same students
        assert counts == pairs | {"random": 2 + 1, "upper_bound": 2}  # draws of the first set and of the second
        each = {(one["set"], one["seed"]) for one in student["rows"]["set"]["each"]}
        assert each == {(number, seed) for number in (0, 1) for seed in (0, 1)}
        draws = {(one["set"], one["draw"], one["seed"]) for one in student["rows"]["random"]["each"]}
        assert draws == {(0, 0, 0), (0, 1, 1), (1, 0, 0)}  # which take the seeds in turn
        assert student["margin"]["n"] == 4 and set(student["dd_ranking"]) == {"hlr", "ior", "lrs"}


def test_a_dry_run_says_what_is_missing_and_writes_nothing(whole, toy_run, lonely, capsys):
    root = toy_run.parent.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}

    def said(*argv):
        assert evaluate.main([*map(str, argv), "--dry_run"]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert re.search(r"narrow 0 of 25 0.0 s wide 0 of 25 0.0 s total 0 of 50 0.0 s ", said(*whole.argv))
    out = said(*whole.argv, "--seeds", "0,7")
    assert re.search(r"narrow 12 of 25 [\d.]+ s wide 12 of 25 [\d.]+ s total 24 of 50 [\d.]+ s ", out), out
    sizes = CondensedSet.load(toy_run / "dataset").sizes("stored")
    parts = f"(images {sizes['images']:,}, labels {sizes['labels']:,}, views {sizes['views']:,}, observers 0)"
    assert f"bytes of the set, labels stored: {sum(sizes.values()):,} {parts}" in out
    assert "random: not counted; made first, where it can be" in said(
        "--dataset", lonely, *MACHINE, "--source.path", root / "toy"
    )
    online = [
        "--evaluation.labels",
        "online",
        "--evaluation.teachers",
        "[{name: a, arch: convnet3, train: {epochs: 1}}]",
    ]
    assert refused(capsys, "--dataset", toy_run, *FEW, *online, "--dry_run").startswith("--dry_run: the networks that")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before and not os.path.exists("runs/lonely")


def test_the_same_command_again_trains_nothing_and_says_the_same(whole, toy_run, capsys):
    before = units(toy_run.parent)
    assert evaluate.main(whole.argv) == 0
    assert units(toy_run.parent) == before and capsys.readouterr().out == whole.out
    assert json.loads((toy_run / "evaluation/results.json").read_text()) == whole.results


def test_results_curves_and_the_card_s_table_lie_in_the_run_and_in_every_dataset_folder(whole, toy_run, two):
    text = (toy_run / "evaluation/results.json").read_text()
    for folder in (toy_run / "dataset", two / "dataset"):
        assert (folder / "results.json").read_text() == text
        assert PIL.Image.open(folder / "assets/curves.png").format == "PNG"
        card = (folder / "README.md").read_text()
        section = card.split("## Results\n")[1].split("Prefixes, ")[0]
        assert "edc (batch 4, epochs 2, ema decay 0.5, rand_augment 0)" in section and "margin over (i)" in section
        assert "**wide**" in section and "of the last epoch" in section and "| n |" in section
    assert (toy_run / "evaluation/curves.png").is_file() and str(toy_run) not in text


def test_an_accuracy_is_that_of_the_last_epoch_s_predictions(whole, toy_run, session):
    parsed = comparison.parse(whole.argv[: -len(MACHINE)])
    made = trials.Bench(parsed.comparison, parsed.sets, session, session.store.root.parent)
    session.store.root = toy_run.parent / "artifacts"
    each = whole.results["students"]["wide"]["rows"]["set"]["each"]
    own = [trial for trial in made.trials() if (trial.student, trial.row) == ("wide", "set")]
    assert len(own) == len(each) == 4
    for trial in own:
        tensors, truth = session.store.load(made.unit(trial)), made.test[1]
        (found,) = [one for one in each if (one["set"], one["seed"]) == (trial.set, trial.seed)]
        for name in ("live", "ema"):
            right = [int(a) == int(b) for a, b in zip(tensors[name], truth, strict=True)]
            assert found[name] == round(sum(right) / len(right), 4)
            assert tensors["curve"][-1].tolist()[0] == 2  # measured on the way for the picture alone


def test_what_a_person_wrote_in_the_card_stays(whole, toy_run):
    card = toy_run / "dataset/README.md"
    mine = "\n## My notes\n\nmade on a rainy day\n"
    card.write_text(card.read_text() + mine)
    run(toy_run, *FEW)
    assert card.read_text().endswith(mine) and card.read_text().count("## Results\n") == 1
    card.write_text(card.read_text().removesuffix(mine))


def test_a_holdout_is_measured_for_a_choice_and_is_no_result_of_the_set(whole, toy_run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in (toy_run / "dataset").rglob("*")}
    found = run(toy_run, *FEW, "--split", "holdout", out=tmp_path / "out")
    assert "split holdout of train: protocol edc" in capsys.readouterr().err
    assert found["about"]["split"] == "holdout" and found["about"]["test"]["images"] == 9  # a quarter of 36
    asked = comparison.parse(["--dataset", str(toy_run), "--split", "holdout"])
    assert evaluate.places(asked.comparison, asked.sets[0])[0] == toy_run / "evaluation/holdout"
    assert {path: path.stat().st_mtime_ns for path in (toy_run / "dataset").rglob("*")} == before


def test_a_control_given_as_the_set_leaves_the_set_s_own_results_alone(whole, toy_run):
    before = (toy_run / "dataset/results.json").read_text()
    assert evaluate.main(["--dataset", str(toy_run / "controls/initial"), *FEW, *MACHINE]) == 0
    assert (toy_run / "dataset/results.json").read_text() == before
    assert (toy_run / "evaluation/initial/results.json").is_file()


def test_a_readme_in_the_output_folder_that_is_no_card_is_left_alone(toy_run, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    run(toy_run, *FEW, out=tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n" and (tmp_path / "curves.png").is_file()


def test_another_set_is_no_folder_for_results(toy_run, two, capsys):
    for folder in (two / "dataset", toy_run / "dataset", toy_run / "controls/initial"):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        line = refused(capsys, "--dataset", toy_run, *FEW, "--output_dir", folder)
        assert line.startswith(f"output_dir: {folder} is a data set; choose another")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_set_away_from_its_run_has_no_control_images(lonely, toy_run, tmp_path, capsys):
    found = run(lonely, "--seeds", "0", source=toy_run.parent.parent / "toy", out=tmp_path / "out")
    rows = set(found["students"]["narrow"]["rows"])
    assert rows == {"set", "hard_mixed", "hard_unmixed", "real_mixed", "real_unmixed"}
    assert found["about"]["set"]["id"] == "lonely"
    out = capsys.readouterr().out
    for row in ("(i) initial images", "(ii) random real images"):
        (line,) = [line for line in out.splitlines() if line.startswith(row)]
        assert "not available: it lies beside the run that made the set, and the observers" in line


def test_hard_rows_are_the_set_s_own_images_with_their_classes(toy_run, session):
    made = bench(toy_run, session, "--seeds", "0")
    images = CondensedSet.load(toy_run / "dataset")
    hard = [trial for trial in made.trials() if trial.row.startswith("hard")]
    assert len(hard) == 2
    for trial in hard:
        section = made.section(trial)
        read = made.lessons.read_bytes(trial, section)
        assert read["labels"] == 0 < read["images"]
        assert (read["views"] > 0) == (trial.row == "hard_mixed")  # where they say how images are mixed
        fed = made.lessons.feed(trial, section, seed=1)
        assert section.loss == "ce" and fed.count == 6
        batches = list(fed.epoch(0, torch.Generator().manual_seed(0)))
        assert all(batch.soft is None for batch in batches)
        labels = torch.cat([batch.label for batch in batches])
        assert sorted(labels.tolist()) == images.labels.tolist()
        mixed = torch.cat([batch.share for batch in batches]) < 1
        assert bool(mixed.any()) == (trial.row == "hard_mixed")


def test_real_rows_fill_the_set_s_bytes_with_balanced_classes_and_take_its_steps(toy_run, session):
    made = bench(toy_run, session, "--seeds", "0,1")
    images = CondensedSet.load(toy_run / "dataset")
    budget = sum(images.sizes("stored").values())
    encoding = comparison.recipes.resolve(images.recipe).images
    picked = []
    for seed in (0, 1):
        rows, told = lessons.equal_bytes(made.real, budget, encoding, seed)
        sizes = [len(file) for file in encode(made.real.images(rows), encoding)]
        assert told == sum(sizes)
        assert len(set(rows.tolist())) == len(rows)
        counts = torch.bincount(made.real.labels[rows], minlength=3)
        assert sum(sizes) <= budget and int(counts.max() - counts.min()) <= 1
        if len(rows) < len(made.real.rows()):
            assert sum(sizes) + max(sizes) * 1.2 > budget
        picked.append(rows.tolist())
    assert picked[0] != picked[1]
    few, _ = lessons.equal_bytes(made.real, 900, encoding, 0)
    cost = [len(file) for file in encode(made.real.images(few), encoding)]
    assert sum(cost) <= 900 < sum(cost) + 400 and set(made.real.labels[few].tolist()) == {0, 1, 2}
    assert len(lessons.equal_bytes(made.real, 1, encoding, 0)[0]) == 3  # one a class at least
    real = [trial for trial in made.trials() if trial.row.startswith("real")]
    assert len(real) == 4
    for trial in real:
        fed = made.lessons.feed(trial, made.section(trial), seed=1)
        own = made.lessons.feed(trial._replace(row="set"), made.sections["narrow"], seed=1)
        batches = list(fed.epoch(0, torch.Generator().manual_seed(0)))
        assert fed.steps == own.steps == len(batches) == 2 and {len(batch.x) for batch in batches} == {4}


def test_every_row_takes_the_set_s_steps_where_teachers_need_whole_batches(toy_run, session, monkeypatch):
    beside = replace(session, store=work.Store(toy_run.parent / "artifacts"))  # the observers that label
    made = bench(toy_run, beside, "--seeds", "0", "--evaluation.labels", "online")
    before = {trial.row: made.unit(trial).fingerprint for trial in made.trials()}
    monkeypatch.setattr(teachers.Teachers, "of_batches", True)
    assert all(made.unit(trial).fingerprint != before[trial.row] for trial in made.trials())
    stored = bench(toy_run, beside, "--seeds", "0")
    assert not {stored.unit(trial).fingerprint for trial in stored.trials()} & set(before.values())
    steps = {trial.row: made.lessons.feed(trial, made.section(trial), seed=1).steps for trial in made.trials()}
    assert {"set", "hard_mixed", "real_unmixed"} <= set(steps) and set(steps.values()) == {1}  # 6 images in fours


def test_a_protocol_without_mixing_has_one_row_where_others_have_two(toy_run, tmp_path, capsys):
    small = ["--evaluation.students", json.dumps([STUDENT]), "--evaluation.epochs", "1", "--controls", "hard,real"]
    found = run(toy_run, "--evaluation.protocol", "dc", "--seeds", "0", *small, out=tmp_path)
    assert set(found["students"]["narrow"]["rows"]) == {"set", "real_unmixed"}
    assert found["about"]["protocol"] == "dc (epochs 1)"
    assert found["about"]["bytes"]["labels"] == 0 < found["about"]["bytes"]["images"]


@pytest.mark.parametrize("precision, emulated", [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_bfloat16_that_a_cpu_has_no_instructions_for_is_said(
    toy_run, session, capsys, monkeypatch, precision, emulated
):
    monkeypatch.setattr(launch, "emulates_bfloat16", lambda: emulated)
    bench(toy_run, session, "--evaluation.precision", precision).check()
    said = "evaluation.precision: this CPU emulates bfloat16" in capsys.readouterr().err
    assert said == (emulated and precision == "bfloat16")


def test_labels_may_be_the_means_or_made_online_and_bytes_say_so(toy_run, tmp_path):
    mean = run(toy_run, *FEW, "--evaluation.labels", "mean", out=tmp_path / "mean")["about"]
    online = run(toy_run, *FEW, "--evaluation.labels", "online", out=tmp_path / "online")["about"]
    assert mean["bytes"]["labels"] > 0 == mean["bytes"]["views"] == mean["bytes"]["observers"]
    assert mean["bytes"]["images"] == online["bytes"]["images"]  # the one soft label of each image is no image
    assert online["bytes"]["labels"] == 0 < online["bytes"]["observers"]
    assert online["rows"]["set"]["bytes"] == online["bytes"]["images"] + online["bytes"]["observers"]
    assert online["rows"]["set"]["bytes_of"] == online["bytes"] and mean["rows"]["set"]["bytes_of"] == mean["bytes"]
    assert "labels online" in online["protocol"] and "labels mean" in mean["protocol"]


def test_teachers_are_named_without_the_paths_of_this_machine(toy_run, tmp_path, session):
    networks = bench(toy_run, session).teachers._recipe.observers.networks
    session.store.root = toy_run.parent / "artifacts"
    state = bench(toy_run, session).teachers.networks[0].module.state_dict()
    save_file(state, tmp_path / "judge.safetensors")
    teacher = {
        "name": "judge",
        "arch": "convnet",
        "args": networks[0].args,
        "weights": str(tmp_path / "judge.safetensors"),
    }
    labels = ["--evaluation.labels", "online", "--evaluation.teachers", json.dumps([teacher])]
    about = run(toy_run, *FEW, *labels, out=tmp_path / "out")["about"]
    assert str(tmp_path) not in json.dumps(about["evaluation"])
    assert about["evaluation"]["teachers"][0]["weights"] == "judge.safetensors"


def test_values_for_a_single_student_reach_it_alone(toy_run, session):
    students = json.dumps([STUDENT, "convnet3"])
    made = bench(
        toy_run, session, "--evaluation.students", students, "--evaluation.per_student", "{convnet3: {lr: 0.5}}"
    )
    assert (made.sections["narrow"].lr, made.sections["convnet3"].lr) == (0.001, 0.5)


def test_a_timm_and_a_transformers_student_stand_beside_ours(toy_run, tmp_path):
    vit = {"name": "vit", "arch": "transformers/vit"}
    vit["args"] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit["args"] |= {"image_size": 8, "patch_size": 4}
    cnn = {"name": "timm", "arch": "timm/resnet10t", "args": {"stem_width": 4}}
    found = run(
        toy_run, *FEW, "--evaluation.students", json.dumps([vit, cnn]), "--evaluation.epochs", "1", out=tmp_path
    )
    assert set(found["students"]) == {"vit", "timm"}


@pytest.mark.parametrize("side", [(20, 26), (33, 20), (24, 24)])
def test_test_images_are_resized_and_cut_as_pil_and_torchvision_do(toy_run, session, tmp_path, monkeypatch, side):
    monkeypatch.setattr(students, "TEST_BATCH", 2)
    x, y = np.meshgrid(np.linspace(0, 255, side[0]), np.linspace(0, 255, side[1]))
    image = PIL.Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))  # a value is a place
    splits = {"train": [0, 1, 2] * 4, "test": [2, 0, 1]}
    write_parquet(tmp_path / "toy", splits, names=NAMES, encoded=[png(image)] * 12)
    more = ["--source.path", str(tmp_path / "toy"), "--evaluation.test_resize", "12"]
    images, labels = bench(toy_run, session, *more).test
    assert images.shape == (3, 3, 8, 8) and labels.tolist() == [2, 0, 1]
    expected = np.asarray(v2.Compose([v2.Resize(12), v2.CenterCrop(8)])(image)).transpose(2, 0, 1).astype(float)
    pixel = 255 / (12 * max(side) / min(side))  # of the longer side, which PIL rounds to whole pixels
    assert np.abs(images[0].numpy() - expected).max() <= (0 if side[0] == side[1] else pixel + 2)


def test_a_student_is_another_where_anything_that_decides_it_is(toy_run, session, monkeypatch):
    monkeypatch.setattr(teachers.Teachers, "fingerprints", [])
    made = bench(toy_run, session, *FEW, "--upper_bound")
    trials_of, section = {trial.row: trial for trial in made.trials()}, made.sections["narrow"]
    images = made.sets[0].manifest["images"]

    def mark(row="set", **changes):
        made.sections["narrow"] = section.model_copy(update=changes)
        return made.unit(trials_of[row]).fingerprint

    found = [mark(), mark(lr=0.5), mark(weight_decay=0.5), mark(test_resize=12), mark(precision="bfloat16")]
    found.append(mark(labels="online"))
    monkeypatch.setattr(teachers.Teachers, "fingerprints", ["other"])
    found.append(mark(labels="online"))
    plain, whole = mark(), mark("upper_bound")
    made.real.fingerprint = "other"
    assert mark() == plain and mark("upper_bound") != whole
    for place, key, value in (
        (made.students, "narrow", made.students["narrow"].model_copy(update={"args": {"depth": 1}})),
        (images, "mean", [0.4] * 3),
        (vars(made.comparison), "split", "holdout"),
        (vars(made.judged_on), "fingerprint", "other"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(place, key, value)
            found.append(mark())
    assert len(set(found)) == len(found)


def test_random_images_of_another_seed_are_others(toy_run, two):
    first, second = (CondensedSet.load(run / "controls/random/0").images for run in (toy_run, two))
    assert not torch.equal(first, second)


# Processes


def test_two_processes_give_the_figures_of_one(whole, toy_run, tmp_path):
    folders = [shutil.copytree(toy_run, tmp_path / number / "runs/first", symlinks=True) for number in "12"]
    more = ["--seeds", "0,1", "--controls", "initial"]
    alone = run(folders[0], *more)
    done = fresh.ranks(2, "edc_hub.evaluate", "--dataset", folders[1], *more, *MACHINE, env=ENVIRONMENT)
    assert [one.returncode for one in done] == [0, 0], done
    assert [one.stdout.count("condensed set ") for one in done] == [1, 0]
    together = json.loads((folders[1] / "evaluation/results.json").read_text())
    assert same(alone) == same(together) and together["about"]["hardware"]["processes"] == 2


def test_a_killed_evaluation_goes_on_to_the_same_figures(toy_run, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(toy_run, runs / "first", ignore=shutil.ignore_patterns("evaluation"))  # of other tests
    more = ["--seeds", "0", "--evaluation.epochs", "40", "--controls", "[]", "--checkpoint_seconds", "0"]
    argv = ["--dataset", str(runs / "first"), *more, *MACHINE]
    killed = fresh.start("edc_hub.evaluate", *argv, env=ENVIRONMENT, module=True)
    deadline = time.monotonic() + 120
    while not list(runs.glob("artifacts/students/*.progress")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait(60).returncode == -signal.SIGKILL
    assert list(runs.glob("artifacts/students/*.progress")) and not (runs / "first/evaluation/results.json").exists()
    resumed = run(runs / "first", *more)
    assert not list(runs.rglob("*.progress"))
    shutil.rmtree(runs / "artifacts")
    assert same(run(runs / "first", *more)) == same(resumed)


# Trackers


def test_a_tracker_that_is_not_installed_is_one_line(toy_run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("edc_hub.trackers.find_spec", lambda name: None)
    line = refused(capsys, "--dataset", toy_run, *FEW, "--report_to", "tensorboard", "--output_dir", tmp_path)
    assert line == "report_to: tensorboard is not installed; pip install tensorboard, or remove it"


def test_tensorboard_gets_curves_and_accuracies(toy_run, tmp_path):
    run(toy_run, *FEW, "--report_to", "tensorboard", out=tmp_path)
    assert list((tmp_path / "tracking").rglob("events.out.tfevents*"))


def test_a_tracker_that_fails_costs_neither_table_nor_results(toy_run, tmp_path, capsys, monkeypatch):
    class Broken(tracking.TensorBoardTracker):
        def start(self):
            raise ConnectionError("no route to the tracker\nand more")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Broken)
    argv = ["--dataset", str(toy_run), *FEW, *MACHINE, "--report_to", "tensorboard", "--output_dir", str(tmp_path)]
    assert evaluate.main(argv) == 2
    out, err = capsys.readouterr()
    assert "condensed set" in out and (tmp_path / "results.json").is_file()
    assert "error: report_to: tensorboard failed (no route to the tracker); the results are written" in err
    assert "Traceback" not in err


def test_a_tracker_sees_every_student_and_steps_that_never_go_back(toy_run, tmp_path, monkeypatch, capsys):
    steps, seen = [], {}

    class Tracker:
        requires_logging_directory = False

        def __init__(self, name):
            self.name = name

        def start(self):
            print("the tracker's own words")

        finish = start

        def store_init_configuration(self, values):
            assert values["evaluation.protocol"] == "edc"

        def log(self, values, step):
            steps.append(step)
            seen.update(values)

    monkeypatch.setattr("edc_hub.trackers.find_spec", lambda name: name)
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"wandb": Tracker})
    found = run(toy_run, "--seeds", "0,1", "--controls", "initial", "--report_to", "wandb", out=tmp_path)
    assert steps == sorted(set(steps)) == [0, 1]
    out, err = capsys.readouterr()
    assert "condensed set" in out and "own words" not in out and "own words" in err
    (own,) = found["students"].values()
    for row in ("set", "initial"):
        for each in own["rows"][row]["each"]:
            accuracy = seen[f"narrow/{row}/set0-draw0-seed{each['seed']}/accuracy"]
            assert round(accuracy, 4) == each["live"]


# Mistakes


def test_the_printed_recipe_goes_to_stdout_and_the_row_s_name_to_stderr(toy_run, capsys, tmp_path):
    argv = ["--dataset", str(toy_run), "--print_recipe", "--output_dir", str(tmp_path / "none")]
    assert evaluate.main(argv) == 0
    out, err = capsys.readouterr()
    assert "protocol: edc" in out and "rows are called: edc (batch 4" in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["--evaluation.students", "resnet81"],
            "evaluation.students: resnet81: arch: no network 'resnet81'; did you mean",
        ),
        (["--evaluation.students", "timm/resnet81"], "evaluation.students: timm/resnet81: arch: no network"),
        (["--evaluation.students", "[{arch: alexnet, stem: standard}]"], "alexnet: cannot take 8x8 images"),
        (
            [
                *("--evaluation.students", "[{arch: timm/vit_tiny_patch16_224, args: {img_size: 8, patch_size: 4}}]"),
                *("--evaluation.augment", "own", "--evaluation.view.view_size", "6", "--evaluation.labels", "mean"),
            ],
            "cannot take 6x6 images",
        ),
        (["--evaluation.protocol", "rdd3"], "evaluation.protocol: no protocol 'rdd3'; did you mean 'rd3'?"),
        (["--evaluation.test_resize", "6"], "evaluation.test_resize: 6 is less than the images' 8 px; raise it"),
        (["--source.test_split", "tests"], "source.test_split: no split 'tests' in toy; there are: train, test"),
        (["--source.path", "nobody/nothing"], "source.path: cannot reach 'nobody/nothing' on the Hub"),
        (["--source.size", "12"], "source.size: students see the set's images, which decide it; remove it"),
        (["--source.std", "1,1,1"], "source.std: students see the set's images, which decide it; remove it"),
        (["--source.path", "./nowhere"], "source.path: no folder ./nowhere"),
        (["--device", "cuda"], "device: cuda is asked for"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_status_2(toy_run, tmp_path, capsys, more, line):
    machine = [] if "--device" in more else MACHINE
    capsys.readouterr()
    assert evaluate.main(["--dataset", str(toy_run), *FEW, "--output_dir", str(tmp_path), *machine, *more]) == 2
    out, err = capsys.readouterr()
    errors = [text for text in err.splitlines() if "error:" in text]
    assert out == "" and len(errors) == 1 and line in errors[0] and "Traceback" not in err, err


def test_classes_that_are_not_those_of_the_set_are_one_line(toy_run, tmp_path, capsys):
    source = write_source(tmp_path / "toy", names=["red", "green", "violet"])
    line = refused(capsys, "--dataset", toy_run, *FEW, "--source.path", source, "--output_dir", tmp_path / "out")
    assert "source.path: toy has class 'violet' where the set has 'blue' (3 in the set)" in line


def test_bytes_of_one_real_image_a_class_are_of_all_classes():
    pixels = torch.randint(256, (300, 3, 72, 72), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    encoding = Images(format="jpeg", quality=31)  # as the set is
    real = SimpleNamespace(
        names=list(range(300)),
        rows=lambda label: torch.tensor([label]),
        images=lambda rows: pixels[rows],
        keep=lambda rows: None,
    )
    rows, told = lessons.equal_bytes(real, 1000, encoding, 0)
    assert sorted(rows.tolist()) == list(range(300)) and told == sum(map(len, encode(pixels, encoding)))


def test_a_real_set_beyond_the_memory_is_one_line(toy_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    line = refused(capsys, "--dataset", toy_run, *FEW, "--upper_bound", "--output_dir", tmp_path / "out")
    assert "upper_bound: the real set takes 0.0 GB of memory at 8 px and 0.0 GB are free; leave it out" in line


def test_real_images_of_equal_bytes_beyond_the_memory_are_one_line(toy_run, tmp_path, session, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    argv = ["--dataset", toy_run, "--seeds", "0", "--controls", "real"]
    line = refused(capsys, *argv, "--output_dir", tmp_path / "out")
    assert line.startswith("controls: as much of the real set as fits in the set's bytes takes 0.0 GB of memory")
    monkeypatch.setattr(lessons.Lessons, "bytes", lambda *_: {"images": 500})  # of which a few images fit
    bench(*argv[1:2], session, *argv[2:]).check()


def test_a_newer_format_and_a_set_without_soft_labels_are_one_line(lonely, toy_run, tmp_path, capsys):
    facts = json.loads((lonely / "manifest.json").read_text())
    source = ["--source.path", toy_run.parent.parent / "toy", "--output_dir", tmp_path / "out"]
    files = {path: file for path, file in facts["files"].items() if not path.startswith("soft_labels/")}
    (lonely / "manifest.json").write_text(json.dumps({**facts, "files": files}))
    line = refused(capsys, "--dataset", lonely, *FEW, *source)
    assert "evaluation.labels: stored, but toy carries no soft_labels and mse_ce needs soft labels" in line
    (lonely / "manifest.json").write_text(json.dumps({**facts, "format_version": "99.0"}))
    assert "the set is newer than this edc_hub: its format is 99.0" in refused(capsys, "--dataset", lonely)


def test_label_batches_are_kept_only_where_a_student_s_are_as_large(toy_run, tmp_path, capsys, session):
    labelled = json.loads((toy_run / "dataset/manifest.json").read_text())["soft_labels"]["batch"]
    asked = ["--dataset", toy_run, *FEW, "--output_dir", tmp_path / "out", "--evaluation.shuffled", "batches"]
    line = refused(capsys, *asked, "--evaluation.batch", str(labelled + 1))
    assert line.startswith("evaluation.shuffled: batches") and line.endswith(f"write rows, or batch: {labelled}")
    made = bench(toy_run, session, *FEW, "--evaluation.batch", str(labelled), "--evaluation.shuffled", "batches")
    made.check()
    rows = bench(toy_run, session, *FEW, "--evaluation.batch", str(labelled))
    assert made.unit(made.trials()[0]) != rows.unit(rows.trials()[0])


def test_a_place_without_a_finished_set_is_one_line(toy_run, tmp_path, capsys):
    assert "manifest.json is missing" in refused(capsys, "--dataset", tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(toy_run / "recipe.yaml", tmp_path / "run/recipe.yaml")
    line = refused(capsys, "--dataset", tmp_path / "run")
    assert line.startswith(
        f"dataset: no finished set in {tmp_path / 'run'}, manifest.json is missing; edc-hub condense "
    )


def test_a_comparison_under_way_is_not_disturbed(toy_run, tmp_path, capsys):
    with disk.lock(tmp_path / "out"):
        line = refused(capsys, "--dataset", toy_run, *FEW, "--output_dir", tmp_path / "out")
    assert "is being written by process" in line


def test_a_folder_has_no_revision_and_is_no_recipe(toy_run, capsys):
    line = refused(capsys, "--dataset", toy_run, *FEW, "--revision", "v1.0.0")
    assert f"revision: {toy_run} is a folder, and only sets on the Hub have revisions; remove it" in line
    assert f"write --dataset {toy_run}" in refused(capsys, toy_run, *FEW)


def test_a_set_on_the_hub_that_cannot_be_reached_is_one_line(capsys):
    line = refused(capsys, "--dataset", "nobody/nothing", "--revision", "v9.0.0")  # the tests are offline
    assert line.startswith("nobody/nothing: no folder here, not in the cache at revision v9.0.0, and HF_HUB_OFFLINE")
    line = refused(capsys, "--dataset", "~/out")
    assert line.startswith(
        "~/out: no folder here, and no data set on the Hub can have this name; give the dataset fold"
    )


def test_a_revision_that_is_not_there_and_a_hub_that_cannot_be_reached_are_one_line(tmp_path):
    code = """
    import time
    time.sleep = lambda seconds: None  # before each new attempt
    from edc_hub import comparison, errors
    for id in ("org/toy", "org/cut"):
        try:
            comparison.parse(["--dataset", id, "--revision", "v9.0.0"])
        except errors.InputError as error:
            print(error)
    """
    with Hub() as hub:
        hub.commit("org/toy", {"README.md": b"toy"})
        hub.cut("org/cut", times=math.inf)
        missing, unreachable = python(code, hub.url, tmp_path).stdout.splitlines()
    assert missing.startswith("revision: org/toy has no v9.0.0; see its tags on the Hub")
    assert unreachable.startswith(
        "org/cut: neither a folder here nor a data set on the Hub at revision v9.0.0 that can be reached"
    )


def test_results_of_fewer_students_or_another_protocol_stay_out_of_the_set_s_card(toy_run, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(toy_run, runs / "first", ignore=shutil.ignore_patterns("evaluation"))
    (runs / "first/dataset/results.json").unlink(missing_ok=True)
    for more, epochs in ((["--evaluation.epochs", "1"], 1), ([], 2)):  # the set's own takes a trial's place
        run(runs / "first", "--seeds", "0,1", "--controls", "[]", *more)
        kept = (runs / "first/dataset/results.json").read_text()
        assert f"epochs {epochs}," in json.loads(kept)["about"]["protocol"]
    card = (runs / "first/dataset/README.md").read_text()
    assert "epochs 2," in card
    dc = ["--evaluation.protocol", "dc", "--evaluation.batch", "4", "--evaluation.epochs", "2"]
    for other in (["--seeds", "0"], ["--seeds", "0,1", *dc], ["--seeds", "0,1", "--evaluation.epochs", "1"]):
        run(runs / "first", *other, "--controls", "[]", "--evaluation.students", json.dumps([STUDENT]))
        assert "keeps its results" in capsys.readouterr().err
        assert (runs / "first/dataset/results.json").read_text() == kept
        assert (runs / "first/dataset/README.md").read_text() == card
    assert (runs / "first/evaluation/dc/results.json").is_file()  # beside, not in the place of the set's own protocol


def test_a_holdout_of_other_training_images_than_the_set_s_is_refused(toy_run, tmp_path, capsys):
    shutil.copytree(toy_run / "dataset", tmp_path / "downloaded")
    argv = ["--dataset", tmp_path / "downloaded", *FEW, "--split", "holdout", "--controls", "[]"]
    argv += ["--output_dir", tmp_path / "out", "--source.path"]
    assert evaluate.main([*map(str, argv), str(toy_run.parent.parent / "toy"), *MACHINE]) == 0
    write_parquet(tmp_path / "toy", {"train": [0, 1, 2] * 12, "test": [0, 1, 2]}, names=NAMES)  # of the same labels
    line = refused(capsys, *argv, tmp_path / "toy")
    assert line.startswith("split: holdout, but toy has other images here than the set was condensed from and may")


def test_figures_on_other_images_than_the_set_s_test_split_are_named_and_are_no_results_of_it(
    toy_run, tmp_path, capsys
):
    runs = tmp_path / "runs"
    shutil.copytree(toy_run, runs / "first", ignore=shutil.ignore_patterns("evaluation", "results.json"))
    card = (runs / "first/dataset/README.md").read_text()
    found = run(runs / "first", *FEW, "--source.test_split", "train")["about"]
    out, err = capsys.readouterr()
    assert "toy, split train (not the test images of the set's own recipe), 36 images" in out and "gets no res" in err
    assert (found["split"], found["test"]["split"], found["own_protocol"]) == ("test", "train", False)
    assert (
        not (runs / "first/dataset/results.json").exists() and (runs / "first/dataset/README.md").read_text() == card
    )
    moved = run(runs / "first", *FEW, source=write_source(tmp_path / "elsewhere/toy"))["about"]
    assert (
        moved["own_protocol"] and (runs / "first/dataset/results.json").is_file()
    )  # the same images in another folder


def test_other_images_without_a_training_split_are_refused_before_a_student_is_trained(toy_run, session, tmp_path):
    write_parquet(tmp_path / "other", {"test": [0, 1, 2]}, names=NAMES)
    made = bench(toy_run, session, *FEW, "--source.path", str(tmp_path / "other"))
    with pytest.raises(InputError, match="^source.train_split: no split 'train' in other"):
        made.check()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "shorter side 8, centre crop 8"),
        (["--evaluation.test_resize", "12"], "shorter side 12, centre crop 8"),
        (["--source.resize", "squash"], "squashed to 8x8"),
        (["--source.resize", "squash", "--evaluation.test_resize", "12"], "squashed to 12x12, centre crop 8"),
    ],
)
def test_the_transform_of_test_images_is_the_one_that_they_went_through(toy_run, session, more, said):
    assert told(toy_run, session, *more)["test"]["transform"] == said


def test_papers_figures_stand_beside_students_and_images_that_are_theirs(toy_run, session):
    students = [{"name": "r", "arch": "resnet18", "stem": "standard"}, {"name": "plain", "arch": "resnet18"}]
    more = ["--evaluation.students", json.dumps(students)]
    assert told(toy_run, session, *more)["published_as"] == {"plain": "resnet18"}
    assert told(toy_run, session, *more, "--source.test_split", "train")["published_as"] == {}


def test_hardware_and_versions_are_those_that_students_were_trained_with(toy_run, session):
    here = launch.machine(session)
    other = {"hardware": {**here["hardware"], "threads": 99}, "versions": {**here["versions"], "torch": "1.0"}}
    about = told(toy_run, session, facts=[other])
    assert about["hardware"]["threads"] == 99 and about["versions"]["torch"] == "1.0"
    mixed = told(toy_run, session, facts=[here, {**other, "device": "TPU"}])
    assert mixed["hardware"]["threads"] == f"{here['hardware']['threads']}, 99"
    assert mixed["hardware"]["device"] == "CPU, TPU" and mixed["versions"]["timm"] == here["versions"]["timm"]


def test_students_whose_machine_was_not_kept_are_not_said_to_be_of_this_one(toy_run, session):
    about = told(toy_run, session, facts=[{}, launch.machine(session)])
    assert told(toy_run, session)["versions"]["torch"] == "unknown" and "unknown" in str(about["hardware"]["threads"])


def test_a_set_is_called_by_its_run_whichever_of_its_folders_is_named(toy_run, session, monkeypatch):
    assert {told(place, session)["set"]["id"] for place in (toy_run, toy_run / "dataset")} == {toy_run.name}
    monkeypatch.chdir(toy_run / "dataset")
    assert told(".", session)["set"]["id"] == toy_run.name


def test_controls_are_looked_up_once_for_all_students(toy_run, session, monkeypatch):
    asked, find = [], controls.find
    monkeypatch.setattr(controls, "find", lambda *given: asked.append(given[1]) or find(*given))
    made = bench(toy_run, session, "--evaluation.students", json.dumps([STUDENT, {**STUDENT, "name": "other"}]))
    found = {trial.student: trial.images for trial in made.trials() if trial.row == "initial"}
    assert asked == ["initial", "random"] and found["narrow"] is found["other"]


def test_students_have_the_threads_of_the_run_that_made_the_set(toy_run, lonely):
    def threads(*argv):
        return comparison.parse(["--dataset", *map(str, argv)]).comparison.threads

    assert (threads(toy_run), threads(toy_run, "--threads", 2), threads(lonely)) == (1, 2, None)
