"""Reading sweeps: cells and their runs, what is refused before any work, the plan, and every table that ships."""

import pytest
import yaml
from helpers_sweep import RECIPE, arguments, begun, written

from edc_hub import cells, cli, published, recipes, sweep, sweep_plan, sweep_table


@pytest.fixture
def root(tmp_path):
    return begun(tmp_path)


# Runs


def test_sources_and_weights_in_folders_of_one_name_are_runs_of_their_own(root, tmp_path):
    sources = {name: {"source": {"path": str(tmp_path / name / "data")}} for name in ("one", "other")}
    weights = {
        f"weights of {name}": {
            "observers": {"networks": [{"name": "plain", "arch": "convnet", "weights": f"{tmp_path}/{name}/w.pth"}]}
        }
        for name in ("one", "other")
    }
    file = written(root, "alike", rows={**sources, **weights}, columns={}, paper=None, set_seeds=[0])
    argv = [str(file), "--output_dir", str(tmp_path / "runs/alike")]
    runs = [cell.runs[0] for cell in cells.parse(argv).cells]
    assert len({recipes.published(run) for run in runs}) == 2  # what a set carries does not tell them apart
    assert len({run.output_dir for run in runs}) == 4
    elsewhere = cells.parse([*argv, "--threads", "1", "--device", "cpu", "--checkpoint_seconds", "5"]).cells
    assert [cell.runs[0].output_dir for cell in elsewhere] == [run.output_dir for run in runs]


def test_a_finished_set_of_another_source_of_the_same_name_is_not_replaced(root, tmp_path, capsys):
    file = written(root, "taken", rows={"a": {}}, columns={}, paper=None, set_seeds=[0])
    argv = [*arguments(file, tmp_path / "runs/taken"), "--source.path", str(tmp_path / "one/data")]
    (cell,) = cells.parse(argv).cells
    (run,) = cell.runs
    theirs = run.model_copy(update={"source": run.source.model_copy(update={"path": str(tmp_path / "other/data")})})
    folder = tmp_path / "runs" / run.output_dir.rpartition("/")[2]
    (folder / "dataset").mkdir(parents=True)
    (folder / "dataset/manifest.json").write_text("{}")
    (folder / "dataset/recipe.yaml").write_text(recipes.published(theirs))
    (folder / "recipe.yaml").write_text(recipes.dump(theirs))
    assert sweep.main(argv) == 2
    assert "row 'a': output_dir: " in (err := capsys.readouterr().err) and "differs in source.path;" in err


def test_results_of_other_seeds_another_split_or_other_controls_lie_apart(root, tmp_path):
    file = written(root)

    def folder(*more):
        return cells.parse(arguments(file, tmp_path / "runs", *more)).cells[0].folder

    assert len({folder(), folder("--split", "holdout"), folder("--seeds", "5"), folder("--controls", "hard")}) == 4


# Mistakes


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
        ({"rows": {"a\nb": {}}}, [], "rows and columns: the label 'a\\nb' breaks a table's line; write it in one"),
        (
            {"students": ["convnet3"], "rows": {"a": {"evaluation": {"students": ["resnet18"]}}}},
            [],
            "error: students: row 'a' sets it; remove it",
        ),
        ({"recipe": "digist"}, [], "recipe: no file digist; did you mean 'digits'?"),
        (
            {"columns": {"c": {"evaluation": 3}}, "paper": None},
            [],
            "evaluation: expected a section of keys and values",
        ),
        ({}, ["--evaluation", "3"], "evaluation: expected a section of keys and values, got 3"),
        ({"rowz": {}}, [], "rowz: unknown key; did you mean 'rows'?"),
        ({"paper": {"where": "T", "figures": {"b": {}}}}, [], "paper.figures: 'b' is no row; there are: two, none"),
        ({"paper": {"where": "T", "figures": {"two": {"c": {}}}}}, [], "'c' is no column with students"),
        ({"paper": {"where": "T", "figures": {"two": {"zeta 1": {"x": "?"}}}}}, [], "x: accuracy: expected a number"),
        ({}, ["--evaluation.zeta", "3"], "--evaluation.zeta: column 'zeta 1' sets it; remove it"),
        ({}, ["--set_sed", "3"], "error: set_sed: unknown key; did you mean 'set_seeds'?"),
        ({}, ["--synthesize.iteration", "3"], "error: synthesize.iteration: unknown key; did you mean 'iterations'?"),
        ({}, ["--seed", "3"], "--seed: not of a sweep; write set_seeds"),
        ({}, ["--seeds", "0,0"], "seeds: [0, 0]; give at least one, and each once"),
        (
            {
                "rows": {"a": {"evaluation": {"per_student": {"narrow": {"zeta": 3.0}}}}},
                "columns": {"c": {"evaluation": {"per_student": {"narrow": {"epochs": 3}}}}},
            },
            [],
            "row 'a', column 'c': both set evaluation.per_student; leave it to one of them",
        ),
        ({}, ["--evaluation", "null", "--students", "convnet3"], "evaluation: expected keys and values; write e.g."),
        ({}, ["--only", "[]"], "only: an empty list; write labels of rows, e.g. --only '[\"two\"]'"),
        ({}, ["--only", "three"], "only: no row 'three'; there are: 'two', 'none'"),
        (
            {"rows": {"a, b": {}, "c": {}}},
            ["--only", "a, b"],
            """there are: 'a, b', 'c'; a label with a comma stands in a list: write --only '["a, b"]'""",
        ),
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
    assert "cells 4 condense runs, different 4 not made yet 4 images a class in all of them 4 bytes of " in out
    assert "that are made 0 students, controls not counted 16 in cells without results 16" in out
    assert "row 'none', column 'zeta 1': synthesize.iterations 0, evaluation.zeta 1.0" in out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_a_student_that_two_cells_share_once(root, tmp_path, capsys):
    rows = {"as it is": {}, "said again": {"evaluation": {"lr": 0.001}}, "other": {"evaluation": {"lr": 0.002}}}
    file = written(root, "shared", rows=rows, columns={}, paper=None)
    assert sweep.main([*arguments(file, tmp_path / "runs/shared"), "--dry_run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cells 3 " in out and "students, controls not counted 8" in out  # two of two sets and two seeds


def test_a_row_whose_label_has_a_comma_is_named_in_a_list(root, tmp_path):
    file = written(root, "commas", rows={"a, b": {}, "c": {}}, paper=None)
    parsed = cells.parse([str(file), "--output_dir", str(tmp_path / "runs"), "--only", '["a, b"]'])
    assert list(parsed.sweep.rows) == ["a, b"]


def test_students_of_a_command_line_go_before_those_of_the_file(root, tmp_path):
    file = written(root, "own", students=["resnet18"], paper=None)
    for key in ("--students", "--evaluation.students"):
        parsed = cells.parse([str(file), "--output_dir", str(tmp_path / "runs"), key, "convnet3"])
        assert {*parsed.cells[0].recipe.evaluation.students} == {"convnet3"}


def test_students_of_the_recipe_that_no_cell_trains_need_not_exist(root, tmp_path):
    below = {**RECIPE, "evaluation": {**RECIPE["evaluation"], "students": ["resnet81"]}}
    (root / "below.yaml").write_text(yaml.safe_dump(below))
    file = written(root, "own", recipe=str(root / "below.yaml"), students=["convnet3"], paper=None)
    cells.check(cells.parse([str(file), "--output_dir", str(tmp_path / "runs")]).cells, sweep._opener())


def test_the_table_says_what_random_draws_count_and_that_the_paper_s_figures_are_of_the_test_split(root, tmp_path):
    file = written(root, "facts")
    more = ["--controls", "random", "--split", "holdout"]
    parsed = cells.parse([str(file), "--output_dir", str(tmp_path / "runs"), *more])
    said = " ".join(sweep_table.text(parsed, {}).split())
    assert "set seeds 0, 1 x student seeds 0, 1, of row (ii) set seeds x random draws" in said
    assert "last, best or unknown; the paper's figures are of its test split" in said
    plain = sweep_table.text(cells.parse([str(file), "--output_dir", str(tmp_path / "runs")]), {})
    assert "row (ii)" not in plain and "its test split" not in plain


def test_help_lists_the_sweeps_that_ship(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    out = capsys.readouterr().out
    assert "table5" in out and "--set_seeds" in out and "--dry_run" in out


# What ships


TABLES = [2, 3, 4, 5, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]


def test_the_paper_s_ablations_and_those_for_a_cpu_ship_as_sweeps():
    light = {
        f"light-{name}"
        for name in ("methods", "alpha", "zeta", "ladder", "levers", "levers10", "batchnorm", "observers")
    }
    paper = {"ladder", "methods-cifar100", *(f"table{name}" for name in ("1-cifar10", "1-cifar100", *TABLES))}
    assert set(recipes.shipped(cells.SHIPPED)) == light | paper
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


def test_students_of_rded_at_all_ipcs_of_table_2_have_batches_for_a_thousand_classes():
    parsed = cells.parse(["table2"])
    own = [cell.recipe for cell in parsed.cells if cell.row == "RDED"]
    assert [recipe.evaluation.batch for recipe in own] == [100, 100, 100, 100, 200]
    assert [recipe.relabel.batch for recipe in own] == [100, 100, 100, 100, 200]
    assert all(recipe.evaluation.labels == "online" and recipe.relabel.epochs == 1 for recipe in own)


def test_both_readings_of_alpha_are_one_set_at_a_half_and_swapped_elsewhere():
    parsed = cells.parse(["table5"])
    by_row = {cell.row: cell for cell in parsed.cells if cell.column == "plain"}
    for value in (0, 0.25, 0.5, 0.75):
        own, other = by_row[f"global form {value}"], by_row[f"class form {value}"]
        assert own.recipe.synthesize.alpha == value and other.recipe.synthesize.alpha == 1 - value
    assert by_row["global form 0.5"].runs == by_row["class form 0.5"].runs
