"""Results: every figure with its n and its spread, controls, margins and scores, and how they are shown."""

import io
import json
import math
import random
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import edc_hub
from edc_hub import report, results
from edc_hub.results import ROWS, Outcome


EDC = {"method": "EDC", "accuracy": 0.791, "std": 0.003, "as": "unknown", "where": "Table 1"}
RDED = {"method": "RDED", "accuracy": 0.371, "std": None, "as": "best", "where": "Table 2"}


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """Stands in for the table of published figures; yields what it was asked."""
    asked = []

    def lookup(name: str, ipc: int, student: str) -> list[dict]:
        asked.append((name, ipc, student))
        return [EDC, RDED] if student == "resnet18" else []

    module = SimpleNamespace(lookup=lookup)
    monkeypatch.setitem(sys.modules, "edc_hub.published", module)
    monkeypatch.setattr(edc_hub, "published", module, raising=False)
    return asked


def about(**other) -> dict:
    images = {row: {"images": 100, "bytes": 1_360_000} for row in ROWS}
    images["real_mixed"] = images["real_unmixed"] = {"images": 592, "bytes": 1_358_817}
    images["upper_bound"] = {"images": 50_000, "bytes": 112_000_000}
    made = {"id": "someone/cifar10-edc-ipc10", "revision": "v1.0.0", "name": "cifar10", "method": "edc", "ipc": 10}
    test = {"id": "uoft-cs/cifar10", "commit": "0b2714987fa478483af9968de7c934580d0bb9a2", "fingerprint": "f" * 16}
    return {
        "set": {**made, "seeds": [0], "fingerprints": ["f" * 16]},
        "protocol": "edc (epochs 200)",
        "evaluation": {"labels": "stored"},
        "averaged": ["resnet18", "convnet"],
        "split": "test",
        "test": {**test, "images": 10_000, "transform": "shorter side 32", "split": "test", "own": True},
        "published_as": {name: name for name in ("resnet18", "convnet")},
        "bytes": {"images": 240_000, "labels": 1_000_000, "views": 120_000, "observers": 0},
        "rows": images,
        "unavailable": {},
        "hardware": {"device": "x86_64", "processes": 1, "threads": 2, "cores": 2},
        "versions": {"torch": "2.15"},
        **other,
    }


def trained(row: str, base: float, *, student="resnet18", seeds=3, sets=1, draws=1, steps=2000) -> list[Outcome]:
    """Students of one row: accuracies about `base` that differ by set, draw and seed; EMA a point above live."""
    return [
        Outcome(row, student, made, draw, seed, value, value + 0.01, steps, 12.3456)
        for made in range(sets)
        for draw in range(draws)
        for seed in range(seeds)
        for value in [base + 0.004 * seed + 0.01 * draw + 0.02 * made]
    ]


def everything(**keys) -> list[Outcome]:
    return [
        *trained("set", 0.50, **keys),
        *trained("initial", 0.47, **keys),
        *trained("random", 0.42, **{**keys, "draws": 3}),
        *trained("hard_mixed", 0.30, **keys),
        *trained("hard_unmixed", 0.33, **keys),
        *trained("real_mixed", 0.39, **keys),
        *trained("real_unmixed", 0.37, **keys),
        *trained("upper_bound", 0.91, **{**keys, "steps": 23_460}),
    ]


def row_of(text: str, title: str) -> str:
    return next(line for line in text.splitlines() if title in line)


def test_each_figure_has_its_n_and_the_sample_spread_of_all_sets_and_seeds():
    outcomes = trained("set", 0.5, sets=2) + trained("random", 0.4, draws=3, sets=2)
    rows = results.summarise(outcomes, about())["students"]["resnet18"]["rows"]
    for row, count in (("set", 6), ("random", 18)):
        values = [it.live for it in outcomes if it.row == row]
        assert rows[row]["n"] == len(rows[row]["each"]) == len(values) == count
        assert rows[row]["live"]["mean"] == round(sum(values) / count, 4)
        spread = math.sqrt(sum((x - sum(values) / count) ** 2 for x in values) / (count - 1))
        assert rows[row]["live"]["std"] == round(spread, 4)
        assert rows[row]["ema"]["mean"] == pytest.approx(rows[row]["live"]["mean"] + 0.01, abs=1e-4)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999 bytes"), (999_499, "999 kB"), (999_600, "1 MB"), (999_999_999, "1 GB"), (10**12, "1 TB")],
)
def test_bytes_are_shown_in_the_unit_that_three_digits_need(count, shown):
    assert results.amount(count) == shown


def test_sets_of_different_numbers_of_draws_are_counted_as_they_are():
    outcomes = trained("random", 0.4, seeds=1, draws=3) + [Outcome("random", "resnet18", 1, 0, 0, 0.5, 0.5, 2000, 1.0)]
    text = report.table(results.summarise(outcomes, about()))
    assert "4 draws of 2 sets" in row_of(text, "random real images")


def test_one_student_has_no_spread_and_the_table_shows_none():
    found = results.summarise(trained("set", 0.521, seeds=1), about())
    assert found["students"]["resnet18"]["rows"]["set"]["live"] == {"mean": 0.521, "std": None}
    line = row_of(report.table(found), "condensed set")
    assert line.split()[2:5] == ["1", "52.1", "53.1"] and "±" not in line


def test_the_order_of_outcomes_changes_nothing_and_the_file_reads_back(tmp_path):
    outcomes = everything() + everything(student="convnet")
    found = results.summarise(outcomes, about())
    shuffled = random.Random(0).sample(outcomes, len(outcomes))
    assert json.dumps(results.summarise(shuffled, about())) == json.dumps(found)
    assert list(found["students"]) == ["convnet", "resnet18"]
    assert list(found["students"]["convnet"]["rows"]) == list(ROWS)
    results.write(found, tmp_path / "evaluation")
    text = (tmp_path / "evaluation" / "results.json").read_text("utf-8")
    assert json.loads(text) == found and text.endswith("\n")
    each = found["students"]["convnet"]["rows"]["set"]["each"][1]
    assert each == {"set": 0, "draw": 0, "seed": 1, "live": 0.504, "ema": 0.514, "steps": 2000, "seconds": 12.35}


def test_the_margin_is_over_the_initial_images_of_the_same_set_and_seed():
    noise = random.Random(1)
    outcomes = [
        it._replace(live=it.live + noise.random() / 50)
        for it in trained("set", 0.5, sets=2) + trained("initial", 0.47, sets=2)
    ]
    margin = results.summarise(outcomes, about())["students"]["resnet18"]["margin"]
    by = {(it.row, it.set, it.seed): it.live for it in outcomes}
    gaps = [by["set", made, seed] - by["initial", made, seed] for made in range(2) for seed in range(3)]
    assert margin["n"] == 6 and margin["ema"] == pytest.approx(0.03)
    assert margin["live"] == round(sum(gaps) / 6, 4) and margin["std"]["live"] == round(statistics.stdev(gaps), 4)
    fewer = [it for it in outcomes if it.row == "set" or it.seed == 0]
    assert results.summarise(fewer, about())["students"]["resnet18"]["margin"]["n"] == 2
    assert results.summarise(trained("set", 0.5), about())["students"]["resnet18"]["margin"] is None


def test_scores_are_those_of_dd_ranking_with_the_better_hard_labels():
    own = results.summarise(everything(seeds=1), about())["students"]["resnet18"]
    assert own["better"] == {"hard": "hard_unmixed", "real": "real_mixed"}
    gap, gain = 0.91 - 0.33, 0.50 - (0.42 + 0.43 + 0.44) / 3
    weight = 0.5
    alpha = weight * gain - (1 - weight) * gap
    score = (math.e**alpha - math.e**-1) / (math.e - math.e**-1)
    assert own["dd_ranking"]["hlr"]["live"] == pytest.approx(gap, abs=1e-4)
    assert own["dd_ranking"]["ior"]["live"] == pytest.approx(gain, abs=1e-4)
    assert own["dd_ranking"]["lrs"]["live"] == pytest.approx(score, abs=1e-4)
    assert own["dd_ranking"]["lrs"]["ema"] == own["dd_ranking"]["lrs"]["live"]  # all EMA figures lie one point higher


def test_scores_take_the_better_hard_labels_of_each_weights():
    figures = {"hard_mixed": (0.4, 0.1), "hard_unmixed": (0.3, 0.2), "upper_bound": (0.9, 0.9)}
    outcomes = [Outcome(row, "r", 0, 0, 0, live, ema, 9, 1.0) for row, (live, ema) in figures.items()]
    found = results.summarise(outcomes, about())["students"]["r"]
    assert found["dd_ranking"]["hlr"] == {"live": 0.5, "ema": 0.7} and found["better"] == {"hard": "hard_unmixed"}


def test_the_row_of_a_protocol_of_hard_labels_is_that_of_the_scores():
    protocol = {**about()["evaluation"], "labels": "hard"}
    outcomes = [*trained("set", 0.5, seeds=1), *trained("random", 0.4, seeds=1), *trained("upper_bound", 0.9, seeds=1)]
    scores = results.summarise(outcomes, about(evaluation=protocol))["students"]["resnet18"]["dd_ranking"]
    assert scores["hlr"]["live"] == 0.4 and set(scores) == {"hlr", "ior", "lrs"}


def test_without_an_average_there_is_no_figure_of_one():
    outcomes = [*trained("set", 0.5), *trained("initial", 0.4), *trained("random", 0.3)]
    plain = results.summarise(outcomes, about(averaged=["another student"]))
    for shown in (report.table(plain), report.markdown(plain)):
        for title in ("condensed set", "margin over (i)"):
            assert "-" in row_of(shown, title).replace("|", " ").replace("*", "").split()
        assert "DD-Ranking as fractions, live: IOR 0.200\n" in shown + "\n"
    averaged = results.summarise(outcomes, about(averaged=["resnet18"]))
    assert averaged["students"] == plain["students"] and "live / EMA: IOR" in report.table(averaged)


def test_scores_are_left_out_where_their_ingredients_are_missing():
    def scores(*rows: str) -> set[str]:
        kept = [it for it in everything() if it.row in rows]
        return set(results.summarise(kept, about())["students"]["resnet18"]["dd_ranking"])

    assert scores("set", "initial", "hard_mixed") == set()
    assert scores("set", "random") == {"ior"}
    assert scores("set", "hard_mixed", "upper_bound") == {"hlr"}
    assert scores("set", "random", "hard_mixed", "upper_bound") == {"hlr", "ior", "lrs"}


def test_published_figures_are_asked_for_and_shown_with_the_epoch_they_are_of(published):
    found = results.summarise(everything() + everything(student="convnet"), about())
    assert published == [("cifar10", 10, "convnet"), ("cifar10", 10, "resnet18")]
    assert (
        found["students"]["resnet18"]["published"] == [EDC, RDED] and found["students"]["convnet"]["published"] == []
    )
    for text in (report.table(found), report.markdown(found)):
        assert "published: EDC 79.1 ± 0.3 (unknown), RDED 37.1 (best)" in text and text.count("published:") == 1


@pytest.mark.parametrize("other", [{"split": "holdout"}, {"set": {**about()["set"], "part": True}}])
def test_published_figures_stand_beside_whole_test_splits_alone(published, other):
    found = results.summarise(everything(), about(**other))
    assert published == [] and found["students"]["resnet18"]["published"] == []


def test_the_figures_that_ship_are_looked_up(monkeypatch):
    monkeypatch.undo()  # the table itself
    found = results.summarise(everything(), about())["students"]["resnet18"]["published"]
    assert {"method": "EDC", "accuracy": 0.791, "std": 0.003, "as": "unknown"}.items() <= found[0].items()


def test_the_table_fits_a_terminal_and_its_columns_are_aligned():
    long = {"hard_mixed": "a reason that goes on " * 12}
    outcomes = [it for it in everything() if it.row not in ("hard_mixed", "initial")]
    text = report.table(results.summarise(outcomes, about(unavailable=long)))
    assert max(map(len, text.splitlines())) <= 120 and text == "\n".join(map(str.rstrip, text.splitlines())) + "\n"
    lines = [line for line in text.splitlines() if " ± " in line and "published" not in line and ":" not in line]
    assert len({line.index("±") for line in lines}) == 1 and len({line.rindex("±") for line in lines}) == 1
    assert "edc (epochs 200)" in text and "last epoch" in text and "nothing is selected on the test split" in text
    assert (
        "split test, 10,000 images, shorter side 32" in text and "soft labels 1 MB" in text and "observers" not in text
    )


def test_a_table_of_a_student_in_a_folder_fits_a_terminal():
    path = f"transformers/{'a-folder/' * 9}config"
    text = report.table(results.summarise(everything(student=path, sets=2), about()))
    assert max(map(len, text.splitlines())) <= 120 and row_of(text, "condensed set").endswith("2 sets x 3 seeds")
    assert "a-folder/a-folder/config  " in text


def test_the_table_shows_every_row_or_why_it_is_not_there():
    kept = [it for it in everything() if it.row not in ("initial", "upper_bound")]
    missing = {"initial": "the set's observers are not published"}
    found = results.summarise(kept, about(unavailable=missing))
    for text in (report.table(found), report.markdown(found)):
        assert "not available: the set's observers are not published" in row_of(text, "(i) initial images")
        assert "the better" in row_of(text, "hard labels, unmixed") and "better" not in row_of(
            text, "hard labels, mixed"
        )
        assert "3 draws x 3 seeds" in row_of(text, "random real images") and "margin over" not in text


def test_a_row_that_nobody_asked_for_says_how_to_ask_for_it():
    found = results.summarise(trained("set", 0.5), about(unavailable={"hard_mixed": "the protocol mixes no views"}))
    text = report.table(found)
    assert row_of(text, "(iii) hard labels, mixed").endswith("not available: the protocol mixes no views")
    rows = {"(i) initial": "--controls initial", "(ii) random": "--controls random", "whole real": "--upper_bound"}
    rows |= {"(iii) hard labels, unmixed": "--controls hard", "equal bytes, mixed": "--controls real"}
    for row, flag in rows.items():
        assert row_of(text, row).endswith(f" not asked for ({flag})")
        assert "not available: not measured" in row_of(report.markdown(found), row)  # its readers ask for nothing


def test_random_images_of_one_or_two_draws_say_that_these_are_few():
    for draws in (1, 2, 3):
        found = results.summarise(trained("set", 0.5) + trained("random", 0.4, draws=draws), about())
        for text in (report.table(found), report.markdown(found)):
            said = "fewer than 3 draws" in " ".join(text.split())  # a table's line may be wrapped
            assert said == (draws < 3) and "fewer" not in row_of(text, "condensed set")


def test_a_row_of_other_steps_says_so():
    text = report.table(results.summarise(everything(), about()))
    assert "23,460 steps" in row_of(text, "whole real set")
    assert " steps" not in row_of(text, "(i) initial images")


def test_the_holdout_is_never_taken_for_the_test_split():
    text = report.table(results.summarise(everything(), about(split="holdout")))
    assert "split holdout (kept from the training images, for choices)" in text


def test_the_card_of_a_set_that_an_earlier_commit_measured_can_be_made_again():
    found = results.summarise(everything(), about())
    del found["about"]["test"]["split"], found["about"]["test"]["own"], found["about"]["averaged"]
    assert "split test, 10,000 images" in report.markdown(found)


def test_the_card_has_protocol_students_n_bytes_hardware_controls_and_margin():
    text = report.markdown(results.summarise(everything() + everything(student="convnet"), about()))
    for part in (
        "- protocol: edc (epochs 200)",
        "- hardware: x86_64, 1 process of 2 threads, 2 cores",
        "soft labels 1 MB",
        "| **resnet18** | condensed set | 3 | 50.4 ± 0.4 | 51.4 ± 0.4 | 100 | 1.36 MB |",
        "|  | (ii) random real images | 9 |",
        "|  | **margin over (i)** | 3 | **+3.0 ± 0.0** | **+3.0 ± 0.0** |",
        "| **convnet** | condensed set",
        "- convnet, DD-Ranking as fractions, live / EMA: HLR",
    ):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * 9 and {line.count("|") for line in rows} == {9}
    assert "None" not in text


def test_the_curves_are_a_picture_with_a_row_of_panels_a_student():
    def losses(level: float) -> list[torch.Tensor]:
        return [level * torch.exp(-torch.arange(30) / (9 + seed)) for seed in range(2)]

    points = torch.tensor([[10.0, 0.2, 0.3], [30.0, 0.4, 0.45]])
    lines = {"timm/resnet18": {"set": losses(4), "hard_mixed": losses(2)}, "convnet": {"set": losses(3)}}
    without = report.curves(lines)
    lines["convnet"]["set"] += [points, points]
    measured = report.curves(lines)
    one, two = (np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in (without, measured))
    assert two.shape[1] > one.shape[1] and one.min(axis=2).std() > 5
    assert report.curves(dict(reversed(lines.items()))) == measured
