"""Initial images against slow references: which rows and crops are chosen, in which order, and what they look like."""

import datasets
import numpy as np
import pytest
import torch
import torchvision
from toys import Net, Watching, png, write_parquet

from edc_hub import initialize, pixels, rded, rules, source, work
from edc_hub.errors import InputError
from edc_hub.recipe import Recipe


@pytest.fixture
def observers():
    return Watching(one=Net(1, [0.4, 0.5, 0.6]), two=Net(2, [0.1, 0.9, 0.3]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 20 images of 20 x 14 pixels."""
    path = tmp_path_factory.mktemp("sets") / "three"
    write_parquet(path, {"train": [row * 7 % 3 for row in range(60)]}, names=["a", "b", "c"], side=(20, 14))
    return path


def make_recipe(folder, *, size=12, ipc=4, seed=0, streaming=False, **section) -> Recipe:
    networks = [{"name": name, "arch": "convnet"} for name in ("one", "two")]
    return Recipe(
        ipc=ipc,
        seed=seed,
        source={"path": str(folder), "size": size, "mean": [0.2, 0.5, 0.7], "std": [0.1, 0.2, 0.3],
                "streaming": streaming},
        observers={"networks": networks},
        initialize=section,
    )  # fmt: skip


def obtain(recipe, observers, session):
    real = source.load(recipe.source)
    return initialize.obtain(recipe, real, observers, session), real


def test_real_images_are_distinct_rows_of_their_class_and_larger_sets_begin_with_smaller_ones(
    folder, observers, session
):
    initial, real = obtain(make_recipe(folder, ipc=20), observers, session)
    rows = initial.source_rows[:, 0].long()
    assert initial.images.shape == (60, 3, 12, 12) and initial.images.dtype == torch.uint8
    assert initial.source_rows.shape == (60, 1) and initial.source_rows.dtype == torch.int32
    for label, of_class in enumerate(rows.split(20)):
        assert sorted(of_class.tolist()) == real.rows(label).tolist()
    assert torch.equal(initial.images, real.images(rows))
    few, _ = obtain(make_recipe(folder, ipc=5), observers, session)
    assert torch.equal(few.images.unflatten(0, (3, 5)), initial.images.unflatten(0, (3, 20))[:, :5])
    other, _ = obtain(make_recipe(folder, ipc=5, seed=1), observers, session)
    assert not torch.equal(other.source_rows, few.source_rows) and other.fingerprint != few.fingerprint
    assert observers.loaded == 0


def test_random_rows_are_drawn_without_replacement_from_each_class(folder):
    real = source.load(make_recipe(folder).source)
    rows = initialize.random_rows(real, 19, torch.Generator().manual_seed(0))
    for label, of_class in enumerate(rows.split(19)):
        assert len(set(of_class.tolist())) == 19 and set(of_class.tolist()) <= set(real.rows(label).tolist())
    assert not torch.equal(rows, initialize.random_rows(real, 19, torch.Generator().manual_seed(1)))


def test_noise_is_standard_normal_in_the_normalised_space(folder, observers, session):
    recipe = make_recipe(folder, kind="noise", size=32, ipc=20)
    initial, _ = obtain(recipe, observers, session)
    assert (initial.source_rows == -1).all() and initial.source_rows.shape == (60, 1)
    x = initial.images.double() / 255
    for channel, (mean, std) in enumerate(zip(recipe.source.mean, recipe.source.std, strict=True)):
        clamped = (torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * std + mean).clamp(0, 1)
        assert abs(x[:, channel].mean() - clamped.mean()) < 2e-3 and abs(x[:, channel].std() - clamped.std()) < 2e-3
    assert len(initial.images.flatten(1).unique(dim=0)) == 60


def slow_score(networks, crop, label, size):
    """Cross-entropy in float64 of one crop, zero-padded in the normalised space of each network, logits averaged."""
    logits = 0
    for network in networks:
        mean = torch.tensor(network.facts["mean"], dtype=torch.float64)[:, None, None]
        z = crop.double() / 255 - mean
        left, top = (size - z.shape[2]) // 2, (size - z.shape[1]) // 2
        z = torch.nn.functional.pad(z, (left, size - z.shape[2] - left, top, size - z.shape[1] - top))
        logits = logits + network((z + mean)[None])[0]
    return float(-torch.log_softmax(logits / len(networks), 0)[label])


def test_scores_are_cross_entropies_of_mean_logits_of_centred_crops(observers, session):
    networks = list(observers.networks.values())
    crops = torch.randint(0, 256, (9, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(9) % 3
    found = rded.score(networks, crops, labels, 12, session)
    expected = [slow_score(networks, crop, label, 12) for crop, label in zip(crops, labels.tolist(), strict=True)]
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def slow_crops(real, rows, draws, side, area, ratio, flip):
    """[(row, [crop, …]), …] by torchvision's crop and resize of the image that `datasets` shows, one at a time."""
    shown = datasets.load_dataset("parquet", data_files=str(real.folder / "data" / "train.parquet"), split="train")
    found = []
    for row, of_image in zip(rows.tolist(), draws.numpy(), strict=True):
        image, crops = shown[row]["image"], []
        for u in of_image:
            left, top, right, bottom = pixels.crop_box(*image.size, u, area, ratio)
            crop = torchvision.transforms.functional.resized_crop(
                image, top, left, bottom - top, right - left, [side, side]
            )
            crop = np.asarray(crop)[:, ::-1] if flip and u[22] < 0.5 else np.asarray(crop)
            crops.append(torch.from_numpy(crop.copy()).permute(2, 0, 1))
        found.append((row, crops))
    return found


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_rded_tiles_the_best_crop_of_each_image_by_ranks_ipc_apart(folder, observers, session, factor, names):
    size, ipc = 12, 3
    recipe = make_recipe(
        folder, kind="rded", factor=factor, ipc=ipc, images_per_class=15, crops=4, batch=10, observers=names,
        crop_area=[0.2, 0.9],
    )  # fmt: skip
    initial, real = obtain(recipe, observers, session)
    assert initial.source_rows.shape == (9, factor**2)
    real.folder = folder
    networks, side = [observers.networks[name] for name in names], size // factor
    for label in range(3):
        rows = initialize._candidates(recipe, real, label, None)
        assert len(rows) == 15 and set(rows.tolist()) <= set(real.rows(label).tolist())
        draws = torch.rand(
            (15, 4, 23), generator=work.generator(0, "initial", f"class-{label:04d}"), dtype=torch.float64
        )
        best = []
        for row, crops in slow_crops(real, rows, draws, side, (0.2, 0.9), (1, 1), False):
            scores = [slow_score(networks, crop, label, size) for crop in crops]
            least = scores.index(min(scores))
            best.append((scores[least], row, crops[least]))
        best.sort(key=lambda entry: entry[0])
        for j in range(ipc):
            expected = torch.zeros((3, size, size), dtype=torch.uint8)
            for tile in range(factor**2):
                _, row, crop = best[tile * ipc + j]
                y, x = tile // factor * side, tile % factor * side
                expected[:, y : y + side, x : x + side] = crop
                assert initial.source_rows[label * ipc + j, tile] == row
            assert torch.equal(initial.images[label * ipc + j], expected)


def test_the_edc_variant_tiles_consecutive_ranks_of_1024_crops_of_the_easiest_images(folder, observers, session):
    size, ipc, kept = 12, 3, 10
    recipe = make_recipe(
        folder, kind="rded", variant="edc", factor=2, ipc=ipc, images_per_class=kept, batch=64, crop_area=[0.2, 0.9]
    )
    initial, real = obtain(recipe, observers, session)
    real.folder = folder
    networks = list(observers.networks.values())
    for label in range(3):
        whole = [(slow_score(networks, real.images(row[None])[0], label, size), int(row)) for row in real.rows(label)]
        rows = torch.tensor([row for _, row in sorted(whole)[:kept]])
        rows = torch.tensor([rows[i % kept] for i in range(256)])  # EDC's code: the first 4 x 64 by loss
        generator = work.generator(0, "initial", f"class-{label:04d}")
        draws = torch.rand((256, 4, 23), generator=generator, dtype=torch.float64)
        scored = []
        for row, crops in slow_crops(real, rows, draws, size, (0.2, 0.9), (3 / 4, 4 / 3), True):
            scored += [(slow_score(networks, crop, label, size), row, crop) for crop in crops]
        assert len(scored) == 1024
        scored.sort(key=lambda entry: entry[0])
        for j in range(ipc):
            image = initial.images[label * ipc + j]
            for tile in range(4):
                _, row, crop = scored[4 * j + tile]
                small = torch.nn.functional.interpolate(crop[None].double(), (6, 6), mode="bilinear", antialias=True)[
                    0
                ]
                y, x = tile // 2 * 6, tile % 2 * 6
                assert initial.source_rows[label * ipc + j, tile] == row
                assert (image[:, y : y + 6, x : x + 6].double() - small).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("difficulty", ["medium", "hardest"])
def test_crops_of_another_difficulty_come_first_and_larger_sets_begin_with_smaller_ones(
    folder, observers, session, difficulty
):
    keys = {"kind": "rded", "images_per_class": 15, "crops": 4, "observers": ["one"], "crop_area": [0.2, 0.9]}
    easiest, real = obtain(make_recipe(folder, ipc=15, **keys), observers, session)
    initial, _ = obtain(make_recipe(folder, ipc=7, difficulty=difficulty, **keys), observers, session)
    for label in range(3):
        ranks = list(range(15))  # of the crops by ascending cross-entropy
        wanted = {"hardest": ranks[::-1], "medium": [7, 6, 8, 5, 9, 4, 10]}[difficulty][:7]
        found = initial.source_rows[label * 7 : label * 7 + 7, 0].tolist()
        assert found == [int(easiest.source_rows[label * 15 + rank, 0]) for rank in wanted]
        assert torch.equal(initial.images[label * 7], easiest.images[label * 15 + wanted[0]])
    few, _ = obtain(make_recipe(folder, ipc=3, difficulty=difficulty, **keys), observers, session)
    assert torch.equal(few.images.unflatten(0, (3, 3)), initial.images.unflatten(0, (3, 7))[:, :3])


def test_ranks_by_difficulty():
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.2])
    assert rded.ranked(scores, "easiest").tolist() == [1, 5, 3, 0, 4, 2]
    assert rded.ranked(scores, "hardest").tolist() == [2, 4, 0, 3, 5, 1]
    assert rded.ranked(scores, "medium").tolist() == [3, 0, 5, 4, 1, 2]  # the median lies between the first two


def test_difficulty_counts_only_where_it_is_another_and_where_crops_are_scored(folder, observers, session):
    keys = {"kind": "rded", "images_per_class": 12, "crops": 2}
    marks = {difficulty: obtain(make_recipe(folder, difficulty=difficulty, **keys), observers, session)[0].fingerprint
             for difficulty in ("easiest", "medium", "hardest")}  # fmt: skip
    assert len(set(marks.values())) == 3
    assert marks["easiest"] == obtain(make_recipe(folder, **keys), observers, session)[0].fingerprint
    assert "difficulty" not in initialize._facts(make_recipe(folder, **keys))  # sets made before the key are found
    with pytest.raises(InputError, match="initialize.difficulty: medium crops need kind rded, got real"):
        rules.validate(make_recipe(folder, kind="real", difficulty="medium"))


def test_tiles_fill_an_image_whose_side_the_factor_does_not_divide():
    crops = torch.arange(9, dtype=torch.uint8)[None, :, None, None, None].expand(2, 9, 3, 3, 3) * 10
    image = rded.tile(crops, 11)
    assert image.shape == (2, 3, 11, 11)
    expected = torch.arange(9).view(3, 3).repeat_interleave(torch.tensor([4, 4, 3]), 0)
    expected = expected.repeat_interleave(torch.tensor([4, 4, 3]), 1) * 10
    assert torch.equal(image[1, 2].long(), expected)


def test_kmeans_picks_distinct_images_nearest_to_the_centres_largest_cluster_first(tmp_path, observers, session):
    """Classes of flat images around few colours: the centres are known."""
    colours, counts = [(220, 30, 30), (30, 220, 30), (30, 30, 220)], [5, 12, 8]
    generator, encoded, group = np.random.default_rng(0), [], []
    for _ in range(2):
        for index, (colour, count) in enumerate(zip(colours, counts, strict=True)):
            for _ in range(count):
                shade = np.clip(np.array(colour) + generator.integers(-9, 10, 3), 0, 255).astype(np.uint8)
                encoded.append(png(pixels.PIL.Image.fromarray(np.tile(shade, (12, 12, 1)))))
                group.append(index)
    order = generator.permutation(50)
    write_parquet(
        tmp_path / "flat", {"train": [int(row >= 25) for row in order]}, names=["x", "y"],
        encoded=[encoded[row] for row in order],
    )  # fmt: skip
    recipe = make_recipe(tmp_path / "flat", kind="kmeans", ipc=3, observers=["two"])
    initial, real = obtain(recipe, observers, session)
    group = torch.tensor(group)[order]
    for label, rows in enumerate(initial.source_rows[:, 0].long().split(3)):
        assert group[rows].tolist() == [1, 2, 0] and (real.labels[rows] == label).all()
        for row in rows:
            members = ((group == group[row]) & (real.labels == label)).nonzero().flatten()
            features = observers.networks["two"].features(real.images(members).double() / 255)
            assert row == members[(features - features.mean(0)).norm(dim=1).argmin()]
    assert torch.equal(initial.images, real.images(initial.source_rows[:, 0].long()))


def test_two_centres_never_share_an_image():
    features = torch.tensor([[0.0], [1.0], [10.0]])
    picked = initialize.nearest(features, torch.tensor([[0.2], [0.1], [9.0]]), torch.tensor([0, 0, 2]))
    assert picked.tolist() == [0, 2, 1]


KINDS = [
    {"kind": "real"},
    {"kind": "rded", "factor": 2, "images_per_class": 18, "crops": 2},
    {"kind": "rded", "variant": "edc", "factor": 2, "images_per_class": 6},
    {"kind": "kmeans", "images_per_class": 10, "observers": ["one"]},
]


@pytest.mark.parametrize("section", KINDS)
def test_a_streamed_set_gives_the_bytes_of_a_stored_one(folder, observers, session, tmp_path, section):
    stored, _ = obtain(make_recipe(folder, **section), observers, session)
    elsewhere = work.Store(tmp_path / "elsewhere")
    session.store = elsewhere
    streamed, _ = obtain(make_recipe(folder, streaming=True, **section), observers, session)
    assert streamed.fingerprint == stored.fingerprint
    assert torch.equal(streamed.images, stored.images)
    assert torch.equal(streamed.source_rows, stored.source_rows)


@pytest.mark.parametrize("section", KINDS)
def test_finished_images_are_found_and_only_keys_that_matter_change_them(folder, observers, session, section):
    recipe = make_recipe(folder, **section)
    first, real = obtain(recipe, observers, session)
    observers.loaded, real.source = 0, None
    again = initialize.obtain(recipe, real, observers, session)
    assert observers.loaded == 0 and torch.equal(again.images, first.images)
    unused = {"real": {"crops": 9, "factor": 1}, "kmeans": {"crops": 9}, "rded": {"iterations": 9}}[section["kind"]]
    assert obtain(make_recipe(folder, **{**section, **unused}), observers, session)[0].fingerprint == first.fingerprint
    if section["kind"] != "real":
        changed = make_recipe(folder, **{**section, "batch": 7})
        assert obtain(changed, observers, session)[0].fingerprint != first.fingerprint


def test_images_of_another_source_of_other_weights_or_by_another_key_are_others(folder, observers, session):
    keys = {"kind": "rded", "ipc": 2, "images_per_class": 8, "crops": 1}
    real = source.load(make_recipe(folder).source)

    def mark(**changes):
        return initialize.obtain(make_recipe(folder, **keys | changes), real, observers, session).fingerprint

    found = [mark(), mark(ipc=1), mark(seed=1), mark(crops=2), mark(images_per_class=9), mark(crop_area=[0.3, 1.0])]
    observers.fingerprint = "{}@{} retrained".format
    found.append(mark())
    real.fingerprint = "other"
    found.append(mark())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"ipc": 21}, "ipc: 21 images a class, but class 'a'"),
        ({"ipc": 21, "kind": "noise"}, "ipc: 21 images a class, but class 'a'"),  # the random controls need them
        (
            {"kind": "rded", "factor": 3},
            "ipc: 4 images of 9 pictures a class, .* has 20.*; lower ipc, initialize",
        ),
    ],
)
def test_what_cannot_be_made_is_said_before_any_work(folder, observers, session, keys, named):
    with pytest.raises(InputError, match=named):
        obtain(make_recipe(folder, **keys), observers, session)
    assert observers.loaded == 0
