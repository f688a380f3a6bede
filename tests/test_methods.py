"""Methods: published values, the ladder from G-VBSM to EDC, the README's matrix, and methods that are a function."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from toys import Net, Watching

from edc_hub import condense, keys, methods, recipes, students, synthesize
from edc_hub.condensed import CondensedSet
from edc_hub.errors import InputError
from edc_hub.initialize import Initial
from edc_hub.protocol import of_student
from edc_hub.recipe import Recipe
from edc_hub.selection import selected


CLASSES = {"imagenet1k": 1000, "tiny-imagenet": 200, "cifar100": 100}  # and 10 of the other recipes
PAPERS = ["imagenet1k", "tiny-imagenet", "cifar100", "cifar10"]
LADDER = [f"edc-{letter}" for letter in "abcdefg"]
ROOT = Path(__file__).parent.parent


def recipe(name, method, *argv):
    return recipes.parse([str(name), "--method", method, *map(str, argv)], "condense").recipe


def flat(found):
    return {key: str(value) for key, value in keys.leaves(found.model_dump(), Recipe).items()}


def changed(name, before, after):
    """The keys that two methods set differently on a data set."""
    first, second = (flat(recipe(name, method)) for method in (before, after))
    return {key for key in first | second if first.get(key) != second.get(key)} - {"method"}


# Published values


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("sre2l", {"iterations": [4000, 4000, 1000, 1000], "lr": [0.25, 0.1, 0.25, 0.25], "jitter": [16, 4, 2, 2]}),
        ("sre2l", {"weight": [0.01, 1.0, 0.01, 0.01], "layers": [["bn"]] * 4}),
        ("sre2l", {"block": [100, 100, 100, 10]}),
        (
            "sre2l",
            {"crop_area": [[0.08, 1.0], [0.08, 1.0], [1.0, 1.0], [1.0, 1.0]], "flip": [True, True, False, False]},
        ),
        ("cda", {"jitter": [16, 2, 2, 2]}),
        ("cda", {"lr": [0.25, 0.4, 0.25, 0.25], "weight": [0.01, 0.05, 0.01, 0.01], "crop_area": [[0.08, 1.0]] * 4}),
        ("gvbsm", {"iterations": [4000] * 4, "lr": [0.1, 0.05, 0.05, 0.05], "block": [80, 100, 100, 100]}),
        ("gvbsm", {"jitter": [16] * 4}),
        ("gvbsm", {"ema": [0.4, 0.8, 0.8, 0.8], "drop_rate": [0.0, 0.4, 0.4, 0.4], "weight": [0.01] * 4}),
        ("rded", {"iterations": [0] * 4}),
    ],
)
def test_the_optimiser_of_the_images_is_the_published_one(method, values):
    for key, published in values.items():
        assert [getattr(recipe(name, method).synthesize, key) for name in PAPERS] == published, key


def test_only_edc_from_config_f_on_matches_classes_and_only_gvbsm_densifies():
    for name in PAPERS:
        for method in ("sre2l", "cda", "gvbsm"):
            section = recipe(name, method).synthesize
            assert (section.alpha, section.first_layer, section.flatness.kind) == (1.0, 10.0, "none")
            assert section.densification.weight == (1.0 if method == "gvbsm" else 0.0)
            assert (section.tv, section.l2) == (0.0, 0.0)


@pytest.mark.parametrize("method", ["sre2l", "cda"])
def test_sre2l_and_cda_optimise_an_image_of_each_of_up_to_100_classes_at_a_time(method):
    for name in recipes.shipped():
        found = recipe(name, method)
        section, classes = found.synthesize, CLASSES.get(found.name, 10)
        for ids in synthesize.cut(classes, 5, section.block, section.block_order):
            assert len((ids // 5).unique()) == len(ids) == min(100, classes), name


def test_cda_is_sre2l_with_crops_that_begin_whole():
    for name in ("imagenet1k", "imagenet10"):
        own = {f"synthesize.curriculum.{key}" for key in ("kind", "start", "milestone")}
        own |= {"evaluation.protocol", "evaluation.batch", "relabel.batch"}
        assert changed(name, "sre2l", "cda") <= own
    section = recipe("imagenet1k", "cda").synthesize.curriculum
    assert (section.kind, section.start, section.milestone) == ("cosine", 1.0, 1.0)


@pytest.mark.parametrize(
    ("method", "matched", "labelling"),
    [
        ("sre2l", [["resnet18"]] * 4, [["resnet18"]] * 4),
        ("cda", [["resnet18"]] * 4, [["resnet18"]] * 4),
        ("gvbsm", [4, None, 5, 5], [4, None, 5, 5]),
    ],
)
def test_methods_name_the_networks_of_their_papers(method, matched, labelling):
    for name, *wanted in zip(PAPERS, matched, labelling, strict=True):
        found = recipe(name, method)
        for section, expected in zip((found.synthesize, found.relabel), wanted, strict=True):
            assert (len(section.observers) if isinstance(expected, int) else section.observers) == expected


def test_rded_crops_real_images_and_labels_views_of_tiles():
    for name, factor, area, shuffle in zip(PAPERS, [2, 1, 1, 1], [0.5, 1.0, 1.0, 1.0], [2, 0, 0, 0], strict=True):
        found = recipe(name, "rded")
        start = found.initialize
        assert (start.kind, start.factor, start.images_per_class, start.crops) == ("rded", factor, 300, 5)
        assert (found.relabel.crop_area[0], found.relabel.shuffle, found.relabel.epochs) == (area, shuffle, 300)
        assert start.observers == found.relabel.observers == ["resnet18"]


def test_rded_labels_in_the_batches_that_its_students_learn_from():
    for name in PAPERS:
        for ipc in (1, 10, 50):
            found = recipe(name, "rded", "--ipc", ipc)
            assert found.relabel.batch == found.evaluation.batch


def test_rded_s_convnet_on_cifar100_learns_as_every_student_where_a_resnet_teaches():
    for ipc, batch in ((1, 20), (10, 100), (50, 200)):
        found = of_student(recipe("cifar100", "rded", "--ipc", ipc).evaluation, "convnet3", "convnet3")
        assert (found.batch, found.lr) == (batch, 0.001)


def test_hard_labels_are_trained_by_idc_s_milestones():
    section = recipe("cifar10", "random", "--evaluation.protocol", "hard").evaluation
    steps = [students.rate(section, epoch, section.epochs) for epoch in (665, 666, 832, 833)]
    assert steps == pytest.approx([1, 0.2, 0.2, 0.04])


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("sre2l", {"loss": ["kl"] * 4, "temperature": [20.0, 20.0, 30.0, 30.0], "epochs": [300, 100, 400, 400]}),
        ("sre2l", {"optimizer": ["adamw", "sgd", "adamw", "adamw"], "batch": [1024, 256, 128, 128]}),
        ("cda", {"loss": ["kl"] * 4, "batch": [128] * 4, "zeta": [1.0] * 4}),
        ("rded", {"loss": ["kl"] * 4, "labels": ["online"] * 4, "zeta": [2.0] * 4, "epochs": [300] * 4}),
        ("gvbsm", {"loss": ["mse_ce"] * 4, "ce_weight": [0.1, 0.1, 0.15, 0.15], "epochs": [300, 100, 1000, 1000]}),
        ("gvbsm", {"batch": [1024, 100, 64, 100], "optimizer": ["adamw", "sgd", "sgd", "adamw"], "zeta": [1.0] * 4}),
    ],
)
def test_students_are_trained_by_the_published_protocol(method, values):
    for key, published in values.items():
        assert [getattr(recipe(name, method).evaluation, key) for name in PAPERS] == published, key
    assert all(recipe(name, method).evaluation.ema.decay == 0.0 for name in PAPERS)


def test_stored_labels_last_as_long_as_the_training_of_students():
    for name in PAPERS:
        for method in ("sre2l", "cda", "gvbsm", "edc"):
            found = recipe(name, method)
            assert found.relabel.epochs == found.evaluation.epochs, (name, method)


def test_views_are_mixed_in_the_batches_that_students_learn_from():
    for name in PAPERS:
        for method in ("sre2l", "cda", "edc", "edc-g"):
            found = recipe(name, method)
            assert found.relabel.batch == found.evaluation.batch, (name, method)


# The ladder


def test_config_a_is_gvbsm_and_config_g_is_edc_on_every_recipe():
    for name in recipes.shipped():
        assert changed(name, "gvbsm", "edc-a") == set()
        assert changed(name, "edc-g", "edc") == set(), name


def test_each_letter_of_the_ladder_changes_what_its_table_is_about():
    steps = {
        "edc-b": ("initialize.", "synthesize."),
        "edc-c": ("evaluation.schedule", "evaluation.zeta", "evaluation.milestones", "evaluation.gamma"),
        "edc-d": ("synthesize.flatness.", "synthesize.densification."),
        "edc-e": ("evaluation.", "relabel.", "synthesize.observers"),
        "edc-f": ("synthesize.alpha",),
        "edc-g": ("synthesize.crop_area", "synthesize.jitter", "relabel.crop_area", "evaluation.ema.decay"),
    }
    for before, after in zip(LADDER, LADDER[1:], strict=False):
        for name in PAPERS:
            keys = changed(name, before, after)
            assert keys and all(key.startswith(steps[after]) for key in keys), (name, after, keys)


def test_config_b_takes_half_of_the_steps():
    found = [recipe("imagenet1k", method).synthesize.iterations for method in LADDER]
    assert found == [4000] + [2000] * 6


# Recipes with observers of their own


def test_methods_that_match_batchnorm_find_an_observer_that_has_it_in_every_recipe():
    for name in recipes.shipped():
        for method in ("sre2l", "cda"):
            found = recipe(name, method)
            networks = {net.name: net for net in found.observers.networks}
            (entry,) = found.synthesize.observers
            network = networks[entry.partition("@")[0]]
            assert network.arch != "convnet" and network.arch != "alexnet"


def test_values_of_a_recipe_for_a_method_stand_above_its_own_and_below_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nobservers: {networks: [{name: a, arch: resnet18}]}\nsynthesize: {lr: 0.5}\n"
        "per_method:\n  sre2l: {synthesize: {lr: 0.6, eps: 0.1}, per_ipc: {1: {synthesize: {lr: 0.9}}}}\n"
        "  cda: {synthesize: {lr: 0.7}}\n"
    )
    rate = lambda *argv: recipe(path, *argv).synthesize.lr  # noqa: E731
    assert (rate("edc"), rate("sre2l"), rate("cda"), rate("cda", "--synthesize.lr", 0.8)) == (0.5, 0.6, 0.7, 0.8)
    assert recipe(path, "cda").synthesize.eps == 0.1  # cda stands on sre2l
    assert (rate("sre2l", "--ipc", 1), rate("cda", "--ipc", 1)) == (0.9, 0.7)
    assert "per_method" not in yaml.safe_load(recipes.dump(recipe(path, "cda")))


def test_ours_labels_a_single_image_of_each_class_by_two_ages_of_every_observer():
    def ages(name, method, ipc):
        found = recipe(name, method, "--ipc", ipc)
        return [epoch for _, epoch in selected(found, found.relabel.observers)]

    assert ages("light/cifar10", "edc-plus", 1) == [2] * 5 + [4] * 5
    assert ages("light/cifar10", "edc-plus", 10) == ages("light/cifar10", "edc", 1) == [4] * 5
    assert ages("cifar10", "edc-plus", 1) == [1, 10] * 8 and ages("cifar100", "edc-plus", 1) == [50] * 8


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("per_method: [sre2l]", "per_method: expected methods with keys and values, got ['sre2l']"),
        ("per_method: {sre21: {}}", "per_method: no method 'sre21'; did you mean 'sre2l'?"),
        ("per_method: {sre2l: {synthesise: {lr: 1.0}}}", "synthesise: unknown key"),
        ("per_method: {sre2l: {per_ipc: null}}", "per_ipc: expected numbers of images a class with keys and values"),
        ("per_method: {sre2l: {per_ipc: {'1': {}}}}", "per_ipc: expected numbers of images a class"),
    ],
)
def test_wrong_values_for_a_method_are_answered_in_one_line(tmp_path, text, line):
    path = tmp_path / "mine.yaml"
    path.write_text(f"observers: {{networks: [{{name: a, arch: resnet18}}]}}\n{text}\n")
    with pytest.raises(InputError, match=re.escape(line)):
        recipe(path, "sre2l")


# The matrix


MATRIX = runpy.run_path(str(ROOT / "benchmarks/matrix.py"))


@pytest.mark.parametrize("place", MATRIX["PLACES"], ids=lambda path: path.parent.name)
def test_the_matrix_is_the_one_that_the_methods_files_give(place):
    text, tables = place.read_text(encoding="utf-8"), MATRIX["PLACES"][place]
    assert MATRIX["markdown"](tables) in text, "run python benchmarks/matrix.py"
    assert MATRIX["filled"](text, tables) == text


def test_the_matrix_has_a_row_a_method_and_as_many_cells_as_columns():
    tables = [columns for tables in MATRIX["PLACES"].values() for columns in tables]
    for table in MATRIX["markdown"](tables).split("\n\n"):
        rows = table.split("\n")
        assert {row.count(" | ") for row in rows} == {rows[0].count(" | ")}
        assert {row.split("`")[1] for row in rows[2:]} == set(recipes.methods())


# Methods that are a function

RECIPE = {
    "name": "digits",
    "ipc": 2,
    "threads": 1,
    "device": "cpu",
    "checkpoint_seconds": 0.0,
    "source": {"path": "sklearn/digits", "size": 8},
    "observers": {
        "train": {"epochs": 1, "batch": 50, "augment": "none", "flip": False},
        "networks": [{"name": "plain", "arch": "convnet", "args": {"depth": 1, "width": 8, "norm": "batch"}}],
    },
    "relabel": {"epochs": 2, "batch": 10, "flip": False, "controls": False},
}
BLEND = '''
"""A method of somebody else's."""
HEAD
import torch


def blend(task):
    share, width = task.options.get("share", 0.5), task.options["width"]
    assert task.recipe.relabel.epochs == 1000 and task.recipe.synthesize.betas == [0.5, 0.9]
    saved = task.progress.load()
    images, first = task.initial.images.float(), 0
    if saved:
        images, first = saved["images"], int(saved["step"])
        task.generator.set_state(saved["generator"])
    for step in range(first, 3):
        noise = torch.rand(images.shape, generator=task.generator)
        images = images.lerp(255 * noise, share / width)
        done = {"images": images, "step": torch.tensor(step + 1), "generator": task.generator.get_state()}
        task.progress.save(lambda: done)
        if step == 1 and "stop" in task.options and not saved:
            raise KeyboardInterrupt
    assert task.observers.load("plain", 1)(images / 255).shape == (len(images), len(task.real.names))
    return images.round().byte()


def wrong(task):
    return task.initial.images.float()


def of_two(task, more):
    return task


number = 3
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A package of somebody else's on the path: a function that writes its module, with a line at its head."""
    name = f"theirs_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def write(line=""):
        (tmp_path / name / "ideas.py").write_text(BLEND.replace("HEAD", line))
        for module in [module for module in sys.modules if module.startswith(name)]:
            del sys.modules[module]
        return f"{name}.ideas"

    write()
    yield write
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `condense` on the digits as a user does, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(RECIPE))
    return lambda *argv: condense.main(["mine.yaml", *map(str, argv)])


def test_a_method_from_outside_is_run_resumed_and_named_wherever_a_set_says_its_method(outside, run, tmp_path):
    method = f"{outside()}:blend"
    argv = ["--method", method, "--options.width", 2, "--options.stop", "true"]
    store = tmp_path / "runs/artifacts/methods"
    assert run(*argv) == 130 and list(store.glob("*.progress"))
    assert run(*argv) == 0 and not list(store.glob("*.progress"))
    folder = tmp_path / "runs" / f"digits-{method.replace('.', '-').replace(':', '-')}-ipc2"
    made = CondensedSet.load(folder / "dataset")
    assert made.images.shape == (20, 3, 8, 8)
    assert made.manifest["method"] == method and method in (folder / "dataset/README.md").read_text()
    assert recipes.resolve(made.recipe).options.model_extra == {"width": 2, "stop": True}
    assert len(list(store.glob("*.safetensors"))) == 1 and not (tmp_path / "runs/artifacts/moments").exists()


@pytest.fixture
def images_of(tmp_path, session):
    """The images that a method makes of two pictures in each of three classes, as `condense` would ask for them."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    real = SimpleNamespace(names=["a", "b", "c"], fingerprint="real")
    pictures = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    initial = Initial(pictures, torch.arange(6, dtype=torch.int32)[:, None], "initial")
    watching = Watching(plain=Net(0, [0.5, 0.5, 0.5]))

    def make(method, *argv):
        found = recipe(path, method, "--options.width", 1, *argv)
        return methods.obtain(methods.find(method), found, real, watching, initial, session)

    make.units = lambda: len(list(session.store.root.glob("methods/*.safetensors")))
    return make


def test_a_method_that_was_stopped_goes_on_to_the_images_of_an_undisturbed_run(outside, images_of):
    method = f"{outside()}:blend"
    with pytest.raises(KeyboardInterrupt):
        images_of(method, "--options.stop", "true")
    resumed = images_of(method, "--options.stop", "true")
    assert torch.equal(images_of(method), resumed) and images_of.units() == 2


def test_images_are_found_again_until_options_values_or_the_file_of_the_method_change(outside, images_of):
    method = f"{outside()}:blend"
    first = images_of(method)
    same = images_of(method, "--relabel.batch", 7, "--output_dir", "elsewhere", "--evaluation.lr", 1.0)
    assert torch.equal(same, first) and images_of.units() == 1
    assert not torch.equal(images_of(method, "--options.share", 0.1), first) and images_of.units() == 2
    images_of(method, "--synthesize.lr", 1.0)
    assert images_of.units() == 3
    outside("# a better idea")
    images_of(method)
    assert images_of.units() == 4


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("{}:blen", "method: {} has no 'blen'; did you mean '{}:blend'?"),
        ("{}:nothing", "method: {} has no 'nothing'; its functions: blend, wrong, of_two"),
        ("{}:of_two", "is no Python function of one argument; write def of_two(task)"),
        ("{}:number", "is no Python function of one argument; write def number(task)"),
        ("{}.more:f", "no module '{}.more'; install its package, put its folder on PYTHONPATH"),
        ("nobodys_package.ideas:f", "method: no module 'nobodys_package'; install its package"),
        ("{}:blend:twice", "is no name of a function; write package.module:function"),
        (":blend", "method: ':blend' is no name of a function; write package.module:function"),
    ],
)
def test_a_method_from_outside_that_cannot_be_is_refused_in_one_line(outside, run, capsys, method, line):
    module = outside()
    assert run("--method", method.format(module)) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("edc-hub: error:")]
    assert line.format(module, module) in said


def test_images_of_another_kind_are_refused_in_one_line(outside, images_of):
    with pytest.raises(InputError) as caught:
        images_of(f"{outside()}:wrong")
    assert "returned torch.float32 (6, 3, 8, 8); it must return torch.uint8 (6, 3, 8, 8)" in str(caught.value)


def test_a_module_that_needs_another_says_which(outside, run, capsys):
    module = outside("import nobodys_dependency")
    assert run("--method", f"{module}:blend") == 2
    assert f"method: {module} needs 'nobodys_dependency', which is not installed" in capsys.readouterr().err


def test_a_plan_tells_that_it_does_not_time_a_method_from_outside(outside, run, capsys):
    method = f"{outside()}:blend"
    assert run("--method", method, "--dry_run") == 0
    assert f"synthesize: by {method}, whose time is not projected" in capsys.readouterr().out


def test_options_go_to_methods_that_read_them_and_hold_plain_values():
    for argv, line in (
        (["--options.k", "3"], "options.k: method edc reads no options; remove it"),
        (["--options", "5"], "options: expected a section of keys and values, got 5"),
        (["--method", "a:b", "--options.k", "{x: 1}"], "options.k: expected a plain value or a list of them"),
        (["--method", "a:b", "--options.day", "2020-01-01"], "options.day: expected a plain value"),
    ):
        with pytest.raises(InputError, match=re.escape(line)):
            recipes.parse(["digits", *argv], "condense")
    given = ["--method", "a:b", "--options.k", "[1, 2]", "--options.rate", "3e-1", "--options.word", "/home/me/x"]
    found = recipes.parse(["digits", *given], "condense").recipe
    assert found.options.model_extra == {"k": [1, 2], "rate": 0.3, "word": "/home/me/x"}
    assert recipes.resolve(yaml.safe_load(recipes.dump(found))) == found
    assert "/home/me" not in recipes.published(found)


def test_options_of_a_recipe_and_of_the_command_line_are_merged(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: a:b\nobservers: {networks: [{name: a, arch: resnet18}]}\noptions: {k: 1, m: 2}\n")
    assert recipe(path, "a:b", "--options.m", 3).options.model_extra == {"k": 1, "m": 3}


def test_a_shipped_method_with_code_is_a_line_in_the_table_and_a_file_of_values(
    outside, images_of, monkeypatch, tmp_path
):
    root = tmp_path / "root"
    (root / "methods").mkdir(parents=True)
    (root / "methods/blend.yaml").write_text("all: {options: {share: 0.1}, synthesize: {betas: [0.5, 0.9]}}")
    (root / "protocols").mkdir()
    (root / "protocols/edc.yaml").write_text("{}")
    direct = images_of(f"{outside()}:blend", "--options.share", 0.1)
    monkeypatch.setattr(recipes, "ROOT", root)
    monkeypatch.setitem(methods.FUNCTIONS, "blend", f"{outside()}:blend")
    assert methods.find("blend").__name__ == "blend" and methods.find("edc") is None
    found = images_of("blend")
    assert found.shape == direct.shape and images_of.units() == 2  # draws of its own: a unit's name is in them
