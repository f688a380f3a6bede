"""Recipes: layers, overrides, round trips, the paper's values, and every mistake in one line."""

import os
import subprocess
import sys

import pytest
import yaml
from timm.data import ImageNetInfo

from edc_hub import cli, documents, keys, launch, recipes, terms
from edc_hub.errors import InputError
from edc_hub.recipe import Recipe
from edc_hub.selection import selected


PAPER = ["imagenet1k", "imagenet10", "tiny-imagenet", "cifar100", "cifar10"]  # Tables 6 to 10, in this order
NETWORK = "{name: a, arch: resnet18}"


def parse(*argv):
    return recipes.parse([str(word) for word in argv], "condense")


def recipe(*argv):
    return parse(*argv).recipe


def error(*argv):
    """The one line of a refused command."""
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        return path

    return write


@pytest.mark.parametrize(
    ("entries", "chosen"),
    [
        (None, [("a", 4), ("b", 8), ("c", 0)]),
        (["*"], [("a", 4), ("b", 8), ("c", 0)]),
        (["b@*", "a@2"], [("b", 4), ("b", 8), ("a", 2)]),
        (["b", "b@*"], [("b", 8), ("b", 4)]),
        (["*@*"], [("a", 2), ("a", 4), ("b", 4), ("b", 8), ("c", 0)]),
    ],
)
def test_a_star_names_every_observer_or_every_snapshot(entries, chosen, file):
    text = (
        "observers:\n  networks:\n    - {name: a, arch: resnet18, train: {epochs: 4, snapshots: [2]}}\n"
        "    - {name: b, arch: resnet18, train: {epochs: 8, snapshots: [4]}}\n"
        "    - {name: c, arch: timm/resnet18, weights: FOLDER}\n"
    )
    found = recipe(file(text), "--relabel.observers", "null" if entries is None else entries)
    assert selected(found, found.relabel.observers) == chosen
    assert "relabel.observers: *@4: c is loaded, not trained here; write c" in error(
        file(text), "--relabel.observers", ["*@4"]
    )
    assert recipe(file(text), "--relabel.observers", "*, b@4,").relabel.observers == ["*", "b@4"]
    without = file(text.rsplit("    - ", 1)[0])
    assert selected(recipe(without), ["*@4"]) == [("a", 4), ("b", 4)]


# What ships


def test_the_recipes_that_the_documents_name_are_shipped():
    assert {"digits", *PAPER, "light/cifar10", "light/cifar100", "light/tiny-imagenet", "light/imagenette"} == set(
        recipes.shipped()
    )
    ladder = [f"edc-{letter}" for letter in "abcdefg"]
    assert {"random", "rded", "sre2l", "cda", "gvbsm", "edc", *ladder} <= set(recipes.methods())


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_shipped_recipe_resolves_for_every_method_and_ipc_and_prints_a_recipe_that_loads_back(name):
    for method in recipes.methods():
        for ipc in (1, 10, 50):
            found = recipe(name, "--ipc", ipc, "--method", method)
            assert (found.method, found.ipc) == (method, ipc)
            assert recipes.resolve(yaml.load(recipes.dump(found), yaml.CSafeLoader)) == found
        assert recipes.resolve(documents.read(recipes.published(found), "published")).synthesize == found.synthesize


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_shipped_file_holds_no_key_twice_and_names_its_data_set_and_method(name):
    content = recipes.load(recipes.find(name))
    assert {"name", "method", "ipc", "source", "observers"} <= set(content)


def test_the_optimiser_of_the_images_is_that_of_tables_6_to_10():
    for name, iterations, block in zip(PAPER, [2000, 2000, 2000, 2000, 75], [80, 100, 100, 100, 1000], strict=True):
        section = recipe(name).synthesize
        assert (section.iterations, section.block, section.lr, section.betas) == (iterations, block, 0.05, [0.5, 0.9])
        assert (section.alpha, section.flatness.beta, section.flatness.tau) == (0.5, 0.99, 4.0)
        assert (section.flatness.kind, section.flatness.weight) == ("logits", 0.25)  # Table 4
        assert section.crop_area == ([0.08, 1.0] if name == "cifar10" else [0.5, 1.0])
        assert section.weight == (0.1 if name == "imagenet1k" else 0.01)
        assert section.ema == (0.0 if name == "imagenet10" else 0.8)


def test_the_initial_images_are_those_of_tables_6_to_10():
    for name, kind, factor in zip(PAPER, ["rded", "rded", "real", "real", "real"], [2, 2, 1, 1, 1], strict=True):
        assert (recipe(name).initialize.kind, recipe(name).initialize.factor) == (kind, factor)


def test_labels_and_students_are_those_of_tables_6_to_10():
    epochs, batches = [300, 1000, 300, 1000, 1000], [100, 50, 100, 50, 25]
    for name, epoch, batch in zip(PAPER, epochs, batches, strict=True):
        found = recipe(name, "--ipc", 10)
        assert (found.relabel.epochs, found.relabel.batch) == (epoch, batch)
        assert (found.evaluation.epochs, found.evaluation.batch) == (epoch, batch)
        assert (found.evaluation.optimizer, found.evaluation.lr, found.evaluation.ema.decay) == ("adamw", 0.001, 0.99)
        assert found.relabel.rand_augment == (0 if name == "imagenet1k" else 2)
        schedule = (found.evaluation.schedule, found.evaluation.zeta)
        assert name == "cifar10" or schedule == ("smooth", 2.0)
    found = recipe("cifar10").evaluation
    assert (found.schedule, found.milestones, found.gamma) == ("multistep", [0.8, 0.9, 0.95], 0.5)


def test_tiny_imagenet_has_1000_epochs_at_ipc_1_alone():
    assert [recipe("tiny-imagenet", "--ipc", ipc).relabel.epochs for ipc in (1, 2, 10)] == [1000, 300, 300]
    assert [recipe("tiny-imagenet", "--ipc", ipc).evaluation.epochs for ipc in (1, 2, 10)] == [1000, 300, 300]


def test_observers_are_those_of_appendix_a2():
    eight = "resnet18 convnet_w128 mobilenet_v2 wrn_16_2 shufflenet_v2 convnet_d1 convnet_d2 convnet_w32".split()
    four = {"resnet18", "mobilenet_v2", "shufflenet_v2", "efficientnet_b0"}
    for name, names, epochs in (
        ("cifar10", set(eight), 10),
        ("cifar100", set(eight), 50),
        ("tiny-imagenet", four, 50),
        ("imagenet10", four, 20),
    ):
        found = recipe(name).observers.networks
        assert {net.name for net in found} == names and {net.train.epochs for net in found} == {epochs}
    large = recipe("imagenet1k")
    assert {net.name for net in large.observers.networks} == four | {"alexnet"}
    assert all(net.weights and net.train is None for net in large.observers.networks)
    assert [name for name, _ in selected(large, large.relabel.observers)] == [
        "resnet18", "mobilenet_v2", "shufflenet_v2", "alexnet",
    ]  # fmt: skip


def test_the_ten_classes_of_imagenet10_are_the_paper_s():
    wnids = "n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797"
    info = ImageNetInfo()
    assert [info.index_to_label_name(number) for number in recipe("imagenet10").source.classes] == wnids.split()


def test_moments_of_large_images_use_patches_of_16_and_random_resized_crops():
    for name in PAPER:
        section, large = recipe(name).moments, name.startswith("imagenet")
        assert (section.patch, section.augment) == ((16, "rrc") if large else (4, "pad_crop"))


def test_random_publishes_real_images_with_the_labels_and_evaluation_of_edc():
    for name in recipes.shipped():
        control, edc = recipe(name, "--method", "random"), recipe(name)
        assert (control.synthesize.iterations, control.initialize.kind, control.initialize.factor) == (0, "real", 1)
        assert (control.relabel, control.evaluation) == (edc.relabel, edc.evaluation)


# Layers


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """A root of recipes with methods of our own."""
    (tmp_path / "root/methods").mkdir(parents=True)
    (tmp_path / "root/protocols").mkdir()
    (tmp_path / "root/protocols/edc.yaml").write_text("{}")
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "root")

    def write(name, text):
        (tmp_path / f"root/methods/{name}.yaml").write_text(text)

    return write


def test_a_later_layer_wins_default_method_data_set_ipc_recipe_command_line(methods, file):
    networks = f"observers: {{networks: [{NETWORK}]}}\n"
    path = file(f"name: toy\nipc: 3\n{networks}")
    rate = lambda *argv: recipe(path, *argv).synthesize.lr  # noqa: E731
    methods("edc", "{}")
    assert rate() == 0.05
    methods("edc", "all: {synthesize: {lr: 1.0}}")
    assert rate() == 1.0
    methods("edc", "all: {synthesize: {lr: 1.0}, per_ipc: {3: {synthesize: {lr: 2.0}}}}")
    assert rate() == 2.0 and rate("--ipc", 4) == 1.0
    methods("edc", "all: {synthesize: {lr: 1.0}}\ntoy: {synthesize: {lr: 3.0}, per_ipc: {3: {synthesize: {lr: 4.0}}}}")
    assert rate() == 4.0 and rate("--ipc", 4) == 3.0 and rate("--name", "other") == 1.0
    path = file(f"name: toy\nipc: 3\n{networks}synthesize: {{lr: 5.0}}\n")
    assert rate() == 5.0 and rate("--synthesize.lr", 6) == 6.0


def test_a_method_stands_on_the_whole_of_its_base(methods, file):
    path = file(f"name: toy\nmethod: plain\nobservers: {{networks: [{NETWORK}]}}\n")
    methods("edc", "all: {synthesize: {lr: 1.0, eps: 2.0}}\ntoy: {synthesize: {lr: 3.0, iterations: 4}}")
    methods("plain", "base: edc\nall: {synthesize: {lr: 5.0}}")
    found = recipe(path).synthesize
    assert (found.lr, found.eps, found.iterations) == (5.0, 2.0, 4)


def test_sections_merge_and_lists_replace_whole(file):
    path = file(f"observers: {{networks: [{NETWORK}, {{name: b, arch: resnet18}}]}}\nsynthesize: {{jitter: 1}}")
    found = recipe(path, "--synthesize", "{betas: [0.1, 0.2]}", "--observers.networks", "[{name: c, arch: alexnet}]")
    assert (found.synthesize.jitter, found.synthesize.betas) == (1, [0.1, 0.2])
    assert [net.name for net in found.observers.networks] == ["c"]


def test_a_heading_with_nothing_under_it_changes_nothing(file):
    path = file(f"synthesize:\n  # iterations: 3\nobservers: {{networks: [{NETWORK}]}}")
    assert recipe(path).synthesize == recipe(file(f"observers: {{networks: [{NETWORK}]}}")).synthesize


def test_observers_train_is_shared_and_a_network_s_own_keys_win():
    found = recipe("digits", "--observers.networks", f"[{NETWORK}, {{name: b, arch: resnet18, train: {{lr: 0.3}}}}]")
    shared, own = (net.train for net in found.observers.networks)
    assert shared == found.observers.train and own == shared.model_copy(update={"lr": 0.3})


def test_the_evaluation_is_that_of_the_protocol_below_the_file_and_the_command_line(methods, file, tmp_path):
    protocol = "all: {lr: 1.0, batch: 7, ema: {decay: 0.5}}\ntoy: {batch: 8, per_ipc: {3: {epochs: 9}}}"
    (tmp_path / "root/protocols/ours.yaml").write_text(protocol)
    methods("edc", "all: {evaluation: {protocol: ours, lr: 2.0}}")
    path = file(f"name: toy\nipc: 3\nobservers: {{networks: [{NETWORK}]}}\nevaluation: {{ema: {{bn: averaged}}}}\n")
    found = recipe(path, "--evaluation.momentum", 0.3).evaluation
    assert (found.protocol, found.lr, found.batch, found.epochs) == ("ours", 2.0, 8, 9)
    assert (found.ema.decay, found.ema.bn, found.momentum) == (0.5, "averaged", 0.3)
    assert recipe(path, "--evaluation.protocol", "edc").evaluation.batch == 50  # the other's values are gone
    assert "evaluation.protocol: no protocol 'our'; did you mean 'ours'?" in error(
        path, "--evaluation.protocol", "our"
    )


def test_a_data_set_that_no_method_knows_is_said():
    every = [recipe(name, "--method", method) for name in recipes.shipped() for method in recipes.methods()]
    assert not any(map(recipes.without_values, every))
    for method in ("edc", "sre2l", "random"):
        line = recipes.without_values(recipe("digits", "--method", method, "--name", "pets"))
        assert line == f"method {method}: it has no values of its own for 'pets'; those for all data sets are used"


# Command line


def test_values_are_yaml_and_both_spellings_of_an_override_work():
    found = recipe("digits", "--synthesize.lr=2e-5", "--synthesize.betas", "[1e-1, 0.9]", "--relabel.observers=null")
    assert (found.synthesize.lr, found.synthesize.betas, found.relabel.observers) == (2e-5, [0.1, 0.9], None)
    networks = '[{"name": "a", "arch": "convnet", "args": {"depth": 1}, "train": {"lr": 1e-3}}]'
    net = recipe("digits", "--observers.networks", networks).observers.networks[0]
    assert (net.args, net.train.lr) == ({"depth": 1}, 1e-3)


def test_a_dash_in_the_name_of_a_student_stays_while_one_in_a_key_may_stand_for_an_underscore():
    net = ["--evaluation.students", "[{name: my-net, arch: convnet3}]"]
    found = recipe("digits", *net, "--evaluation.per-student.my-net.epochs", 5, "--evaluation.weight-decay", 0.5)
    assert (found.evaluation.per_student, found.evaluation.weight_decay) == ({"my-net": {"epochs": 5}}, 0.5)
    assert recipe("digits", *net, "--evaluation.per_student.convnet3.epochs", 5).evaluation.per_student["convnet3"]


def test_values_of_a_file_for_a_student_that_is_not_trained_now_are_no_mistake(file):
    own = "evaluation: {students: [{name: a, arch: convnet3}, resnet18], per_student: {a: {epochs: 5}}}\n"
    path = file(f"observers: {{networks: [{NETWORK}]}}\n{own}")
    assert recipe(path, "--evaluation.students", "resnet18").evaluation.per_student == {"a": {"epochs": 5}}


def test_a_list_may_be_written_with_commas():
    found = recipe("digits", "--relabel.observers", "convnet_d3,convnet_d2", "--source.mean", "0.1,0.2,3e-1")
    assert (found.relabel.observers, found.source.mean) == (["convnet_d3", "convnet_d2"], [0.1, 0.2, 0.3])
    assert recipe("digits", "--source.classes", "3,5").source.classes == [3, 5]
    found = recipe("digits", "--evaluation.students", "resnet18,convnet3", "--relabel.observers", "convnet_d3")
    assert found.evaluation.students == ["resnet18", "convnet3"] and found.relabel.observers == ["convnet_d3"]


def test_text_keys_take_the_text_as_it_stands():
    found = recipe("digits", "--source.revision", "12e45", "--output_dir", "2024", "--source.path", "a: [b")
    assert (found.source.revision, found.output_dir, found.source.path) == ("12e45", "2024", "a: [b")


def test_flags_stand_anywhere_with_or_without_a_value():
    for argv in (["--dry_run", "digits"], ["digits", "--dry_run", "true"], ["--dry-run", "digits"]):
        assert parse(*argv)[1:] == (True, False, False)
    assert parse("digits", "--print_recipe", "--dry_run=false")[1:] == (False, True, False)
    assert recipe("digits", "--synthesize.flip", "--ipc", 3).synthesize.flip is True


def test_a_recipe_is_found_by_shipped_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()  # a folder of data of the same name does not hide the recipe
    assert recipe("cifar10").name == "cifar10"
    assert recipe(recipes.ROOT / "light/cifar10.yaml") == recipe("light/cifar10")


def test_help_lists_every_key_with_its_meaning_type_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    missing = [key.path for key in keys.walk(Recipe) if key.path not in text or key.field.description not in text]
    shown_once = ("observers.networks[].train.", "evaluation.teachers[].train.")  # under observers.train
    assert all(path.startswith(shown_once) for path in missing)
    assert "--synthesize.iterations  integer >= 0, default 2000\n        steps of Adam" in text
    assert '--relabel.mix  none | cutmix | mixup, default "cutmix"' in text
    assert "light/cifar10" in text and "--print_recipe" in text


# Written recipes


def test_the_printed_recipe_is_resolved_and_refuses_another_method(file):
    path = file(recipes.dump(recipe("tiny-imagenet", "--ipc", 1)))
    assert recipe(path) == recipe("tiny-imagenet", "--ipc", 1)
    assert recipe(path, "--ipc", 1, "--method", "edc", "--evaluation.protocol", "edc") == recipe(path)  # its own
    for key, value in {"method": "random", "ipc": 10, "name": "digits", "evaluation.protocol": "dc"}.items():
        assert error(path, f"--{key}", value).startswith(f"{key}: this recipe is resolved, with the values of {key} ")
    assert "no protocol 'cd'; " in error(path, "--evaluation.protocol", "cd")


def test_an_override_of_observers_train_reaches_the_networks_of_a_printed_recipe(file):
    path = file(recipes.dump(recipe("light/cifar10")))
    found = recipe(path, "--observers.train.batch", 7)
    assert {net.train.batch for net in found.observers.networks} == {7}
    own = {net.name for net in recipe("light/cifar10").observers.networks if net.train.epochs == 8}
    found = recipe(path, "--observers.train.epochs", 7)
    assert {net.name: net.train.epochs for net in found.observers.networks} == {
        net.name: 8 if net.name in own else 7 for net in found.observers.networks
    }


def test_numbers_and_texts_survive_printing(file):
    found = recipe("digits", "--source.revision", "1e5", "--source.name", "yes", "--synthesize.eps", 1e-17)
    again = recipe(file(recipes.dump(found)))
    assert again == found and again.source.revision == "1e5" and again.source.name == "yes"


def test_a_fine_tuned_and_a_loaded_network_survive_printing(file):
    networks = "[{name: a, arch: resnet18, weights: x.pth}, {name: b, arch: resnet18, weights: y.pth, train: {}}]"
    found = recipe("digits", "--observers.networks", networks)
    assert [net.train is None for net in found.observers.networks] == [True, False]
    assert recipe(file(recipes.dump(found))) == found


def test_the_published_recipe_tells_nothing_of_the_machine(tmp_path, file):
    weights = tmp_path / "nets/best.pth"
    networks = f"[{{name: a, arch: transformers/{tmp_path}/model, weights: {weights}}}]"
    argv = ["--source.path", tmp_path / "pets", "--observers.networks", networks]
    machine = ["--threads", 3, "--device", "cpu", "--checkpoint_seconds", 5, "--output_dir", tmp_path]
    text = recipes.published(recipe("digits", *argv, *machine))
    assert str(tmp_path) not in text and text == recipes.published(recipe("digits", *argv))
    found = recipe(file(text))
    assert (found.source.path, found.observers.networks[0].weights) == ("pets", "best.pth")
    assert found.observers.networks[0].arch == "transformers/model"
    assert recipe("cifar10").source.path in recipes.published(recipe("cifar10"))


# Mistakes: one line that names the key or file, what is wrong and what to write


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--synthesize.iteratons 3", "synthesize.iteratons: unknown key; did you mean 'iterations'?"),
        ("--synthesise.lr 3", "synthesise: unknown key; did you mean 'synthesize'?"),
        ("--flatness.kind none", "flatness: unknown key; did you mean 'synthesize.flatness'?"),
        (
            "--iterations 3",
            "iterations: unknown key; did you mean 'initialize.iterations' or 'synthesize.iterations'?",
        ),
        ("--images.colour x", "images.colour: unknown key; images has: format, quality"),
        ("--ipc ten", "ipc: expected an integer, got 'ten'; write e.g. --ipc 10"),
        ("--ipc 1e3", "ipc: expected an integer, got 1000.0; write e.g. --ipc 10"),
        ("--ipc true", "ipc: expected an integer, got True; write e.g. --ipc 10"),
        ("--ipc 0", "ipc: expected at least 1, got 0; write e.g. --ipc 10"),
        ("--ipc 40000", "ipc: expected at most 32767, got 40000"),  # int16 in a condensed set
        ("--relabel.epochs 40000", "relabel.epochs: expected at most 32767, got 40000"),
        ("--ipc.x 3", "ipc: expected an integer, got {'x': 3}; write e.g. --ipc 10"),
        ("--ipc", "--ipc: a value is missing; write e.g. --ipc VALUE, or see --help"),
        ("--synthesize.alpha 1.5", "synthesize.alpha: expected at most 1, got 1.5; write e.g. --synthesize.alpha 0.5"),
        ("--synthesize.lr .inf", "synthesize.lr: expected a finite number, got inf; write e.g. --synthesize.lr 0.05"),
        (
            "--source.std [1,1,0]",
            "source.std[2]: expected more than 0, got 0; write e.g. --source.std '[0.5, 0.5, 0.5]'",
        ),
        ("--source.mean [122,115,105]", "source.mean[0]: expected at most 1, got 122; write e.g. --source.mean"),
        (
            "--source.mean [1]",
            "source.mean: expected a list of 3, got [1]; write e.g. --source.mean '[0.5, 0.5, 0.5]'",
        ),
        ("--source.streaming maybe", "maybe"),
        ("--source.path null", "source.path: expected text, got None; write e.g. --source.path sklearn/digits"),
        ("--images.format gif", "images.format: expected one of 'png', 'jpeg' or 'webp', got 'gif'; write e.g."),
        (
            "--relabel.observers {a,b}",
            "relabel.observers: expected a list, got {'a': None, 'b': None}; write e.g. --relabel.observers '[\"a\"",
        ),
        ("--synthesize 5", "synthesize: expected a section of keys and values, got 5; write e.g. synthesize: {"),
        ("--synthesize.lr 1e300", "synthesize.lr: 1e+300 is more than float32 arithmetic can work with; write less"),
        ("--relabel.budget abc", "relabel.budget: expected a number, got 'abc'; write e.g. --relabel.budget 0.5"),
        (
            "--source.classes no,yes",
            "source.classes[0]: expected text, got False; YAML so reads yes, no, on and off: put",
        ),
        ("--relabel.budget 1e305", "relabel.budget: 1e+305 is more than float32 arithmetic"),
        (
            '--evaluation.students [{"arch":"convnet3","args":{"width":2020-01-01}}]',
            "evaluation.students[0].args: expected plain values, got {'width': datetime.date(2020, 1, 1)}; ",
        ),
        ("--source.classes [", "--source.classes: broken YAML: line 1: "),
        ("--observers.networks [1]", "observers.networks[0]: expected a section of keys and values"),
        ("--observers.networks.0.arch x", "observers.networks: expected a list, got {'0': {'arch': 'x'}}; write e.g."),
        ("--observers.networks null", "observers.networks: expected a list, got None"),
        ("--hub.id a/b--c", "hub.id: 'a/b--c' is no name of a repository; write ORG/NAME (Cannot have -- or .."),
        ("--hub.observers a", "hub.observers: 'a' is no name of a repository; write ORG/NAME (it names no owner)"),
        ("--name a/b", "name: expected a name of letters, digits, '.', '_' and '-', got 'a/b'"),
        ("--method ecd", "method: no method 'ecd'; did you mean 'edc'? There are: cda, edc, edc-a"),
        ("--method sgd2000", "method: no method 'sgd2000'; there are: cda, edc, "),
        ("--dryrun", "--dryrun: unknown key; did you mean 'dry_run'?"),
        ("ipc=3", "recipe: expected one, got 2: digits ipc=3; a key is written --ipc 3; write e.g."),
        ("--print_recipe=3", "--print_recipe: expected true or false, got '3'"),
        ("--observers.train.snapshots [99]", "observers.train.snapshots: 99 is after the last epoch"),
        ("more", "recipe: expected one, got 2: digits more; write e.g. edc-hub condense digits"),
        ("--evaluation 3", "evaluation: expected a section of keys and values, got 3; write e.g. evaluation: {"),
        ("--evaluation [a]", "evaluation: expected a section of keys and values, got ['a']"),
        ('--evaluation.students [{"name":"a"}]', "evaluation.students[0].arch: missing; write e.g. arch: name"),
        (
            "--evaluation.students [3]",
            "evaluation.students[0]: expected text, got 3; write e.g. evaluation.students: [{arch",
        ),
        ("--evaluation.per_student.my-net.epochs 5", "evaluation.per_student.my-net: no student is called so"),
        (
            "--evaluation.per_student.other.epoch 5",
            "evaluation.per_student.other.epoch: unknown key; did you mean 'epochs'",
        ),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(argv, line):
    assert line in error("digits", *argv.split(" "))


def test_a_recipe_of_other_images_has_a_name_of_its_own(file):
    own = "observers: {networks: [{name: a, arch: resnet18}]}\nsource: "
    path = file(own + "{path: pets}")
    assert error(path) == "name: none given, and digits would bring the values of that set; write name: mine"
    assert parse(path, "--name", "pets").recipe.name == "pets"
    assert parse(file(own + "{size: 8}", "no-path.yaml")).recipe.name == "digits"


def test_a_set_of_a_release_with_fewer_keys_is_the_same_where_what_is_new_is_at_its_default(tmp_path):
    digits = recipe("digits")
    carried = documents.read(recipes.published(digits), "recipe")
    place, whole = tmp_path / "set.yaml", tmp_path / "run.yaml"
    whole.write_text(recipes.dump(digits))
    del carried["synthesize"]["residual"], carried["seed"]
    place.write_text(documents.write(carried))
    launch.refuse_another_recipe(digits, place, whole)
    moved = digits.model_copy(update={"output_dir": "elsewhere", "threads": 1})
    launch.refuse_another_recipe(moved, place, whole)
    for changed in ({"seed": 1}, {"synthesize": digits.synthesize.model_copy(update={"alpha": 0.1})}):
        with pytest.raises(InputError, match=f"is finished and differs in {next(iter(changed))}"):
            launch.refuse_another_recipe(digits.model_copy(update=changed), place, whole)
    assert digits.synthesize.iterations != type(digits.synthesize)().iterations  # the recipe's, not the default
    del carried["synthesize"]["iterations"]
    place.write_text(documents.write(carried))
    with pytest.raises(InputError, match="differs in synthesize.iterations; give this run another output_dir"):
        launch.refuse_another_recipe(digits, place, whole)


@pytest.mark.parametrize(
    ("networks", "line"),
    [
        ("[{nam: x}]", "observers.networks[0].nam: unknown key; did you mean 'name'?"),
        ("[{name: x}]", "observers.networks[0].arch: missing; write e.g. arch: name"),
        ("[{name: x, arch: y, args: 3}]", "observers.networks[0].args: expected keys and values, got 3"),
        ("[{name: x, arch: y, args: {depth: .nan}}]", "plain values, got {'depth': nan}; write finite numbers"),
        ("[{name: x, arch: y, args: {day: 2020-01-01}}]", "write finite numbers, dates in quotes"),
        (
            "[{name: x, arch: y, train: {epochs: x}}]",
            "observers.networks[0].train.epochs: expected an integer, got 'x'",
        ),
        (f"[{NETWORK}, {NETWORK}]", "observers.networks: two networks are called 'a'; give each its own name"),
        ("[]", "observers.networks: none given"),
    ],
)
def test_a_wrong_observer_is_answered_in_one_line(networks, line):
    assert line in error("digits", "--observers.networks", networks)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "expected keys and values, got a list"),
        ("just text", "expected keys and values, got a str"),
        ("ipc: 10\nsource: {path: x\nname: y", "broken YAML: line "),
        ("ipc: 10\n\tname: y", "broken YAML: line 2: "),
        ("ipc: 10\nname: x\nipc: 20\n", "broken YAML: line 3: the key 'ipc' is given twice"),
        ("source:\n  size: 8\n  size: 9\n", "broken YAML: line 3: the key 'size' is given twice"),
        ("? [a, b]\n: 3\n", "broken YAML: line 1: "),
        (b"\x80\xff\x00", "cannot be read as text"),
        (b"name: \x00", "broken YAML"),
    ],
)
def test_a_broken_file_is_answered_in_one_line_that_names_it(file, text, line):
    path = file(text)
    assert error(path).startswith(f"{path}: ") and line in error(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("10: x", "10: a key must be text, got 10; write it in quotes"),
        ("ipc: 2e1", "ipc: expected an integer, got 20.0"),
        ("source: {revision: 12e4}", "source.revision: expected text, got 120000.0"),
        ("resolved: maybe", "resolved: expected true or false, got 'maybe'"),
        ("method: [edc]", "method: expected text, got ['edc']; write e.g. --method edc"),
        ("name: {a: 1}\nipc: [3]", "name: expected text, got {'a': 1}"),
    ],
)
def test_a_wrong_value_in_a_file_is_answered_in_one_line(file, text, line):
    assert line in error(file(text))


def without_libyaml(content):
    return yaml.dump(content, Dumper=documents.Dumper, sort_keys=False, allow_unicode=True, width=2**16)


def test_every_shipped_file_is_read_and_every_recipe_written_as_without_libyaml():
    for path in (*recipes.ROOT.rglob("*.yaml"), *terms.CARDS.glob("*.yaml")):
        assert documents.load(path) == yaml.load(path.read_text("utf-8"), documents.Loader)
    for name in recipes.shipped():
        text = recipes.dump(recipe(name))
        assert text == without_libyaml(yaml.load(text, documents.Loader))


@pytest.mark.parametrize(
    "value", ["2e-5", "a\tb", "a\n b", "\\", "\x07", "😀", "é?", "", "x" * 200, "yes", "'", "#", "a: b", "\udcff"]
)
def test_an_odd_text_is_written_as_without_libyaml_and_comes_back(value):
    content = {value: [value, {"a": value}]}
    assert documents.write(content) == without_libyaml(content)
    assert documents.read(documents.write(content), "odd") == content


def test_what_libyaml_refuses_is_read():
    assert documents.read("{args:{}}", "odd") == {"args": {}}


def test_a_missing_recipe_is_answered_with_those_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error("recipes/cifar1000.yaml") == "recipe: no file recipes/cifar1000.yaml; did you mean 'cifar100'?"
    assert "write a YAML file or one of: cifar10, cifar100, digits" in error("nonsense")
    assert error(tmp_path).startswith(f"recipe: {tmp_path} is a folder")
    assert error().startswith("recipe: expected one, none given; write e.g. edc-hub condense digits")
    assert "no file methods/edc" in error("methods/edc")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--source.streaming true", "source.streaming: convnet_d3, "),
        ("--source.classes [1,2,1]", "source.classes: 1 is given twice"),
        ("--source.classes [1]", "source.classes: 1 given, a classifier needs two"),
        ("--moments.patch 17", "moments.patch: 17 px is wider than the images; write at most 16"),
        ("--relabel.observers []", "relabel.observers: an empty list, but it needs one"),
        ("--synthesize.observers []", "synthesize.observers: an empty list, but it needs one"),
        ("--initialize.kind rded --initialize.observers []", "initialize.observers: an empty list"),
        ("--relabel.observers [nobody]", "relabel.observers: no observer 'nobody'; there are: convnet_d3, "),
        ("--synthesize.observers [convnet_d3@3]", "synthesize.observers: convnet_d3@3 was not kept; write one of: "),
        ("--initialize.observers [convnet_d3@x]", "initialize.observers: convnet_d3@x was not kept"),
        ("--initialize.factor 2", "initialize.factor: 2 tiles a side need kind rded, got real"),
        ("--initialize.kind rded --initialize.factor 3", "initialize.factor: 3 tiles do not divide 16 px"),
        (
            "--initialize.kind rded --ipc 301",
            "initialize: ipc 301 at factor 1 needs 301 crops a class, got 300; raise",
        ),
        ("--initialize.kind rded --initialize.variant edc --ipc 1025", "got 1024; write variant: rded"),
        ("--initialize.kind kmeans --ipc 301", "initialize.images_per_class: 300 cannot give 301 centres; write 301"),
        ("--initialize.kind kmeans --initialize.observers [convnet_d3,convnet_d2]", "write [convnet_d3@"),
        ('--initialize.kind kmeans --initialize.observers ["*"]', "kmeans uses the features of one observer; write ["),
        ('--relabel.observers ["*@99"]', "relabel.observers: convnet_d3@99 was not kept; write one of: convnet_d3@"),
        ('--relabel.observers ["convnet_*"]', "relabel.observers: no observer 'convnet_*'; there are: convnet_d3, "),
        ("--synthesize.jitter 16", "synthesize.jitter: 16 px rolls past the image; write less than 16"),
        (
            "--synthesize.class_scope local --synthesize.alpha 1",
            "synthesize.class_scope: local has no effect at alpha 1",
        ),
        ("--synthesize.layers []", "synthesize.layers: an empty list"),
        ("--synthesize.crop_area [1,0.5]", "synthesize.crop_area: the smallest area comes first; write [0.5, 1]"),
        ("--observers.train.crop_area [1,0.5]", "observers.train.crop_area: the smallest area comes first"),
        ("--relabel.batch 1", "relabel.batch: cutmix mixes two views of a batch, got 1"),
        ("--relabel.batch 1 --relabel.mix none --relabel.observer_mode batch", "relabel.batch: observer_mode batch"),
        ("--relabel.shuffle 3", "relabel.shuffle: 3 strips do not divide 16 px"),
        (
            "--evaluation.labels online --evaluation.augment own --evaluation.view.shuffle 3",
            "evaluation.view.shuffle: 3 strips do not divide 16 px; write a divisor of it, or 0",
        ),
        (
            "--observers.train.batch 1",
            "observers.train.batch: expected at least 2, got 1",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused_in_one_line(argv, line):
    assert line in error("digits", *argv.split(" "))


def test_real_images_for_every_block_are_not_drawn_from_a_stream():
    line = error("imagenet1k", "--source.streaming", "true", "--synthesize.class_scope", "local")
    assert line.startswith("synthesize.class_scope: local draws real images for every block; write source.streaming: ")


def test_what_a_combination_does_not_use_is_not_refused():
    recipe("digits", "--relabel.batch", 1, "--relabel.mix", "none")
    recipe("digits", "--synthesize.iterations", 0, "--synthesize.observers", "[]")
    recipe("digits", "--initialize.kind", "rded", "--initialize.factor", 4, "--ipc", 18)
    recipe("imagenet1k", "--source.streaming", "true")
    recipe("digits", "--evaluation.view.shuffle", 3)


def test_a_loaded_observer_has_no_epochs_to_name():
    assert "resnet18 is loaded, not trained here" in error("imagenet1k", "--relabel.observers", "[resnet18@3]")


# The console command


def test_the_console_command_answers_with_the_right_status(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip()
    assert cli.main(["--help"]) == 0 and "condense" in capsys.readouterr().out
    for argv, line in (
        (["condens"], "unknown command 'condens'; did you mean 'condense'?"),
        (["frobnicate"], "unknown command 'frobnicate'; write one of: condense"),
        ([], "a command is missing; write one of: condense"),
    ):
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and line in err and err.count("\n") == 1


def test_a_command_that_is_stopped_while_it_is_imported_says_so(monkeypatch, capsys):
    def stopped(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", stopped)
    assert cli.main(["condense", "digits"]) == 130
    assert capsys.readouterr().err == "edc-hub: stopped; the same command goes on from here\n"


def test_help_survives_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    program = "import sys; from edc_hub import cli; sys.exit(cli.main(['--help']))"
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_only_reads_needs_no_torch():
    program = """if True:
        import contextlib, sys, edc_hub
        print(dir(edc_hub))
        from edc_hub import cli, comparison, recipes
        assert cli.main(["--help"]) == cli.main(["--version"]) == 0 and recipes.parse(["digits"], "condense").recipe
        with contextlib.suppress(SystemExit):
            comparison.parse(["--help"])
        assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("['CondensedSet', 'Task', '__version__']\n")
    offered = {}
    exec("from edc_hub import *", offered)
    assert {"CondensedSet", "Task"} < set(offered)


def test_field_defaults_are_a_recipe_but_for_observers():
    assert recipes.resolve({"observers": {"networks": [{"name": "a", "arch": "resnet18"}]}}).name == Recipe().name


def test_a_switch_takes_any_word_for_a_truth_and_an_error_names_it():
    assert recipe("light/cifar10", "--relabel.flip", "no").relabel.flip is False
    assert recipe("--relabel.flip", "light/cifar10").relabel.flip is True
    assert error("light/cifar10", "--relabel.flip", "1").startswith("relabel.flip: expected true or false, got 1")
    assert error("light/cifar10", "--dry_run", "yes").startswith("--dry_run: expected true or false")


def test_a_name_too_long_for_a_file_is_no_recipe():
    assert error("a" * 300).startswith("recipe: no file aaa")
    assert error("~nosuchuser/x").startswith("recipe: no file ~nosuchuser/x")
