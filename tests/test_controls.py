"""Controls of a set that lies beside no run, made again from its source rows and its published observers."""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers_evaluation import MACHINE, condensed
from safetensors.torch import save_file

from edc_hub import comparison, controls, documents, evaluate, observers, recipes, source
from edc_hub.condensed import CondensedSet
from edc_hub.work import Session, Store


FEW = ["--seeds", "0", "--controls", "initial,random"]


@pytest.fixture
def alone(toy_run, tmp_path):
    """Copies a run's dataset folder to where no run is, with its observers' weights published beside it."""
    from accelerate import PartialState

    def copy(run=toy_run):
        place = tmp_path / "downloaded"
        shutil.copytree(run / "dataset", place)
        (place / "results.json").unlink(missing_ok=True)
        given = recipes.resolve(documents.load(run / "recipe.yaml"))
        session = Session(Store(run.parent / "artifacts"), PartialState(cpu=True), torch.device("cpu"))
        own, known = observers.obtain(given, source.load(given.source), session), {}
        for name in ("plain", "other"):
            file = tmp_path / f"{name}.safetensors"
            save_file(own.load(name, 3).module.state_dict(), file)
            known[f"{name}@3"] = {"weights": str(file), "arch": "convnet", "bytes": file.stat().st_size}
        (place / "observers.json").write_text(json.dumps(known))
        return place

    return copy


def run(place, toy_run, out, *more):
    real = ["--source.path", str(toy_run.parent.parent / "toy")]
    argv = ["--dataset", str(place), *real, *FEW, "--output_dir", str(out), *MACHINE, *more]
    assert evaluate.main(argv) == 0
    return json.loads((out / "results.json").read_text())


def test_the_real_set_is_the_one_that_the_set_was_made_from_whatever_was_committed_since(alone):
    place = alone()
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["source"]["commit"] = "0" * 40
    (place / "manifest.json").write_text(json.dumps(manifest))
    carried = {"dataset": [str(place)]}
    assert comparison.resolve(carried).comparison.source.revision == "0" * 40
    other = {**carried, "source": {"path": "somebody/else"}}
    assert comparison.resolve(other).comparison.source.revision is None
    named = {**carried, "source": {"revision": "main"}}
    assert comparison.resolve(named).comparison.source.revision == "main"


def test_labels_of_a_set_whose_method_is_elsewhere_are_made_without_that_method(alone, toy_run, tmp_path):
    place = alone()
    recipe = (place / "recipe.yaml").read_text()
    (place / "recipe.yaml").write_text(recipe.replace("method: edc\n", "method: of_somebody:else_\n"))
    assert "of_somebody" in (place / "recipe.yaml").read_text()
    found = run(place, toy_run, tmp_path / "out")
    assert not {"initial", "random"} & found["about"]["unavailable"].keys()


def test_controls_of_a_downloaded_set_are_those_that_its_run_made(alone, toy_run, tmp_path):
    found = run(alone(), toy_run, tmp_path / "out")
    beside = run(toy_run / "dataset", toy_run, tmp_path / "beside")
    assert "initial" not in found["about"]["unavailable"] and "random" not in found["about"]["unavailable"]
    made = CondensedSet.load(next((tmp_path / "out" / "controls").glob("*/controls/initial")))
    own = CondensedSet.load(toy_run / "controls" / "initial")
    assert torch.equal(made.images, own.images) and torch.equal(made.soft_labels, own.soft_labels)
    for epoch in range(own.epochs):
        assert torch.equal(made.views(epoch)[1], own.views(epoch)[1])
    rows, theirs = (next(iter(each["students"].values()))["rows"] for each in (found, beside))
    for row in ("initial", "random"):
        assert [rows[row][weights] for weights in ("live", "ema")] == [
            theirs[row][weights] for weights in ("live", "ema")
        ]


def test_without_published_observers_controls_are_not_available_and_no_real_image_is_read(alone, toy_run, tmp_path):
    place = alone()
    (place / "observers.json").unlink()
    found = run(place, toy_run, tmp_path / "out")["about"]["unavailable"]
    assert found["initial"] == found["random"] and "observers are not published" in found["initial"]


def test_other_real_images_than_the_set_was_condensed_from_give_no_controls(alone, toy_run, tmp_path):
    found = run(alone(), toy_run, tmp_path / "out", "--source.holdout", "0.5")["about"]["unavailable"]
    assert "has other images here than the set was condensed from" in found["initial"]


def test_images_that_started_from_noise_have_no_initial_real_ones(alone, toy_run, tmp_path):
    noise = condensed(toy_run.parent.parent, "noise", "--initialize.kind", "noise", "--relabel.controls", "false")
    found = run(alone(noise), toy_run, tmp_path / "out")["about"]["unavailable"]
    assert found == {"initial": "the images start from no real ones"} | {
        key: value for key, value in found.items() if key not in ("initial", "random")
    }


def test_controls_of_another_recipe_or_of_an_unfinished_run_are_not_taken_for_the_sets(toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "run")
    ask = partial(controls.find, CondensedSet.load(tmp_path / "run" / "dataset"), "initial", None)
    assert len(ask()[0]) == 1
    manifest = tmp_path / "run/controls/initial/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe_sha256": "of another"}))
    assert ask() == ([], "0 of 1 are there: the run is not finished, its command goes on with it")
