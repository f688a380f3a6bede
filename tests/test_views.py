"""Views: what each operation does, against torchvision image by image, and that a row replays by itself to the bit."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from edc_hub import randaugment, views
from edc_hub.recipe import Relabel


SECTIONS = {
    "cutmix": Relabel(),
    "cutmix of each sample": Relabel(mix_shared="sample", rand_augment=2, shuffle=3, crop_area=[0.08, 1.0]),
    "mixup": Relabel(mix="mixup", rand_augment=1, mix_alpha=0.8),
    "mixup of each sample": Relabel(mix="mixup", mix_shared="sample", shuffle=2),
    "no mixing": Relabel(mix="none", rand_augment=3, flip=False),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, size: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def smooth(size: int) -> torch.Tensor:
    small = torch.randint(40, 180, (3, 4, 4), generator=seeded(2), dtype=torch.uint8)
    return F.resize(small, [size, size])


def space(size: int) -> dict:
    return RandAugment()._augmentation_space(randaugment.BINS, (size, size))


def torchvision_op(image: torch.Tensor, number: int, level: int) -> torch.Tensor:
    name, (magnitudes, _) = list(space(image.shape[-1]).items())[number]
    magnitude = float(magnitudes[abs(level)].item()) * (-1 if level < 0 else 1) if magnitudes.ndim else 0.0
    return _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)


def shuffled(image: torch.Tensor, order: list[int]) -> torch.Tensor:
    """RDED's ShufflePatches by lists, with a given order in place of random.shuffle."""
    count = len(order) // 2
    for part, axis in ((order[:count], 2), (order[count:], 1)):
        width = image.shape[axis] // count
        strips = list(image.split([width] * (count - 1) + [image.shape[axis] - width * (count - 1)], axis))
        image = torch.cat([strips[i] for i in part], axis)
    return image


def reference(images: torch.Tensor, table: dict, row: int, size: int) -> torch.Tensor:
    """One row by the plain per-image operations, in float64 where pixels are mixed."""

    def single(prefix: str) -> torch.Tensor:
        image = images[int(table["mix_image_id" if prefix else "image_id"][row])]
        if "shuffle" in table:
            image = shuffled(image, table[f"{prefix}shuffle"][row].tolist())
        if "augment" in table:
            for number, level in table[f"{prefix}augment"][row].view(-1, 2).tolist():
                image = torchvision_op(image, number, level)
        image = F.resized_crop(image.float(), *table[f"{prefix}crop"][row].tolist(), [size, size], antialias=True)
        return (F.hflip(image) if table[f"{prefix}flip"][row] else image).double() / 255

    view = single("")
    if table["mix_image_id"][row] < 0:
        return view
    y, x, h, w = table["mix_box"][row].tolist()
    share, other = table["mix_lam"][row].double(), single("mix_")
    if h * w == 0:
        return share * view + (1 - share) * other
    view[:, y : y + h, x : x + w] = other[:, y : y + h, x : x + w]
    return view


def test_the_operation_table_is_torchvisions():
    ours = randaugment.table()["operations"]
    for mine, (name, (magnitudes, signed)) in zip(ours, space(331).items(), strict=True):
        first, last = (magnitudes[0].item(), magnitudes[-1].item()) if magnitudes.ndim else (0, 0)
        scale = 331 if name.startswith("Translate") else 1
        assert (mine["name"], mine["signed"]) == (name, signed)
        assert mine["first"] * scale == pytest.approx(first) and mine["last"] * scale == pytest.approx(last)


@pytest.mark.parametrize("number", range(14), ids=list(space(32)))
@pytest.mark.parametrize("size", [16, 31, 64])
def test_randaugment_operations_are_torchvisions(number, size):
    name, (magnitudes, signed) = list(space(size).items())[number]
    images = torch.cat([noise(1, size), smooth(size)[None]])
    levels = range(-30 if signed else 0, 31) if magnitudes.ndim else [0]
    for image in images:
        rows = torch.tensor([[number, level] for level in levels], dtype=torch.int16)
        got = randaugment.apply(image.expand(len(rows), -1, -1, -1), rows)
        want = torch.stack([torchvision_op(image, number, level) for level in levels])
        # a shear whose bin makes exact halves rounds either way in single precision
        allowed = 0.01 if name in ("ShearX", "ShearY", "Rotate") else 0
        assert (got != want).float().mean() <= allowed, name
        at = levels.index(9) if magnitudes.ndim else 0  # the magnitude of the recipes, where no half occurs
        assert torch.equal(got[at], want[at]), name


def test_two_operations_are_applied_in_their_order():
    images = noise(40, 24)
    augment = randaugment.sample(40, 2, 9, seeded())
    for image, row, got in zip(
        images, augment.view(40, 2, 2).tolist(), randaugment.apply(images, augment), strict=True
    ):
        for number, level in row:
            image = torchvision_op(image, number, level)
        assert torch.equal(got, image)


def test_randaugment_draws_every_operation_and_a_sign_only_where_there_is_one():
    drawn = randaugment.sample(4000, 2, 9, seeded()).view(-1, 2)
    for number, (magnitudes, signed) in enumerate(space(32).values()):
        levels = set(drawn[drawn[:, 0] == number, 1].tolist())
        assert levels == ({0} if not magnitudes.ndim else {9, -9} if signed else {9})
    assert drawn[:, 0].long().bincount().min() > 8000 / 14 * 0.8


@pytest.mark.parametrize(("stored", "size"), [(32, 32), (48, 20), (40, 64)])
def test_crops_are_torchvisions_resized_crop(stored, size):
    images = noise(60, stored)
    table = views.sample(Relabel(mix="none", crop_area=[0.05, 1.0]), torch.arange(60), stored, seeded())
    got = views.apply(images, table, size)
    for row in range(60):
        torch.testing.assert_close(got[row].double(), reference(images, table, row, size), atol=2e-6, rtol=0)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.parametrize(("stored", "size"), [(32, 32), (37, 24)])
def test_a_view_is_shuffle_randaugment_crop_flip_and_mix_in_this_order(section, stored, size):
    images = noise(30, stored)
    section = section.model_copy(update={"view_size": size})
    table = views.sample(section, torch.randperm(30, generator=seeded(3)), stored, seeded())
    got = views.apply(images, table, size)
    assert got.dtype == torch.float32 and got.shape == (30, 3, size, size) and 0 <= got.min() and got.max() <= 1
    for row in range(30):
        torch.testing.assert_close(got[row].double(), reference(images, table, row, size), atol=2e-6, rtol=0)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_row_replays_to_the_bit_alone_in_any_order_and_in_any_company(section):
    images = noise(50, 33)
    table = views.sample(section, torch.arange(50), 33, seeded())
    together = views.apply(images, table, 33)
    for row in range(50):
        assert torch.equal(views.apply(images, views.take(table, torch.tensor([row])), 33)[0], together[row])
    for count in (2, 7, 31):
        rows = torch.randint(50, (count,), generator=seeded(count))
        assert torch.equal(views.apply(images, views.take(table, rows), 33), together[rows])
    assert torch.equal(views.apply(images, views.take(table, torch.arange(49, -1, -1)), 33), together.flip(0))


def test_a_shuffle_moves_strips_and_loses_no_pixel_even_where_strips_are_uneven():
    images = noise(20, 11)
    table = views.sample(Relabel(shuffle=3, mix="none", flip=False), torch.arange(20), 11, seeded())
    table["crop"] = torch.tensor([0, 0, 11, 11], dtype=torch.int16).expand(20, 4)
    got = (views.apply(images, table, 11) * 255).round().to(torch.uint8)
    moved = 0
    for image, order, view in zip(images, table["shuffle"].tolist(), got, strict=True):
        assert torch.equal(view, shuffled(image, order))
        assert torch.equal(view.flatten(1).sort().values, image.flatten(1).sort().values)
        moved += not torch.equal(view, image)
    assert moved > 15


def test_the_share_of_a_cutmix_view_is_what_its_clipped_box_leaves():
    table = views.sample(Relabel(mix_shared="sample"), torch.arange(2000), 32, seeded())
    y, x, h, w = table["mix_box"].long().unbind(1)
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 32).all() and (x + w <= 32).all()
    torch.testing.assert_close(table["mix_lam"], (1 - h * w / 32**2).float())
    assert (h != w).any()  # some were clipped
    assert table["mix_lam"].unique().numel() > 100


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_boxes_follow_the_law_of_the_reference(alpha):
    """CutMix: a box of side int(size * sqrt(1 - lambda)), lambda ~ Beta, about a uniform centre, clipped."""
    size, count = 40, 20000
    section = Relabel(mix_shared="sample", mix_alpha=alpha)
    ours = views.sample(section, torch.arange(count), size, seeded())["mix_box"].double().numpy()
    draw = np.random.default_rng(0)
    half = (size * np.sqrt(1 - draw.beta(alpha, alpha, count))).astype(int) // 2
    centre = draw.integers(size, size=(2, count))
    low, high = np.clip(centre - half, 0, size), np.clip(centre + half, 0, size)
    theirs = np.stack([*low, *(high - low)], 1).astype(float)
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4.5 * spread).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.03)
    shares, expected = ours[:, 2] * ours[:, 3] / size**2, theirs[:, 2] * theirs[:, 3] / size**2
    assert np.allclose(np.quantile(shares, [0.1, 0.5, 0.9]), np.quantile(expected, [0.1, 0.5, 0.9]), atol=0.015)


def test_half_of_the_views_are_mirrored_unless_flip_is_off():
    drawn = views.sample(Relabel(), torch.arange(4000), 8, seeded())["flip"]
    assert drawn.double().mean() == pytest.approx(0.5, abs=0.03)
    assert not views.sample(Relabel(flip=False), torch.arange(100), 8, seeded())["flip"].any()


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_a_batch_shares_its_share_and_box_unless_each_sample_has_its_own(mix):
    shared = views.sample(Relabel(mix=mix), torch.arange(64), 32, seeded())
    own = views.sample(Relabel(mix=mix, mix_shared="sample"), torch.arange(64), 32, seeded())
    assert shared["mix_lam"].unique().numel() == 1 and shared["mix_box"].unique(dim=0).shape[0] == 1
    assert own["mix_lam"].unique().numel() > 30


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_shares_follow_the_beta_law(alpha):
    table = views.sample(Relabel(mix="mixup", mix_shared="sample", mix_alpha=alpha), torch.arange(20000), 8, seeded())
    share = table["mix_lam"].double()
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_a_view_is_mixed_with_the_view_of_another_row_of_its_batch():
    table = views.sample(Relabel(rand_augment=2, shuffle=2), torch.arange(100, 150), 32, seeded())
    partner = table["mix_image_id"].long() - 100
    assert (partner != torch.arange(50)).all() and partner.unique().numel() == 50
    for column in ("crop", "flip", "augment", "shuffle"):
        assert torch.equal(table[f"mix_{column}"], table[column][partner])
    alone = views.sample(Relabel(), torch.tensor([7]), 32, seeded())
    assert alone["mix_image_id"].item() == 7


def test_crops_have_the_areas_and_ratios_asked_for():
    crop = views.sample(Relabel(crop_area=[0.3, 0.6]), torch.arange(5000), 96, seeded())["crop"].double()
    area, ratio = crop[:, 2] * crop[:, 3] / 96**2, crop[:, 3] / crop[:, 2]
    assert 0.28 < area.min() < 0.31 and 0.59 < area.max() < 0.62 and area.mean() == pytest.approx(0.45, abs=0.01)
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.37
    assert ratio.log().mean() == pytest.approx(0, abs=0.01)
    assert (crop[:, :2] >= 0).all() and (crop[:, :2] + crop[:, 2:] <= 96).all()
    assert (crop[:, 0] + crop[:, 2] == 96).any() and (crop[:, 1] == 0).any()  # the borders can be reached


def test_a_draw_depends_on_its_generator_alone():
    torch.manual_seed(1)
    first = views.sample(Relabel(rand_augment=2), torch.arange(9), 32, seeded(5))
    torch.manual_seed(2)
    again = views.sample(Relabel(rand_augment=2), torch.arange(9), 32, seeded(5))
    other = views.sample(Relabel(rand_augment=2), torch.arange(9), 32, seeded(6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["crop"], other["crop"])


def test_columns_are_the_schemas_and_only_those_in_use():
    table = views.sample(Relabel(rand_augment=2, shuffle=2), torch.arange(5), 32, seeded(), epoch=3)
    expected = {
        "epoch": (torch.int16, ()), "image_id": (torch.int32, ()), "crop": (torch.int16, (4,)),
        "flip": (torch.bool, ()), "mix_image_id": (torch.int32, ()), "mix_crop": (torch.int16, (4,)),
        "mix_flip": (torch.bool, ()), "mix_box": (torch.int16, (4,)), "mix_lam": (torch.float32, ()),
        "augment": (torch.int16, (4,)), "mix_augment": (torch.int16, (4,)),
        "shuffle": (torch.int16, (4,)), "mix_shuffle": (torch.int16, (4,)),
    }  # fmt: skip
    assert views.columns(table) == list(expected)
    assert {name: (column.dtype, tuple(column.shape[1:])) for name, column in table.items()} == expected
    assert (table["epoch"] == 3).all()
    plain = views.sample(Relabel(mix="none", flip=False), torch.arange(5), 32, seeded())
    assert views.columns(plain) == list(expected)[:9]
    assert (plain["mix_image_id"] == -1).all() and not plain["flip"].any() and not plain["mix_crop"].any()


def test_the_whole_image_is_a_view_of_itself():
    images = noise(4, 20)
    assert torch.equal(views.apply(images, views.whole(4, 20), 20), images.float() / 255)
    assert (views.whole(400, 20)["crop"] == torch.tensor([0, 0, 20, 20])).all()  # also where no draw has this ratio
