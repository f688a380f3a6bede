"""How soft labels are stored: what each codec keeps, budgets, and that everything that reads them reads them all."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from helpers_labels import CLASSES, COUNT, RELABEL, Observers, noise, recipe, seeded, written

from edc_hub import CondensedSet, codecs, feed, labels, recipes, tables
from edc_hub.errors import InputError
from edc_hub.feed import Stored
from edc_hub.recipe import Relabel


CODECS = [{"codec": "dense"}, {"codec": "int8"}, {"codec": "top_k", "top_k": 2}, {"codec": "top_k", "top_k": 5}]
IDS = ["dense", "int8", "top_2", "top_all"]


def logits(rows: int = 200, classes: int = 30, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, with equal values and a row of zeros among them."""
    found = torch.randn(rows, classes, generator=seeded(seed)) * 10 ** torch.linspace(-4, 3, rows)[:, None]
    found[0], found[1], found[2, :20] = 0, 3.5, -1.25
    return found.half()


def reference(soft: torch.Tensor, section: Relabel) -> torch.Tensor:
    """What a reader gets of each row, one number at a time, in float64."""
    rows = []
    for row in soft.double().tolist():
        if section.codec == "int8":
            step = torch.tensor(max(map(abs, row)) / 127).half().item()
            row = [max(-127, min(127, round(value / step))) * step if step else 0.0 for value in row]
        if section.codec == "top_k":
            order = sorted(range(len(row)), key=lambda i: (-row[i], i))
            rest = [row[i] for i in order[section.top_k :]]
            fill = sum(rest) / len(rest) if rest else 0.0
            row = [row[i] if i in order[: section.top_k] else fill for i in range(len(row))]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("section", [{"codec": "dense"}, {"codec": "int8"}, {"codec": "top_k", "top_k": 4}])
def test_what_is_read_is_what_the_codec_keeps_of_each_logit(section):
    soft, section = logits(), Relabel(**section)
    read = codecs.decode(codecs.encode(soft, section), 30)
    assert read.dtype == torch.float16 and read.shape == soft.shape
    torch.testing.assert_close(read.double(), reference(soft, section), rtol=2**-10, atol=6e-8)
    if section.codec == "dense":
        assert torch.equal(read, soft)


def test_an_int8_logit_is_off_by_half_a_step_at_most():
    soft = logits()
    columns = codecs.encode(soft, Relabel(codec="int8"))
    assert columns["soft_label"].dtype == torch.int8 and columns["scale"].dtype == torch.float16
    error = (codecs.decode(columns, 30).double() - soft.double()).abs()
    step = soft.double().abs().amax(1, keepdim=True) / 127
    assert (error <= 0.51 * step + 2**-11 * soft.double().abs() + 4e-6).all()
    rows = step.view(-1) > 1e-4  # where float16 has all digits of a step
    assert (columns["soft_label"].abs().amax(1)[rows] == 127).all()


def test_top_k_keeps_the_largest_and_fills_with_the_constant_of_least_squared_error():
    soft, k = logits(), 4
    columns = codecs.encode(soft, Relabel(codec="top_k", top_k=k))
    assert {name: str(column.dtype) for name, column in columns.items()} == {
        "indices": "torch.int16", "values": "torch.float16", "fill": "torch.float16"
    }  # fmt: skip
    read = codecs.decode(columns, 30)
    for row, kept in zip(soft.double(), read.double(), strict=True):
        best = sorted(range(30), key=lambda i: (-row[i].item(), i))
        assert torch.equal(kept[best[:k]], row[best[:k]])
        rest, fill = row[best[k:]], kept[best[k:]].unique()
        assert len(fill) == 1
        ours = (rest - fill).square().mean()
        for other in (rest.min(), rest.median(), torch.tensor(0.0), fill * 1.01, fill * 0.99):
            assert ours <= (rest - other).square().mean() * (1 + 1e-3) + 1e-12


def test_top_k_of_all_classes_loses_nothing_and_more_than_there_are_is_refused():
    soft = logits(classes=5)
    assert torch.equal(codecs.decode(codecs.encode(soft, Relabel(codec="top_k", top_k=5)), 5), soft)
    labels.check(recipe(relabel={"codec": "top_k", "top_k": 5}), 5)
    labels.check(recipe(relabel={"codec": "dense", "top_k": 10}), 5)
    with pytest.raises(InputError, match="relabel.top_k: 6 of 5 classes; write at most 5"):
        labels.check(recipe(relabel={"codec": "top_k", "top_k": 6}), 5)


def test_a_row_is_stored_alike_whatever_is_stored_with_it():
    soft = logits()
    for given in CODECS:
        section = Relabel(**given)
        whole = codecs.encode(soft, section)
        for start, stop in ((0, 1), (7, 90)):
            part = codecs.encode(soft[start:stop], section)
            assert all(torch.equal(part[name], whole[name][start:stop]) for name in whole)


def test_the_bytes_of_a_row_are_those_of_its_columns():
    for given in CODECS:
        section = Relabel(**given)
        columns = codecs.encode(logits(), section)
        found = sum(column[0].numel() * column.element_size() for column in columns.values())
        assert codecs.row_bytes(section, 30) == found
        assert [name for name, _ in codecs.described(codecs.facts(section), 30)] == list(columns)


def test_smaller_codecs_make_smaller_files_and_no_file_outgrows_its_numbers():
    table = {"epoch": torch.zeros(1000, dtype=torch.int16), "image_id": torch.arange(1000).int()}
    soft = (3 * torch.randn(2, 1000, 100, generator=seeded())).half()
    made = SimpleNamespace(mean=soft[0], epochs=2, epoch=lambda number: (table, soft[number]))
    sizes = {}
    for given in ({"codec": "dense"}, {"codec": "int8"}, {"codec": "top_k", "top_k": 10}):
        section = Relabel(**given)
        sizes[section.codec] = tables.file_bytes(tables.label_rows(made, section)) / 2000
        assert sizes[section.codec] < codecs.row_bytes(section, 100) + 8
    assert sizes["int8"] < 0.6 * sizes["dense"] and sizes["top_k"] < 0.25 * sizes["dense"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """The same set of ten images and six label epochs in every codec."""
    from accelerate import PartialState

    from edc_hub.work import Session, Store

    root = tmp_path_factory.mktemp("codecs")
    session = Session(Store(root / "artifacts"), PartialState(cpu=True), torch.device("cpu"), progress="none")
    places = dict(zip(IDS, CODECS, strict=True)) | {"observers": {"codec": "observers"}}
    return {name: written(root / name, session, epochs=6, relabel=given) for name, given in places.items()}


@pytest.mark.parametrize(("name", "given"), [*zip(IDS, CODECS, strict=True)], ids=IDS)
def test_a_set_reads_back_what_its_codec_keeps_of_the_labels(sets, name, given):
    found, dense = CondensedSet.load(sets[name]), CondensedSet.load(sets["dense"])
    for epoch in (0, 5):
        (table, soft), (want, made) = found.views(epoch), dense.views(epoch)
        assert list(table) == list(want) and all(torch.equal(table[key], want[key]) for key in want)
        assert soft.dtype == torch.float32
        torch.testing.assert_close(soft.double(), reference(made.half(), Relabel(**given)), rtol=2**-10, atol=6e-8)
    facts = found.manifest["soft_labels"]
    assert (facts["codec"], facts.get("top_k"), facts["epochs"]) == (given["codec"], given.get("top_k"), 6)
    assert torch.equal(found.soft_labels, dense.soft_labels)  # one an image, as it was


FEATURES = {
    "dense": {"soft_label": "List(Value('float16'), length=5)"},
    "int8": {"soft_label": "List(Value('int8'), length=5)", "scale": "Value('float16')"},
    "top_2": {
        "indices": "List(Value('int16'), length=2)", "values": "List(Value('float16'), length=2)",
        "fill": "Value('float16')",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_load_dataset_reads_every_codec_map_style_filtered_and_as_a_stream(sets, name, tmp_path):
    options = {"split": "train", "cache_dir": str(tmp_path)}
    rows = load_dataset(str(sets[name]), "soft_labels", **options)
    shown = {key: repr(value) for key, value in rows.features.items() if key in codecs.COLUMNS}
    assert shown == FEATURES[name] and list(rows.features)[-len(shown) :] == list(shown)
    third = load_dataset(str(sets[name]), "soft_labels", filters=[("epoch", "==", 3)], **options)
    assert third["epoch"][:] == [3] * COUNT

    stream = load_dataset(str(sets[name]), "soft_labels", streaming=True, **options).with_format("torch").batch(COUNT)
    for epoch, batch in enumerate(stream):
        table, soft = CondensedSet.load(sets[name]).views(epoch)
        assert torch.equal(batch["image_id"], table["image_id"].long())
        assert torch.equal(codecs.decode(batch, CLASSES).float(), soft)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("kept_bytes", [feed.KEPT_BYTES, 0], ids=["memory", "disk"])
def test_students_are_fed_the_labels_of_every_codec(sets, name, kept_bytes, monkeypatch):
    monkeypatch.setattr(feed, "KEPT_BYTES", kept_bytes)
    condensed = CondensedSet.load(sets[name])
    fed = Stored(condensed, COUNT, torch.device("cpu"), seed=3)
    for number in range(7):
        (batch,) = fed.epoch(number, seeded(number))
        order = torch.randperm(COUNT, generator=seeded(number))
        same = [epoch for epoch in range(6) if torch.equal(condensed.replay(epoch)[order], batch.x)]
        assert len(same) == 1 and torch.equal(batch.soft, condensed.views(same[0])[1][order])


def test_sizes_tell_labels_from_views_in_every_codec(sets):
    found = {name: CondensedSet.load(place).sizes("stored") for name, place in sets.items()}
    for name, size in found.items():
        files = sum(path.stat().st_size for path in sets[name].glob("soft_labels/*.parquet"))
        assert size["labels"] + size["views"] == files and (files > 0) == (name != "observers")
    assert found["dense"]["views"] == pytest.approx(found["top_2"]["views"], rel=0.1)


def test_observers_store_no_views_and_say_who_labels(sets):
    assert not (sets["observers"] / "soft_labels").exists()
    manifest = json.loads((sets["observers"] / "manifest.json").read_text())
    assert list(manifest["configs"]) == ["images"] and manifest["soft_labels"]["epochs"] == 0
    assert manifest["soft_labels"]["mix"] == "cutmix"  # how the views are to be drawn
    found = CondensedSet.load(sets["observers"])
    assert found.epochs == 0 and found.soft_labels.shape == (COUNT, CLASSES)
    with pytest.raises(InputError, match="stores no labelled views"):
        found.views(0)


def test_the_card_has_the_columns_of_its_codec(sets):
    for name, columns in FEATURES.items():
        text = (sets[name] / "README.md").read_text()
        assert all(f"| `{column}` |" in text for column in columns)
        assert ("| `scale` |" in text) == (name == "int8") and ("| `fill` |" in text) == (name == "top_2")


def test_codecs_share_one_labelling(session):
    images, observers = noise(COUNT, 16), Observers(CLASSES)
    made = labels.obtain(recipe(relabel=RELABEL), images, observers, session)
    calls = len(observers.loaded)
    for given in (*CODECS, {"codec": "int8", "budget": 100.0, "full": True}):
        again = labels.obtain(recipe(relabel={**RELABEL, **given}), images, observers, session)
        assert again.units == made.units
    assert len(observers.loaded) == calls


def label_files(place: Path, config: str = "soft_labels") -> int:
    return sum(path.stat().st_size for path in (place / config).glob("*.parquet"))


def test_a_budget_keeps_the_label_epochs_that_fit_and_labels_no_others(session, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 2 * COUNT)  # two label epochs a row group
    whole = written(tmp_path / "whole", session, epochs=40)
    size = label_files(whole)
    session.store.root = tmp_path / "others"
    budget = 0.5 * size
    place = written(tmp_path / "dataset", session, epochs=40, relabel={"budget": budget / 1e6})
    found, kept = CondensedSet.load(place), CondensedSet.load(place).epochs
    assert 0.9 * budget < label_files(place) <= budget and 1 < kept < 40
    made = len(list((tmp_path / "others/views").glob("*.safetensors"))) - 1
    assert kept <= made <= kept + 2  # one or two may turn out not to fit
    want = CondensedSet.load(whole).views(kept - 1)[0]
    assert all(torch.equal(column, want[name]) for name, column in found.views(kept - 1)[0].items())


def test_a_budget_within_the_first_row_group_is_filled_to_the_epoch(session, tmp_path):
    sizes = {count: label_files(written(tmp_path / f"of {count}", session, epochs=count)) for count in (3, 4)}
    for kept, budget in ((3, sizes[3]), (3, sizes[4] - 1)):
        place = written(tmp_path / f"budget {budget}", session, epochs=40, relabel={"budget": budget / 1e6})
        assert CondensedSet.load(place).epochs == kept and label_files(place) == sizes[kept]


def test_a_budget_below_one_label_epoch_keeps_one_and_says_so(session, tmp_path, capsys):
    place = written(tmp_path / "dataset", session, epochs=4, relabel={"budget": 1e-6})
    assert CondensedSet.load(place).epochs == 1
    assert "relabel.budget: 1e-06 MB keep 1 of 4 label epochs; one takes 0.0" in capsys.readouterr().err


def test_a_budget_keeps_a_label_epoch_for_each_picture_of_a_canvas(session, tmp_path):
    with pytest.raises(InputError, match=r"relabel.budget: 1e-06 MB keep 1 label epochs, .* one of the 4 pictures"):
        written(tmp_path / "dataset", session, epochs=8, relabel={"budget": 1e-6}, encoding={"grid": 2})


def test_all_label_epochs_stand_beside_the_pruned_ones_as_a_configuration_of_their_own(session, tmp_path):
    whole = written(tmp_path / "whole", session, epochs=30)
    given = {"codec": "int8", "budget": label_files(whole) / 4e6, "full": True}
    place = written(tmp_path / "dataset", session, epochs=30, relabel=given)
    facts = CondensedSet.load(place).manifest
    kept = facts["soft_labels"]["epochs"]
    assert 1 <= kept < 30 and facts["soft_labels"]["full_epochs"] == 30
    assert label_files(place, "soft_labels_full") == label_files(whole)
    assert list(facts["configs"]) == ["images", "soft_labels", "soft_labels_full"]
    rows = load_dataset(str(place), "soft_labels_full", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 30 * COUNT and "List(Value('float16')" in repr(rows.features["soft_label"])
    assert len(load_dataset(str(place), split="train", cache_dir=str(tmp_path / "cache"))) == COUNT  # images alone
    read, known = CondensedSet.load(place, full=True), CondensedSet.load(whole)
    assert read.epochs == 30 and read.sizes("stored") == known.sizes("stored")
    assert all(torch.equal(read.views(epoch)[1], known.views(epoch)[1]) for epoch in (0, kept, 29))
    assert torch.equal(read.replay(29), known.replay(29))
    with pytest.raises(InputError, match="has no soft_labels_full; leave out full, or make it with relabel.full"):
        CondensedSet.load(whole, full=True)


def test_a_control_has_as_many_label_epochs_as_its_set(session):
    given = recipe(relabel={**RELABEL, "epochs": 8, "budget": 1e-6, "full": True})
    found = labels.obtain(given, noise(COUNT, 16), Observers(CLASSES), session, epochs=5)
    assert found.epochs == 5 and found.full is None


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--relabel.codec", "observers"], "relabel.codec: observers stores no views .* --evaluation.labels online"),
        (["--relabel.codec", "observers", "--relabel.budget", "3"], "relabel.budget: codec observers"),
        (["--relabel.codec", "observers", "--relabel.full", "true"], "relabel.full: codec observers"),
        (["--relabel.full", "true"], "relabel.full: true, but soft_labels has all label epochs"),
        (["--relabel.codec", "float8"], "relabel.codec: .*dense"),
        (["--relabel.budget", "0"], "relabel.budget: "),
        (["--relabel.top_k", "0"], "relabel.top_k: "),
    ],
)
def test_keys_that_do_not_go_together_are_refused(given, line):
    with pytest.raises(InputError, match=line):
        recipes.parse(["digits", *given], prog="condense")


def test_keys_that_go_together_are_taken():
    for given in (
        ["--relabel.codec", "observers", "--evaluation.labels", "online"],
        ["--relabel.codec", "top_k", "--relabel.top_k", "3", "--relabel.budget", "25"],
        ["--relabel.codec", "int8", "--relabel.full", "true"],
    ):
        recipes.parse(["digits", *given], prog="condense")
    assert recipes.parse(["digits"], prog="condense").recipe.relabel.codec == "dense"
