"""Sweeps: real ones of two by two cells, what they share, and what fails."""

import contextlib
import io
import json
import os
import threading
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import fresh
import PIL.Image
import pytest
import yaml
from helpers_sweep import ENVIRONMENT, MACHINE, SWEEP, arguments, begun, figures, written

from edc_hub import cells, disk, evaluate, sweep, sweep_table, work
from edc_hub.errors import InputError


FAILING = {"untrained": {"observers": {"train": {"lr": 0.0}}}}  # an observer that sees nothing is refused, late


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("sweep"))


def stamps(runs, *stages):
    return {path: path.stat().st_mtime_ns for stage in stages for path in (runs / "artifacts" / stage).rglob("*.s*")}


def stages(runs):
    return sorted(path.name for path in (runs / "artifacts").iterdir())


@pytest.fixture(scope="module")
def whole(root):
    """Two rows under two columns, of two set seeds and two student seeds each."""
    file, runs, out = written(root), root / "runs", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert sweep.main(arguments(file, runs / "steps")) == 0
    written_there = [path.name for run in runs.glob("digits-*") for path in run.rglob("*")]
    return SimpleNamespace(file=file, runs=runs, folder=runs / "steps", out=out.getvalue(), in_runs=written_there)


# Cells and figures


def test_a_figure_is_that_of_evaluate_on_the_sets_of_all_set_seeds(whole, tmp_path):
    (line,) = [line for line in figures(whole.folder) if (line["row"], line["column"]) == ("two", "zeta 1")]
    sets = sorted(str(path) for path in whole.runs.glob("digits-edc-ipc1-seed*"))
    sets = [path for path in sets if yaml.safe_load(open(f"{path}/recipe.yaml"))["synthesize"]["iterations"] == 2]
    argv = ["--dataset", ",".join(sets), "--seeds", "0,1", "--controls", "[]", "--evaluation.zeta", "1.0"]
    before = stamps(whole.runs, "students")
    assert evaluate.main([*argv, *MACHINE, "--output_dir", str(tmp_path / "out")]) == 0
    assert stamps(whole.runs, "students") == before  # the sweep's students are found again
    own = json.loads((tmp_path / "out/results.json").read_text())["students"]["narrow"]["rows"]["set"]
    accuracies = [100 * each["ema"] for each in own["each"]]
    assert len(sets) == 2 and len(accuracies) == 4 == int(line["n"])
    assert float(line["EMA"]) == pytest.approx(fmean(accuracies), abs=0.02)
    assert float(line["EMA std"]) == pytest.approx(stdev(accuracies), abs=0.02)
    assert int(line["bytes"]) > 0 and "zeta 1.0" in line["protocol"]


def test_the_paper_s_figure_stands_beside_ours_with_how_it_was_published(whole):
    lines = {(line["row"], line["column"]): line for line in figures(whole.folder)}
    quoted = {place: (line["paper"], line["paper std"], line["as"]) for place, line in lines.items()}
    assert quoted[("two", "zeta 2")] == ("48.6", "", "best") and quoted[("two", "zeta 1")] == ("40.0", "1.0", "last")
    assert quoted[("none", "zeta 2")] == ("", "", "")
    ours = "{:.1f} ± {:.1f} (4)".format(*(float(lines[("two", "zeta 2")][key]) for key in ("EMA", "EMA std")))
    for text in (whole.out, (whole.folder / "table.md").read_text()):
        assert ours in text and "48.6 best" in text and "40.0 ± 1.0 last" in text and "The paper, Table 1" in text
    assert PIL.Image.open(whole.folder / "table.png").format == "PNG"


def test_the_same_command_again_makes_nothing_and_says_the_same(whole, capsys):
    before = stamps(whole.runs, *stages(whole.runs))
    tables = {name: (whole.folder / name).read_text() for name in ("table.csv", "table.md")}
    assert sweep.main(arguments(whole.file, whole.folder)) == 0
    assert capsys.readouterr().out == whole.out and before == stamps(whole.runs, *stages(whole.runs))
    assert tables == {name: (whole.folder / name).read_text() for name in tables}
    assert sweep.main([*arguments(whole.file, whole.folder), "--dry_run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not made yet 0 " in said and "in cells without results 0 " in said and "are made 0 " not in said


def test_a_cell_that_fails_now_shows_none_of_its_old_figures_and_a_damaged_file_counts_for_none(whole):
    parsed = cells.parse(arguments(whole.file, whole.folder))
    lines = sweep_table.lines(parsed, {parsed.cells[0].place: InputError("other images")})
    assert [line.missing for line in lines] == ["failed", "", "", ""]
    place = parsed.cells[1].folder / "results.json"
    text = place.read_text()
    place.write_text(text[:100])
    try:
        assert [line.missing for line in sweep_table.lines(parsed, {})] == ["", "not yet", "", ""]
    finally:
        place.write_text(text)


def test_what_differs_in_the_evaluation_alone_is_condensed_once(whole):
    assert len(list(whole.runs.glob("digits-edc-ipc1-seed*"))) == 4  # two rows, two set seeds
    made = [stage for stage in stages(whole.runs) if stage != "students"]
    before = stamps(whole.runs, *made)
    folders = set(whole.runs.iterdir())
    more = ["--evaluation.lr", "0.002", "--set_seeds", "0", "--seeds", "0", "--only", "two"]
    assert sweep.main(arguments(whole.file, whole.runs / "other", *more)) == 0
    assert stamps(whole.runs, *made) == before and set(whole.runs.iterdir()) - folders == {whole.runs / "other"}
    lines = figures(whole.runs / "other")
    assert [(line["row"], line["n"], line["EMA std"]) for line in lines] == [("two", "1", "")] * 2


def test_a_sweep_leaves_the_sets_without_results_of_its_own(whole):
    assert whole.in_runs.count("manifest.json") == 4  # of the sets: no control was asked for
    assert not {"results.json", "evaluation", "controls"} & set(whole.in_runs)


def test_controls_and_live_weights_stand_in_the_table_where_they_are_asked_for(whole, capsys):
    more = ["--set_seeds", "0", "--seeds", "0", "--only", "two", "--controls", "initial,hard", "--weights", "ema,live"]
    folder = whole.runs / "controls"
    assert sweep.main(arguments(whole.file, folder, *more, "--split", "holdout")) == 0
    out = capsys.readouterr().out
    rows = ["set", "initial", "hard_mixed", "hard_unmixed"]
    assert [line["trained on"] for line in figures(folder)] == rows * 2
    assert "zeta 2, EMA" in out and "zeta 2, live" in out and "  (i) initial images" in out
    assert "split holdout, kept from the training images, for choices" in out


def test_two_processes_give_the_table_of_one_and_both_go_on_after_a_cell_that_fails(root, whole):
    file = written(root, "two", rows={"two": {}, **FAILING, "none": SWEEP["rows"]["none"]})
    folder = root / "both/steps"
    done = fresh.ranks(2, "edc_hub.sweep", *arguments(file, folder), env=ENVIRONMENT)
    assert [one.returncode for one in done] == [2, 2], done
    for one in done:
        assert "2 of 6 cells failed, the others are in the tables: row 'untrained'" in one.stderr
    good = [line for line in figures(folder) if line["row"] != "untrained"]
    assert good == figures(whole.folder) and [one.stdout.count("Steps and zeta") for one in done] == [1, 0]
    assert [line["missing"] for line in figures(folder) if line["row"] == "untrained"] == ["failed"] * 2


ALONE = """
import os, sys
from edc_hub import sweep, trials, work
me, save, train = os.environ["RANK"], work.Store.save, trials.Bench._train

def failing_save(store, unit, *content):
    if (me, unit.stage) == ("0", "blocks"):
        raise ZeroDivisionError("by the first alone")
    save(store, unit, *content)

def failing_train(bench, trial, progress):
    if me == "1" and bench.comparison.evaluation.zeta == 1.0:
        raise ValueError("by the second alone")
    return train(bench, trial, progress)

work.Store.save, trials.Bench._train = failing_save, failing_train
sys.exit(sweep.main(sys.argv[1:]))
"""


def test_a_unit_that_fails_on_one_of_two_processes_fails_its_cells_and_the_others_are_done(root):
    folder = root / "alone/steps"
    columns = dict(reversed(SWEEP["columns"].items()))  # those that fail come first
    rows = {"two": {}, "kept": {"synthesize": {"iterations": 1}}, "none": SWEEP["rows"]["none"]}
    file = written(root, "alone", rows=rows, columns=columns, set_seeds=[0])
    kept = next(cell.runs[0] for cell in cells.parse(arguments(file, folder)).cells if cell.row == "kept")
    (Path(kept.output_dir) / ".lock").mkdir(parents=True)  # where the first process writes a file
    done = fresh.ranks(2, ALONE, *arguments(file, folder), env=ENVIRONMENT, module=False)
    assert all(one.returncode == 1 and "5 of 6 cells failed" in one.stderr for one in done), (
        done
    )  # both came to the end
    lines = {(line["row"], line["column"]): line for line in figures(folder)}
    failed = [place for place, line in lines.items() if line["missing"] == "failed"]
    assert failed == [*((row, column) for row in ("two", "kept") for column in columns), ("none", "zeta 1")]
    assert lines[("none", "zeta 2")]["n"] == "2" and float(lines[("none", "zeta 2")]["EMA"]) > 0
    said = (folder / "table.md").read_text()
    assert said.count("by the first alone") == 2 and said.count("by the second alone") == 1
    assert said.count(f"cannot write {kept.output_dir}") == 2


def test_a_run_that_another_command_writes_is_waited_for(root, monkeypatch):
    file = written(root, "waiting", rows=SWEEP["rows"], columns={}, paper=None, set_seeds=[0], seeds=[0])
    folder = root / "runs/waiting"
    place = Path(cells.parse(arguments(file, folder)).cells[0].runs[0].output_dir)
    kept, said, report = threading.Event(), threading.Event(), work.Session.report

    def other():
        with disk.lock(place):
            kept.set()
            said.wait(60)

    def heard(self, text):
        report(self, text)
        if f"{place} is being written by process {os.getpid()}" in text:
            said.set()

    monkeypatch.setattr(work.Session, "report", heard)
    thread = threading.Thread(target=other)
    thread.start()
    assert kept.wait(60) and sweep.main(arguments(file, folder)) == 0
    thread.join()
    assert said.is_set() and not [line for line in figures(folder) if line["missing"]]


# Mistakes


def test_a_cell_that_fails_is_named_and_the_others_are_done(root, capsys):
    title = "what $^$ matplotlib would take for mathematics"
    changes = {"columns": {}, "paper": None, "set_seeds": [0], "seeds": [0], "title": title}
    file = written(root, "failing", rows={**FAILING, "two": {}}, **changes)
    folder = root / "runs/failing"
    assert sweep.main(arguments(file, folder)) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert "1 of 2 cells failed" in line and "row 'untrained': " in line and "plain" in line
    lines = figures(folder)
    assert [(line["row"], line["missing"]) for line in lines] == [("untrained", "failed"), ("two", "")]
    assert float(lines[1]["EMA"]) > 0
    assert "failed, row 'untrained'" in out and "failed, row 'untrained'" in (folder / "table.md").read_text()


def test_an_error_of_ours_in_a_cell_is_status_1_with_its_traceback(root, capsys, monkeypatch):
    real = evaluate.measure

    def broken(parsed, folder, session):
        if parsed.comparison.evaluation.zeta == 1.0:
            raise ZeroDivisionError("by a bug")
        return real(parsed, folder, session)

    monkeypatch.setattr(evaluate, "measure", broken)
    file = written(root, "bug", rows={"two": {}}, paper=None, set_seeds=[0], seeds=[0])
    assert sweep.main(arguments(file, root / "runs/bug")) == 1
    err = capsys.readouterr().err
    assert 'raise ZeroDivisionError("by a bug")' in err and "row 'two', column 'zeta 1': by a bug" in err
    assert [line["missing"] for line in figures(root / "runs/bug")] == ["", "failed"]
