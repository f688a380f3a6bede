"""Per-image moments of layer inputs and their gradient, against slow references in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edc_hub import networks, sites
from edc_hub.errors import InputError
from edc_hub.taps import Layout, Taps


class Wrapped(nn.Module):
    """A module behind the face that taps expect."""

    def __init__(self, module, size):
        super().__init__()
        self.module, self.facts = module, {"arch": "test", "image_size": size, "input_size": None}
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, x):
        return self.module(x)


class Residual(nn.Module):
    """x feeds a convolution and an addition; `order` says which the graph makes first."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 6, 1)
        self.short = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        if self.order == "branch first":
            branch = self.two(torch.relu(self.norm(self.one(x))))
            x = branch + x + self.short(x)
        else:
            doubled = x + x
            branch = self.two(torch.relu(self.norm(self.one(x))))
            x = self.short(x) + (doubled + branch)
        y = x + self.norm(x)  # the layer's output gradient is also the shortcut's
        return self.head(y.mean((2, 3)))


class Handing(nn.Conv2d):
    """A Conv2d subclass whose input gradient is the very tensor of its output gradient."""

    def forward(self, x):
        return x + 1


class Sum(nn.Module):
    """One gradient tensor goes to both terms of the sum; `first` says which of them the graph makes first."""

    def __init__(self, first):
        super().__init__()
        self.first, self.one, self.two, self.handing = first, nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), Handing(6, 6, 1)

    def forward(self, x):
        if self.first == "handing":
            a, b = self.handing(torch.tanh(self.one(x))), torch.tanh(self.two(x))
        else:
            b, a = torch.tanh(self.two(x)), self.handing(torch.tanh(self.one(x)))
        return (a + b).flatten(1) if self.first == "handing" else (b + a).flatten(1)


def plain(norm=True, groups=1):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU6()]
    layers += [nn.AvgPool2d(2), nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(*layers)


def seeded(make, size):
    torch.manual_seed(0)
    network = Wrapped(make(), size).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.normal_()
            module.bias.normal_()
    return network


def reference(network, x, layout, side, shift):
    """Moments of each image by the definition, image by image; the first call of a module counts."""
    inputs = {}
    names = {module: name for name, module in network.module.named_modules()}

    def keep(module, args):
        inputs.setdefault(names[module], args[0])

    watched = {segment.name for segment in layout.segments}
    handles = [module.register_forward_pre_hook(keep) for module, name in names.items() if name in watched]
    logits = network(x)
    for handle in handles:
        handle.remove()
    first, second = [], []
    for segment in layout.segments:
        h, s = inputs[segment.name], shift[segment.start : segment.start + segment.length]
        if segment.kind == "patch":
            height, width = (-(-n // side) * side for n in h.shape[-2:])
            if h.shape[-2:] != (height, width):
                h = F.interpolate(h, (height, width), mode="bilinear", align_corners=False)
            tiles = [
                h[:, :, i : i + side, j : j + side].flatten(1)
                for i in range(0, height, side)
                for j in range(0, width, side)
            ]
            values = torch.stack(tiles, 1)
        else:
            values = h.flatten(2)
        first.append((values - s[None, :, None]).mean(2))
        second.append((values - s[None, :, None]).square().mean(2))
    return logits, torch.cat(first, 1), torch.cat(second, 1)


NETWORKS = {
    "plain": (lambda: plain(), 16),
    "depthwise": (lambda: plain(groups=8), 16),
    "no norm": (lambda: plain(norm=False), 8),
    "tiles do not fit": (lambda: plain(), 14),
    "maps smaller than a tile": (lambda: plain(), 6),
    "branch first": (lambda: Residual("branch first"), 8),
    "sum first": (lambda: Residual("sum first"), 8),
    "a layer of another class, first": (lambda: Sum("handing"), 8),
    "a layer of another class, last": (lambda: Sum("other"), 8),
}


@pytest.mark.parametrize("chunk", [sites.CHUNK, 2000])
@pytest.mark.parametrize("weights", ["one group", "each image its own"])
@pytest.mark.parametrize("name", NETWORKS)
def test_moments_and_gradient_are_those_of_the_definition(name, weights, chunk, monkeypatch):
    monkeypatch.setattr(sites, "CHUNK", chunk)  # the smaller one cuts these few images
    make, size = NETWORKS[name]
    network = seeded(make, size)
    exact = copy.deepcopy(network).double()
    x = torch.rand(5, 3, size, size)
    taps = Taps(network, patch=4)
    generator = torch.Generator().manual_seed(1)
    taps.shift = torch.randn(taps.layout.size, generator=generator)
    rows = 1 if weights == "one group" else 5
    a, b = (torch.randn(rows, taps.layout.size, generator=generator) for _ in range(2))

    def run(x, network, moments):
        logits, first, second = moments(x, network)
        if rows == 1:
            first, second = first.mean(0, keepdim=True), second.mean(0, keepdim=True)
        scalar = (first * a.to(x)).sum() + (second * b.to(x)).sum() + logits.sin().sum()
        return first, second, torch.autograd.grad(scalar, x)[0]

    def ours(x, network):
        with taps:
            logits = network(x)
        return logits, *taps.collect()

    found = run(x.clone().requires_grad_(), network, ours)
    expected = run(
        x.double().requires_grad_(), exact, lambda x, n: reference(n, x, taps.layout, 4, taps.shift.double())
    )
    for ours_, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().mean().item())


def test_without_gradient_the_moments_are_the_same():
    network = seeded(plain, 16)
    x, taps = torch.rand(3, 3, 16, 16), Taps(network, patch=4)
    with taps:
        network(x.clone().requires_grad_())
    first, second = taps.collect()
    with torch.no_grad(), taps:
        network(x)
    for a, b in zip(taps.collect(), (first, second), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("size", [16, 14, 3])
def test_second_moments_hold_where_the_mean_is_a_hundred_times_the_spread(size):
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten()), size)
    with torch.no_grad():
        network.module[0].weight.copy_(torch.randn(8, 3, 1, 1) * 0.2)
        network.module[0].bias.copy_(torch.randn(8) * 0.01)
    x = 100 + torch.randn(6, 3, size, size)
    taps = Taps(network, patch=4)
    with torch.no_grad(), taps:
        network(x)
    taps.shift = taps.collect()[0].mean(0) + 0.3 * torch.randn(taps.layout.size)
    with torch.no_grad(), taps:
        network(x)
    first, second = (m.double() for m in taps.collect())
    _, first_, second_ = reference(copy.deepcopy(network).double(), x.double(), taps.layout, 4, taps.shift.double())
    # the layer's input itself is rounded to float32; conv1's is exact
    conv = sum(s.length for s in taps.layout.segments if s.layer == 0)
    for part in (slice(0, conv), slice(conv, None)):
        scale = 1.0 if part.start == 0 else 10.0
        var, var_ = ((s - f.square())[:, part] for f, s in ((first, second), (first_, second_)))
        torch.testing.assert_close(var, var_, rtol=1e-4 * scale, atol=1e-6 * scale)
        torch.testing.assert_close(first[:, part], first_[:, part], rtol=1e-4 * scale, atol=1e-4 * scale)


def test_rows_do_not_depend_on_the_images_beside_them_beyond_rounding():
    network = seeded(plain, 16)
    x, taps = torch.rand(7, 3, 16, 16), Taps(network, patch=4)
    with torch.no_grad(), taps:
        network(x)
    first, second = taps.collect()
    with torch.no_grad(), taps:
        network(x[2:4])
    torch.testing.assert_close(taps.collect(), (first[2:4], second[2:4]), rtol=1e-5, atol=1e-6)


def test_channels_last_gives_the_same():
    network = seeded(plain, 16)
    x, taps = torch.rand(4, 3, 16, 16), Taps(network, patch=4)
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone().contiguous(memory_format=form).requires_grad_()
        with taps:
            logits = network.to(memory_format=form)(leaf)
        first, second = taps.collect()
        (grad,) = torch.autograd.grad(logits.sum() + (first * second).sum(), leaf)
        results.append((first, second, grad.contiguous()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 8, 4])  # the last layer sees 8x8, 4x4 (one tile) or 2x2 (less than one)
def test_under_autocast_moments_are_float32_sums_of_what_the_layer_saw(size):
    network = seeded(plain, size)
    x, taps = torch.rand(4, 3, size, size).requires_grad_(), Taps(network, patch=4)
    seen = {}
    network.module[7].register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16), taps:
        logits = network(x)
    first, second = taps.collect()
    (grad,) = torch.autograd.grad(logits.float().sum() + first.sum() + second.sum(), x)
    assert first.dtype == second.dtype == torch.float32 and grad.isfinite().all() and grad.abs().max() > 0
    h = seen["h"].double()
    assert seen["h"].dtype == torch.bfloat16
    wide = h if size > 4 else F.interpolate(h, (4, 4), mode="bilinear")
    tiles = wide.unfold(2, 4, 4).unfold(3, 4, 4)
    for segment in taps.layout.segments[-2:]:
        columns = slice(segment.start, segment.start + segment.length)
        values = h.flatten(2) if segment.kind == "conv" else tiles.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
        torch.testing.assert_close(first[:, columns].double(), values.mean(2), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(second[:, columns].double(), values.square().mean(2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [("bn",), ("conv",), ("patch",), ("bn", "patch")])
def test_a_choice_of_layers_measures_just_those(layers):
    network = seeded(plain, 16)
    x, every, some = torch.rand(4, 3, 16, 16), Taps(network, patch=4), Taps(network, patch=4, layers=layers)
    layout, columns = every.layout.keep(layers)
    assert some.layout == layout and {s.kind for s in layout.segments} == set(layers)
    assert layout.segments[0].layer == 0
    every.shift = torch.randn(every.layout.size)
    some.shift = every.shift[columns]
    results = []
    for taps in (every, some):
        leaf = x.clone().requires_grad_()
        with taps:
            network(leaf)
        first, second = taps.collect()
        if taps is every:
            first, second = first[:, columns], second[:, columns]
        results.append((first, second, torch.autograd.grad((first + second).sum(), leaf)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_layout_follows_named_modules_channels_before_tiles():
    layout = Taps(seeded(plain, 16), patch=4).layout
    assert [(s.layer, s.name, s.kind, s.length) for s in layout.segments] == [
        (0, "0", "conv", 3),
        (0, "0", "patch", 16),
        (1, "1", "bn", 8),
        (2, "3", "conv", 8),
        (2, "3", "patch", 16),
        (3, "4", "bn", 8),
        (4, "7", "conv", 8),
        (4, "7", "patch", 4),
    ]
    assert layout.size == 71 and layout.layers == 5
    assert Layout.of((s.name, s.kind, s.length) for s in layout.segments) == layout


def test_a_network_without_the_layers_is_refused():
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)), 8)
    with pytest.raises(InputError, match="synthesize.layers: test has no bn or conv or patch input .*.observers"):
        Taps(network, patch=4)


def test_hooks_are_gone_after_use_even_after_an_error():
    network = seeded(plain, 16)
    taps = Taps(network, patch=4)
    with pytest.raises(RuntimeError), taps:
        network(torch.rand(1, 5, 16, 16))
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "wrn_16_2", "shufflenet_v2_x0_5", "convnet"])
def test_an_observer_of_the_paper_gets_the_gradient_of_the_definition(arch):
    args = {"width": 8} if arch == "convnet" else {}
    network = (
        networks.build(arch, 10, args=args, image_size=16, seed=3, mean=[0.5] * 3, std=[0.25] * 3)
        .eval()
        .requires_grad_(False)
    )
    taps, x = Taps(network, patch=4), torch.rand(2, 3, 16, 16)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, taps.layout.size, generator=generator) for _ in range(2))
    leaf = x.clone().requires_grad_()
    with taps:
        logits = network(leaf)
    first, second = taps.collect()
    found = torch.autograd.grad((first * a).sum() + (second * b).sum() + logits.sum(), leaf)[0]
    exact = copy.deepcopy(network).double()
    leaf = x.double().requires_grad_()
    logits, first_, second_ = reference(exact, leaf, taps.layout, 4, taps.shift.double())
    expected = torch.autograd.grad((first_ * a).sum() + (second_ * b).sum() + logits.sum(), leaf)[0]
    torch.testing.assert_close(first.double(), first_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.double(), second_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
