"""What a student sees: stored views and labels in their order, views drawn while it trains."""

import pytest
import torch
from helpers_labels import noise, seeded, written

from edc_hub import CondensedSet, feed, lessons, source, views, work
from edc_hub.feed import Drawn, Stored
from edc_hub.recipe import Images, Source
from edc_hub.section import ViewSettings


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def condensed(tmp_path_factory):
    """Ten images in five classes, three label epochs of views with RandAugment, strips and CutMix."""
    from accelerate import PartialState

    root = tmp_path_factory.mktemp("feed")
    session = work.Session(work.Store(root / "artifacts"), PartialState(cpu=True), CPU)
    return CondensedSet.load(written(root / "dataset", session, epochs=3))


def joined(fed, number: int, seed: int = 0) -> feed.Batch:
    """The batches of one epoch as one."""
    parts = zip(*fed.epoch(number, seeded(seed)), strict=True)
    return feed.Batch(*(None if part[0] is None else torch.cat(part) for part in parts))


def label_epoch(condensed, batch: feed.Batch, order: torch.Tensor) -> int:
    """Which label epoch these views are."""
    found = [epoch for epoch in range(condensed.epochs) if torch.equal(condensed.replay(epoch)[order], batch.x)]
    assert len(found) == 1
    return found[0]


def order_of(seed: int) -> torch.Tensor:
    return torch.randperm(10, generator=seeded(seed))


@pytest.mark.parametrize(
    "constants",
    [(), (views, "PIXELS", 1), (feed, "KEPT_BYTES", 0), (views, "PIXELS", 7 * 16 * 16)],
    ids=["ahead", "batches", "disk", "few"],
)
def test_stored_views_and_labels_are_those_of_the_set_to_the_bit(condensed, monkeypatch, constants):
    if constants:
        monkeypatch.setattr(*constants)
    fed = Stored(condensed, 4, CPU, seed=3)
    for number in (0, 1, 2, 5, 0):
        batch = joined(fed, number, seed=number)
        table, soft = condensed.views(label_epoch(condensed, batch, order_of(number)))
        rows = order_of(number)
        assert batch.x.dtype == torch.float32 and batch.soft.dtype == torch.float32
        assert torch.equal(batch.soft, soft[rows])
        for i, row in enumerate(rows.tolist()):
            first, second = table["image_id"][row].item(), table["mix_image_id"][row].item()
            assert batch.label[i] == condensed.labels[first] and batch.mixed[i] == condensed.labels[second]
            assert batch.share[i] == table["mix_lam"][row]


def test_label_epochs_are_cycled_in_an_order_of_each_students_own(condensed):
    def turns(seed: int) -> list[int]:
        fed = Stored(condensed, 4, CPU, seed=seed)
        return [label_epoch(condensed, joined(fed, number), order_of(0)) for number in range(12)]

    students = [turns(seed) for seed in range(4)]
    for found in students:
        assert [sorted(found[i : i + 3]) for i in (0, 3, 6, 9)] == [[0, 1, 2]] * 4
        assert len({tuple(found[i : i + 3]) for i in (0, 3, 6, 9)}) > 1  # a new order in each cycle
    assert len({tuple(found) for found in students}) == 4
    assert turns(1) == students[1]


def test_an_epoch_is_the_same_whatever_came_before_it(condensed):
    through = Stored(condensed, 4, CPU, seed=1)
    found = [joined(through, number, seed=number) for number in range(8)]
    for number in (7, 4):
        alone = joined(Stored(condensed, 4, CPU, seed=1), number, seed=number)
        assert all(torch.equal(*pair) for pair in zip(alone, found[number], strict=True))


def test_rows_are_shuffled_anew_and_each_comes_once(condensed):
    fed = Stored(condensed, 4, CPU, seed=0)
    sizes = [len(batch.x) for batch in fed.epoch(0, seeded(1))]
    assert sizes == [4, 4, 2] and fed.steps == 3
    one, other = (joined(fed, 0, seed=seed) for seed in (1, 2))
    assert not torch.equal(one.x, other.x)
    assert torch.equal(one.x[order_of(1).argsort()], other.x[order_of(2).argsort()])


@pytest.mark.parametrize("batch, sizes", [(4, [4, 4, 2]), (5, [5, 5]), (3, [3, 3, 3]), (20, [10])])
def test_shuffled_batches_are_those_that_were_labelled(condensed, batch, sizes):
    """In another order every time; what is mixed with what stays together, and a smaller batch comes last."""
    seen = []
    for seed in range(6):
        found = list(Stored(condensed, batch, CPU, seed=0, shuffled="batches").epoch(0, seeded(seed)))
        assert [len(each.x) for each in found] == sizes
        rows = torch.cat([each.x for each in found])
        (replayed,) = [x for x in map(condensed.replay, range(3)) if any(torch.equal(rows[0], view) for view in x)]
        places = [next(i for i, view in enumerate(replayed) if torch.equal(view, row)) for row in rows]
        for part in torch.tensor(places).split(batch):
            assert part.tolist() == list(range(part[0], part[0] + len(part))) and part[0] % batch == 0
        seen.append(tuple(places))
    assert (len(set(seen)) > 1) == (len(sizes) > 1)


def test_a_last_batch_of_one_view_is_left_out_unless_it_is_the_only_one(condensed):
    for batch, sizes in ((3, [3, 3, 3]), (9, [9]), (1, [1] * 10), (10, [10]), (50, [10])):
        fed = Stored(condensed, batch, CPU, seed=0)
        assert [len(found.x) for found in fed.epoch(0, seeded())] == sizes and fed.steps == len(sizes)
    assert feed.steps(1, 50) == 1


def test_hard_labels_with_mixing_keep_the_views_and_have_the_shares(condensed):
    soft, hard = (joined(Stored(condensed, 4, CPU, seed=0, hard=value), 0) for value in (False, True))
    assert hard.soft is None and torch.equal(hard.x, soft.x)
    assert torch.equal(hard.mixed, soft.mixed) and torch.equal(hard.share, soft.share) and (hard.share < 1).any()


def test_hard_labels_without_mixing_show_the_views_before_they_are_mixed(condensed):
    plain = joined(Stored(condensed, 4, CPU, seed=0, hard=True, mix=False), 0)
    mixed = joined(Stored(condensed, 4, CPU, seed=0), 0)
    table, _ = condensed.views(label_epoch(condensed, mixed, order_of(0)))
    for i, row in enumerate(order_of(0).tolist()):
        alone = {name: column[row : row + 1].clone() for name, column in table.items()}
        alone["mix_image_id"][:] = -1
        assert torch.equal(plain.x[i : i + 1], views.apply(condensed.images, alone, 16))
    assert torch.equal(plain.mixed, plain.label) and (plain.share == 1).all()


IMAGES, LABELS = noise(11, 16), torch.arange(11) % 3
VIEW = ViewSettings(rand_augment=1)


def test_drawn_views_are_sampled_batch_by_batch_from_the_generator():
    fed, rng = Drawn(IMAGES, LABELS, VIEW, 4, CPU, seed=0, teach=None), seeded(5)
    order = torch.randperm(11, generator=rng)
    found = list(fed.epoch(3, seeded(5)))
    assert [len(batch.x) for batch in found] == [4, 4, 3] and fed.steps == 3
    for batch, ids in zip(found, order.split(4), strict=True):
        table = views.sample(VIEW, ids, 16, rng)
        assert torch.equal(batch.x, views.apply(IMAGES, table, 16))
        assert torch.equal(batch.label, LABELS[ids]) and batch.soft is None
        assert torch.equal(batch.mixed, LABELS[table["mix_image_id"].long()])
        assert torch.equal(batch.share, table["mix_lam"])


def test_drawn_views_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    many = joined(Drawn(IMAGES, LABELS, VIEW, 4, CPU, seed=0, teach=None), 0)
    monkeypatch.setattr(views, "PIXELS", 1)
    few = joined(Drawn(IMAGES, LABELS, VIEW, 4, CPU, seed=0, teach=None), 0)
    assert torch.equal(many.x, few.x) and torch.equal(many.share, few.share)


def test_clean_views_do_not_depend_on_how_many_are_made_at_once(condensed, monkeypatch):
    feeds = Drawn(IMAGES, LABELS, VIEW, 4, CPU, seed=0, teach=None), Stored(condensed, 4, CPU, seed=0)
    many = [torch.cat(list(fed.clean(seeded()))) for fed in feeds]
    monkeypatch.setattr(views, "PIXELS", 1)
    few = [torch.cat(list(fed.clean(seeded()))) for fed in feeds]
    assert all(map(torch.equal, many, few))


def test_without_a_view_whole_images_are_shown_under_their_own_labels():
    fed = Drawn(IMAGES, LABELS, None, 4, CPU, seed=0, teach=None)
    found, order = joined(fed, 0, seed=2), torch.randperm(11, generator=seeded(2))
    assert torch.equal(found.x, IMAGES[order].float() / 255)
    assert torch.equal(found.label, LABELS[order]) and torch.equal(found.mixed, found.label)
    assert (found.share == 1).all() and found.soft is None


def test_teachers_see_each_batch_as_the_student_does():
    seen = []

    def teach(x: torch.Tensor, table: views.ViewTable) -> torch.Tensor:
        assert torch.equal(x, views.apply(IMAGES, table, 16))
        seen.append(x)
        return x.flatten(1)[:, :3].half()

    found = list(Drawn(IMAGES, LABELS, VIEW, 4, CPU, seed=0, teach=teach).epoch(0, seeded()))
    assert [len(x) for x in seen] == [4, 4, 3]
    for batch, x in zip(found, seen, strict=True):
        assert torch.equal(batch.x, x) and torch.equal(batch.soft, x.flatten(1)[:, :3].half().float())


def test_teachers_of_whole_batches_see_further_views_of_a_smaller_set_and_the_student_its_own():
    seen = []

    def teach(x: torch.Tensor, table: views.ViewTable) -> torch.Tensor:
        seen.extend(table["image_id"].tolist())
        return x.flatten(1)[:, :3]

    (found,) = Drawn(IMAGES, LABELS, VIEW, 16, CPU, seed=0, teach=teach, full=True).epoch(0, seeded())
    order = torch.randperm(11, generator=seeded())
    assert seen == [*order.tolist(), *order[:5].tolist()]
    assert torch.equal(found.label, LABELS[order]) and torch.equal(found.soft, found.x.flatten(1)[:, :3])


def test_a_fixed_number_of_full_batches_passes_over_all_images_again_and_again():
    labels = torch.arange(11)
    fed = Drawn(IMAGES, labels, None, 4, CPU, seed=6, teach=None, fixed=2)
    epochs = [list(fed.epoch(number, seeded(number))) for number in range(12)]
    assert fed.steps == 2 and all([len(batch.x) for batch in epoch] == [4, 4] for epoch in epochs)
    stream = torch.cat([batch.label for epoch in epochs for batch in epoch])
    passes = stream[:88].view(8, 11)
    assert (passes.sort(1).values == labels).all()
    assert len({tuple(row) for row in passes.tolist()}) == 8
    alone = Drawn(IMAGES, labels, None, 4, CPU, seed=6, teach=None, fixed=2)
    assert torch.equal(torch.cat([batch.label for batch in alone.epoch(7, seeded(99))]), stream[56:64])
    few = Drawn(IMAGES[:3], labels[:3], None, 8, CPU, seed=6, teach=None, fixed=1)
    assert [len(batch.x) for batch in few.epoch(0, seeded())] == [8]


def test_clean_views_are_crops_alone_of_all_images(condensed):
    colours = torch.arange(0, 250, 25, dtype=torch.uint8)
    solid = colours.view(-1, 1, 1, 1).expand(10, 3, 16, 16).contiguous()
    view = ViewSettings(rand_augment=2, shuffle=2, mix="mixup", view_size=12)
    found = torch.cat(list(Drawn(solid, LABELS[:10], view, 7, CPU, seed=0, teach=None).clean(seeded())))
    assert found.shape[1:] == (3, 12, 12) and len(found) >= 999
    values, counts = (255 * found).round().to(torch.uint8).unique(return_counts=True)
    assert torch.equal(values, colours) and counts.min() > 0.9 * counts.max()
    plain = torch.cat(list(Drawn(IMAGES, LABELS, None, 7, CPU, seed=0, teach=None).clean(seeded())))
    assert torch.equal(plain.unique(dim=0), (IMAGES.float() / 255).unique(dim=0))
    assert next(Stored(condensed, 4, CPU, seed=0).clean(seeded())).shape == (4, 3, 16, 16)


@pytest.mark.parametrize("flip", [True, False])
def test_clean_views_are_cropped_and_mirrored_as_views_are(flip):
    ramp = torch.arange(16, dtype=torch.uint8).mul(16).expand(1, 3, 16, 16).contiguous()
    for smallest, whole in ((1.0, 1), (0.1, 0)):
        view = ViewSettings(crop_area=[smallest, 1.0], flip=flip)
        rows = torch.cat(list(Drawn(ramp, LABELS[:1], view, 50, CPU, seed=0, teach=None).clean(seeded())))[:, 0, 0]
        assert (rows[:, 0] > rows[:, -1]).float().mean() == pytest.approx(flip / 2, abs=0.06)
        assert ((rows.amax(1) == 240 / 255) & (rows.amin(1) == 0)).float().mean() == pytest.approx(whole, abs=0.1)


def test_a_stream_is_read_twice_for_real_images_of_equal_bytes_however_many_there_are(monkeypatch):
    whole, stream = (source.load(Source(size=8, streaming=streaming)) for streaming in (False, True))
    passes, read = [], stream.source.dataset.iter
    monkeypatch.setattr(stream.source.dataset, "iter", lambda **options: passes.append(0) or read(**options))
    rows, size = lessons.equal_bytes(stream, 120_000, Images(), 0)
    expected, theirs = lessons.equal_bytes(whole, 120_000, Images(), 0)
    assert torch.equal(rows, expected) and size == theirs and len(rows) > 600
    assert torch.equal(stream.images(rows), whole.images(rows)) and len(passes) <= 2
