"""What a card says of its own lines of code: they are what is measured, for each prefix."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from edc_hub import card, disk, recipes, results, showcase


def test_a_prefix_is_the_example_with_a_filter():
    assert showcase.prefixes(10) == [1, 2, 5, 10] and showcase.prefixes(1) == [1]
    assert showcase.prefixes(50) == [1, 2, 5, 10, 20, 50] and showcase.prefixes(7) == [1, 2, 5, 7]
    code = 'ds = load_dataset("dataset", "images", split="train").with_format("torch", ["image"])\n'
    assert showcase.prefix(code, 10, 10) == code
    assert '"train").filter(lambda row: row["ipc_index"] < 2).with_format("torch"' in showcase.prefix(code, 2, 10)


def test_figures_go_into_results_and_card_and_stay(dataset, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    results.write({"about": {}}, folder)
    showcase.publish(folder, [{"images_per_class": 1, "accuracy": [0.5]}, {"images_per_class": 2, "accuracy": [0.6]}])
    results.write({"about": {"new": True}}, folder)
    written = json.loads((folder / "results.json").read_text("utf-8"))
    assert written["about"] == {"new": True} and written["prefixes"][1]["accuracy"] == [0.6]
    assert len(written["prefixes"][1]["example_sha256"]) == 64
    text = (folder / "README.md").read_text("utf-8")
    assert "| 1 | 50.0 % |\n| 2 | 60.0 % |\n" in text and "lines:\n\n60.0 %, 1 student.\n" in text
    (folder / "README.md").unlink()  # as who wants no card may do
    showcase.publish(folder, written["prefixes"])
    assert not (folder / "README.md").exists()


def test_a_damaged_file_of_results_does_not_lose_what_was_measured(dataset, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    (folder / "results.json").write_text('{"about": ')
    showcase.publish(folder, [{"images_per_class": 1, "accuracy": [0.5]}])
    assert json.loads((folder / "results.json").read_text())["prefixes"][0]["accuracy"] == [0.5]


def test_a_command_that_measures_the_same_set_waits_for_its_turn_to_write(dataset, tmp_path, monkeypatch):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    figures = [{"images_per_class": 1, "accuracy": [0.5]}, {"images_per_class": 2, "accuracy": [0.6]}]
    turn, arrived = disk.turn, threading.Event()
    monkeypatch.setattr(disk, "turn", lambda run: (arrived.set(), turn(run))[1])
    with ThreadPoolExecutor(1) as other:
        with turn(tmp_path):
            writing = other.submit(showcase.publish, folder, figures)
            assert arrived.wait(30)
            time.sleep(0.2)
            assert not writing.done()
            results.write({"about": {"new": True}}, folder)
        writing.result(timeout=30)
    written = json.loads((folder / "results.json").read_text("utf-8"))
    assert written["about"] == {"new": True} and written["prefixes"][1]["accuracy"] == [0.6]


def test_what_is_measured_are_the_lines_of_the_card(dataset, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(dataset, run / "dataset")
    shutil.copyfile(dataset / "recipe.yaml", run / "recipe.yaml")
    ran = []

    def train(place, code, seed, images, labels):
        ran.append((code, seed))
        assert place == run and images.dtype == torch.uint8 and len(images) == len(labels)
        return 0.25

    monkeypatch.setattr(showcase, "_train", train)
    found = showcase.measure(run, recipes.of_run(run), 2)
    assert found == [{"images_per_class": k, "accuracy": [0.25, 0.25]} for k in (1, 2)]
    shown = (run / "dataset/README.md").read_text("utf-8")
    assert [seed for _, seed in ran] == [0, 1, 0, 1] and f"```python\n{ran[-1][0]}\n```" in shown


def test_the_lines_are_trained_and_tested(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "dataset")
    recipe = recipes.load(dataset / "recipe.yaml")
    assert recipe["evaluation"]["epochs"] == 2
    code = card.DatasetCard.load(dataset / "README.md").text
    code = code.split("```python\n")[1].split("```")[0]
    images, labels = torch.zeros((7, 3, 16, 16), dtype=torch.uint8), torch.zeros(7, dtype=torch.int64)
    accuracy = showcase._train(tmp_path, showcase.prefix(code, 1, 2), 0, images, labels)
    assert accuracy in (0, 1) and accuracy == showcase._train(tmp_path, showcase.prefix(code, 1, 2), 0, images, labels)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "run: no finished set in"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--sedes", "3"], "sedes: unknown key; did you mean 'seeds'?"),
        (["other"], "showcase: expected RUN, got"),
    ],
)
def test_a_wrong_command_line_is_refused(tmp_path, capsys, more, line):
    assert showcase.main([str(tmp_path), *more]) == 2
    err = capsys.readouterr().err
    assert line in err and len(err.splitlines()) == 1


def test_under_a_launcher_one_process_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert showcase.main([str(tmp_path)]) == 0 and capsys.readouterr().err == ""


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as done:
        showcase.main(["--help"])
    assert done.value.code == 0 and "--seeds  integer >= 1, default 3" in capsys.readouterr().out
