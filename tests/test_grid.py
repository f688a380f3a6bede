"""Canvases: what they decode to, and that a set of them is one of its decoded pictures wherever it is used."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from helpers_labels import CLASSES, COUNT, IPC, RELABEL, Observers, noise, recipe, seeded, written
from huggingface_hub import DatasetCard
from safetensors import safe_open
from toys import Net, Watching, write_parquet

from edc_hub import (
    CondensedSet,
    canvas,
    condense,
    evaluate,
    feed,
    initialize,
    labels,
    manifest,
    relabel,
    rules,
    source,
    synthesize,
    tables,
    teachers,
    views,
    work,
)
from edc_hub.errors import InputError
from edc_hub.recipe import Recipe


CPU = torch.device("cpu")
TILES = 4  # of grid 2


def slow_decode(images, grid: int) -> torch.Tensor:
    """Tile by tile, pixel by pixel, in exact fractions of integers, rounded half to even."""
    count, _, size, _ = images.shape
    side, step = size // grid, 2 * grid
    found = np.zeros((count * grid**2, 3, size, size))
    for n in range(count):
        for tile in range(grid**2):
            top, left = tile // grid * side, tile % grid * side
            pixels = images[n, :, top : top + side, left : left + side].numpy().astype(np.int64)
            for y in range(size):
                for x in range(size):
                    total = 0
                    for line, down in taps(y, grid, side):
                        for column, right in taps(x, grid, side):
                            total = total + down * right * pixels[:, line, column]
                    found[n * grid**2 + tile, :, y, x] = np.round(total / step**2)
    return torch.from_numpy(found).to(torch.uint8)


def taps(place: int, grid: int, side: int) -> list[tuple[int, int]]:
    """The two pixels of a line that lie about (place + 1/2) / grid - 1/2, and their shares in 1 / (2 grid)."""
    low, share = divmod(2 * place + 1 - grid, 2 * grid)
    return [(min(max(low, 0), side - 1), 2 * grid - share), (min(low + 1, side - 1), share)]


@pytest.mark.parametrize(("grid", "size"), [(2, 8), (3, 9), (4, 8), (2, 4)])
def test_a_canvas_decodes_to_its_tiles_row_by_row_resized_to_the_size_of_the_image(grid, size):
    images = noise(3, size)
    found = canvas.decode(images, grid)
    assert found.dtype == torch.uint8 and found.shape == (3 * grid**2, 3, size, size)
    assert torch.equal(found, slow_decode(images, grid))


def test_decoding_some_canvases_at_a_time_gives_the_same_pictures(monkeypatch):
    whole = canvas.decode(noise(5, 8), 2)
    monkeypatch.setattr(canvas, "CANVASES", 2)
    assert torch.equal(canvas.decode(noise(5, 8), 2), whole)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_the_differentiable_decoding_is_that_of_bytes_up_to_rounding(grid):
    images = noise(2, 12)
    x = (images.double() / 255).requires_grad_()
    found = canvas.decode(x, grid)
    assert (255 * found - canvas.decode(images, grid)).abs().max() <= 0.5 + 1e-9
    weight = torch.randn(found.shape, generator=seeded(), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found * weight).sum(), x)
    step = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)
    expected = ((canvas.decode(x.detach() + step, grid) - found.detach()) * weight).sum()  # it is linear
    torch.testing.assert_close((gradient * step).sum(), expected)


def test_pictures_put_on_canvases_are_decoded_in_their_order():
    colours = torch.arange(0, 240, 20, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 8, 8).contiguous()
    canvases = canvas.compose(colours, 2)
    assert canvases.shape == (3, 3, 8, 8)
    assert torch.equal(canvas.decode(canvases, 2), colours)  # no pixel of a neighbour
    smooth = torch.linspace(0, 255, 16).expand(4, 3, 16, 16).round().to(torch.uint8)
    error = (canvas.decode(canvas.compose(smooth, 2), 2).int() - smooth.int()).abs()
    assert error.max() <= 12 and error[..., 2:-2].max() <= 1  # at the border the ramp has no continuation


def test_with_grid_1_nothing_is_done():
    images, table = noise(3, 8), views.whole(3, 8)
    assert canvas.decode(images, 1) is images and canvas.compose(images, 1) is images
    assert canvas.stored(table, 1) is table and canvas.joined(table, 1) is table and canvas.facts(1) == {}


def test_rows_are_stored_by_canvas_and_tile_and_read_back():
    table = views.sample(recipe(relabel=RELABEL).relabel, torch.tensor([0, 7, 5, 3]), 8, seeded())
    rows = canvas.stored(table, 2)
    assert rows["image_id"].tolist() == [0, 1, 1, 0] and rows["tile"].tolist() == [0, 3, 1, 3]
    assert rows["tile"].dtype == rows["mix_tile"].dtype == torch.int8 and rows["image_id"].dtype == torch.int32
    assert (rows["mix_image_id"] * 4 + rows["mix_tile"]).tolist() == table["mix_image_id"].tolist()
    assert list(rows)[:3] == ["epoch", "image_id", "tile"] and list(rows) == views.columns(rows)
    back = canvas.joined(rows, 2)
    assert back.keys() == table.keys() and all(torch.equal(back[name], table[name]) for name in table)
    alone = canvas.stored(views.whole(8, 8), 2)
    assert (alone["mix_image_id"] == -1).all() and (alone["mix_tile"] == -1).all()
    assert (canvas.joined(alone, 2)["mix_image_id"] == -1).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten canvases of 2 x 2 pictures in five classes, two label epochs. For reading alone."""
    from accelerate import PartialState

    root = tmp_path_factory.mktemp("grid")
    session = work.Session(work.Store(root / "artifacts"), PartialState(cpu=True), CPU)
    return written(root / "dataset", session, encoding={"grid": 2})


@pytest.fixture(scope="module")
def found(folder):
    return CondensedSet.load(folder)


def test_canvases_are_counted_and_stored_pictures_are_labelled(folder, found, tmp_path):
    about = found.manifest
    assert about["format_version"] == "2.0" and about["decode"]["grid"] == 2 and about["ipc"] == IPC
    assert about["images"]["count"] == len(found.images) == COUNT
    assert torch.equal(found.images, noise(COUNT, 16)) and torch.equal(found.pictures, canvas.decode(found.images, 2))
    rows = load_dataset(str(folder), "soft_labels", split="train", cache_dir=str(tmp_path))
    assert rows.num_rows == 2 * COUNT
    assert rows.features["tile"].dtype == rows.features["mix_tile"].dtype == "int8"
    for epoch in range(2):
        part = rows.filter(lambda row, epoch=epoch: row["epoch"] == epoch)
        for name in ("", "mix_"):
            pairs = zip(part[f"{name}image_id"], part[f"{name}tile"], strict=True)
            assert sorted(pairs) == [(image, (image + epoch) % TILES) for image in range(COUNT)]


def test_stored_views_of_canvases_give_the_observers_logits_to_the_bit(found):
    networks, batch = Observers(CLASSES).networks, RELABEL["batch"]
    for epoch in range(2):
        x, (table, logits) = found.replay(epoch), found.views(epoch)
        assert x.shape == (COUNT, 3, 16, 16) and "tile" in table
        for rows in torch.arange(len(x)).split(batch):
            again = (networks["a"](x[rows]) + networks["b"](x[rows])) / 2
            assert torch.equal(again.half().float(), logits[rows])
    assert (
        table["crop"][:, :2].add(table["crop"][:, 2:]).max() > 8
    )  # boxes are in the decoded picture, not in the tile


def test_the_label_of_a_canvas_is_the_mean_over_its_pictures(found):
    networks = Observers(CLASSES).networks
    x = found.pictures.float() / 255
    each = (networks["a"](x) + networks["b"](x)) / 2
    torch.testing.assert_close(each.view(COUNT, TILES, CLASSES).mean(1), found.soft_labels, atol=1e-5, rtol=2**-10)


def test_every_picture_of_every_canvas_has_its_turn():
    ids = torch.randperm(COUNT, generator=seeded())
    seen = [canvas.turn(ids, epoch, 2) for epoch in range(TILES)]
    assert all(torch.equal(pictures // TILES, ids) for pictures in seen)
    assert sorted(torch.cat(seen).tolist()) == list(range(COUNT * TILES))
    assert torch.equal(canvas.turn(ids, 3, 1), ids)


def test_students_see_one_picture_of_every_canvas_with_its_labels(found):
    fed = feed.Stored(found, 8, CPU, seed=0)
    assert fed.count == COUNT and fed.steps == 2
    batches = list(fed.epoch(0, seeded()))
    x, soft = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    order = torch.randperm(len(x), generator=seeded())
    epoch = next(number for number in range(2) if torch.equal(found.replay(number)[order], x))
    table, logits = found.views(epoch)
    assert torch.equal(soft, logits[order])
    for column, part in (("image_id", 2), ("mix_image_id", 3)):
        assert torch.equal(torch.cat([batch[part] for batch in batches]), found.labels[table[column].long()][order])
    teach = teachers.of_images(found, SimpleNamespace(device=CPU))
    one = {"image_id": torch.tensor([5]), "mix_image_id": torch.tensor([39]), "mix_lam": torch.tensor([0.25])}
    assert torch.equal(teach(x, one)[0], 0.25 * found.soft_labels[1] + 0.75 * found.soft_labels[9])


def test_likeness_is_of_decoded_pictures_to_the_rows_they_started_from(found):
    known = found.manifest["likeness"]
    assert known["compared"] + known["noise"] == COUNT * TILES and known["parts"] == 0 and known["compared"] > COUNT
    assert 4 < known["psnr"] < 12  # of two noises


def test_row_groups_and_budget_count_one_view_of_each_canvas(session, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 2 * COUNT)
    section, images = {**RELABEL, "epochs": 7}, noise(COUNT, 16)

    def made(**more) -> labels.Labels:
        given = recipe(IPC, relabel={**section, **more}, images={"grid": 2})
        return labels.obtain(given, images, Observers(CLASSES), session)

    whole = made()
    rows = [len(columns["tile"]) for _, columns in tables.label_rows(whole, recipe().relabel)]
    assert rows == [2 * COUNT, 2 * COUNT, 2 * COUNT, COUNT]
    size = tables.file_bytes(tables.label_rows(whole.first(5), recipe().relabel))
    assert made(budget=size / 1e6).epochs == 5 and made(budget=(size - 1) / 1e6).epochs == 4


def test_the_lines_of_the_card_train_on_decoded_pictures(folder, found, tmp_path, monkeypatch):
    text = DatasetCard.load(folder / "README.md").text
    example, replay = (
        re.search(rf"```python\n({start}.*?)```", text, re.DOTALL)[1] for start in ("import timm", "from")
    )
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    exec(replay, names)
    assert torch.equal(names["x"], found.replay(0))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    names = {}
    exec(example.replace("shuffle=True", "shuffle=False"), names)
    assert names["logits"].shape[1] == CLASSES and torch.isfinite(names["loss"])
    last = names["batch"]["image"]
    assert torch.equal(last, found.pictures[-len(last) :].float())
    assert torch.equal(names["batch"]["label"], found.of_pictures(found.labels)[-len(last) :])
    assert torch.equal(names["batch"]["soft_label"].float(), found.of_pictures(found.soft_labels)[-len(last) :])
    for part in ("canvas of 2x2 pictures", "`tile`, `mix_tile`", "in the decoded picture", "8 pictures of each class"):
        assert part in text
    assert f"{2 * COUNT} labelled views" in text and "timm's own training script" not in text
    assert not re.search(r"\{\{|\}\}|\{%|None|Undefined|nan", text)


def test_a_reader_that_does_not_know_canvases_refuses_the_set(folder, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT_VERSION", "1.0")
    with pytest.raises(InputError, match=r"its format is 2\.0"):
        CondensedSet.load(folder)


def test_without_canvases_the_schema_is_what_it_was(dataset):
    made = json.loads((dataset / "manifest.json").read_text())
    assert made["format_version"] == "1.0" and "decode" not in made
    table, _ = CondensedSet.load(dataset).views(0)
    assert not {"tile", "mix_tile"} & set(table)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"images": {"grid": 3}}, r"images\.grid: 3 pictures a side do not divide 16 px"),
        (
            {"images": {"grid": 2}, "initialize": {"kind": "rded", "factor": 2}},
            r"initialize\.factor: 2.*images\.grid 2",
        ),
        ({"images": {"grid": 2}, "initialize": {"kind": "kmeans", "images_per_class": 7}}, "cannot give 8 centres"),
        (
            {"images": {"grid": 2}, "relabel": {"epochs": 3}},
            "relabel.epochs: 3, and an epoch shows one of the 4 pictures",
        ),
        (
            {"images": {"grid": 2}, "initialize": {"kind": "rded", "images_per_class": 7}},
            "grid 2 needs 8 crops a class",
        ),
    ],
)
def test_canvases_that_cannot_be_are_refused(sections, said):
    with pytest.raises(InputError, match=said):
        rules.validate(recipe(**sections))


# Where canvases come from


@pytest.fixture(scope="module")
def real_set(tmp_path_factory):
    """Three classes of 24 images of 20 x 14 pixels."""
    path = tmp_path_factory.mktemp("sets") / "three"
    write_parquet(path, {"train": [row * 7 % 3 for row in range(72)]}, names=["a", "b", "c"], side=(20, 14))
    return path


def initial(folder, session, grid: int, ipc: int, **section):
    given = Recipe(
        ipc=ipc,
        source={"path": str(folder), "size": 12},
        observers={"networks": [{"name": "one", "arch": "convnet"}]},
        initialize={"images_per_class": 20, **section},
        images={"grid": grid},
    )
    return initialize.obtain(given, source.load(given.source), Watching(one=Net(1, [0.4, 0.5, 0.6])), session)


@pytest.mark.parametrize("kind", ["real", "kmeans", "rded"])
def test_canvases_hold_the_images_of_a_set_with_as_many_more_a_class(real_set, session, kind):
    found, single = initial(real_set, session, 2, 3, kind=kind), initial(real_set, session, 1, 12, kind=kind)
    assert found.images.shape == (9, 3, 12, 12) and found.fingerprint != single.fingerprint
    assert torch.equal(found.images, canvas.compose(single.images, 2))
    assert torch.equal(found.source_rows, single.source_rows.view(9, 4))


def test_the_first_canvases_of_a_class_are_those_of_a_smaller_set(real_set, session):
    found, fewer = initial(real_set, session, 2, 5, kind="real"), initial(real_set, session, 2, 2, kind="real")
    assert torch.equal(found.images.unflatten(0, (3, 5))[:, :2], fewer.images.unflatten(0, (3, 2)))


def test_noise_fills_the_canvas_itself(real_set, session):
    found, single = (initial(real_set, session, grid, 3, kind="noise") for grid in (2, 1))
    assert torch.equal(found.images, single.images)  # not shrunk, which would smooth it
    assert found.source_rows.shape == (9, 4) and (found.source_rows == -1).all()


def test_classes_with_too_few_images_for_their_canvases_are_refused(real_set, session):
    with pytest.raises(InputError, match="28"):
        initial(real_set, session, 2, 7, kind="real")


def test_synthesis_sees_decoded_pictures_and_moves_the_canvases(session, tmp_path):
    section = {"iterations": 60, "lr": 0.2, "crop_area": [1.0, 1.0], "flip": False}
    given, images, seen = recipe(images={"grid": 2}, synthesize=section), noise(3, 16), []

    def loss(x, _, labels, *__, **___):
        seen.append((x.detach(), labels.tolist()))
        return (x - 0.25).square().sum()

    observed = SimpleNamespace(loss=loss, matcher=SimpleNamespace(state=dict, drop=lambda generator: None))
    labels, progress = torch.tensor([0, 0, 1]).repeat_interleave(TILES), work.Progress(tmp_path / "p", 1e9)
    z, _ = synthesize.optimise(images, labels, [observed], given, session, seeded(), progress)
    assert z.shape == (3, 3, 16, 16) and seen[0][1] == [0] * 8 + [1] * 4
    torch.testing.assert_close(seen[0][0], canvas.decode(images.float() / 255, 2), rtol=0, atol=1e-6)
    assert (0.5 * z + 0.5 - 0.25).abs().max() < 0.05


# The whole way

DIGITS = {
    "name": "digits",
    "ipc": 2,
    "source": {"path": "sklearn/digits", "size": 16},
    "observers": {
        "train": {"epochs": 2, "batch": 50, "augment": "none", "flip": False},
        "networks": [{"name": "plain", "arch": "convnet", "args": {"depth": 2, "width": 8, "norm": "batch"}}],
    },
    "moments": {"rows": 500},
    "images": {"grid": 2},
    "synthesize": {"iterations": 3, "block": 8},
    "relabel": {"epochs": 4, "batch": 20, "flip": False, "random_draws": 1},
    "evaluation": {
        "students": [{"name": "narrow", "arch": "convnet", "args": {"depth": 2, "width": 8}}],
        "epochs": 2,
        "batch": 20,
    },
}
MACHINE = ["--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of digits on canvases."""
    root = tmp_path_factory.mktemp("digits")
    (root / "recipe.yaml").write_text(yaml.safe_dump(DIGITS))
    assert condense.main([str(root / "recipe.yaml"), "--output_dir", str(root / "run"), *MACHINE]) == 0
    return root / "run"


def test_a_run_with_canvases_has_as_many_images_as_asked_for_and_controls_alike(run):
    digits = source.load(Recipe(**DIGITS).source)
    sets = [CondensedSet.load(run / place) for place in ("dataset", "controls/initial", "controls/random/0")]
    for each in sets:
        assert each.images.shape == (20, 3, 16, 16) and each.pictures.shape == (80, 3, 16, 16) and each.grid == 2
        assert each.ipc == 2 and len(each.views(1)[1]) == 20
    for control in sets[1:]:
        rows = control.source_rows
        assert rows.shape == (20, 4) and torch.equal(digits.labels[rows[:, 3]], control.labels)
        assert torch.equal(control.images, canvas.compose(digits.images(rows.flatten()), 2))
    assert torch.equal(sets[0].source_rows, sets[1].source_rows) and not torch.equal(sets[0].images, sets[1].images)
    mixed = sets[0].views(0)[0]
    assert (mixed["mix_tile"] != mixed["tile"]).any()


@pytest.mark.parametrize("kind", ["stored", "online", "mean"])
def test_students_of_canvases_are_evaluated_beside_their_controls(run, tmp_path, kind):
    out, rows = tmp_path / "out", "[initial, random, hard, real]" if kind == "stored" else "[]"
    argv = ["--dataset", str(run / "dataset"), "--output_dir", str(out), "--seeds", "0", "--controls", rows, *MACHINE]
    assert evaluate.main([*argv, "--evaluation.labels", kind]) == 0
    found = json.loads((out / "results.json").read_text())
    counted = found["about"]["rows"]
    assert counted["set"]["images"] == 20
    if kind == "stored":
        assert {"initial", "random", "hard_mixed", "real_mixed"} <= counted.keys()
        assert all(counted[row]["images"] == 20 for row in ("initial", "random", "hard_mixed"))
        for path in (run.parent / "artifacts/students").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert json.loads(file.metadata()["facts"])["steps"] == 2  # 20 canvases in batches of 20


def test_a_set_of_canvases_is_labelled_anew_as_one(run, capsys):
    argv = [str(run.parent / "recipe.yaml"), "--images", str(run / "dataset"), *MACHINE]
    place = ["--output_dir", str(run.parent / "again"), "--relabel.controls", "false"]
    assert relabel.main([*argv, *place, "--images.grid", "1"]) == 2
    assert "canvases of 2 x 2 pictures; write --images.grid 2" in capsys.readouterr().err
    assert relabel.main([*argv, *place]) == 0
    ours, again = CondensedSet.load(run / "dataset"), CondensedSet.load(run.parent / "again/dataset")
    assert again.grid == 2 and torch.equal(again.images, ours.images)
    assert torch.equal(again.soft_labels, ours.soft_labels)


def test_the_plan_counts_a_labelled_view_of_each_canvas(run, capsys):
    assert condense.main([str(run.parent / "recipe.yaml"), "--dry_run", *MACHINE]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^images +20 rows", shown, re.M) and re.search(r"^soft_labels +80 rows", shown, re.M)
