"""Synthesis: the loop, in normalised space, against slow references; resume inside a block."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from edc_hub import crops, matching, networks, synthesize, work
from edc_hub.errors import InputError
from edc_hub.initialize import Initial
from edc_hub.pixels import Space
from edc_hub.recipe import Recipe
from edc_hub.work import Progress


MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.201]


def recipe(iterations=10, **keys):
    defaults = {"iterations": iterations, "crop_area": [1.0, 1.0], "flip": False, "lr": 0.05}
    source = {"size": 8, "mean": MEAN, "std": STD}
    return Recipe.model_validate({"source": source, "synthesize": {**defaults, **keys}})


class Smooth:
    """An observer with a smooth loss of every pixel, so that float32 and float64 can be compared."""

    class matcher:  # noqa: N801 - stands for an object without state
        state = staticmethod(dict)
        restore = staticmethod(lambda saved: None)
        drop = staticmethod(lambda generator: None)

    def __init__(self, seed, dtype=torch.float32):
        weight = torch.randn(10, 3 * 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.weight = weight.to(dtype)

    def logits(self, x):
        return torch.tanh(x.flatten(1) - 0.5) @ self.weight.t()

    def loss(self, x, averaged, labels, section, dropped, *, mix, keep):
        return F.cross_entropy(self.logits(x), labels)


def images(count=4, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, 215, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_ten_adam_steps_are_those_of_a_reference_on_normalised_pixels(session, tmp_path):
    labels, made = torch.tensor([0, 1, 2, 3]), recipe(betas=[0.4, 0.8], eps=1e-3)
    observed = [Smooth(0), Smooth(1), Smooth(2)]
    generator = work.generator(0, "blocks", "b")
    z, losses = synthesize.optimise(
        images(), labels, observed, made, session, generator, Progress(tmp_path / "p", 1e9)
    )

    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (images().double() / 255 - mean) / std
    low, high = -mean / std, (1 - mean) / std
    m, v, expected_losses = torch.zeros_like(expected), torch.zeros_like(expected), []
    for t in range(10):
        leaf = expected.clone().requires_grad_()
        loss = F.cross_entropy(Smooth(t % 3, torch.float64).logits(leaf * std + mean), labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected_losses.append(loss.item())
        m = 0.4 * m + 0.6 * gradient
        v = 0.8 * v + 0.2 * gradient**2
        lr = 0.05 * (1 + math.cos(math.pi * t / 10)) / 2
        step = lr * (m / (1 - 0.4 ** (t + 1))) / ((v / (1 - 0.8 ** (t + 1))).sqrt() + 1e-3)
        expected = torch.minimum(torch.maximum(expected - step, low), high)
    assert (z - (images() / 255.0 - mean) / std).abs().max() > 0.2  # it moved, in units of std
    torch.testing.assert_close(z.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.double(), torch.tensor(expected_losses).double(), rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_is_refused_and_not_published(session, tmp_path):
    class Broken(Smooth):
        def loss(self, *rest, **more):
            return super().loss(*rest, **more) * torch.inf

    generator, progress = torch.Generator(), Progress(tmp_path / "p", 1e9)
    given = images(), torch.arange(4), [Smooth(0), Broken(0)], recipe()
    with pytest.raises(InputError, match="no number from step 1 on; lower synthesize.lr .*, or raise synthesize.eps"):
        synthesize.optimise(*given, session, generator, progress)


def test_a_spectrum_of_what_is_no_number_is_refused_like_such_a_loss(session, tmp_path):
    class Spectral(Smooth):
        def loss(self, x, *rest, **more):
            broken = x.flatten(1) * torch.nan
            return super().loss(x, *rest, **more) + torch.linalg.eigvalsh(broken @ broken.T).sum()

    given = images(), torch.arange(4), [Smooth(0), Spectral(0)], recipe()
    with pytest.raises(InputError, match="no number from step 1 on; lower synthesize.lr"):
        synthesize.optimise(*given, session, torch.Generator(), Progress(tmp_path / "p", 1e9))


def test_pixels_that_the_last_step_breaks_are_refused_and_not_published(session, tmp_path):
    class Steep(Smooth):
        def loss(self, x, *rest, **more):
            return super().loss(x, *rest, **more) + (0 * x).sqrt().sum()  # 0, and its gradient is no number

    given = images(), torch.arange(4), [Steep(0)], recipe(iterations=1)
    with pytest.raises(InputError, match="no number from step 1 on; lower synthesize.lr"):
        synthesize.optimise(*given, session, torch.Generator(), Progress(tmp_path / "p", 1e9))


def test_the_cosine_starts_at_one_and_ends_next_to_zero():
    values = [synthesize.cosine(t, 100) for t in range(100)]
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


def test_pixels_stay_in_the_unit_range_and_are_rounded_not_cut():
    pixels = Space(recipe().source, torch.device("cpu"))
    original = images()
    z = pixels.to_z(original)
    assert torch.equal(pixels.to_bytes(z), original)
    assert torch.equal(pixels.to_bytes(pixels.to_z(original) + 0.6 / 255 / pixels.std), original + 1)
    wild = z * 50
    pixels.clamp(wild)
    x = pixels.to_x(wild)
    assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6 and x.min() < 0.01 and x.max() > 0.99


@pytest.mark.parametrize("order", ["class_major", "across_class"])
def test_every_image_is_in_exactly_one_block(order):
    blocks = synthesize.cut(classes=7, ipc=3, block=5, order=order)
    assert sorted(torch.cat(blocks).tolist()) == list(range(21))
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 1]
    first = (blocks[0] // 3).tolist()
    assert first == ([0, 0, 0, 1, 1] if order == "class_major" else [0, 1, 2, 3, 4])


def test_the_block_shares_one_crop_flip_and_roll():
    made = recipe(crop_area=[0.3, 0.9], flip=True, jitter=2)
    generator = torch.Generator().manual_seed(3)
    same = images(1).expand(5, -1, -1, -1) / 255.0
    views = [crops.Crop(8, made.synthesize, generator)(same) for _ in range(20)]
    for view in views:
        assert torch.equal(view, view[:1].expand_as(view))
    assert len({tuple(view[0].flatten().tolist()) for view in views}) > 15


def test_a_crop_is_the_resized_mirrored_rolled_part():
    made = recipe(crop_area=[0.3, 0.9], flip=True, jitter=2)
    x = images(2) / 255.0
    for seed in range(6):
        crop = crops.Crop(8, made.synthesize, torch.Generator().manual_seed(seed))
        left, top, right, bottom = crop.box
        height, width = bottom - top, right - left
        part = x[:, :, top:bottom, left:right].double()
        expected = torch.empty(2, 3, 8, 8, dtype=torch.float64)
        for row in range(8):
            for column in range(8):
                y = min(max((row + 0.5) * height / 8 - 0.5, 0), height - 1)
                u = min(max((column + 0.5) * width / 8 - 0.5, 0), width - 1)
                y0, u0 = int(y), int(u)
                y1, u1 = min(y0 + 1, height - 1), min(u0 + 1, width - 1)
                a, b = y - y0, u - u0
                top = part[:, :, y0, u0] * (1 - b) + part[:, :, y0, u1] * b
                bottom = part[:, :, y1, u0] * (1 - b) + part[:, :, y1, u1] * b
                expected[:, :, row, column] = top * (1 - a) + bottom * a
        if crop.flip:
            expected = expected.flip(-1)
        if crop.roll:
            expected = expected.roll(crop.roll, (-2, -1))
        torch.testing.assert_close(crop(x).double(), expected, rtol=1e-4, atol=1e-6)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("flatness", ["none", "logits"])
def test_a_block_killed_in_the_middle_ends_with_the_same_bits(session, tmp_path, flatness):
    keys = {"crop_area": [0.3, 1.0], "flip": True, "drop_rate": 0.3, "flatness": {"kind": flatness}}
    made = recipe(iterations=9, **keys)
    labels = torch.tensor([0, 0, 1, 1])
    nets = [network("batch"), network("instance")]

    def run(progress, stop=None):
        observed = [synthesize.Observed(net, target(net), labels, made, session) for net in nets]
        if stop is not None:
            loss, calls = observed[0].loss, []

            def stopping(*arguments, **more):
                calls.append(1)
                if len(calls) == stop:
                    raise Interrupted
                return loss(*arguments, **more)

            observed[0].loss = stopping
        generator = work.generator(0, "blocks", "b")
        return synthesize.optimise(images(), labels, observed, made, session, generator, progress)

    undisturbed, losses = run(Progress(tmp_path / "a", 1e9))
    with pytest.raises(Interrupted):
        run(Progress(tmp_path / "b", 0.0), stop=4)
    resumed, resumed_losses = run(Progress(tmp_path / "b", 0.0))
    assert torch.equal(undisturbed, resumed) and torch.equal(losses, resumed_losses)
    assert (undisturbed - Space(made.source, session.device).to_z(images())).abs().max() > 0.1


@pytest.mark.parametrize("order", ["class_major", "across_class"])
def test_a_block_gets_its_images_labels_and_class_counts_and_its_result_goes_back_to_their_places(
    session, monkeypatch, order
):
    made = recipe(block=4, block_order=order)
    networks_ = [{"name": "net", "arch": "convnet", "train": {"epochs": 1}}]
    made = Recipe.model_validate(made.model_dump() | {"ipc": 3, "observers": {"networks": networks_}})
    start = Initial(images(9, seed=6), torch.zeros(9, 1, dtype=torch.int32), "start")
    seen = []

    def targets(name, epoch, counts):
        seen.append(counts)
        return target(network("batch"))._replace(class_ids=counts.nonzero().flatten())

    def optimise(images, labels, observed, *_):
        which = torch.tensor([(start.images == image).flatten(1).all(1).nonzero().item() for image in images])
        assert torch.equal(labels, which // 3)  # class-major: the label of image i is i // ipc
        assert torch.equal(seen[-1], torch.bincount(labels, minlength=3))
        return Space(made.source, session.device).to_z(255 - images), torch.zeros(1)

    monkeypatch.setattr(synthesize, "optimise", optimise)
    real = SimpleNamespace(names=["a", "b", "c"])
    observers = SimpleNamespace(load=lambda *_: network("batch"))
    moments = SimpleNamespace(targets=targets, fingerprint=lambda _: "moments")
    found = synthesize.obtain(made, real, observers, moments, start, session)
    assert len(seen) == 3 and sum(seen).tolist() == [3, 3, 3]
    assert torch.equal(found, 255 - start.images)


class Fifty:
    """A real set of 50 images of 5 classes, row r of class r % 5."""

    labels = torch.arange(50) % 5

    def rows(self, label):
        return (self.labels == label).nonzero().flatten()

    def images(self, rows):
        return images(50, seed=4)[rows]


def test_local_images_are_drawn_of_the_blocks_classes_and_count_as_the_block_does():
    counts = torch.tensor([0, 3, 0, 1, 0])
    drawn, weights = synthesize.draw_real(Fifty(), counts, 6, torch.Generator().manual_seed(0))
    assert drawn.shape == (12, 3, 8, 8)
    everything = images(50, seed=4)
    found = [next(r for r in range(50) if torch.equal(everything[r], image)) for image in drawn]
    assert [row % 5 for row in found] == [1] * 6 + [3] * 6 and len(set(found)) == 12
    torch.testing.assert_close(weights, torch.tensor([0.75 / 6] * 6 + [0.25 / 6] * 6))


def test_local_targets_are_the_statistics_of_the_drawn_images_and_leave_the_global_form_alone(session):
    made = recipe(class_scope="local", layers=["conv"])
    net = network("batch")
    given = target(net)._replace(layout=None)
    columns = torch.cat([torch.arange(s.start, s.start + s.length) for s in taps_of(net).segments if s.kind == "conv"])
    given = given._replace(global_mean=given.global_mean[columns], global_var=given.global_var[columns])
    pixels, weights = images(9, seed=5), torch.rand(9, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum()
    found = synthesize.retarget(given, net, pixels, weights, made, session)
    seen = []
    exact = copy.deepcopy(net).double()
    for layer in exact.module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    exact(pixels.double() / 255)
    share = weights.double()[:, None]
    mean = torch.cat([(share * h.mean((2, 3))).sum(0) for h in seen])
    square = torch.cat([(share * h.square().mean((2, 3))).sum(0) for h in seen])
    torch.testing.assert_close(found.mixture_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mixture_var.double(), square - mean**2, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.global_mean, given.global_mean) and torch.equal(found.global_var, given.global_var)


def random_observed(session, **keys):
    """An observer of four images of two classes, its recipe, and a view of them that wants a gradient."""
    made, labels = recipe(**keys), torch.tensor([0, 0, 1, 1])
    observed = synthesize.Observed(network("batch"), target(network("batch")), labels, made, session)
    return observed, made, labels, (images(seed=2) / 255.0).requires_grad_()


def test_the_loss_is_cross_entropy_and_each_other_term_by_its_weight(session):
    weights = {
        "weight": 0.3,
        "flatness": {"kind": "logits", "weight": 0.7, "tau": 2.0},
    }
    observed, made, labels, x = random_observed(session, **weights, ema=0.0)
    averaged = images(seed=3) / 255.0
    found = observed.loss(x, averaged, labels, made.synthesize)
    (gradient,) = torch.autograd.grad(found, x)

    logits, matched = observed.network(x), matching.Matcher(target(network("batch")), made.synthesize, labels)
    with observed.taps[8]:
        observed.network(x)
    present, average = (F.softmax(observed.network(view) / 2, -1) for view in (x, averaged))
    terms = [
        (1.0, -F.log_softmax(logits, -1)[range(4), labels].mean()),
        (0.3, matched(*observed.taps[8].collect())),
        (0.7, (present * (present / average).log()).sum() / 4),
    ]
    assert all(term > 1e-4 for _, term in terms)
    expected = sum(weight * term for weight, term in terms)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-3, atol=1e-6)


def test_mixed_precision_is_for_the_networks_and_not_for_the_statistics(session):
    session.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    observed, made, labels, x = random_observed(session, weight=1.0, ema=0.0)
    collect, kept = observed.taps[8].collect, []
    observed.taps[8].collect = lambda: kept.append(collect()) or kept[0]
    found = observed.loss(x, None, labels, made.synthesize)
    with torch.no_grad(), session.autocast():
        logits = observed.network(x)
    assert logits.dtype == torch.bfloat16
    exact = matching.Matcher(target(network("batch")), made.synthesize, labels)(*kept[0])
    torch.testing.assert_close(found, F.cross_entropy(logits.float(), labels) + exact, rtol=1e-5, atol=1e-5)


class Recorder(Smooth):
    """Remembers the views it is shown."""

    def __init__(self, seed):
        super().__init__(seed)
        self.seen = []

    def loss(self, x, averaged, *rest, **more):
        self.seen.append((x.detach().double(), averaged.double()))
        return super().loss(x, averaged, *rest, **more)


def recorded(session, tmp_path, **keys):
    observed, made = Recorder(0), recipe(iterations=12, **keys)
    progress, generator = Progress(tmp_path / "p", 1e9), work.generator(0, "blocks", "b")
    synthesize.optimise(images(), torch.arange(4), [observed], made, session, generator, progress)
    return observed.seen


@pytest.mark.parametrize("every", [0, 3])
def test_flatness_compares_with_the_running_average_of_the_images(session, tmp_path, every):
    residual = {"every": every, "weight": 0.4}
    seen = recorded(session, tmp_path, flatness={"kind": "logits", "beta": 0.7}, residual=residual)
    start = expected = seen[0][0]
    for step, (x, averaged) in enumerate(seen):
        if step and every and step % every == 0:
            expected = 0.6 * expected + 0.4 * start  # merged as the images are
        expected = 0.7 * expected + 0.3 * x  # Eq. 7
        torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-6)
    assert max((x - averaged).abs().max() for x, averaged in seen) > 0.01


def test_the_average_is_seen_through_the_crop_of_the_images(session, tmp_path):
    views = {"crop_area": [0.3, 0.9], "flip": True, "jitter": 2}
    seen = recorded(session, tmp_path, flatness={"kind": "logits", "beta": 0.0}, **views)
    for x, averaged in seen:
        torch.testing.assert_close(averaged, x, rtol=0, atol=1e-6)


def test_half_of_the_views_are_mirrored_and_rolls_are_up_to_the_jitter_each_way():
    made, generator = recipe(flip=True, jitter=2), torch.Generator().manual_seed(0)
    drawn = [crops.Crop(8, made.synthesize, generator) for _ in range(2000)]
    assert sum(crop.flip for crop in drawn) / 2000 == pytest.approx(0.5, abs=0.05)
    rolls = torch.tensor([crop.roll or [0, 0] for crop in drawn]).flatten()
    counts = torch.bincount(rolls + 2, minlength=5)
    assert len(counts) == 5 and counts.min() > 0.8 * 4000 / 5
    assert not any(crops.Crop(8, recipe(flip=False).synthesize, generator).flip for _ in range(50))


def network(norm):
    args = {"depth": 2, "width": 8, "norm": norm}
    net = networks.build("convnet", 10, args=args, image_size=8, mean=MEAN, std=STD, seed=1)
    return net.eval().requires_grad_(False)


def taps_of(net):
    from edc_hub.taps import Taps

    return Taps(net, patch=4).layout


def target(net):
    """Targets from random real images, by the taps themselves."""
    from edc_hub.taps import Taps
    from edc_hub.targets import Targets

    taps = Taps(net, patch=4)
    with torch.no_grad(), taps:
        net.eval()(images(20, seed=9) / 255.0)
    first, second = taps.collect()
    mean, var = matching.group(first, second, taps.shift, torch.full((1, 20), 1 / 20))
    classes = torch.tensor([0, 1])
    return Targets(taps.layout, mean[0], var[0], classes, mean.expand(2, -1), var.expand(2, -1), mean[0], var[0])
