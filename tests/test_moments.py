"""Moments over the real set and the targets that follow, against slow references in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from edc_hub import matching, moments, networks
from edc_hub.recipe import Recipe
from edc_hub.taps import Taps
from edc_hub.work import Progress, Session


MEAN, STD = [0.5, 0.4, 0.6], [0.25, 0.2, 0.3]
CLASSES, SIZE = 3, 8


class Real:
    """A small set in memory with what moments ask of a RealSet: 3 classes of 11, 6 and 1 images, some rows unused."""

    names, fingerprint = ["a", "b", "c"], "real"

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.tensor([0, 1, -1, 0, 0, 1, 0, 2, 0, 1, 0, 1, 0, -1, 0, 1, 0, 0, 1, 0])
        tint = torch.randint(0, 120, (20, 3, 1, 1), generator=generator)
        self.pixels = (torch.randint(0, 136, (20, 3, SIZE, SIZE), generator=generator) + tint).to(torch.uint8)

    def rows(self):
        return (self.labels >= 0).nonzero().flatten()

    def batches(self, rows, batch, *, view=None):
        self.views = view
        for part in rows.split(batch) if len(rows) else ():
            yield self.pixels[part], self.labels[part], part


class Nets:
    """Observers made on the spot; counts how often one is loaded."""

    def __init__(self, **made):
        self.made, self.loaded = made, []

    def load(self, name, epoch):
        self.loaded.append(name)
        return self.made[name]

    def fingerprint(self, name, epoch):
        return f"{name}@{epoch}"


def network(norm="batch", seed=1):
    made = networks.build(
        "convnet", CLASSES, args={"depth": 2, "width": 6, "norm": norm}, image_size=SIZE, mean=MEAN, std=STD, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return made.eval().requires_grad_(False)


def recipe(names=("net",), synthesize=None, source=None, **section):
    nets = [{"name": name, "arch": "convnet", "train": {"epochs": 1}} for name in names]
    return Recipe.model_validate(
        {
            "source": {"size": SIZE, "mean": MEAN, "std": STD, **(source or {})},
            "observers": {"networks": nets},
            "moments": {"batch": 4, "rows": 5, "patch": 4, **section},
            "synthesize": synthesize or {},
        }
    )


def image_moments(net, pixels, layout):
    """m and v of each image, float64 (N, F), by the definition."""
    net = copy.deepcopy(net).double()
    inputs = {}
    for segment in layout.segments:
        module = net.module.get_submodule(segment.name)
        module.register_forward_pre_hook(lambda _, args, name=segment.name: inputs.update({name: args[0]}))
    net(pixels.double() / 255)
    mean, var = [], []
    for segment in layout.segments:
        h = inputs[segment.name]
        if segment.kind == "patch":
            if h.shape[-1] % 4:
                h = F.interpolate(h, (4, 4), mode="bilinear", align_corners=False)
            h = h.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(h), segment.length, -1)
        else:
            h = h.flatten(2)
        mean.append(h.mean(2))
        var.append(h.var(2, correction=0))
    return torch.cat(mean, 1), torch.cat(var, 1)


def by_class(net, layout, real):
    """n, mean, within, between by the definition, one class at a time."""
    m, v = image_moments(net, real.pixels, layout)
    stats = []
    for label in range(CLASSES):
        mine = (real.labels == label).nonzero().flatten()
        mean = sum(m[i] for i in mine) / len(mine)
        within = sum(v[i] for i in mine) / len(mine)
        between = sum((m[i] - mean) ** 2 for i in mine) / len(mine)
        stats.append((len(mine), mean, within, between))
    n, mean, within, between = zip(*stats, strict=True)
    return torch.tensor(n), torch.stack(mean), torch.stack(within), torch.stack(between)


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().mean().item())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_class_moments_are_those_of_the_definition(session, norm, streaming):
    real, net = Real(), network(norm)
    given = recipe(source={"streaming": streaming})
    found = moments.obtain(given, real, Nets(net=net), session)
    layout = Taps(net, patch=4).layout
    n, mean, within, between = by_class(net, layout, real)
    file = session.store.load(found._units["net", 1])
    assert torch.equal(file["n"], n)
    assert all(file[name].dtype == torch.float32 for name in ("mean", "within", "between"))
    close(file["mean"], mean), close(file["within"], within), close(file["between"], between)


def test_moments_hold_where_the_mean_is_a_hundred_times_the_spread(session):
    real, net = Real(), network()
    real.pixels = (100 + torch.randint(0, 4, real.pixels.shape, generator=torch.Generator().manual_seed(1))).byte()
    net.std.fill_(1 / 255), net.mean.zero_()  # the first layer sees 100 with a spread of 1
    found = moments.obtain(recipe(), real, Nets(net=net), session)
    layout = Taps(net, patch=4).layout
    _, mean, within, between = by_class(net, layout, real)
    file = session.store.load(found._units["net", 1])
    first = slice(0, sum(s.length for s in layout.segments if s.layer == 0))
    assert 80 < (mean[:, first].abs() / within[:, first].sqrt()).min()
    for name, exact in (("within", within), ("between", between)):
        close(file[name][:, first], exact[:, first])
    total = file["within"] + file["between"]
    close(total, within + between, 1e-3)  # deeper layers work on rounded inputs


def test_sums_of_a_class_do_not_cancel_far_from_the_shift():
    """A class's images are alike and far from the other classes: their spread is a hundredth of the distance."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([5, 2, 5, 5, 2, 5, 2, 5])
    first = 100 * torch.randn(8, 1, generator=generator)[labels] + 0.5 * torch.randn(8, 40, generator=generator)
    second = first.square() + torch.rand(8, 40, generator=generator)
    present, sums = moments.class_sums(first, second, labels)
    assert present.tolist() == [2, 5] and sums.dtype == torch.float64
    for row, label in enumerate((2, 5)):
        m, s = first[labels == label].double(), second[labels == label].double()
        n = len(m)
        close(sums[0, row], m.sum(0), 1e-6)
        close(sums[1, row], (s - m**2).sum(0), 1e-2)  # float32 holds no more of a variance given as a mean square
        close(sums[2, row] / n - (sums[0, row] / n) ** 2, m.var(0, correction=0))


@pytest.mark.parametrize("target", ["reference", "exact", "finite"])
def test_targets_are_those_of_the_definition(session, target):
    real, net = Real(), network()
    found = moments.obtain(recipe(target=target, bn_target="pass"), real, Nets(net=net), session)
    targets = found.targets("net", 1, torch.tensor([3, 0, 1]))
    n, mean, within, between = by_class(net, targets.layout, real)
    assert targets.class_ids.tolist() == [0, 2]
    counts, factor = {0: 3, 2: 1}, {"reference": lambda k: 0, "exact": lambda k: 1, "finite": lambda k: 1 - 1 / k}
    for row, (label, count) in enumerate(counts.items()):
        close(targets.class_mean[row], mean[label])
        close(targets.class_var[row], within[label] + factor[target](count) * between[label])
    middle = 3 / 4 * mean[0] + 1 / 4 * mean[2]
    var = sum(c / 4 * (within[y] + factor[target](c) * between[y]) for y, c in counts.items())
    if target != "reference":
        var = var + 3 / 4 * (mean[0] - middle) ** 2 + 1 / 4 * (mean[2] - middle) ** 2
    close(targets.mixture_mean, middle), close(targets.mixture_var, var)
    m, v = image_moments(net, real.pixels[real.rows()], targets.layout)
    close(targets.global_mean, m.mean(0))
    share = n.double()[:, None] / n.sum()
    inside, spread = (share * between).sum(0), (share * (mean - m.mean(0)) ** 2).sum(0)
    asked = {
        "reference": (1 - 1 / 4) * (inside + spread),  # batch 4
        "exact": inside + spread,
        "finite": (1 - 1 / 2) * inside + spread,  # 3 and 1 images: 2 of a class
    }
    close(targets.global_var, v.mean(0) + asked[target])


def test_the_reference_target_is_what_variances_of_batches_are_on_average(session):
    real, net = Real(), network()
    found = moments.obtain(recipe(target="reference", bn_target="pass"), real, Nets(net=net), session)
    targets = found.targets("net", 1, torch.tensor([1, 1, 0]))
    m, v = image_moments(net, real.pixels[real.rows()], targets.layout)
    generator, total, draws = torch.Generator().manual_seed(0), 0, 4000
    for _ in range(draws):  # batches of 4, as the recipe has it
        batch = torch.randint(len(m), (4,), generator=generator)
        total = total + m[batch].var(0, correction=0)  # the variance within images is v.mean(0) in all of them
    wide = m.var(0, correction=0) > 1e-3 * v.mean(0)  # else what is left of a float32 difference is noise
    error = (total / draws - (targets.global_var.double() - v.mean(0)))[wide].abs() / m.var(0, correction=0)[wide]
    assert wide.sum() > 20 and error.mean() < 0.03  # the factor takes off 0.25


def test_finite_targets_of_a_block_with_all_classes_alike_agree_with_the_global_form(session):
    real, net = Real(), network()
    found = moments.obtain(recipe(target="finite", bn_target="pass"), real, Nets(net=net), session)
    n = torch.bincount(real.labels[real.rows()])
    _, mean, within, between = by_class(net, found.targets("net", 1, n).layout, real)
    even = found.targets("net", 1, torch.tensor([2, 2, 2]))
    share = n.double()[:, None] / n.sum()
    close(even.class_var, within + between / 2)
    drift = ((share - 1 / 3) * (within + between / 2)).sum(0)  # the set's classes are not of one size, the block's are
    middle = (share * mean).sum(0)
    drift = drift + (share * (mean - middle) ** 2).sum(0) - ((mean - mean.mean(0)) ** 2).mean(0)
    close(even.global_var - even.mixture_var, drift, 1e-3)


def test_exact_targets_are_the_variance_over_all_values(session):
    real, net = Real(), network()
    found = moments.obtain(recipe(target="exact", bn_target="pass"), real, Nets(net=net), session)
    n = torch.bincount(real.labels[real.rows()])
    targets = found.targets("net", 1, n)
    inputs = []
    exact = copy.deepcopy(net).double()
    exact.module.get_submodule(targets.layout.segments[2].name).register_forward_pre_hook(
        lambda _, a: inputs.append(a[0])
    )
    exact(real.pixels[real.rows()].double() / 255)
    segment = targets.layout.segments[2]
    columns = slice(segment.start, segment.start + segment.length)
    assert segment.kind == "bn"
    close(targets.global_var[columns], inputs[0].var((0, 2, 3), correction=0))
    close(targets.mixture_var[columns], inputs[0].var((0, 2, 3), correction=0))


def test_batch_norm_layers_aim_at_their_running_buffers_if_asked(session):
    real, net = Real(), network()
    found = moments.obtain(recipe(bn_target="running"), real, Nets(net=net), session)
    other = moments.obtain(recipe(bn_target="pass"), real, Nets(net=net), session)
    running, own = (m.targets("net", 1, torch.tensor([1, 1, 0])) for m in (found, other))
    for segment in running.layout.segments:
        columns = slice(segment.start, segment.start + segment.length)
        if segment.kind == "bn":
            module = net.module.get_submodule(segment.name)
            assert torch.equal(running.global_mean[columns], module.running_mean)
            assert torch.equal(running.global_var[columns], module.running_var)
            assert not torch.equal(own.global_mean[columns], module.running_mean)
        else:
            assert torch.equal(running.global_mean[columns], own.global_mean[columns])
    assert torch.equal(running.class_mean, own.class_mean)


def test_targets_follow_the_layers_that_synthesis_matches(session):
    real, net = Real(), network()
    every = moments.obtain(recipe(), real, Nets(net=net), session).targets("net", 1, torch.tensor([1, 1, 0]))
    given = recipe(synthesize={"layers": ["bn"]})
    some = moments.obtain(given, real, Nets(net=net), session).targets("net", 1, torch.tensor([1, 1, 0]))
    assert some.layout == Taps(net, patch=4, layers=["bn"]).layout
    columns = every.layout.keep(["bn"])[1]
    assert torch.equal(some.class_var, every.class_var[:, columns])
    assert torch.equal(some.global_mean, every.global_mean[columns])


def test_a_change_of_target_does_not_repeat_the_pass_and_a_new_observer_runs_alone(session):
    real = Real()
    moments.obtain(recipe(), real, Nets(net=network()), session)
    again = Nets(net=network())
    found = moments.obtain(recipe(target="exact", bn_target="pass"), real, again, session)
    assert not again.loaded
    assert found.fingerprint([("net", 1)]) != moments.obtain(recipe(), real, again, session).fingerprint([("net", 1)])
    both = Nets(net=network(), more=network(seed=2))
    moments.obtain(recipe(("net", "more")), real, both, session)
    assert set(both.loaded) == {"more"}


def test_targets_of_other_images_views_or_aims_are_others(session):
    nets, other, rrc = Nets(net=network()), Real(), {"augment": "rrc"}
    other.fingerprint = "other"

    def mark(real, **section):
        return moments.obtain(recipe(**{"rows": 20, **section}), real, nets, session).fingerprint([("net", 1)])

    sections = [{}, {"target": "exact"}, {"bn_target": "pass"}, {"batch": 5}, {"rows": 30}, {"patch": 2}, rrc]
    sections += [{**rrc, "crop_area": [0.5, 1.0]}, {**rrc, "flip": False}]
    assert len({mark(other), *(mark(Real(), **section) for section in sections)}) == 1 + len(sections)


class Killed(Exception):
    pass


@pytest.mark.parametrize("saves", range(1, 12))
def test_a_killed_pass_ends_with_the_bytes_of_an_undisturbed_one(session, tmp_path, monkeypatch, saves):
    names = ("net", "more")
    nets = Nets(net=network(), more=network("instance", seed=2))
    whole = moments.obtain(recipe(names), Real(), nets, session)
    other = Session(type(session.store)(tmp_path / "other"), session.state, session.device, checkpoint_seconds=0.0)
    done = 0

    def count(original):
        def counted(*args, **options):
            nonlocal done
            done += 1
            if done == saves:
                raise Killed
            return original(*args, **options)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr(type(session.store), "save", count(type(session.store).save))
        patched.setattr(Progress, "save", count(Progress.save))
        with pytest.raises(Killed):
            moments.obtain(recipe(names), Real(), nets, other)
    assert len(list(other.store.root.rglob("*@1-*"))) < 2
    resumed = moments.obtain(recipe(names), Real(), nets, other)
    for unit in whole._units.values():
        assert (
            other.store.path(resumed._units[unit.name[:-2], 1]).read_bytes() == session.store.path(unit).read_bytes()
        )
    left = {path.name.partition("-")[0] for path in other.store.root.rglob("*.safetensors")}
    assert left == {"net@1", "more@1"}  # parts are gone once every observer's file is there


def test_a_pass_that_another_run_overtakes_ends_with_its_files(session, monkeypatch):
    nets, add_up = Nets(net=network()), moments.add_up
    overtaken = False

    def slow(*args):
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            moments.obtain(recipe(), Real(), nets, session)  # another run is through and has removed shift and parts
        return add_up(*args)

    monkeypatch.setattr(moments, "add_up", slow)
    found = moments.obtain(recipe(), Real(), nets, session)
    assert len(list(session.store.root.rglob("*.safetensors"))) == 1
    assert session.store.has(found._units["net", 1])


def test_a_pass_killed_between_two_observers_files_is_not_repeated(session, monkeypatch):
    names = ("net", "more")
    nets = Nets(net=network(), more=network("instance", seed=2))
    save = type(session.store).save

    def until(self, unit, *args):
        if unit.name.startswith("more@"):
            raise Killed
        save(self, unit, *args)

    with monkeypatch.context() as patched:
        patched.setattr(type(session.store), "save", until)
        with pytest.raises(Killed):
            moments.obtain(recipe(names), Real(), nets, session)
    real = Real()
    real.batches = None  # not read again
    moments.obtain(recipe(names), real, nets, session)


def test_the_crop_of_a_real_image_follows_the_recipe(session):
    real = Real()
    moments.obtain(recipe(augment="rrc", crop_area=[0.5, 1.0], flip=False), real, Nets(net=network()), session)
    assert real.views == ("rrc", 0, 4, (0.5, 1.0), False)
    moments.obtain(recipe(), real, Nets(net=network()), session)
    assert real.views is None


def test_class_rows_are_read_alone(session):
    """A block reads the rows of its classes, not the whole file: ImageNet's is gigabytes."""
    real, net = Real(), network()
    found = moments.obtain(recipe(), real, Nets(net=net), session)
    read = []

    class Spy:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def get_tensor(self, name):
            read.append(name)
            return self.handle.get_tensor(name)

    opened = session.store.open(found._units["net", 1])
    with opened as handle:
        found._session = SimpleNamespace(store=SimpleNamespace(open=lambda unit: _Given(Spy(handle))), device="cpu")
        found.targets("net", 1, torch.tensor([0, 2, 0]))
    assert read and not {"mean", "within", "between"} & set(read)


class _Given:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        pass


def test_the_block_statistics_of_all_real_images_are_the_exact_targets(session):
    """What synthesis measures and what it is matched to agree: all images of two classes match themselves."""
    real, net = Real(), network()
    found = moments.obtain(recipe(target="exact", bn_target="pass"), real, Nets(net=net), session)
    rows = (real.labels == 0).nonzero().flatten()
    targets = found.targets("net", 1, torch.tensor([len(rows), 0, 0]))
    taps = Taps(net, patch=4)
    taps.shift = targets.global_mean
    with torch.no_grad(), taps:
        net(real.pixels[rows] / 255)
    mean, var = matching.group(*taps.collect(), taps.shift, torch.full((1, len(rows)), 1 / len(rows)))
    close(mean[0], targets.class_mean[0].double()), close(var[0], targets.class_var[0].double())
