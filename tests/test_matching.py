"""The terms of the synthesis loss against slow references in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from edc_hub import matching, networks
from edc_hub.matching import Matcher, Running
from edc_hub.recipe import Synthesize
from edc_hub.section import Flatness
from edc_hub.taps import Layout, Taps
from edc_hub.targets import Targets


LAYOUT = Layout.of(
    [("a", "conv", 3), ("a", "patch", 4), ("b", "bn", 5), ("c", "conv", 5), ("c", "patch", 1), ("d", "bn", 2)]
)
LABELS = torch.tensor([4, 4, 4, 7, 7, 1])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets(layout=LAYOUT, seed=5):
    size = layout.size
    values = [draw(size, seed=seed), draw(size, seed=seed + 1).abs()]
    values += [torch.tensor([1, 4, 7]), draw(3, size, seed=seed + 2), draw(3, size, seed=seed + 3).abs()]
    return Targets(layout, *values, draw(size, seed=seed + 4), draw(size, seed=seed + 5).abs())


def moments(given, seed=9, count=6):
    """Moments of images about the global mean, as taps give them, with a gradient."""
    first = draw(count, given.layout.size, seed=seed)
    second = (first.square() + draw(count, given.layout.size, seed=seed + 1).abs()).requires_grad_()
    return first.requires_grad_(), second


def slow(given, section, mean, var, class_mean, class_var, dropped=()):
    """Eq. 2 and 5 spelled out, one layer, one segment, one class at a time. Statistics float64 (F,) and (3, F)."""
    names = list(dict.fromkeys(s.name for s in given.layout.segments))
    total = 0.0
    for number, name in enumerate(names):
        if name in dropped:
            continue
        loss = 0.0
        for segment in given.layout.segments:
            if segment.name != name:
                continue
            columns = slice(segment.start, segment.start + segment.length)

            def apart(a, b, columns=columns):
                return ((a[columns] - b[columns].double()) ** 2).sum().sqrt()

            whole = apart(mean, given.global_mean) + apart(var, given.global_var)
            if section.class_scope == "per_class":
                share = {1: 1 / 6, 4: 3 / 6, 7: 2 / 6}
                by_class = 0.0
                for row, label in enumerate((1, 4, 7)):
                    both = apart(class_mean[row], given.class_mean[row]) + apart(class_var[row], given.class_var[row])
                    by_class = by_class + share[label] * both
            else:
                by_class = apart(mean, given.mixture_mean) + apart(var, given.mixture_var)
            loss = loss + section.alpha * whole + (1 - section.alpha) * by_class
        total = total + (section.first_layer if number == 0 else 1.0) * loss
    return total


def statistics(first, second, shift, rows):
    mean = sum(first[i] for i in rows) / len(rows)
    square = sum(second[i] for i in rows) / len(rows)
    return shift.double() + mean, square - mean**2


@pytest.mark.parametrize("scope", ["per_class", "mixture", "local"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_and_its_gradient_are_those_of_equation_5(scope, alpha):
    given, section = targets(), Synthesize(class_scope=scope, alpha=alpha, ema=0.0)
    first, second = moments(given)
    matcher = Matcher(given, section, LABELS)
    found = matcher(first, second)
    found_grad = torch.autograd.grad(found, (first, second))
    first_, second_ = (t.detach().double().requires_grad_() for t in (first, second))
    whole = statistics(first_, second_, given.global_mean, range(6))
    rows = [[5], [0, 1, 2], [3, 4]]
    classes = [statistics(first_, second_, given.global_mean, row) for row in rows]
    class_mean, class_var = (torch.stack(values) for values in zip(*classes, strict=True))
    expected = slow(given, section, *whole, class_mean, class_var)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found_grad, torch.autograd.grad(expected, (first_, second_)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["per_class", "mixture"])
def test_the_average_gives_value_and_the_present_batch_the_gradient(scope):
    momentum = 0.8
    given, section = targets(), Synthesize(class_scope=scope, ema=momentum)
    matcher, past = Matcher(given, section, LABELS), []
    for step in range(4):
        first, second = moments(given, seed=20 + step)
        found = matcher(first, second)
        found_grad = torch.autograd.grad(found, (first, second))
        first_, second_ = (t.detach().double().requires_grad_() for t in (first, second))
        rows = [range(6), [5], [0, 1, 2], [3, 4]]
        past.append([statistics(first_, second_, given.global_mean, row) for row in rows])
        # the average of everything so far, weighted by age and divided by the sum of weights
        ages = [(1 - momentum) * momentum ** (step - t) for t in range(step + 1)]
        held = [
            [sum(w * values[r][k].detach() for w, values in zip(ages, past, strict=True)) / sum(ages) for k in (0, 1)]
            for r in range(4)
        ]
        used = [[held[r][k] + past[-1][r][k] - past[-1][r][k].detach() for k in (0, 1)] for r in range(4)]
        class_mean, class_var = (torch.stack([used[r][k] for r in (1, 2, 3)]) for k in (0, 1))
        expected = slow(given, section, *used[0], class_mean, class_var)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(found_grad, torch.autograd.grad(expected, (first_, second_)), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_the_first_visit_is_the_statistic_itself_and_a_constant_stays():
    running = Running(0.9)
    value = torch.tensor([3.0, -2.0])
    for _ in range(5):
        torch.testing.assert_close(running(value), value)


def test_a_restored_matcher_goes_on_with_the_same_bits():
    given, section = targets(), Synthesize(class_scope="per_class", ema=0.7)
    one, other = Matcher(given, section, LABELS), Matcher(given, section, LABELS)
    for step in range(3):
        one(*moments(given, seed=step))
    other.restore({name: tensor.clone() for name, tensor in one.state().items()})
    first, second = moments(given, seed=50)
    assert torch.equal(one(first, second), other(first, second))


def test_dropped_layers_are_convolutions_drawn_from_the_generator():
    given, section = targets(), Synthesize(drop_rate=0.5, ema=0.0)
    first, second = moments(given)
    whole = statistics(first.detach().double(), second.detach().double(), given.global_mean, range(6))
    possible = {
        names: slow(given, section, *whole, None, None, names).item() for names in [(), ("a",), ("c",), ("a", "c")]
    }
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        matcher = Matcher(given, section, LABELS)
        found = matcher(first, second, matcher.drop(generator)).item()
        names, value = min(possible.items(), key=lambda item: abs(item[1] - found))
        assert found == pytest.approx(value, rel=1e-5)
        seen.add(names)
    assert seen == set(possible)


def test_without_dropping_the_generator_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert Matcher(targets(), Synthesize(), LABELS).drop(generator) is None
    assert torch.equal(state, generator.get_state())


def test_at_the_target_itself_the_gradient_is_zero_not_infinite():
    given = targets()
    zero = torch.zeros(LAYOUT.size)
    given = given._replace(global_var=zero, mixture_mean=given.global_mean, mixture_var=zero)
    first = torch.zeros(6, LAYOUT.size, requires_grad=True)
    second = torch.zeros(6, LAYOUT.size, requires_grad=True)
    loss = Matcher(given, Synthesize(ema=0.0), LABELS)(first, second)
    gradients = torch.autograd.grad(loss, (first, second))
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_layer_losses_add_the_four_distances_of_a_convolution_and_the_two_of_a_norm():
    given = targets()
    mean, var = draw(2, LAYOUT.size, seed=40), draw(2, LAYOUT.size, seed=41)
    found = matching.layer_losses(mean, var, given.global_mean, given.global_var, LAYOUT)
    assert found.shape == (2, 4)
    for row in range(2):
        for layer in range(4):
            expected = 0.0
            for segment in LAYOUT.segments:
                if segment.layer == layer:
                    for i in ((mean, given.global_mean), (var, given.global_var)):
                        columns = slice(segment.start, segment.start + segment.length)
                        expected += math.sqrt(((i[0][row] - i[1])[columns].double() ** 2).sum())
            assert found[row, layer].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scope", ["per_class", "mixture"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_gradient_of_the_pixels_through_a_network(scope, norm):
    """The whole chain: taps, grouping, distances, back to the image, against autograd on the definitions."""
    network = networks.build(
        "convnet", 8, args={"depth": 2, "width": 6, "norm": norm}, image_size=8, mean=[0.5] * 3, std=[0.25] * 3, seed=0
    )
    network.eval().requires_grad_(False)
    taps, labels = Taps(network, patch=4), LABELS
    given, section = targets(taps.layout), Synthesize(class_scope=scope, ema=0.0)
    taps.shift = given.global_mean
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with taps:
        network(x)
    found = Matcher(given, section, labels)(*taps.collect())
    (found_grad,) = torch.autograd.grad(found, x)

    exact, inputs = copy.deepcopy(network).double(), {}
    for segment in taps.layout.segments:
        module = exact.module.get_submodule(segment.name)
        module.register_forward_pre_hook(lambda _, args, name=segment.name: inputs.update({name: args[0]}))
    pixels = x.detach().double().requires_grad_()
    exact(pixels)

    def statistics(rows):
        mean, var = [], []
        for segment in taps.layout.segments:
            h = inputs[segment.name][rows]
            if segment.kind == "patch":
                h = h.unfold(2, 4, 4).unfold(3, 4, 4).permute(2, 3, 0, 1, 4, 5).reshape(segment.length, -1)
            else:
                h = h.transpose(0, 1).flatten(1)
            mean.append(h.mean(1)), var.append(h.var(1, correction=0))
        return torch.cat(mean), torch.cat(var)

    classes = [statistics(rows) for rows in ([5], [0, 1, 2], [3, 4])]
    class_mean, class_var = (torch.stack(values) for values in zip(*classes, strict=True))
    expected = slow(given, section, *statistics(list(range(6))), class_mean, class_var)
    (expected_grad,) = torch.autograd.grad(expected, pixels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    floor = 1e-4 * expected_grad.abs().mean().item()
    torch.testing.assert_close(found_grad.double(), expected_grad, rtol=1e-4, atol=floor)


class Block(nn.Module):
    """A residual block whose input is made before its consumers in the one order, after one of them in the other."""

    def __init__(self, order):
        super().__init__()
        self.order, self.conv = order, nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        x = torch.tanh(x)
        return x + self.conv(x) if self.order == "conv first" else (x * 1).add(self.conv(x)) + x


@pytest.mark.parametrize("order", ["conv first", "sum first"])
def test_a_residual_add_gets_its_own_gradient(order):
    torch.manual_seed(0)
    net = nn.Module()
    net.module, net.facts, net.mean = (
        Block(order),
        {"input_size": None, "image_size": 8, "arch": "block"},
        torch.zeros(1, 3, 1, 1),
    )
    net.forward = net.module.forward
    given = targets(Taps(net, patch=4).layout)
    section = Synthesize(ema=0.0, class_scope="mixture")
    x = torch.rand(6, 3, 8, 8).requires_grad_()
    taps = Taps(net, patch=4)
    taps.shift = given.global_mean
    with taps:
        out = net(x)
    loss = Matcher(given, section, LABELS)(*taps.collect()) + out.sin().sum()
    (found,) = torch.autograd.grad(loss, x)

    exact, pixels = copy.deepcopy(net.module).double(), x.detach().double().requires_grad_()
    seen = []
    exact.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = exact(pixels)
    (h,) = seen
    tiles = h.unfold(2, 4, 4).unfold(3, 4, 4).permute(2, 3, 0, 1, 4, 5).reshape(4, -1)
    flat = h.transpose(0, 1).flatten(1)
    mean, var = (
        torch.cat([flat.mean(1), tiles.mean(1)]),
        torch.cat([flat.var(1, correction=0), tiles.var(1, correction=0)]),
    )
    expected = torch.autograd.grad(slow(given, section, mean, var, None, None) + out.sin().sum(), pixels)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", ["paper", "code"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_flatness_is_the_divergence_of_softened_predictions(direction, reduction):
    logits, averaged = draw(4, 7, seed=1).requires_grad_(), draw(4, 7, seed=2).requires_grad_()
    section = Flatness(kind="logits", tau=3.0, direction=direction, reduction=reduction)
    found = matching.flatness(logits, averaged, section)
    p, q = (
        torch.exp(z.double() / 3) / torch.exp(z.double() / 3).sum(1, keepdim=True) for z in (logits, averaged.detach())
    )
    if direction == "code":
        p, q = q, p
    expected = sum(p[i, j] * (p[i, j].log() - q[i, j].log()) for i in range(4) for j in range(7)) / (
        4 if reduction == "batchmean" else 28
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)
    assert torch.autograd.grad(found, averaged, allow_unused=True)[0] is None


def test_densification_distils_the_spectrum_of_each_class():
    images = (0.05 * draw(7, 3, 64, 64, seed=3)).requires_grad_()
    labels = torch.tensor([2, 0, 2, 0, 2, 1, 1])
    found = matching.densification(images, labels, 4.0)
    (found_grad,) = torch.autograd.grad(found, images)
    pixels = images.detach().double().requires_grad_()
    pooled = pixels.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).flatten(1)
    expected = 0.0
    for label in range(3):
        rows = pooled[labels == label]
        spectrum = torch.linalg.eigvals(rows @ rows.T).real
        target = torch.softmax(spectrum.detach() / 4, 0)
        expected = expected + (target * (target.log() - torch.log_softmax(spectrum, 0))).sum()
    (expected_grad,) = torch.autograd.grad(expected, pixels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found_grad.double(), expected_grad, rtol=1e-3, atol=1e-3 * expected_grad.abs().max().item()
    )


def test_densification_of_single_images_is_nothing():
    images = draw(3, 3, 8, 8).requires_grad_()
    assert matching.densification(images, torch.tensor([0, 1, 2]), 4.0) == 0


def test_flatness_of_statistics_is_the_distance_of_the_blocks_own_statistics():
    given, section = targets(), Synthesize(first_layer=10.0, class_scope="per_class", ema=0.9, drop_rate=0.5)
    present, averaged = moments(given, seed=9), moments(given, seed=30)
    matcher = Matcher(given, section, LABELS)
    found = matcher.flatness(present, averaged)
    present_ = [t.detach().double().requires_grad_() for t in present]
    averaged_ = [t.detach().double() for t in averaged]
    ours = statistics(*present_, given.global_mean, range(6))
    theirs = statistics(*averaged_, given.global_mean, range(6))
    expected = 0.0
    for segment in LAYOUT.segments:
        columns = slice(segment.start, segment.start + segment.length)
        for one, other in zip(ours, theirs, strict=True):
            distance = ((one - other)[columns] ** 2).sum().sqrt()
            expected = expected + (10.0 if segment.name == "a" else 1.0) * distance
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found, (*present, *averaged), allow_unused=True)
    assert gradients[2] is gradients[3] is None  # X_EMA has no gradient
    for one, other in zip(gradients, torch.autograd.grad(expected, present_), strict=False):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)
    assert not matcher.state()  # of this view alone: nothing is remembered


def test_what_is_not_kept_leaves_the_averages_as_they_were():
    given, section = targets(), Synthesize(class_scope="per_class", ema=0.7)
    one, other = Matcher(given, section, LABELS), Matcher(given, section, LABELS)
    for step in range(4):
        first = one(*moments(given, seed=step))
        assert torch.equal(other(*moments(given, seed=step), keep=False), first)
        other(*moments(given, seed=90), keep=False)
        assert torch.equal(other(*moments(given, seed=step)), first)


def test_total_variation_is_the_norm_of_the_differences_in_four_directions():
    z = draw(2, 3, 4, 5, seed=1).requires_grad_()
    exact, expected = z.detach().double().requires_grad_(), 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = 0.0
        for y in range(4 - down):
            for x in range(max(0, -right), 5 - max(0, right)):
                squares = squares + (exact[:, :, y + down, x + right] - exact[:, :, y, x]).square().sum()
        expected = expected + squares.sqrt()
    found = matching.total_variation(z)
    torch.testing.assert_close(found, expected.float())
    gradients = torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(gradients[0], gradients[1].float())
    flat = torch.ones(1, 3, 4, 4, requires_grad=True)
    assert torch.equal(torch.autograd.grad(matching.total_variation(flat), flat)[0], torch.zeros(1, 3, 4, 4))


def test_the_norm_is_that_of_an_image_averaged_over_the_block():
    z = draw(3, 3, 2, 2, seed=2)
    expected = sum(sum(float(value) ** 2 for value in image.flatten()) ** 0.5 for image in z) / 3
    assert matching.mean_norm(z).item() == pytest.approx(expected, rel=1e-5)
