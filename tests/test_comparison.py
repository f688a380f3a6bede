"""What `edc-hub evaluate` is asked for: the layers of its recipe, the name of a row, and every mistake in one line."""

import json
import shutil

import pytest
import yaml
from helpers_evaluation import STUDENT

from edc_hub import CondensedSet, comparison, documents, keys, recipes
from edc_hub.errors import InputError
from edc_hub.protocol import Evaluation, Student, of_student, student_name


OWN = "edc (batch 4, epochs 2, ema decay 0.5, rand_augment 0)"


@pytest.fixture
def ask(toy_run):
    def parse(*argv):
        return comparison.parse([*map(str, argv), "--dataset", str(toy_run)])

    return parse


@pytest.fixture
def copied(toy_run, tmp_path):
    """A copy of the set away from its run, changed by keyword: manifest=… and recipe=… update its files."""

    def copy(name="copied", *, manifest=None, recipe=None):
        folder = tmp_path / name
        shutil.copytree(toy_run / "dataset", folder)
        facts = json.loads((folder / "manifest.json").read_text()) | (manifest or {})
        (folder / "manifest.json").write_text(json.dumps(facts))
        content = documents.load(folder / "recipe.yaml")
        for section, values in (recipe or {}).items():
            content[section] = {**content[section], **values} if isinstance(values, dict) else values
        (folder / "recipe.yaml").write_text(documents.write(content))
        return folder

    return copy


def error(*argv):
    with pytest.raises(InputError) as caught:
        comparison.parse([str(word) for word in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_recipe_everything_is_the_set_s_own(ask):
    found = ask().comparison
    assert found.evaluation.model_dump()["students"] == [{**STUDENT, "stem": "auto", "input_size": None}]
    assert (found.evaluation.epochs, found.evaluation.batch, found.evaluation.loss) == (2, 4, "mse_ce")
    assert (found.source.holdout, found.seeds, found.split) == (0.25, [0, 1, 2], "test")
    assert found.controls == ["initial", "random", "hard", "real"] and not found.upper_bound


def test_a_later_layer_wins_set_protocol_file_command_line(ask, tmp_path):
    file = tmp_path / "mine.yaml"
    epochs = lambda *argv: ask(*argv).comparison.evaluation.epochs  # noqa: E731
    assert epochs() == 2  # the set's own, whose protocol has 1000
    assert epochs("--evaluation.protocol", "rded") == 300  # another protocol puts the set's own values aside
    assert epochs("--evaluation.protocol", "edc") == 2  # naming the same one does not
    file.write_text("evaluation: {protocol: rded, epochs: 7}")
    assert epochs(file) == 7 and epochs(file, "--evaluation.epochs", 8) == 8
    assert epochs(file, "--evaluation.protocol", "dc") == 7
    assert ask(file).comparison.evaluation.loss == "kl"


def test_a_protocol_s_values_are_those_of_the_set_s_name_and_ipc(copied):
    folder = copied(manifest={"name": "cifar100", "ipc": 50})
    found = comparison.parse(["--dataset", str(folder), "--evaluation.protocol", "rded"]).comparison.evaluation
    assert (found.batch, found.epochs, found.temperature) == (200, 300, 20.0)


def test_the_name_of_a_row_shows_every_deviation_from_the_preset(ask):
    protocol = lambda *argv: ask(*argv).protocol  # noqa: E731
    assert protocol() == OWN  # which names how its labels were made, too
    assert protocol("--evaluation.protocol", "dc") == "dc"
    assert protocol(
        "--evaluation.protocol", "rd3", "--evaluation.labels", "stored", "--evaluation.augment", "set"
    ) == ("rd3 (labels stored, augment set, 3 label epochs, rand_augment 0, labels of 2 networks)")
    assert (
        protocol("--evaluation.protocol", "rded", "--evaluation.view.flip", "false")
        == "rded (view flip False, labels of 2 networks)"
    )
    assert protocol("--evaluation.protocol", "dc", "--students", "resnet18,convnet3") == "dc"
    online = ("--evaluation.protocol", "edc", "--evaluation.labels", "online")
    assert protocol(*online) == "edc (labels online, batch 4, epochs 2, ema decay 0.5)"
    assert "labels of alexnet" in protocol(*online, "--evaluation.teachers", f"[{TWIN}]")
    for key, value in (("lr", 0.5), ("test_resize", 9), ("precision", "bfloat16"), ("momentum", 0.1)):
        assert protocol("--evaluation.protocol", "dc", f"--evaluation.{key}", value) == f"dc ({key} {value})"


def test_the_name_of_a_row_leaves_out_what_nothing_reads(ask):
    line = ("--evaluation.protocol", "rded", "--evaluation.schedule", "linear")
    for key, value, shown in (
        ("temperature", 3, "temperature 3.0, schedule linear"),  # of kl, its loss
        ("zeta", 9, "schedule linear, zeta 9.0"),
        ("milestones", "0.1,0.2", "schedule linear"),
        ("gamma", 0.1, "schedule linear"),
        ("shuffled", "batches", "schedule linear"),  # of stored labels
    ):
        assert ask(*line, f"--evaluation.{key}", value).protocol == f"rded ({shown}, labels of 2 networks)"


def test_the_name_of_a_row_leaves_out_what_is_no_longer_read(ask):
    line = ("--evaluation.protocol", "dc", "--evaluation.schedule", "smooth")
    assert ask(*line).protocol == "dc (schedule smooth)"  # and not the milestones that the preset has
    stored = ("--evaluation.protocol", "rded", "--evaluation.labels", "stored", "--evaluation.augment", "set")
    assert "view" not in ask(*stored).protocol
    own = ("--evaluation.momentum", "0.5", "--evaluation.per_student.narrow.optimizer", "sgd")
    assert "momentum 0.5" in ask(*own).protocol  # of the one that it is read for
    assert "momentum" not in ask(*own[:2]).protocol


def test_the_name_of_a_row_shows_labels_that_its_method_makes_otherwise(copied):
    made = {"rand_augment": 2, "observer_mode": "batch", "crop_area": [0.9, 1.0]}
    folder = copied(recipe={"relabel": made, "evaluation": {"epochs": 3}})
    name = comparison.parse(["--dataset", str(folder)]).protocol
    assert name == "edc (batch 4, epochs 3, ema decay 0.5, crop_area [0.9, 1.0], observer_mode batch)"


def test_a_student_with_arguments_and_no_name_is_not_called_like_the_plain_one():
    args = {"depth": 2, "norm": "batch norm"}
    assert [student_name(Student(arch="convnet", args=args)), student_name(Student(arch="convnet"))] == [
        "convnet-depth2-normbatch-norm",
        "convnet",
    ]
    assert student_name(Student(name="mine", arch="convnet", args=args)) == "mine"
    long = [student_name(Student(arch="transformers/vit", args={"x" * 200: value})) for value in (1, 2)]
    assert long[0] != long[1] and max(map(len, long)) <= 80  # it is part of the names of files


@pytest.mark.parametrize("codec, said", [("int8", "int8 labels"), ("top_k", "top 10 labels"), ("dense", None)])
def test_labels_that_lost_something_show_in_the_name_of_a_row(copied, codec, said):
    soft = json.loads((copied() / "manifest.json").read_text())["soft_labels"]
    folder = copied("other", manifest={"soft_labels": {**soft, "codec": codec}})
    named = f", {said}" if said else ""
    assert comparison.parse(["--dataset", str(folder)]).protocol == OWN[:-1] + f"{named})"
    hard = comparison.parse(["--dataset", str(folder), "--evaluation.protocol", "dc"])
    assert hard.protocol == "dc"  # which reads none of them


def test_other_values_for_a_student_are_found_by_its_name_or_its_architecture():
    section = Evaluation(lr=1e-3, per_student={"swin_tiny": {"lr": 1e-4}, "mine": {"lr": 1e-2}})
    assert of_student(section, "swin_tiny", "swin_tiny").lr == of_student(section, "small", "swin_tiny").lr == 1e-4
    assert of_student(section, "mine", "swin_tiny").lr == 1e-2 and of_student(section, "other", "resnet18").lr == 1e-3
    averaged = Evaluation(ema={"bn": "averaged"}, per_student={"narrow": {"ema": {"decay": 0.9}}})
    assert of_student(averaged, "narrow", "convnet").ema.model_dump() == {"decay": 0.9, "bn": "averaged"}


def test_the_printed_recipe_loads_back_to_the_same_comparison(ask, tmp_path):
    more = ["--evaluation.protocol", "rded", "--seeds", "3,4", "--controls", "hard,real", "--evaluation.lr", "2e-5"]
    first = ask(*more)
    (tmp_path / "mine.yaml").write_text(documents.write(first.comparison.model_dump()))
    again = comparison.parse([str(tmp_path / "mine.yaml")])
    assert (
        again.comparison == first.comparison
        and again.protocol == first.protocol == "rded (lr 2e-05, labels of 2 networks)"
    )


def test_lists_may_be_written_with_commas(ask):
    found = ask("--seeds", "5,6", "--controls", "real", "--students", "resnet18,timm/resnet10t").comparison
    assert (found.seeds, found.controls) == ([5, 6], ["real"])
    assert found.evaluation.students == ["resnet18", "timm/resnet10t"]
    assert ask("--controls", "[]").comparison.controls == []


@pytest.mark.parametrize("name", ["random", "controls"])
def test_a_run_may_be_called_like_a_folder_of_controls(toy_run, tmp_path, name):
    shutil.copytree(toy_run, tmp_path / name)
    found = CondensedSet.load(tmp_path / name / "dataset")
    assert found.run == tmp_path / name
    for control in [*(tmp_path / name / "controls/random").iterdir(), tmp_path / name / "controls/initial"]:
        assert CondensedSet.load(control).run == tmp_path / name


def test_a_run_its_dataset_folder_and_a_dot_name_the_same_set(toy_run, monkeypatch):
    monkeypatch.chdir(toy_run / "dataset")
    for place in (toy_run, toy_run / "dataset", "."):
        (found,) = comparison.parse(["--dataset", str(place)]).sets
        assert found.run == toy_run and found.manifest["name"] == "toy"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "digits"])
def test_a_shipped_recipe_leaves_the_set_to_the_command_line_and_takes_its_protocol(ask, name):
    path = recipes.find(name, comparison._SHIPPED)
    assert f"edc-hub evaluate {name} --dataset " in path.read_text() and "dataset" not in documents.load(path)
    found = ask(name).comparison
    assert found == ask(path).comparison
    assert found.evaluation.students and all(isinstance(student, str) for student in found.evaluation.students)
    assert (found.evaluation.protocol, found.evaluation.epochs) == ("edc", 2)


def test_help_lists_every_key_and_the_shipped_recipes(capsys):
    with pytest.raises(SystemExit):
        comparison.parse(["--help"])
    text = capsys.readouterr().out
    for key in keys.walk(comparison.Comparison):
        if not key.path.startswith("evaluation.teachers[].train."):  # as observers.train
            assert key.path in text and key.field.description in text
    assert "cifar10, cifar100, digits" in text and "--print_recipe" in text


# Mistakes


TWIN = '{"name":"t","arch":"alexnet","weights":"a"}'


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--evaluation.epoch 3", "evaluation.epoch: unknown key; did you mean 'epochs'?"),
        ("--seed 3", "seed: unknown key; did you mean 'seeds'?"),
        ("--foo 3", "foo: unknown key; this command has: dataset, "),
        ("--seeds x", "seeds[0]: expected an integer, got 'x'"),
        ("--seeds []", "seeds: []; give at least one, and each once"),
        ("--seeds 1,1", "seeds: [1, 1]; give at least one, and each once"),
        ("--controls reel", "controls[0]: expected one of 'initial', 'random', 'hard' or 'real', got 'reel'"),
        ("--report_to tensorbord", "report_to[0]: expected one of 'tensorboard', 'wandb' or 'trackio'"),
        ("--split train", "split: expected one of 'test' or 'holdout', got 'train'"),
        (
            "--evaluation.protocol edcc",
            "evaluation.protocol: no protocol 'edcc'; did you mean 'edc'? There are: cda, dc, edc",
        ),
        ("--evaluation dc --students convnet3", "evaluation: expected keys and values"),
        (
            '--students [{"name":"mine","arch":"resnet18"}] --evaluation.per_student.resnet18.lr abc',
            "resnet18.lr: expected a number, got 'abc'; write e.g. --evaluation.per_student.resnet18.lr ",
        ),
        ("--evaluation.students []", "evaluation.students: an empty list; name one, e.g. [resnet18]"),
        ("--evaluation.students convnet3,convnet3", "evaluation.students: 'convnet3' is given twice"),
        (  # one file for both
            '--students ["timm/test_vit2",{"name":"timm-test_vit2","arch":"timm/test_vit2"}]',
            "evaluation.students: 'timm/test_vit2' is given twice",
        ),
        ("--evaluation.students [{args:{}}]", "evaluation.students[0].arch: missing"),
        ("--evaluation.per_student.narow.lr 1", "evaluation.per_student.narow: no student is called so; did you mean"),
        ("--evaluation.loss ce", "evaluation.loss: ce does not go with labels: stored; write labels: hard"),
        (
            "--evaluation.labels hard",
            "mse_ce does not go with labels: hard; write loss: ce, or labels: stored",
        ),
        ("--evaluation.augment own", "evaluation.augment: own, but stored labels are those of the set's own views"),
        (
            '--evaluation.teachers [{"name":"a","arch":"resnet18","weights":"W"}]',
            "evaluation.teachers: not asked with labels stored",
        ),
        ("--evaluation.batch 1", "evaluation.batch: expected at least 2, got 1"),
        ("--evaluation.view.crop_area 1,0.5", "evaluation.view.crop_area: the smallest area comes first"),
        (
            "--evaluation.per_student.narrow.lrr 1",
            "evaluation.per_student.narrow.lrr: unknown key; did you mean 'lr'",
        ),
        (
            '--students [{"name":"mine","arch":"resnet18"}] --evaluation.per_student.resnet18.loss ce',
            "evaluation.loss: ce does not go with labels: stored",
        ),
        (
            f"--evaluation.teachers [{TWIN},{TWIN}]",
            "teachers: two networks are called 't'; give each its own name",
        ),
        ("--evaluation.per_student.narrow.test_resize 9", "evaluation.per_student.narrow: test_resize is the same"),
        ("--evaluation.per_student.narrow.labels mean", "evaluation.per_student.narrow: labels is the same for all"),
        (
            "--evaluation.per_student.narrow.students [a]",
            "evaluation.per_student.narrow: students is the same for all",
        ),
        ("--split holdout --source.holdout 0.1", "source.holdout: 0.1, but the set was condensed with 0.25"),
        ("--split holdout --source.holdout_seed 4", "source.holdout_seed: 4, but the set was condensed with 0"),
        ("cifar11", "recipe: no file cifar11; did you mean 'cifar10'?"),
        ("cifar10 digits", "recipe: expected at most one, got cifar10 digits; a set is named by --dataset"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(toy_run, argv, line):
    assert line in error("--dataset", toy_run, *argv.split(" "))


def test_without_a_set_there_is_nothing_to_do():
    assert error() == "dataset: none given; write --dataset FOLDER or --dataset ORG/NAME"
    assert error("cifar10").startswith("dataset: none given")
    assert error("--dataset", "").startswith("dataset: none given")  # a variable of the shell that is not set
    assert error("--dataset", "~nosuchuser/x").startswith("dataset: no home folder for ~nosuchuser/x")
    assert "is too long for a path" in error("--dataset", "a" * 300)


def test_a_holdout_that_the_set_was_made_from_is_refused(copied):
    folder = copied(recipe={"source": {"holdout": 0.0}})
    for more in ([], ["--source.holdout", 0.1]):
        line = error("--dataset", folder, "--split", "holdout", *more)
        assert line.startswith("split: holdout, but the set was condensed from all training images (source.holdout 0)")


def test_sets_of_one_figure_differ_in_their_seed_alone(copied, toy_run):
    source = json.loads((toy_run / "dataset/manifest.json").read_text())["source"]
    other = copied("seed", manifest={"fingerprint": "other", "seed": 1}, recipe={"seed": 1})
    assert len(comparison.parse(["--dataset", f"{toy_run},{other}"]).sets) == 2
    more = copied("more", manifest={"fingerprint": "more"}, recipe={"synthesize": {"iterations": 9}, "seed": 2})
    line = error("--dataset", f"{toy_run},{more}")
    assert f"{toy_run} and {more} differ in synthesize.iterations; one figure is of sets of one recipe" in line
    classes = copied("classes", manifest={"fingerprint": "classes", "classes": ["a", "b", "c"]})
    assert "differ in classes" in error("--dataset", f"{toy_run},{classes}")
    other = copied("other", manifest={"fingerprint": "3" * 64, "source": {**source, "fingerprint": "4" * 64}})
    assert "differ in the real images they are of" in error("--dataset", f"{toy_run},{other}")
    assert "are one set; give it once" in error("--dataset", f"{toy_run},{copied('twice')}")


def test_a_set_in_the_run_of_another_is_refused(toy_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    content = documents.load(run / "recipe.yaml")
    content["synthesize"]["iterations"] = 9
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    line = error("--dataset", run)
    assert f"{run} lies in the run {run}, whose recipe differs in synthesize.iterations; evaluate a copy" in line
