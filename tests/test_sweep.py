"""Sweeps: real ones of two by two cells, what they share, what fails, and every table that ships."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from statistics import fmean, stdev
from types import SimpleNamespace

import PIL.Image
import pytest
import yaml

from edc_hub import cells, cli, evaluate, published, recipes, sweep, sweep_plan, sweep_table


RECIPE = {
    "name": "digits",
    "ipc": 1,
    "source": {"path": "sklearn/digits", "size": 8, "holdout": 0.1},
    "observers": {
        "train": {"epochs": 1, "batch": 50, "augment": "none", "flip": False},
        "networks": [{"name": "plain", "arch": "convnet", "args": {"depth": 1, "width": 16, "norm": "batch"}}],
    },
    "synthesize": {"iterations": 2, "block": 10},
    "relabel": {"epochs": 2, "batch": 10, "rand_augment": 0},
    "evaluation": {
        "students": [{"name": "narrow", "arch": "convnet", "args": {"depth": 1, "width": 8}}],
        "epochs": 2,
        "batch": 5,
    },
}
SWEEP = {
    "title": "Steps and zeta",
    "set_seeds": [0, 1],
    "seeds": [0, 1],
    "rows": {"two": {}, "none": {"synthesize": {"iterations": 0}}},
    "columns": {"zeta 2": {}, "zeta 1": {"evaluation": {"zeta": 1.0}}},
    "paper": {
        "where": "The paper, Table 1",
        "as": "best",
        "figures": {
            "two": {"zeta 2": {"narrow": 48.6}, "zeta 1": {"narrow": {"accuracy": 40, "std": 1, "as": "last"}}}
        },
    },
}
FAILING = {"untrained": {"observers": {"train": {"lr": 0.0}}}}  # an observer that sees nothing is refused, late
MACHINE = ["--threads", "1", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    (root / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


def written(root, name="table", **changes):
    """The file of a sweep like SWEEP."""
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "recipe": str(root / "tiny.yaml"), **changes}, sort_keys=False))
    return path


def arguments(file, out, *more):
    return [str(file), "--output_dir", str(out), *MACHINE, *map(str, more)]


def figures(folder):
    """table.csv, a dictionary a line."""
    with (folder / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "edc_hub.sweep", *arguments(file, folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr  # the launcher's status for a worker's 2
    assert "2 of 6 cells failed, the others are in the tables: row 'untrained'" in done.stderr
    good = [line for line in figures(folder) if line["row"] != "untrained"]
    assert good == figures(whole.folder) and done.stdout.count("Steps and zeta") == 1
    assert [line["missing"] for line in figures(folder) if line["row"] == "untrained"] == ["failed"] * 2


# Mistakes


def test_a_cell_that_fails_is_named_and_the_others_are_done(root, capsys):
    file = written(root, "failing", rows={**FAILING, "two": {}}, columns={}, paper=None, set_seeds=[0], seeds=[0])
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


@pytest.mark.parametrize(
    ("changes", "more", "line"),
    [
        (
            {"rows": {"a": {"synthesize": {"iteratons": 3}}}},
            [],
            "row 'a', column 'zeta 2': synthesize.iteratons: unknown key; did you mean 'iterations'?",
        ),
        (
            {"rows": {"a": {"evaluation": {"students": ["resnet81"]}}}},
            [],
            "evaluation.students: resnet81: arch: no net",
        ),
        ({"rows": {"a": {"initialize": {"factor": 3}}}}, [], "row 'a', column 'zeta 2': initialize.factor: 3 tiles"),
        ({"rows": {"a": {"ipc": 500}}}, [], "row 'a', column 'zeta 2': ipc: 500 images a class, but class"),
        ({"rows": {"a": {"seed": 1}}}, [], "row 'a': seed: the same for the whole sweep; write set_seeds"),
        ({"rows": {"a": {"evaluation": {"zeta": 3.0}}}}, [], "row 'a', column 'zeta 1': both set evaluation.zeta"),
        ({"rows": {}}, [], "rows: none given"),
        ({"recipe": "digist"}, [], "recipe: no file digist; did you mean 'digits'?"),
        ({"rowz": {}}, [], "rowz: unknown key; did you mean 'rows'?"),
        ({"paper": {"where": "T", "figures": {"b": {}}}}, [], "paper.figures: 'b' is no row; there are: two, none"),
        ({"paper": {"where": "T", "figures": {"two": {"c": {}}}}}, [], "'c' is no column with students"),
        ({"paper": {"where": "T", "figures": {"two": {"zeta 1": {"x": "?"}}}}}, [], "x: accuracy: expected a number"),
        ({}, ["--evaluation.zeta", "3"], "--evaluation.zeta: column 'zeta 1' sets it; remove it"),
        ({}, ["--seed", "3"], "--seed: not of a sweep; write set_seeds"),
        ({}, ["--seeds", "0,0"], "seeds: [0, 0]; give at least one, and each once"),
        ({}, ["--only", "three"], "only: no row 'three'; there are: two, none"),
        ({}, ["--split", "holdout", "--source.holdout", "0"], "source.holdout: 0 keeps no image back"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_before_any_work(root, tmp_path, capsys, changes, more, line):
    changes = {"paper": None, **changes} if "rows" in changes else changes
    assert sweep.main(arguments(written(root, "wrong", **changes), tmp_path / "runs/wrong", *more)) == 2
    out, err = capsys.readouterr()
    errors = [text for text in err.splitlines() if "error:" in text]
    assert out == "" and len(errors) == 1 and line in errors[0] and "Traceback" not in err, err
    assert not (tmp_path / "runs/artifacts").exists() and not (tmp_path / "runs/wrong/table.csv").exists()


def test_a_dry_run_says_what_is_shared_and_writes_nothing(root, tmp_path, capsys):
    assert cli.main(["sweep", *arguments(written(root), tmp_path / "runs/steps", "--dry_run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cells 4 condense runs, different 4 observers 1 sets of initial images 2 sets of images 4" in out
    assert "row 'none', column 'zeta 1': synthesize.iterations 0, evaluation.zeta 1.0" in out
    assert not (tmp_path / "runs").exists()


def test_help_lists_the_sweeps_that_ship(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    out = capsys.readouterr().out
    assert "table5" in out and "--set_seeds" in out and "--dry_run" in out


# What ships


TABLES = [2, 3, 4, 5, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]


def test_the_paper_s_ablations_and_those_for_a_cpu_ship_as_sweeps():
    light = {"light-methods", "light-alpha", "light-zeta"}
    assert set(recipes.shipped(cells.SHIPPED)) == light | {f"table{number}" for number in TABLES}
    assert not [name for name in recipes.shipped() if "table" in name or "sweep" in name]


@pytest.mark.parametrize("name", recipes.shipped(cells.SHIPPED))
def test_every_shipped_sweep_resolves_and_shows_every_figure_of_the_paper(name, tmp_path):
    parsed = cells.parse([name, "--output_dir", str(tmp_path / "none")])
    assert len(parsed.cells) == len(parsed.sweep.rows) * (len(parsed.sweep.columns) or 1)
    lines = sweep_table.lines(parsed, {})
    trained = {line.student for line in lines}
    quoted = [figure for figure in _figures(parsed.sweep) if figure[2] in trained]
    assert sorted(map(str, quoted)) == sorted(
        str((line.row, line.column, line.student, line.paper.accuracy)) for line in lines if line.paper
    )
    assert all(len(text) <= sweep_table.WIDTH for text in sweep_table.text(parsed, {}).splitlines())
    assert "condense runs, different" in sweep_plan.show(parsed)


def _figures(given):
    """Every figure of a sweep as (row, column, student, per cent)."""
    found = []
    for row, own in (given.paper.figures if given.paper else {}).items():
        for column, students in own.items() if given.columns else [("", own)]:
            for student, value in students.items():
                found.append((row, column, student, float(value["accuracy"] if isinstance(value, dict) else value)))
    return found


def test_light_methods_quotes_the_figures_of_published_yaml_under_one_protocol():
    parsed = cells.parse(["light-methods"])
    names = {"rded": "RDED", "sre2l": "SRe2L", "gvbsm": "G-VBSM", "edc": "EDC"}
    for row, column, student, accuracy in _figures(parsed.sweep):
        known = published.lookup("cifar10", int(column.removeprefix("IPC ")), student)
        (figure,) = [it for it in known if it["method"] == names[row]]
        quoted = published.reported(parsed.sweep.paper, row, column, student)
        assert (round(100 * figure["accuracy"], 6), figure["as"], figure["where"]) == (
            accuracy,
            quoted.taken,
            quoted.where,
        )
    assert {cell.recipe.evaluation.protocol for cell in parsed.cells} == {"edc"}
    labels = [
        {k: v for k, v in cell.recipe.relabel if k != "epochs"} for cell in parsed.cells if cell.row != "edc-plus"
    ]
    assert all(own == labels[0] for own in labels)


def test_both_readings_of_alpha_are_one_set_at_a_half_and_swapped_elsewhere():
    parsed = cells.parse(["table5"])
    by_row = {cell.row: cell for cell in parsed.cells if cell.column == "plain"}
    for value in (0, 0.25, 0.5, 0.75):
        own, other = by_row[f"global form {value}"], by_row[f"class form {value}"]
        assert own.recipe.synthesize.alpha == value and other.recipe.synthesize.alpha == 1 - value
    assert by_row["global form 0.5"].runs == by_row["class form 0.5"].runs
