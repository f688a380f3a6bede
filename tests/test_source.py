"""Sets made here through `datasets` itself: what a user's folder may look like, and what we read from it."""

import os

import datasets
import numpy as np
import pytest
import torch
from toys import picture, png, write_parquet

from edc_hub import folders, recipe, source
from edc_hub.errors import InputError


def section(path, **keys):
    return recipe.Source(**{"path": str(path), "size": 8, **keys})


def open_set(path, split="train", **keys):
    return source.load(section(path, **keys), split)


def message(path, split="train", **keys) -> str:
    with pytest.raises(InputError) as error:
        open_set(path, split, **keys)
    text = str(error.value)
    assert "\n" not in text and text.startswith("source.")
    return text


@pytest.fixture
def plain(tmp_path):
    """Three classes, 8x8 PNGs, a training and a test split."""
    labels = [0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2, 0]
    write_parquet(tmp_path / "plain", {"train": labels, "test": labels[:6]}, names=["ant", "bee", "cat"])
    return tmp_path / "plain"


def test_columns_and_splits_of_other_names_are_found_by_their_features(tmp_path):
    write_parquet(
        tmp_path / "set", {"learn": [1, 0, 1], "valid": [0, 1]}, image="img", label="kind",
        extra={"id": datasets.Value("int64"), "note": datasets.Value("string")},
    )  # fmt: skip
    real = open_set(tmp_path / "set", train_split="learn")
    assert real.labels.tolist() == [1, 0, 1] and real.names == ["a", "b"] and real.id == "set" and real.commit is None
    assert open_set(tmp_path / "set", "test", train_split="learn", test_split="valid").labels.tolist() == [0, 1]


def test_string_labels_are_classes_in_sorted_order_and_the_test_split_shares_them(tmp_path):
    value = datasets.Value("string")
    write_parquet(
        tmp_path / "set", {"train": ["fig", "elm", "oak"], "test": ["oak", "fig"]}, feature=value, label="tree"
    )
    real = open_set(tmp_path / "set")
    assert real.names == ["elm", "fig", "oak"] and real.labels.tolist() == [1, 0, 2]
    test = open_set(tmp_path / "set", "test")
    assert test.names == real.names and test.labels.tolist() == [2, 1]


def test_integer_labels_without_names_are_classes_and_minus_one_is_none(tmp_path):
    write_parquet(tmp_path / "set", {"train": [7, 3, -1, 30, None]}, feature=datasets.Value("int32"))
    real = open_set(tmp_path / "set")
    assert real.names == ["3", "7", "30"] and real.labels.tolist() == [1, 0, -1, 2, -1]
    assert real.rows().tolist() == [0, 1, 3]
    assert open_set(tmp_path / "set", classes=[30, 3]).labels.tolist() == [-1, 1, -1, 0, -1]


def test_a_test_label_that_training_lacks_is_refused(tmp_path):
    write_parquet(tmp_path / "set", {"train": ["x", "y"], "test": ["z"]}, feature=datasets.Value("string"))
    assert "'z' in split 'test'" in message(tmp_path / "set", "test")


def test_bytes_without_an_image_feature_are_read_when_the_column_is_named(tmp_path):
    table = {"blob": [png(picture(i)) for i in range(2)], "label": ["p", "q"]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "set" / "train.parquet")
    assert "no image column among blob, label" in message(tmp_path / "set")
    for streaming in (False, True):
        real = open_set(tmp_path / "set", image_column="blob", streaming=streaming)
        assert torch.equal(real.images(torch.tensor([1]))[0], picture_tensor(1))


def picture_tensor(seed):
    return torch.from_numpy(np.asarray(picture(seed)).copy()).permute(2, 0, 1)


def test_an_image_folder_is_a_set_streamed_or_not(tmp_path):
    for split in ("train", "test"):
        for label in ("yes", "no"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for seed in range(3):
                path = tmp_path / "set" / split / label / f"{seed}.png"
                picture(seed + 10 * (label == "yes")).save(path)
    stored, streamed = open_set(tmp_path / "set"), open_set(tmp_path / "set", streaming=True)
    assert stored.names == ["no", "yes"] and stored.labels.bincount().tolist() == [3, 3]
    assert stored.fingerprint == streamed.fingerprint and torch.equal(stored.labels, streamed.labels)
    images = stored.images(stored.rows())
    assert torch.equal(images, streamed.images(streamed.rows()))
    assert torch.equal(images[stored.rows(1)[0]], picture_tensor(10))


def test_ambiguous_columns_are_listed(tmp_path):
    two = {"coarse": datasets.ClassLabel(names=["u", "v"])}
    write_parquet(tmp_path / "labels", {"train": [0, 1]}, label="fine", extra=two)
    text = message(tmp_path / "labels")
    assert "label_column" in text and "fine, coarse" in text
    assert open_set(tmp_path / "labels", label_column="coarse").names == ["u", "v"]
    write_parquet(tmp_path / "images", {"train": [0, 1]}, extra={"mask": datasets.Image()})
    text = message(tmp_path / "images")
    assert "image_column" in text and "image, mask" in text


def test_what_is_missing_is_said_with_what_there_is(plain, tmp_path):
    assert "no split 'validation' in plain; there are: train, test" in message(plain, "test", test_split="validation")
    assert "there are: image, label" in message(plain, image_column="picture")
    assert "name a column of class labels" in message(plain, label_column="image")
    assert "Available" in message(plain, name="large")
    assert "no folder" in message(tmp_path / "nowhere")
    assert "is a file" in message(plain / "data" / "train.parquet")
    assert "Hub" in message("someone/something")
    assert "names no set" in message("")
    (tmp_path / "empty").mkdir()
    assert "cannot read" in message(tmp_path / "empty")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "text" / "train.parquet")
    assert "no image column among text, label" in message(tmp_path / "text")
    write_parquet(tmp_path / "bare", {"train": [0, 1]}, label=None)
    assert "no label column" in message(tmp_path / "bare")


def test_an_unlabelled_split_is_refused(tmp_path):
    write_parquet(tmp_path / "set", {"train": [0, 1], "test": [-1, -1], "more": [None, None]})
    assert "split 'test'" in message(tmp_path / "set", "test")
    assert "split 'more'" in message(tmp_path / "set", "test", test_split="more")


def test_classes_are_kept_in_the_order_given(plain):
    real = open_set(plain, classes=["cat", 0])
    assert real.names == ["cat", "ant"]
    assert real.labels.tolist() == [1, -1, 0, -1, 1, 0, 0, -1, 1, -1, 0, 1]
    assert "did you mean 'bee'" in message(plain, classes=["bees"])
    assert "no class 9" in message(plain, classes=[9])
    assert "twice" in message(plain, classes=["ant", 0])


def test_a_class_with_fewer_images_than_ipc_is_named_with_its_count(tmp_path):
    write_parquet(tmp_path / "set", {"train": [0, 0, 0, 1, 2, 2, 2]}, names=["ant", "bee", "cat"])
    real = open_set(tmp_path / "set")
    source.check_ipc(real, 1)
    with pytest.raises(InputError, match="ipc: 3 images a class, but class 'bee' of set has 1"):
        source.check_ipc(real, 3)


def test_the_holdout_is_a_stratified_fixed_part_of_training(tmp_path):
    labels = [0] * 40 + [1] * 20 + [2] * 2 + [3]
    write_parquet(tmp_path / "set", {"train": labels}, names=["a", "b", "c", "d"], shared=png(picture(0)))
    keys = {"holdout": 0.2, "holdout_seed": 1}
    train, held = open_set(tmp_path / "set", **keys), open_set(tmp_path / "set", "holdout", **keys)
    assert held.labels[held.labels >= 0].bincount(minlength=4).tolist() == [8, 4, 1, 0]
    assert torch.equal((train.labels >= 0) ^ (held.labels >= 0), torch.ones(63, dtype=torch.bool))
    assert train.fingerprint != held.fingerprint != open_set(tmp_path / "set").fingerprint
    some = open_set(tmp_path / "set", "holdout", classes=["b"], **keys)
    assert torch.equal(some.rows(), held.rows(1))
    other = open_set(tmp_path / "set", "holdout", holdout=0.2, holdout_seed=2)
    assert not torch.equal(other.rows(), held.rows())
    assert "holdout" in message(tmp_path / "set", "holdout")


def test_two_folders_of_one_name_and_one_rewritten_in_place_give_their_own_rows(tmp_path):
    """`datasets` keys its cache by the basename and the globs of the README."""
    first, second = tmp_path / "x" / "dataset", tmp_path / "y" / "dataset"
    write_parquet(first, {"train": [0, 1]})
    write_parquet(second, {"train": [1, 0]})
    for split in ("data/train.parquet", "README.md"):
        os.utime(second / split, ns=(0, (first / split).stat().st_mtime_ns))
    assert open_set(first).labels.tolist() == [0, 1]
    assert open_set(second).labels.tolist() == [1, 0]
    write_parquet(first, {"train": [1, 1]})
    assert open_set(first).labels.tolist() == [1, 1]


def test_fingerprints_follow_content_and_use_not_place_or_cache(plain, tmp_path, monkeypatch):
    real = open_set(plain)
    moved = tmp_path / "elsewhere" / "other-name"
    moved.parent.mkdir()
    plain.rename(moved)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert open_set(moved).fingerprint == real.fingerprint
    write_parquet(moved, {"test": [0, 1]}, names=real.names)
    write_parquet(moved, {"train": real.labels.tolist(), "other": [0]}, names=real.names)
    assert open_set(moved).fingerprint == real.fingerprint
    for key, value in {"size": 16, "resize": "squash", "classes": ["ant", "bee", "cat"][::-1]}.items():
        assert open_set(moved, **{key: value}).fingerprint != real.fingerprint
    assert open_set(moved, mean=[0.1, 0.2, 0.3], streaming=True).fingerprint == real.fingerprint
    write_parquet(moved, {"train": real.labels.tolist()}, names=real.names, shared=png(picture(99)))
    assert open_set(moved).fingerprint != real.fingerprint


def test_a_huge_local_set_is_fingerprinted_by_names_sizes_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "EXACT", 10)
    monkeypatch.setattr(folders, "SAMPLE", 4)
    file = tmp_path / "a"
    file.write_bytes(bytes(100))
    before = folders.content({"a": file})
    file.write_bytes(bytes(99) + b"1")
    assert folders.content({"a": file}) != before != folders.content({"b": file})


def test_the_digits_need_no_network_and_go_the_same_way():
    train, test = open_set("sklearn/digits", size=16), open_set("sklearn/digits", "test", size=16)
    assert train.id == "sklearn/digits" and train.names == list("0123456789")
    assert len(train.labels) + len(test.labels) == 1797
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert (share - 0.2).abs().max() < 0.005
    images = open_set("sklearn/digits", size=8).images(torch.arange(50))
    assert images.min() == 0 and images.max() == 255 and torch.equal(images[:, 0], images[:, 2])
    streamed = open_set("sklearn/digits", size=16, streaming=True)
    assert streamed.fingerprint == train.fingerprint
    assert torch.equal(streamed.images(torch.tensor([9, 2])), train.images(torch.tensor([9, 2])))


@pytest.mark.parametrize("column", ["label", "size"])
def test_an_image_column_that_holds_no_images_is_refused(tmp_path, column):
    write_parquet(tmp_path / "set", {"train": [0, 1]}, extra={"size": datasets.Value("int64")})
    text = message(tmp_path / "set", image_column=column, label_column="label")
    assert f"source.image_column: '{column}' holds" in text and "name a column of images" in text


def test_a_set_behind_a_linked_folder_that_is_rewritten_gives_its_own_rows(tmp_path):
    """With `configs`, datasets names its cache by folder and globs: the key must see what the link holds."""
    write_parquet(tmp_path / "set", {"train": [0]})  # a README that stays as it is
    (tmp_path / "set" / "data").rename(tmp_path / "unused")
    (tmp_path / "set" / "data").symlink_to(tmp_path / "kept" / "data")
    for labels in ([0, 1, 1], [1, 1, 0, 0]):
        write_parquet(tmp_path / "kept", {"train": labels})
        assert open_set(tmp_path / "set").labels.tolist() == labels


def test_links_to_nothing_and_in_circles_do_no_harm(plain):
    before = folders.files(plain)
    (plain / ".#notes").symlink_to("/nowhere/at/all")
    (plain / "again").symlink_to(plain)
    assert folders.files(plain) == before
    assert len(open_set(plain).labels) == 12


def test_a_full_cache_disk_is_named_with_ways_out(plain, monkeypatch):
    def full(self, **_):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from OSError(28, "No space left")

    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", full)
    text = message(plain)
    assert "no room" in text and "set HF_HOME" in text and "source.streaming: true" in text


def test_the_digits_have_no_configuration_to_name():
    with pytest.raises(InputError, match="source.name: sklearn/digits has no configurations"):
        open_set("sklearn/digits", name="foo")
