"""The pixels of real sets: decoding, views, and how much is read and held for them."""

from io import BytesIO

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from toys import picture, png, write_parquet

from edc_hub import pixels, realset, recipe, source
from edc_hub.errors import InputError
from edc_hub.pixels import View


def section(path, **keys):
    return recipe.Source(**{"path": str(path), "size": 8, **keys})


def open_set(path, split="train", **keys):
    return source.load(section(path, **keys), split)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_png_jpeg_and_webp_give_the_pixels_that_pillow_decodes(tmp_path, kind):
    images = [picture(seed) for seed in range(3)]
    encoded = [png(image, kind) for image in images]
    write_parquet(tmp_path / "set", {"train": [0, 1, 0]}, encoded=encoded)
    found = open_set(tmp_path / "set").images(torch.tensor([2, 0, 1]))
    assert found.dtype == torch.uint8 and found.shape == (3, 3, 8, 8)
    for row, image in zip([2, 0, 1], found, strict=True):
        expected = np.asarray(PIL.Image.open(BytesIO(encoded[row])))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_grey_alpha_palette_and_16_bit_images_among_rgb_come_out_as_rgb(tmp_path):
    rgb = picture(0)
    alpha = rgb.copy()
    alpha.putalpha(100)
    deep = PIL.Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16)) * 257)
    palette = rgb.quantize(16)
    palette.info["transparency"] = bytes([0] * 16)
    images = [rgb, rgb.convert("L"), alpha, rgb.convert("LA"), palette, deep, rgb.convert("1"), rgb.convert("CMYK")]
    kinds = ["PNG"] * 7 + ["TIFF"]
    encoded = [png(image, kind) for image, kind in zip(images, kinds, strict=True)]
    write_parquet(tmp_path / "set", {"train": [0, 1] * 4}, encoded=encoded)
    found = open_set(tmp_path / "set").images(torch.arange(8)).permute(0, 2, 3, 1).numpy()
    grey = np.repeat(np.asarray(rgb.convert("L"))[..., None], 3, -1)
    assert np.array_equal(found[0], np.asarray(rgb))
    assert np.array_equal(found[1], grey) and np.array_equal(found[3], grey) and np.array_equal(found[5], grey)
    assert np.array_equal(found[2], np.asarray(rgb))
    assert np.array_equal(found[4], np.asarray(rgb.quantize(16).convert("RGB")))
    assert set(np.unique(found[6])) <= {0, 255}
    assert np.array_equal(found[7], np.asarray(rgb.convert("CMYK").convert("RGB")))


def test_images_of_other_sizes_become_square_by_their_centre_or_squashed(tmp_path):
    wide, tall = picture(1, (31, 20)), picture(2, (16, 27))
    write_parquet(tmp_path / "set", {"train": [0, 1]}, encoded=[png(wide), png(tall)])
    centre = open_set(tmp_path / "set").images(torch.arange(2)).permute(0, 2, 3, 1).numpy()
    squashed = open_set(tmp_path / "set", resize="squash").images(torch.arange(2)).permute(0, 2, 3, 1).numpy()
    bilinear = PIL.Image.Resampling.BILINEAR
    for index, (image, box) in enumerate([(wide, (6, 0, 26, 20)), (tall, (0, 6, 16, 22))]):
        assert np.array_equal(centre[index], np.asarray(image.resize((8, 8), bilinear, box=box)))
        assert np.array_equal(squashed[index], np.asarray(image.resize((8, 8), bilinear)))


def test_the_centre_is_the_one_of_torchvisions_resize_and_center_crop(tmp_path):
    image = picture(3, (48, 32))
    write_parquet(tmp_path / "set", {"train": [0]}, encoded=[png(image)])
    ours = open_set(tmp_path / "set", size=16).images(torch.tensor([0]))[0].permute(1, 2, 0).numpy().astype(int)
    theirs = torchvision.transforms.functional.center_crop(torchvision.transforms.functional.resize(image, 16), 16)
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1


def test_images_are_upright_as_load_dataset_shows_them(tmp_path):
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    write_parquet(tmp_path / "set", {"train": [0]}, encoded=[png(picture(4), exif=exif)])
    shown = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))[0]["image"]
    found = open_set(tmp_path / "set").images(torch.tensor([0]))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(shown)) and not np.array_equal(found, np.asarray(picture(4)))


def test_a_corrupt_or_missing_image_is_named_by_row(tmp_path):
    encoded = [png(picture(i), "JPEG") for i in range(4)]
    encoded[2] = encoded[2][: len(encoded[2]) // 2]
    write_parquet(tmp_path / "cut", {"train": [0, 1, 0, 1]}, encoded=encoded)
    with pytest.raises(InputError, match="row 2 of split 'train' of cut"):
        open_set(tmp_path / "cut").preload()
    write_parquet(tmp_path / "gap", {"train": [0, 1, 0, 1]}, encoded=[*encoded[:2], encoded[3], None])
    with pytest.raises(InputError, match="row 3 .*missing"):
        list(open_set(tmp_path / "gap").batches(torch.arange(4), 2))


@pytest.fixture
def larger(tmp_path):
    """60 images of 12 x 10 pixels in 3 classes, and their encoded bytes."""
    write_parquet(tmp_path / "larger", {"train": [row % 3 for row in range(60)]}, names=["a", "b", "c"], side=(12, 10))
    return tmp_path / "larger"


VIEWS = [None, View("pad_crop", 3, pad=2), View("rrc", 3), View("rrc", 3, area=(0.5, 1.0), flip=False)]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_depends_on_seed_and_row_alone(larger, view, monkeypatch):
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    real = open_set(larger)
    whole = torch.empty((60, 3, 8, 8), dtype=torch.uint8)
    for images, labels, part in real.batches(torch.arange(60), 60, view=view):
        whole[part] = images
        assert torch.equal(labels, part % 3)
    monkeypatch.setattr(realset, "MEMORY", 0)
    for streaming in (False, True):
        got = list(open_set(larger, streaming=streaming).batches(rows, 7, view=view))
        assert [len(images) for images, _, _ in got] == [7] * 8 + [4]
        assert torch.equal(torch.cat([part for _, _, part in got]), rows)
        assert torch.equal(torch.cat([images for images, _, _ in got]), whole[rows])
    if view is not None:
        again = next(real.batches(torch.arange(60), 60, view=view._replace(seed=4)))[0]
        assert not torch.equal(again, whole)


def test_pad_crop_moves_each_image_over_black_and_mirrors_half():
    images = torch.randint(1, 256, (40, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    draws = pixels.uniforms(5, np.arange(40), 3)
    for flip in (True, False):
        found = pixels.pad_crop(images, draws, 2, flip)
        for image, (y, x, mirror), got in zip(images, draws, found, strict=True):
            canvas = torch.zeros(3, 10, 10, dtype=torch.uint8)
            canvas[:, 2:8, 2:8] = image
            top, left = int(y * 5), int(x * 5)
            expected = canvas[:, top : top + 6, left : left + 6]
            assert torch.equal(got, expected.flip(2) if flip and mirror < 0.5 else expected)
    assert {(int(y * 5), int(x * 5)) for y, x, _ in draws} >= {(0, 0), (4, 4)} or len(draws) < 25


def test_rrc_takes_pixels_of_the_original_image_through_the_box(larger):
    real = open_set(larger)
    images, _, rows = next(real.batches(torch.arange(60), 60, view=View("rrc", 11, area=(0.2, 0.6))))
    draws = pixels.uniforms(11, rows.numpy(), pixels.CROP_DRAWS)
    for row, image in enumerate(images):
        box = pixels.crop_box(12, 10, draws[row], (0.2, 0.6), (3 / 4, 4 / 3))
        expected = picture(row, (12, 10)).crop(box).resize((8, 8), PIL.Image.Resampling.BILINEAR)
        expected = np.asarray(expected)[:, ::-1] if draws[row, 22] < 0.5 else np.asarray(expected)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("size", "area", "ratio"),
    [((40, 30), (0.08, 1.0), (3 / 4, 4 / 3)), ((50, 20), (0.8, 1.0), (1.0, 1.0)), ((20, 60), (0.5, 1.0), (0.9, 1.1))],
)
def test_crop_boxes_follow_the_law_of_torchvisions_random_resized_crop(size, area, ratio):
    count = 4000
    draws = pixels.uniforms(1, np.arange(count), pixels.CROP_DRAWS)
    ours = np.array([pixels.crop_box(*size, u, area, ratio) for u in draws], float)
    ours[:, 2:] -= ours[:, :2]
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    image = torch.empty(3, size[1], size[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get = torchvision.transforms.RandomResizedCrop.get_params
        theirs = np.array([get(image, list(area), list(ratio)) for _ in range(count)], float)[:, [1, 0, 3, 2]]
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / count) + 1e-9
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4.5 * spread).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.08, atol=0.05)


def test_the_numbers_of_a_row_are_uniform_and_its_own():
    numbers = pixels.uniforms(7, np.arange(5000), 4)
    assert np.array_equal(pixels.uniforms(7, np.array([4321, 5]), 4), numbers[[4321, 5]])
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / numbers.size - 0.1).max() < 0.01
    both = np.concatenate([numbers, pixels.uniforms(8, np.arange(5000), 4)], 1)
    correlation = np.corrcoef(both, rowvar=False) - np.eye(8)
    assert np.abs(correlation).max() < 0.06


def test_no_more_than_a_few_batches_are_decoded_ahead(larger, monkeypatch):
    monkeypatch.setattr(realset, "MEMORY", 0)
    count = []
    decode = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda *data: count.append(1) or decode(*data))
    for streaming in (False, True):
        count.clear()
        batches = open_set(larger, streaming=streaming).batches(torch.arange(60), 5)
        next(batches)
        batches.close()
        assert len(count) <= 5 * (1 + realset.AHEAD + 1)


def test_a_small_set_is_decoded_once(larger, monkeypatch):
    real = open_set(larger)
    real.preload()
    monkeypatch.setattr(pixels, "decode", None)
    assert len(list(real.batches(real.rows(), 10, view=View("pad_crop", 0)))) == 6
    assert real.images(torch.tensor([4, 4])).shape == (2, 3, 8, 8)


class Counting:
    """Counts how often a stream is begun."""

    def __init__(self, dataset):
        self.dataset, self.passes = dataset, 0

    def with_format(self, _):
        return self

    def iter(self, batch_size):
        self.passes += 1
        return self.dataset.iter(batch_size)


def test_rows_of_a_stream_that_cannot_be_kept_are_the_users_error(larger, tmp_path):
    real = open_set(larger, streaming=True)
    (tmp_path / "file").write_text("")
    real.cache = tmp_path / "file" / "streams"
    with pytest.raises(InputError, match="HF_HOME: cannot write .*; choose another HF_HOME"):
        real.keep(torch.tensor([3, 1]))


def test_a_stream_passes_once_for_ascending_ranges_and_once_for_rows_in_any_order(larger, monkeypatch):
    monkeypatch.setattr(realset, "PART", 8)
    real, stored = open_set(larger, streaming=True), open_set(larger)
    real.source.dataset = counting = Counting(real.source.dataset)
    for rows in torch.arange(60).split(13):
        got = torch.cat([images for images, _, _ in real.batches(rows, 4)])
        assert torch.equal(got, stored.images(rows))
    assert counting.passes == 1
    mixed = torch.tensor([50, 3, 17, 3, 59, 40, 0])
    assert torch.equal(real.images(mixed), stored.images(mixed))
    assert counting.passes == 2
    real.keep(mixed)
    assert counting.passes == 3
    for rows in (mixed, mixed.flip(0), mixed[2:4]):
        assert torch.equal(real.images(rows), stored.images(rows))
        assert torch.equal(next(real.batches(rows, 7))[0], stored.images(rows))
    assert counting.passes == 3
    again = open_set(larger, streaming=True)
    again.source.dataset = counting
    again.keep(mixed)
    assert torch.equal(again.images(mixed), stored.images(mixed)) and counting.passes == 3
