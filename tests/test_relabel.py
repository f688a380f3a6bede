"""Anyone's images as a set of ours: real digits in the layouts that published condensed sets have."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from accelerate import PartialState
from hub import Hub, python
from safetensors.torch import save_file
from toys import write_parquet

from edc_hub import controls, encoding, foreign, given, observers, recipe, recipes, relabel, source
from edc_hub.condensed import CondensedSet
from edc_hub.errors import InputError
from edc_hub.work import Session, Store


NAMES = [str(label) for label in range(10)]
RECIPE = {
    "name": "digits",
    "source": {"path": "sklearn/digits", "size": 8},
    "observers": {
        "train": {"epochs": 3, "snapshots": [1], "batch": 50, "augment": "none", "flip": False},
        "networks": [
            {"name": "plain", "arch": "convnet", "args": {"depth": 2, "width": 16, "norm": "batch"}},
            {"name": "unused", "arch": "convnet", "args": {"depth": 1, "width": 8, "norm": "batch"}},
        ],
    },
    "synthesize": {"observers": ["unused"]},
    "initialize": {"kind": "rded", "factor": 2, "images_per_class": 4, "observers": ["unused"]},
    "relabel": {"epochs": 2, "batch": 10, "flip": False, "observers": ["plain"], "random_draws": 1},
}


@pytest.fixture(scope="module")
def digits():
    return source.load(recipe.Source(**RECIPE["source"]))


@pytest.fixture(scope="module")
def theirs(digits, tmp_path_factory):
    """Three images a class with integer labels, class after class and round after round: uint8 (30, 3, 8, 8)."""
    folder = tmp_path_factory.mktemp("theirs") / "their-digits"
    rows = torch.stack([digits.rows(label)[40:43] for label in range(10)])
    images = digits.images(rows.T.reshape(-1))
    write(folder, images, [i % 10 for i in range(30)])
    return folder, images


def write(folder, images, labels, **options):
    options = {"feature": datasets.Value("int64"), **options}
    write_parquet(folder, {"train": labels}, encoded=[_png(image) for image in images], **options)
    return folder


def _png(image):
    return encoding.encode(image[None], recipe.Images())[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Calls the command with the tiny recipe; artefacts are shared by all tests."""
    runs = tmp_path_factory.mktemp("runs")
    file = runs / "tiny.yaml"
    file.write_text(yaml.safe_dump(RECIPE))

    def call(images, name, *more):
        place = ["--output_dir", str(runs / name), "--threads", "1", "--device", "cpu"]
        return relabel.main([str(file), "--images", str(images), *place, *more]), runs / name

    return call


@pytest.fixture(scope="module")
def made(run, theirs):
    status, folder = run(theirs[0], "made")
    assert status == 0
    return folder


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*") if path.is_file()}


def test_images_come_class_by_class_under_the_names_of_the_source(made, theirs):
    rows = datasets.load_dataset(str(made / "dataset"), split="train")
    assert rows["label"] == [label for label in range(10) for _ in range(3)]
    assert rows.features["label"].names == NAMES
    assert rows["source_rows"] == [[]] * 30 and rows["ipc_index"] == [0, 1, 2] * 10
    loaded = CondensedSet.load(made / "dataset")
    assert torch.equal(loaded.images, theirs[1].view(3, 10, 3, 8, 8).transpose(0, 1).flatten(0, 1))
    right = (loaded.soft_labels.argmax(1) == loaded.labels).float().mean()
    assert right > 0.8  # the observers have learned these classes
    assert loaded.views(1)[1].shape == (30, 10)


def test_the_manifest_says_where_the_images_come_from_and_who_labelled_them(made):
    manifest = json.loads((made / "dataset/manifest.json").read_text())
    assert manifest["method"] == "relabel" and manifest["control"] is None and manifest["ipc"] == 3
    assert manifest["origin"]["id"] == "their-digits" and manifest["source"]["id"] == "sklearn/digits"
    assert [(it["name"], it["roles"]) for it in manifest["observers"]] == [("plain@3", ["relabel"])]
    assert str(made) not in (made / "dataset/recipe.yaml").read_text()


def test_random_real_images_are_the_control_and_unused_observers_are_not_trained(made):
    assert not (made / "controls/initial").exists()
    control = CondensedSet.load(made / "controls/random/0")
    assert control.images.shape == (30, 3, 8, 8) and control.manifest["control"] == "random"
    assert {path.name.split("-")[0] for path in (made.parent / "artifacts/observers").iterdir()} == {"plain"}


def test_the_same_command_again_changes_nothing(run, made, theirs):
    before = digests(made)
    assert run(theirs[0], "made")[0] == 0
    assert digests(made) == before


def test_a_set_of_ours_is_relabelled_and_keeps_its_pixels(run, made, capsys):
    status, folder = run(made / "dataset", "again", "--relabel.controls", "false", "--relabel.observers", "[plain@1]")
    assert status == 0 and capsys.readouterr().out.strip() == str(folder / "dataset")
    first, second = CondensedSet.load(made / "dataset"), CondensedSet.load(folder / "dataset")
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    assert not torch.equal(first.soft_labels, second.soft_labels)
    assert not (folder / "controls").exists()


def test_images_of_another_size_keep_it(run, theirs, tmp_path):
    images = torch.nn.functional.interpolate(theirs[1], scale_factor=2, mode="nearest")
    status, folder = run(write(tmp_path / "large", images, [i % 10 for i in range(30)]), "large")
    assert status == 0
    assert CondensedSet.load(folder / "dataset").images.shape[-1] == 16
    beside = CondensedSet.load(folder / "controls/random/0")
    assert beside.images.shape[-1] == 16
    # as somebody has them who downloads the set and the weights: observers of 8 px look at 16
    place, given_by = shutil.copytree(folder / "dataset", tmp_path / "downloaded"), recipes.of_run(folder)
    session = Session(Store(folder.parent / "artifacts"), PartialState(cpu=True), torch.device("cpu"))
    network = observers.obtain(given_by, source.load(given_by.source), session).load("plain", 3)
    save_file(network.module.state_dict(), tmp_path / "plain.safetensors")
    known = {"plain@3": {"weights": str(tmp_path / "plain.safetensors"), "arch": "convnet", "bytes": 1}}
    (place / "observers.json").write_text(json.dumps(known))
    section = given_by.source.model_copy(update={"size": 16})
    downloaded = CondensedSet.load(place)
    bench = SimpleNamespace(real=source.load(section), source=section, session=session, folder=tmp_path)
    (made,), _ = controls.find(downloaded, "random", bench)
    assert torch.equal(made.images, beside.images) and torch.equal(made.soft_labels, beside.soft_labels)


def test_random_controls_of_another_size_are_of_the_commit_that_the_source_has(run, theirs, tmp_path, monkeypatch):
    asked, original, commit = set(), source.load, "c0ffee" * 6 + "0000"

    def load(section, *split):
        found = original(section, *split)
        if section.path == RECIPE["source"]["path"]:  # as if it were on the Hub
            found.commit = commit
            asked.add((section.size, section.revision))
        return found

    monkeypatch.setattr(source, "load", load)
    images = torch.nn.functional.interpolate(theirs[1], scale_factor=2, mode="nearest")
    status, _ = run(write(tmp_path / "large", images, [i % 10 for i in range(30)]), "pinned")
    assert status == 0 and asked == {(8, None), (16, commit)}


def load(folder, digits, section=None, **options):
    section = section or recipe.Source(**RECIPE["source"])
    return foreign.load(given.Given(images=str(folder), **options), section, digits)


def test_named_classes_are_found_whatever_their_order(digits, theirs, tmp_path):
    names = [*reversed(NAMES), "none of these"]
    labels = [names.index(str(i % 10)) for i in range(30)]
    labels[29] = 10  # a class that the source has not; '9' has two images then
    write(tmp_path / "x", theirs[1], labels, names=names, feature=None)
    found = load(tmp_path / "x", digits, ipc=2)
    assert found.ipc == 2
    assert torch.equal(found.images, theirs[1].view(3, 10, 3, 8, 8)[:2].transpose(0, 1).flatten(0, 1))


def test_the_flags_that_chose_the_images_are_remembered(digits, theirs):
    found = load(theirs[0], digits, ipc=1, label_column="label", size=8)
    assert found.facts["flags"] == "--label_column label --ipc 1 --size 8"
    assert "flags" not in load(theirs[0], digits).facts


@pytest.mark.parametrize("pattern", ["{}", "{:05d}"])
def test_folders_named_by_numbers_are_classes(digits, theirs, tmp_path, pattern):
    for i, image in enumerate(theirs[1]):
        place = tmp_path / "train" / pattern.format(i % 10) / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(_png(image))
    found = load(tmp_path, digits)
    assert torch.equal(found.images, theirs[1].view(3, 10, 3, 8, 8).transpose(0, 1).flatten(0, 1))


def test_numbers_of_chosen_classes_are_those_that_source_classes_lists(theirs, tmp_path):
    section = recipe.Source(**RECIPE["source"], classes=[7, 2])
    write(tmp_path / "x", theirs[1][[2, 7, 12, 17]], [2, 7, 2, 7])
    chosen = source.load(section)
    assert chosen.names == ["7", "2"]
    assert torch.equal(load(tmp_path / "x", chosen, section).images, theirs[1][[7, 17, 2, 12]])
    chosen.names = ["seven", "two"]  # names that say nothing of numbers
    assert torch.equal(load(tmp_path / "x", chosen, section).images, theirs[1][[7, 17, 2, 12]])


def test_images_are_brought_to_a_size_that_is_asked_for(digits, tmp_path):
    write_parquet(tmp_path / "x", {"train": list(range(10))}, feature=datasets.Value("int8"), side=(20, 12))
    with pytest.raises(InputError, match=r"--images: .* not square \(20x12\); write --size 8"):
        load(tmp_path / "x", digits)
    assert load(tmp_path / "x", digits, size=6).images.shape == (10, 3, 6, 6)


def test_images_of_several_sizes_are_refused(digits, theirs, tmp_path):
    encoded = [_png(torch.zeros(3, 8 + (i == 3), 8 + (i == 3), dtype=torch.uint8)) for i in range(10)]
    write_parquet(tmp_path / "x", {"train": list(range(10))}, feature=datasets.Value("int8"), encoded=encoded)
    with pytest.raises(InputError, match=r"of 2 sizes \(8x8, 9x9\); write --size 8"):
        load(tmp_path / "x", digits)


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        ([*range(10), 1], {}, "1 images of class '0', 2 of '1', and a set has as many of each; write --ipc 1"),
        (range(10), {"ipc": 2}, "1 images of class '0', 2 are asked for; write --ipc 1"),
        (range(5), {}, "no class '5' and 4 more of sklearn/digits; it has 5: 0, 1, 2, 3, 4; give"),
        (range(12), {"ipc": 1}, None),  # more classes than the source has: those of its names
    ],
)
def test_classes_must_agree(digits, tmp_path, labels, options, expected):
    write_parquet(tmp_path / "x", {"train": list(labels)}, feature=datasets.Value("int64"))
    if expected is None:
        assert len(load(tmp_path / "x", digits, **options).images) == 10
        return
    with pytest.raises(InputError) as error:
        load(tmp_path / "x", digits, **options)
    assert expected in str(error.value)


def test_a_named_class_without_images_is_refused(digits, tmp_path):
    write_parquet(tmp_path / "x", {"train": [0, 1]}, names=NAMES)
    with pytest.raises(InputError, match="0 images of class '2'; leave it out with source.classes"):
        load(tmp_path / "x", digits)


UNUSED = ["--synthesize.observers", "null", "--initialize.observers", "null"]  # keys that name what is not there


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--label_column", "digit"], "--label_column: no column 'digit'"),
        (["--split", "test"], "--split: no split 'test' in their-digits"),
        (["--images", "no/such/folder"], "--images: no folder"),
        (["--images="], "--images: "),
        (["--ipc", "ten"], "ipc: expected an integer"),
        (["--relabel.shuffle", "4", "--size", "6"], "relabel.shuffle: 4 strips do not divide 6 px"),
        (["--image-colum", "x"], "image_colum: unknown key"),
        (
            [
                "--source.size",
                "32",
                "--observers.networks",
                "[{name: plain, arch: vgg11_bn}, {name: unused, arch: convnet}]",
            ],
            "vgg11_bn: cannot take 8x8 images",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, theirs, capsys, more, expected):
    status, folder = run(theirs[0], "wrong", *more)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert status == 2 and out == "" and len(lines) == 1 and expected in lines[0] and "Traceback" not in err
    assert not (folder / "dataset").exists()


def test_images_must_be_named(capsys):
    assert relabel.main(["digits"]) == 2
    assert "images: none given; write --images FOLDER or --images ORG/NAME" in capsys.readouterr().err


def test_a_finished_set_is_not_replaced_by_one_of_other_images(run, made, theirs, tmp_path, capsys):
    before = digests(made)
    other = write(tmp_path / "other", theirs[1].flip(0), [i % 10 for i in reversed(range(30))])
    for more in ([], ["--dry_run"]):
        assert run(other, "made", *more)[0] == 2
        assert "is finished and of their-digits; give this run another output_dir" in capsys.readouterr().err
    other = write(tmp_path / "their-digits", theirs[1].flip(0), [i % 10 for i in reversed(range(30))])
    assert run(other, "made")[0] == 2 and "their-digits, which has changed since" in capsys.readouterr().err
    assert digests(made) == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, theirs, capsys):
    status, folder = run(theirs[0], "planned", "--dry_run")
    out = capsys.readouterr().out
    assert status == 0 and not folder.exists()
    assert "their-digits: 10 classes, 3 images each, 8 px" in out and "sets: 2\n" in out
    assert re.search(r"soft_labels +60 rows .* MiB before compression, dense\n", out)
    assert re.search(r"\nobservers +[\d.]+ s\nrelabel +[\d.]+ s\ntotal +[\d.]+ s\n", out)


def test_a_set_is_published_once_it_is_labelled(made, theirs, tmp_path):
    code = """
    import contextlib, io, json, sys
    from huggingface_hub import HfApi
    from edc_hub import relabel
    for argv in json.loads(sys.argv[1]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = relabel.main(argv)
        there = [HfApi().repo_exists("org/digits", repo_type="dataset"), HfApi().repo_exists("org/nets-plain")]
        print(json.dumps([status, out.getvalue(), err.getvalue(), there]))
    """
    argv = [str(made.parent / "tiny.yaml"), "--images", str(theirs[0]), "--output_dir", str(made.parent / "pushed")]
    argv += ["--threads", "1", "--device", "cpu", "--relabel.controls", "false", "--relabel.codec", "observers"]
    argv += ["--evaluation.labels", "online", "--evaluation.augment", "own", "--hub.push", "true"]
    place = ["--hub.id", "org/digits", "--hub.observers", "org/nets"]
    calls = [[*argv, *place[:2]], [*argv, *place, "--dry_run"], [*argv, *place]]
    with Hub() as hub:
        done = python(code, hub.url, tmp_path / "home", hub.token, json.dumps(calls))
        alone, dry, pushed = (json.loads(line) for line in done.stdout.splitlines())
        assert alone[0] == 2 and "hub.observers: a set without stored views" in alone[2]
        assert dry[0] == 0 and "create    dataset org/digits\ncommit    model org/nets-plain\n" in dry[1]
        assert "soft_labels" not in dry[1]
        assert pushed[0] == 0, pushed[2]
        assert [call[3] for call in (alone, dry, pushed)] == [[False, False], [False, False], [True, True]]
        files = hub.files("org/digits", "v1.0.0")
        assert json.loads(files["observers.json"])["plain@3"]["weights"] == "org/nets-plain@v1.0.0"
        assert "observers that label" in files["README.md"].decode() and hub.tags("org/nets-plain", "model")


def test_the_recipe_is_printed_and_read_again(run, theirs, tmp_path, capsys):
    assert run(theirs[0], "printed", "--print_recipe")[0] == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    parsed = given.parse([str(tmp_path / "again.yaml"), "--images", str(theirs[0])])
    assert parsed.recipe.method == "relabel" and [net.name for net in parsed.recipe.observers.networks] == ["plain"]
    assert given.resolve(parsed, 3).ipc == 3


def test_a_number_of_images_that_is_given_is_the_recipe_s(run, theirs, capsys):
    assert run(theirs[0], "printed", "--ipc", "1", "--print_recipe")[0] == 0
    assert yaml.safe_load(capsys.readouterr().out)["ipc"] == 1
    one, ten = (given.parse(["tiny-imagenet", "--images", "x", "--ipc", ipc]).recipe for ipc in ("1", "10"))
    assert one.evaluation.epochs != ten.evaluation.epochs  # a value of single IPCs


def test_help_lists_the_keys_of_the_images_and_of_the_recipe(capsys):
    with pytest.raises(SystemExit) as left:
        relabel.main(["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert out.count("  --ipc ") == 1 and "images of each class to take" in out
    assert "--label_column  text or null" in out and "--images.format" in out and "--relabel.epochs" in out


def test_a_run_stands_for_the_set_that_it_made(made, digits):
    ours, same = load(made, digits), load(made / "dataset", digits)
    assert torch.equal(ours.images, same.images) and ours.facts == {**same.facts, "id": made.name}
    assert given.parse(["digits", "--images", str(made)]).recipe.output_dir == "runs/digits-relabel-made"
