"""Every design choice, through the real stages on real digits: each runs, and each changes what it should."""

import copy
from functools import partial

import pytest
import torch
import yaml
from accelerate import PartialState
from test_condense import RECIPE

from edc_hub import condense, initialize, labels, moments, observers, recipes, source, synthesize
from edc_hub.condensed import CondensedSet
from edc_hub.recipe import Source
from edc_hub.work import Session, Store


BASE = copy.deepcopy(RECIPE)
BASE["synthesize"] = {"iterations": 6, "block": 10, "weight": 0.1, "flatness": {"kind": "none"}}
BASE["relabel"] = {"epochs": 2, "batch": 10, "controls": False, "flip": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where runs are made, and the images, opened once."""
    folder = tmp_path_factory.mktemp("choices")
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    return folder, source.load(Source.model_validate(BASE["source"]))


def made(place, *overrides):
    """The images of the recipe, and what labels them, by the stages of the command."""
    folder, real = place
    session = Session(Store(folder / "artifacts"), PartialState(cpu=True), torch.device("cpu"))
    recipe = recipes.parse([str(folder / "base.yaml"), *overrides], prog="condense").recipe
    initialize.check(recipe, real)
    labels.check(recipe, len(real.names))
    started = recipe, real, observers.obtain(recipe, real, session)
    targets = moments.obtain(*started, session) if recipe.synthesize.iterations else None
    images = synthesize.obtain(*started, targets, initialize.obtain(*started, session), session)
    return images, partial(labels.obtain, recipe, images, started[-1], session)


@pytest.fixture(scope="module")
def base(place):
    images, label = made(place)
    return images, label()


def whole(place, name, *overrides):
    common = ["--output_dir", str(place[0] / name), "--threads", "1", "--device", "cpu"]
    assert condense.main([str(place[0] / "base.yaml"), *common, *overrides]) == 0
    return CondensedSet.load(place[0] / name / "dataset")


SYNTHESIS = {
    "per_class": ["--synthesize.class_scope", "per_class"],
    "local": ["--synthesize.class_scope", "local"],
    "plain matching": ["--synthesize.alpha", "1.0"],
    "class form alone": ["--synthesize.alpha", "0.0"],
    "exact": ["--moments.target", "exact"],
    "finite": ["--moments.target", "finite"],
    "pass": ["--moments.bn_target", "pass"],
    "augmented moments": ["--moments.augment", "pad_crop", "--moments.pad", "1"],
    "small patches": ["--moments.patch", "2"],
    "flatness": ["--synthesize.flatness.kind", "logits", "--synthesize.flatness.weight", "20.0"],
    # at tau 4 both spectra of two images are one-hot, and the term gives no gradient
    "densification": ["--synthesize.densification.weight", "100.0", "--synthesize.densification.tau", "1000.0"],
    "jitter": ["--synthesize.jitter", "2"],
    "drop": ["--synthesize.drop_rate", "0.5"],
    "bn": ["--synthesize.layers", "[bn]", "--synthesize.observers", "[plain]"],
    "ema": ["--synthesize.ema", "0.0"],
    "first layer": ["--synthesize.first_layer", "1.0"],
    "across classes": ["--synthesize.block_order", "across_class"],
    "early observer": ["--synthesize.observers", "[plain@1]"],
    "kmeans": ["--initialize.kind", "kmeans", "--initialize.images_per_class", "40"],
    "rded": ["--initialize.kind", "rded", "--initialize.images_per_class", "12", "--initialize.factor", "2"],
    "edc's selector": [
        *["--initialize.kind", "rded", "--initialize.variant", "edc", "--initialize.images_per_class", "12"]
    ],
    "harder crops": [
        *["--initialize.kind", "rded", "--initialize.images_per_class", "12", "--initialize.difficulty", "medium"]
    ],
    "noise": ["--initialize.kind", "noise"],
    "curriculum": ["--synthesize.curriculum.kind", "cosine"],
    "flatness of statistics": ["--synthesize.flatness.kind", "statistics", "--synthesize.flatness.weight", "20.0"],
    "sharpness-aware": ["--synthesize.flatness.kind", "sam", "--synthesize.flatness.rho", "0.5"],
    "total variation": ["--synthesize.tv", "0.1"],
    "squared norm": ["--synthesize.l2", "0.1"],
    "two sizes": ["--synthesize.sizes", "[8, 6]"],
    "mixup of images": ["--synthesize.mix", "mixup"],
    "cutmix of images": ["--synthesize.mix", "cutmix"],
    "cutout": ["--synthesize.mix", "cutout"],
    "drawn observers": ["--synthesize.pick", "random"],
    "accurate observers": ["--synthesize.pick", "accuracy"],
    "both observers": ["--synthesize.together", "2"],
    "residual": ["--synthesize.residual.every", "3"],
    "another seed": ["--seed", "1"],
    "no synthesis": ["--synthesize.iterations", "0"],
}


@pytest.mark.parametrize("name", SYNTHESIS)
def test_a_choice_of_synthesis_changes_the_images(place, base, name):
    images, _ = made(place, *SYNTHESIS[name])
    assert images.shape == base[0].shape == (20, 3, 8, 8)
    assert (images != base[0]).flatten(1).any(1).float().mean() > 0.5


LABELS = {
    "batch statistics": ["--relabel.observer_mode", "batch"],
    "mixup": ["--relabel.mix", "mixup"],
    "unmixed": ["--relabel.mix", "none"],
    "a box each": ["--relabel.mix_shared", "sample"],
    "RandAugment": ["--relabel.rand_augment", "2"],
    "shuffle": ["--relabel.shuffle", "2"],
    "early observers": ["--relabel.observers", "[plain@1]"],
    "mirrored": ["--relabel.flip", "true"],
    "small crops": ["--relabel.crop_area", "[0.1, 0.3]"],
}


@pytest.mark.parametrize("name", LABELS)
def test_a_choice_of_labels_changes_them_and_not_the_images(place, base, name):
    images, label = made(place, *LABELS[name])
    assert torch.equal(images, base[0])
    found = label()
    assert not torch.equal(found.epoch(0)[1], base[1].epoch(0)[1])
    mean_moves = name in ("batch statistics", "early observers")
    assert torch.equal(found.mean, base[1].mean) != mean_moves


def test_smaller_views_are_replayed_at_their_size_and_the_images_of_a_run_are_those_of_its_stages(place, base):
    condensed = whole(place, "views", "--relabel.view_size", "6")
    assert condensed.replay(1).shape == (20, 3, 6, 6) and torch.equal(condensed.images, base[0])


def test_a_holdout_row_is_never_a_source_row(place):
    kept = source.load(Source(path="sklearn/digits", size=8, holdout=0.5), "holdout").rows().tolist()
    held = whole(place, "held", "--source.holdout", "0.5")
    used = {row for rows in held._rows["source_rows"].to_pylist() for row in rows}
    assert used and not used & set(kept)
