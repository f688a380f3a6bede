"""The dataset folder: what `load_dataset` and `CondensedSet` read of it, its bytes, its card, and what is refused."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from datasets import load_dataset
from helpers_labels import CLASSES, COUNT, IPC, RELABEL, Observers, noise, real, recipe, written
from PIL import Image, JpegImagePlugin

from edc_hub import CondensedSet, contents, encoding, labels, recipes, showcase, tables
from edc_hub.errors import InputError
from edc_hub.recipe import Images


def content(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def load(tmp_path):
    return lambda folder, *config, **options: load_dataset(
        str(folder), *config, split="train", cache_dir=str(tmp_path / "cache"), **options
    )


def test_load_dataset_reads_the_images_with_their_names_and_mean_labels(dataset, load, session):
    rows = load(dataset)
    assert rows.column_names == ["image", "label", "image_id", "ipc_index", "source_rows", "soft_label"]
    assert rows.features["label"].names == real(CLASSES).names
    assert rows["label"][:] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert rows["image_id"][:] == list(range(10)) and rows["ipc_index"][:] == [0, 1] * 5
    assert rows["source_rows"][0] == [100] and rows["source_rows"][9] == [109, 4]  # -1 stands for no row
    assert [np.asarray(image).tolist() for image in rows["image"]] == noise(COUNT, 16).permute(0, 2, 3, 1).tolist()
    row = rows.with_format("torch")[3]
    assert row["image"].dtype == torch.uint8 and torch.equal(row["image"], noise(COUNT, 16)[3])
    assert row["soft_label"].shape == (CLASSES,)
    types = {name: str(rows.features[name].dtype) for name in ("image_id", "ipc_index")}
    assert types == {"image_id": "int32", "ipc_index": "int16"}
    assert str(rows.features["soft_label"]) == "List(Value('float16'), length=5)"


def test_load_dataset_reads_the_labelled_views(dataset, load):
    rows = load(dataset, "soft_labels")
    lists = {"crop": 4, "mix_crop": 4, "mix_box": 4, "augment": 4, "mix_augment": 4, "shuffle": 4, "mix_shuffle": 4}
    plain = {
        "epoch": "int16", "image_id": "int32", "flip": "bool", "mix_image_id": "int32", "mix_flip": "bool",
        "mix_lam": "float32",
    }  # fmt: skip
    expected = {name: f"Value('{dtype}')" for name, dtype in plain.items()}
    expected |= {name: f"List(Value('int16'), length={length})" for name, length in lists.items()}
    expected["soft_label"] = "List(Value('float16'), length=5)"
    assert {name: repr(feature) for name, feature in rows.features.items()} == expected
    assert rows["epoch"][:] == [0] * COUNT + [1] * COUNT
    assert load(dataset, "soft_labels", streaming=True).with_format("torch").batch(5).features is not None


def test_the_folder_loads_without_a_network_and_without_edc_hub(dataset, tmp_path):
    program = (
        "import sys, datasets\n"
        f"print(datasets.load_dataset({str(dataset)!r}, 'images')['train'].num_rows,"
        f" datasets.load_dataset({str(dataset)!r}, 'soft_labels')['train'].num_rows, 'edc_hub' in sys.modules)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = fresh.run(program, env=env, cwd=tmp_path)
    assert done.stdout.split() == ["10", "20", "False"], done.stderr


def test_two_folders_of_one_name_are_not_taken_for_each_other(session, tmp_path, load):
    first = written(tmp_path / "one" / "dataset", session)
    other = written(tmp_path / "two" / "dataset", session, images=noise(COUNT, 16, seed=8))
    for config, column in (("images", "soft_label"), ("soft_labels", "soft_label")):
        assert load(first, config)[column][:] != load(other, config)[column][:]


def test_a_folder_rewritten_in_place_is_read_anew(session, tmp_path, load):
    folder = written(tmp_path / "dataset", session)
    before = {config: load(folder, config)["soft_label"][:] for config in ("images", "soft_labels")}
    shutil.rmtree(folder)
    written(folder, session, images=noise(COUNT, 16, seed=8))
    after = {config: load(folder, config)["soft_label"][:] for config in ("images", "soft_labels")}
    assert before["images"] != after["images"] and before["soft_labels"] != after["soft_labels"]
    image = load(folder).with_format("torch")[0]["image"]
    assert torch.equal(image, noise(COUNT, 16, seed=8)[0])


def test_equal_inputs_give_equal_bytes_also_in_another_process(dataset, tmp_path):
    program = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from accelerate import PartialState; from edc_hub.work import Session, Store\n"
        "out = Path(sys.argv[2])\n"
        "from helpers_labels import written\n"
        "written(out / 'dataset', Session(Store(out / 'a'), PartialState(cpu=True), torch.device('cpu')))"
    )
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": str(here.parent), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program, here, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "dataset") == content(dataset)


def test_a_folder_that_holds_this_set_is_left_alone(session, tmp_path):
    folder = written(tmp_path / "dataset", session)
    inode = folder.stat().st_ino
    (folder / "results.json").write_text("{}")
    (tmp_path / ".dataset.host.1.tmp").mkdir()  # of a run that was killed
    written(folder, session)
    assert folder.stat().st_ino == inode and (folder / "results.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "dataset"]


@pytest.fixture
def released(session, tmp_path, monkeypatch):
    """A finished set with what was measured of it, and libraries of another release than those that wrote it."""
    folder = written(tmp_path / "dataset", session)
    for path, text in {"results.json": "{}", "observers.json": "{}", "assets/curves.png": "curves"}.items():
        (folder / path).write_text(text)
    with open(folder / "README.md", "a") as file:
        file.write("\n## Contact\n\nMe.\n")
    monkeypatch.setattr("edc_hub.manifest.version", lambda name: "99.0")
    return folder


def test_a_finished_set_stays_as_it_is_where_another_release_of_a_library_gives_the_same_rows(session, released):
    before = content(released)
    written(released, session)
    assert content(released) == before
    assert sorted(path.name for path in released.parent.iterdir()) == ["artifacts", "dataset"]


def test_a_finished_set_is_never_replaced_by_other_rows_whatever_the_releases(session, released):
    before = content(released)
    for other in ({"epochs": 3}, {"images": noise(COUNT, 16, seed=8)}):
        with pytest.raises(InputError, match="is finished, of other images or labels than this recipe gives now"):
            written(released, session, **other)
        assert content(released) == before
    assert sorted(path.name for path in released.parent.iterdir()) == ["artifacts", "dataset"]


def test_a_damaged_or_half_written_folder_is_written_again(session, tmp_path):
    folder = written(tmp_path / "dataset", session)
    whole = content(folder)
    (folder / "images/train-00000-of-00001.parquet").write_bytes(b"")
    (tmp_path / ".dataset.host.1.tmp").mkdir()
    written(folder, session)
    assert content(folder) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "dataset"]
    (folder / "manifest.json").write_text("{}")
    written(folder, session)
    assert content(folder) == whole


def test_a_failed_write_leaves_the_finished_set_as_it_was(session, tmp_path, monkeypatch):
    folder = written(tmp_path / "dataset", session)
    whole = content(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "label_rows", full)
    with pytest.raises(OSError):
        written(folder, session, images=noise(COUNT, 16, seed=8))
    assert content(folder) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "dataset"]


def test_a_full_disk_is_one_clear_line(session, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_, **__):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.pq, "ParquetWriter", Full)
    with pytest.raises(InputError, match="disk is full"):
        written(tmp_path / "dataset", session)


def test_the_manifest_says_what_the_set_was_made_from(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["format_version"] == "1.0"
    assert (manifest["name"], manifest["method"], manifest["ipc"], manifest["seed"]) == ("toy", "edc", 2, 0)
    assert manifest["classes"] == real(CLASSES).names
    assert manifest["source"]["commit"] == real(CLASSES).commit and manifest["source"]["fingerprint"] == "f" * 16
    assert manifest["images"] == {
        "count": 10, "size": 16, "format": "png", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    assert [observer["name"] for observer in manifest["observers"]] == ["a@3", "b@3"]
    assert (
        manifest["observers"][0]["roles"] == ["relabel", "synthesize"] and manifest["observers"][0]["sha256"] == "a3"
    )
    soft = manifest["soft_labels"]
    assert soft["codec"] == "dense" and soft["view_version"] == 1 and soft["view_size"] == 16
    assert soft["epochs"] == 2 and soft["randaugment"]["operations"][5]["name"] == "Rotate"
    assert {"edc_hub", "python", "torch", "torchvision", "datasets", "transformers", "timm"} <= set(
        manifest["versions"]
    )
    assert manifest["recipe_sha256"] == hashlib.sha256((dataset / "recipe.yaml").read_bytes()).hexdigest()
    for path, facts in manifest["files"].items():
        assert facts["sha256"] == hashlib.sha256((dataset / path).read_bytes()).hexdigest()
        assert facts["bytes"] == (dataset / path).stat().st_size
    assert {path: facts["rows"] for path, facts in manifest["files"].items()} == {
        "images/train-00000-of-00001.parquet": 10, "soft_labels/train-00000-of-00001.parquet": 20,
    }  # fmt: skip


def test_a_condensed_set_reads_back_what_was_written(dataset, session):
    found = CondensedSet.load(dataset)
    assert torch.equal(found.images, noise(COUNT, 16))
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and found.labels.dtype == torch.int64
    assert (found.ipc, found.epochs, found.names) == (2, 2, real(CLASSES).names)
    made = labels.obtain(recipe(IPC, relabel=RELABEL), found.images, Observers(CLASSES), session)
    assert torch.equal(found.soft_labels, made.mean.float())
    for epoch in range(2):
        (table, logits), (want, soft) = found.views(epoch), made.epoch(epoch)
        assert list(table) == list(want) and all(torch.equal(table[name], want[name]) for name in want)
        assert all(table[name].dtype == want[name].dtype for name in want)
        assert torch.equal(logits, soft.float())


def test_the_pixels_replayed_from_the_folder_give_its_labels(dataset):
    found, networks = CondensedSet.load(dataset), Observers(CLASSES).networks
    for epoch in range(2):
        x, (_, logits) = found.replay(epoch), found.views(epoch)
        assert x.shape == (COUNT, 3, 16, 16) and x.dtype == torch.float32
        mean = (networks["a"](x) + networks["b"](x)) / 2
        torch.testing.assert_close(mean, logits, atol=1e-6, rtol=2**-10)


def test_large_sets_are_cut_into_shards_and_read_back_whole(session, tmp_path, load, monkeypatch):
    monkeypatch.setattr(tables, "SHARD_BYTES", 1000)
    monkeypatch.setattr(tables, "ROWS", 1)
    folder = written(tmp_path / "dataset", session, epochs=5)
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = [path for path in manifest["files"] if path.startswith("soft_labels/")]
    assert len(shards) == 5 and shards[-1] == "soft_labels/train-00004-of-00005.parquet"
    assert len(manifest["files"]) > 6
    assert load(folder, "soft_labels")["epoch"][:] == [e for e in range(5) for _ in range(COUNT)]
    found = CondensedSet.load(folder)
    assert torch.equal(found.images, noise(COUNT, 16))
    assert found.views(3)[0]["epoch"].unique().tolist() == [3]


@pytest.mark.parametrize(
    ("size", "kind", "expected"), [(64, "jpeg", "PNG"), (72, "jpeg", "JPEG"), (72, "webp", "WEBP")]
)
def test_images_are_png_up_to_64_pixels_and_as_asked_above(size, kind, expected):
    x = torch.linspace(20, 230, size).round().to(torch.uint8)
    images = torch.stack([x.expand(size, size), x[:, None].expand(size, size), x.expand(size, size).flip(1)])[None]
    files = encoding.encode(images, Images(format=kind, quality=95))
    image = Image.open(io.BytesIO(files[0]))
    assert image.format == expected
    assert expected != "JPEG" or JpegImagePlugin.get_sampling(image) == 0  # colour planes as large as the image
    error = (encoding.decode(files).int() - images.int()).abs()
    assert error.max() == 0 if expected == "PNG" else error.float().mean() < 2


def test_labels_are_those_of_the_stored_jpeg_not_of_the_pixels_before_it(session, tmp_path):
    pixels = noise(COUNT, 72)
    folder = written(tmp_path / "dataset", session, size=72, images=pixels, encoding={"format": "jpeg", "quality": 60})
    found, networks = CondensedSet.load(folder), Observers(CLASSES).networks
    assert not torch.equal(found.images, pixels)
    x = found.images.float() / 255
    torch.testing.assert_close((networks["a"](x) + networks["b"](x)) / 2, found.soft_labels, atol=1e-6, rtol=2**-10)


def test_a_folder_has_no_revisions(dataset):
    with pytest.raises(InputError, match="revision: .* is a folder, and only sets on the Hub have revisions; remove"):
        CondensedSet.load(dataset, revision="v1.0.0")


def test_a_newer_format_is_refused_with_the_side_that_is_old(dataset, tmp_path):
    newer = json.loads((dataset / "manifest.json").read_text()) | {"format_version": "3.0"}
    (tmp_path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match=r"newer than this edc_hub.*3\.0.*reads up to 2\.0.*upgrade"):
        CondensedSet.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(newer | {"format_version": "1.7"}))
    assert CondensedSet.load(tmp_path).ipc == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": "x"}', '{"format_version": "1.0"}', '{"form'])
def test_a_broken_manifest_is_refused(dataset, tmp_path, text):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/manifest.json").write_text(text)
    for name in ("README.md", "recipe.yaml"):
        shutil.copy(dataset / name, tmp_path / "dataset" / name)
    shutil.copy(dataset / "recipe.yaml", tmp_path / "recipe.yaml")
    for read in (
        lambda: CondensedSet.load(tmp_path / "dataset"),
        lambda: recipes.of_run(tmp_path),
        lambda: contents.dataset(tmp_path / "dataset", "some/name"),
        lambda: contents.observers(tmp_path / "dataset", "some/name", [], []),
        lambda: showcase.publish(tmp_path / "dataset", []),
    ):
        with pytest.raises(InputError, match="dataset/manifest.json: not the manifest"):
            read()


def test_a_set_whose_recipe_is_of_something_else_is_refused_with_the_file(dataset, tmp_path):
    (tmp_path / "manifest.json").write_bytes((dataset / "manifest.json").read_bytes())
    (tmp_path / "recipe.yaml").write_text("name: toy")
    with pytest.raises(InputError, match="recipe.yaml: not the recipe of a condensed set, no section source"):
        _ = CondensedSet.load(tmp_path).recipe


@pytest.mark.parametrize("newer", [{"view_version": 2}, {"randaugment": {"bins": 32}}])
def test_views_of_a_newer_version_are_refused_and_the_images_are_read(dataset, tmp_path, newer):
    shutil.copytree(dataset, tmp_path / "set")
    facts = json.loads((dataset / "manifest.json").read_text())
    facts["soft_labels"] |= newer
    (tmp_path / "set/manifest.json").write_text(json.dumps(facts))
    condensed = CondensedSet.load(tmp_path / "set")
    assert torch.equal(condensed.images, CondensedSet.load(dataset).images) and len(condensed.soft_labels) == 10
    for read in (lambda: condensed.replay(0), lambda: condensed.views(0), lambda: condensed.labelled(0, 2)):
        with pytest.raises(InputError, match="soft_labels: views of toy are those of another edc_hub"):
            read()


def test_a_folder_without_a_finished_set_is_refused_with_a_hint(dataset, tmp_path):
    with pytest.raises(InputError, match="manifest.json is missing; give a finished run, or its dataset folder"):
        CondensedSet.load(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(InputError, match=f"edc-hub condense {tmp_path}/recipe.yaml goes on with the run"):
        CondensedSet.load(tmp_path)
    assert CondensedSet.load(dataset.parent).manifest == CondensedSet.load(dataset).manifest
    with pytest.raises(InputError, match="nowhere/at-all: no folder here, not in the cache, and HF_HUB_OFFLINE is"):
        CondensedSet.load("nowhere/at-all")
    with pytest.raises(InputError, match="missing: no folder here, and no data set on the Hub can have this name"):
        CondensedSet.load(str(tmp_path / "missing"))


def test_a_set_with_a_missing_file_is_refused(session, tmp_path):
    folder = written(tmp_path / "dataset", session)
    (folder / "images/train-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="train-00000-of-00001.parquet: missing"):
        _ = CondensedSet.load(folder).images


def test_a_set_with_a_file_cut_short_is_refused(session, tmp_path):
    folder = written(tmp_path / "dataset", session)
    file = folder / "images/train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match="train-00000-of-00001.parquet: not of the size"):
        _ = CondensedSet.load(folder).images


def test_a_label_epoch_that_is_not_there_is_refused(dataset):
    for epoch in (-1, 2):
        with pytest.raises(InputError, match="give 0 to 1"):
            CondensedSet.load(dataset).views(epoch)
