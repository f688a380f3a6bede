import json

import pytest

from edc_hub import documents, networks, published, recipes


TABLE = documents.load(recipes.ROOT / "published.yaml")
FIGURES = [
    (name, ipc, student, figure)
    for name, by_ipc in TABLE.items()
    for ipc, by_student in by_ipc.items()
    for student, figures in by_student.items()
    for figure in figures
]


@pytest.mark.parametrize(
    ("name", "ipc", "student", "method", "accuracy", "std", "taken"),
    [
        ("cifar10", 1, "resnet18", "EDC", 0.326, 0.001, "unknown"),
        ("cifar10", 10, "resnet18", "EDC", 0.791, 0.003, "unknown"),
        ("cifar10", 50, "resnet18", "RDED", 0.621, None, "best"),
        ("cifar10", 50, "resnet18", "EDC (rd3)", 0.648, None, "unknown"),
        ("cifar10", 10, "convnet3", "random", 0.26, 0.012, "unknown"),
        ("cifar10", 10, "convnet3", "RDED", 0.502, None, "best"),
        ("cifar10", 10, "convnet3", "DSA", 0.521, 0.005, "last"),
        ("cifar10", 50, "convnet3", "DREAM", 0.748, None, "best"),
        ("cifar100", 1, "resnet18", "EDC", 0.397, 0.001, "unknown"),
        ("cifar100", 10, "resnet18", "FADRM+", 0.679, None, "unknown"),
        ("tiny-imagenet", 50, "convnet4", "MTT", 0.28, 0.003, "best"),
        ("imagenet10", 50, "mobilenet_v2", "EDC", 0.802, None, "unknown"),
        ("imagenet1k", 40, "shufflenet_v2", "EDC", 0.447, None, "unknown"),
        ("imagenet1k", 50, "swin_tiny", "G-VBSM", 0.574, None, "unknown"),
        ("imagenet1k", 50, "resnet50", "RDED", 0.637, None, "best"),
    ],
)
def test_a_published_figure_is_found_as_a_fraction_with_the_epoch_it_is_of(
    name, ipc, student, method, accuracy, std, taken
):
    (figure,) = [it for it in published.lookup(name, ipc, student) if it["method"] == method]
    assert (figure["accuracy"], figure["std"], figure["as"]) == (accuracy, std, taken)


def test_where_nothing_is_published_nothing_is_found():
    assert published.lookup("digits", 1, "resnet18") == []
    assert published.lookup("cifar10", 7, "resnet18") == []
    assert published.lookup("cifar10", 10, "wrn_16_2") == []


def test_two_names_of_one_network_find_the_same():
    found = published.lookup("imagenet1k", 10, "shufflenet_v2_x0_5")
    assert found and found == published.lookup("imagenet1k", 10, "shufflenet_v2")


def test_what_is_found_may_be_changed_and_written_as_json():
    found = published.lookup("cifar10", 10, "resnet18")
    before = json.dumps(found)
    found[0]["method"] = "mine"
    assert json.dumps(published.lookup("cifar10", 10, "resnet18")) == before


def test_every_figure_is_of_a_shipped_data_set_and_a_known_student_and_says_where_it_is_from():
    names = {recipes.load(recipes.find(name))["name"] for name in recipes.shipped()}
    assert set(TABLE) <= names and {"cifar10", "cifar100", "tiny-imagenet", "imagenet10", "imagenet1k"} <= set(TABLE)
    assert {student for _, _, student, _ in FIGURES} <= set(networks.OURS)
    for name, ipc, student, figure in FIGURES:
        where = f"{name} {ipc} {student} {figure}"
        assert {"method", "accuracy", "as", "where"} <= set(figure) <= {"method", "accuracy", "std", "as", "where"}, (
            where
        )
        assert figure["as"] in ("last", "best", "unknown"), where
        assert isinstance(ipc, int) and 1 <= figure["accuracy"] <= 100 and 0 < figure.get("std", 1) < 5, where


def test_a_method_stands_once_for_a_data_set_an_ipc_and_a_student():
    seen = [(name, ipc, student, figure["method"]) for name, ipc, student, figure in FIGURES]
    assert len(seen) == len(set(seen))
