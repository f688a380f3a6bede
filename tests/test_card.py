"""The card of a condensed set: metadata the Hub accepts, facts of the set alone, and code that runs as it stands."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers_labels import CLASSES, COUNT, IPC, noise, written
from huggingface_hub import DatasetCard
from PIL import Image

from edc_hub import CondensedSet
from edc_hub.card import with_results


def test_the_card_has_valid_metadata_and_only_facts_of_the_set(dataset):
    card = DatasetCard.load(dataset / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other" and data["task_categories"] == ["image-classification"]
    assert data["size_categories"] == ["n<1K"] and data["source_datasets"] == ["extended|toys/blocks"]
    assert "ipc-2" in data["tags"] and "dataset-distillation" in data["tags"]
    assert [config["config_name"] for config in data["configs"]] == ["images", "soft_labels"]
    assert data["configs"][0]["default"] is True
    assert [info["splits"][0]["num_examples"] for info in data["dataset_info"]] == [10, 20]
    for part in (
        "assets/grid.png",
        "https://huggingface.co/datasets/toys/blocks",
        "## License",
        "@inproceedings",
        "75.0 %",
    ):
        assert part in card.text
    assert not re.search(r"\{\{|\}\}|\{%|None|Undefined", card.text)


def test_the_example_of_the_card_trains_a_student(dataset, tmp_path):
    text = DatasetCard.load(dataset / "README.md").text
    example = re.search(r"```python\n(import timm.*?)```", text, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line and "import" not in line]) <= 10
    check = "\nassert logits.shape == (10, 5) and torch.isfinite(loss)\nprint('trained', epoch + 1)"
    env = {**os.environ, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", example + check], env=env, cwd=dataset.parent, capture_output=True, text=True
    )
    assert done.stdout.split() == ["trained", "2"], done.stderr


def test_the_replay_of_the_card_runs(dataset, monkeypatch):
    text = DatasetCard.load(dataset / "README.md").text
    replay = re.search(r"```python\n(from edc_hub.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(dataset.parent)
    names: dict = {}
    exec(replay, names)
    assert names["x"].shape == (COUNT, 3, 16, 16) and names["logits"].shape == (COUNT, CLASSES)


@pytest.mark.parametrize("control", ["initial", "random"])
def test_a_control_says_that_it_is_one(session, tmp_path, control):
    folder = written(tmp_path / "dataset", session, control=control)
    assert CondensedSet.load(folder).manifest["control"] == control
    roles = [observer["roles"] for observer in CondensedSet.load(folder).manifest["observers"]]
    assert roles == [["relabel"], ["relabel"]]  # nothing was synthesised here
    title = DatasetCard.load(folder / "README.md").data.pretty_name
    assert f"{control} images" in title and "condensed" not in title


def test_the_grid_shows_each_start_beside_its_image(dataset):
    sheet = np.asarray(Image.open(dataset / "assets/grid.png"))
    start, final = noise(COUNT, 16, seed=7), noise(COUNT, 16)
    assert sheet.shape == (CLASSES * 72, IPC * 136, 3)
    tile = sheet[72 + 4 : 72 + 68, 136 + 4 : 136 + 132]  # class 1, second image
    assert np.array_equal(tile[::4, :64:4], start[3].permute(1, 2, 0)) and np.array_equal(
        tile[::4, 64::4], final[3].permute(1, 2, 0)
    )


def test_results_stand_between_their_marks_and_nothing_else_changes(dataset):
    text = (dataset / "README.md").read_text("utf-8")
    assert "## Results" in text and "Not measured yet." in text
    measured = with_results(text, "| student |\n|---|\n| 52.1 ± 0.4 \\1 |\n")
    assert "<!-- results -->\n| student |\n|---|\n| 52.1 ± 0.4 \\1 |\n<!-- /results -->" in measured
    assert "Not measured yet." not in measured
    assert with_results(measured, "Not measured yet.") == text
    assert DatasetCard(measured).data.to_dict() == DatasetCard(text).data.to_dict()


def test_results_come_at_the_end_of_a_card_that_has_no_place_for_them():
    first = with_results("# A set\n\nText.\n", "one")
    assert first == "# A set\n\nText.\n\n## Results\n\n<!-- results -->\none\n<!-- /results -->\n"
    assert with_results(first, "two") == first.replace("one", "two")
