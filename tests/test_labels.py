"""Soft labels: what the numbers are, that replay gives them again, that work is resumed and shared."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers_labels import Observers, noise, recipe

from edc_hub import labels, views, work
from edc_hub.errors import InputError
from edc_hub.recipe import Recipe
from edc_hub.work import Store


IMAGES = noise(10, 16)


def made(session, relabel: dict, images=IMAGES, observers=None, **sections) -> labels.Labels:
    given = recipe(relabel={"epochs": 3, "batch": 4, **relabel}, **sections)
    return labels.obtain(given, images, observers or Observers(5), session, "toy")


def logits(networks, x: torch.Tensor) -> torch.Tensor:
    return sum(net(x).double() for net in networks) / len(networks)


def content(found: labels.Labels) -> dict[str, bytes]:
    return {unit.name: found.store.path(unit).read_bytes() for unit in found.units}


def test_labels_are_the_mean_of_raw_logits_of_the_replayed_views(session):
    observers = Observers(5)
    found = made(session, {"rand_augment": 2, "shuffle": 2}, observers=observers)
    for epoch in range(3):
        table, soft = found.epoch(epoch)
        assert soft.dtype == torch.float16 and soft.shape == (10, 5)
        want = logits(observers.networks.values(), views.apply(IMAGES, table, 16))
        torch.testing.assert_close(soft.double(), want, atol=1e-6, rtol=2**-10)
        assert want.abs().max() > 1  # raw, not a probability


@pytest.mark.parametrize("factor", [3e5, math.nan])
def test_logits_that_float16_cannot_hold_are_refused(session, factor):
    observers = Observers(5)
    with torch.no_grad():
        list(observers.networks["b"].parameters())[-1].add_(factor)
    with pytest.raises(InputError, match="relabel.observers: their mean logits are no numbers or pass 65504"):
        made(session, {}, observers=observers)


def test_views_that_an_observer_cannot_take_are_refused_before_any_work():
    nets = [{"name": "a", "arch": "vgg11_bn"}, {"name": "b", "arch": "resnet18"}]
    given = {"source": {"size": 32}, "observers": {"networks": nets}}
    line = "vgg11_bn: cannot take 16x16 images .*; give a an input_size, or write another relabel.view_size"
    with pytest.raises(InputError, match=line):
        labels.check(Recipe(**given, relabel={"view_size": 16}), 5)
    with pytest.raises(InputError, match=line):
        labels.check(Recipe(**given), 5, 16)
    labels.check(Recipe(**given, relabel={"view_size": 16, "observers": ["b"]}), 5)
    labels.check(Recipe(**given), 5)


def test_replayed_pixels_give_the_stored_labels_to_the_bit_in_the_same_batches(session):
    observers = Observers(5)
    table, soft = made(session, {}, observers=observers).epoch(1)
    for rows in torch.arange(10).split(4):
        x = views.apply(IMAGES, views.take(table, rows), 16)
        again = (observers.networks["a"](x) + observers.networks["b"](x)) / 2
        assert torch.equal(again.half(), soft[rows])


def test_every_label_epoch_views_every_image_once_and_anew(session):
    found = made(session, {})
    epochs = [found.epoch(number)[0] for number in range(3)]
    for number, table in enumerate(epochs):
        assert table["image_id"].sort().values.tolist() == list(range(10))
        assert (table["epoch"] == number).all()
        assert list(table) == views.columns(table)
    assert not torch.equal(epochs[0]["image_id"], epochs[1]["image_id"])
    assert not torch.equal(epochs[0]["crop"], epochs[1]["crop"])


def test_the_mean_label_is_that_of_the_image_itself(session):
    observers = Observers(5)
    want = logits(observers.networks.values(), IMAGES.float() / 255)
    torch.testing.assert_close(
        made(session, {"rand_augment": 2}, observers=observers).mean.double(), want, atol=1e-6, rtol=2**-10
    )


def test_only_the_chosen_observers_label(session):
    observers = Observers(5)
    found = made(session, {"observers": ["b"]}, observers=observers)
    table, soft = found.epoch(0)
    want = observers.networks["b"](views.apply(IMAGES, table, 16)).double()
    torch.testing.assert_close(soft.double(), want, atol=1e-6, rtol=2**-10)
    assert observers.loaded == ["b"]  # once, not once an epoch


def test_views_have_the_size_asked_for(session):
    sizes = []
    observers = Observers(5)
    observers.networks["a"].register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape[1:])))
    made(session, {"view_size": 12}, observers=observers)
    assert set(sizes) == {(3, 12, 12)}


def batch_reference(net, x: torch.Tensor) -> torch.Tensor:
    """The network in float64 with BatchNorm by batch statistics, written out."""
    h = x.double()
    for layer in net:
        if isinstance(layer, torch.nn.BatchNorm2d):
            mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
            h = (h - mean) / (var + layer.eps).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        elif not isinstance(layer, torch.nn.Dropout):
            h = layer.double()(h)
            layer.float()
    return h


def test_batch_mode_normalises_by_the_batch_and_leaves_the_observers_as_they_were(session):
    observers = Observers(5)
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in observers.networks.items()}
    batches = []
    observers.networks["a"].register_forward_pre_hook(lambda _, x: batches.append(x[0].clone()))
    found = made(session, {"observer_mode": "batch", "epochs": 1, "observers": ["a"]}, observers=observers)
    for name, net in observers.networks.items():
        assert not any(module.training for module in net.modules())
        assert all(torch.equal(before[name][key], value) for key, value in net.state_dict().items())
    assert [len(x) for x in batches] == [4] * 6  # 10 images in batches of 4, for the images and one epoch
    hooked = list(batches)
    mean, soft = hooked[:3], hooked[3:]
    net = observers.networks["a"]
    for got, given in ((found.mean[shown(mean)], mean), (found.epoch(0)[1], soft)):
        want = torch.cat([batch_reference(net, x) for x in given])[:10]
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=2**-10)


def shown(batches) -> list[int]:
    """Which image each of the first ten whole views is of."""
    views = torch.cat(batches)[: len(IMAGES)]
    return [int((IMAGES / 255 - x).abs().flatten(1).amax(1).argmin()) for x in views]


def test_batches_whose_statistics_count_are_drawn_and_not_of_one_class_after_another(session):
    batches = []
    observers = Observers(5)
    observers.networks["a"].register_forward_pre_hook(lambda _, x: batches.append(x[0].clone()))
    kept = {"epochs": 1, "batch": 5, "observers": ["a"]}
    made(session, {**kept, "observer_mode": "batch"}, observers=observers)
    order = shown(batches[:2])
    assert sorted(order) == list(range(10)) and all(min(part) < 5 <= max(part) for part in (order[:5], order[5:]))
    batches.clear()
    made(session, kept, observers=observers)  # each image by itself, whatever the batch
    assert shown(batches[:2]) == list(range(10))


def test_batch_mode_fills_the_last_batch_with_the_first_images_again(session):
    batches = []
    observers = Observers(5)
    observers.networks["a"].register_forward_pre_hook(lambda _, x: batches.append(x[0].clone()))
    made(session, {"observer_mode": "batch", "epochs": 1, "observers": ["a"]}, observers=observers)
    whole = torch.cat(batches[:3])
    assert torch.equal(whole[10:], whole[:2])
    big = made(session, {"observer_mode": "batch", "epochs": 1, "batch": 25})
    table, soft = big.epoch(0)  # a batch larger than the set
    assert soft.shape == (10, 5) and table["image_id"].sort().values.tolist() == list(range(10))


def test_running_mode_labels_do_not_depend_on_other_images_of_the_batch(session):
    alone = made(session, {"mix": "none", "batch": 1}).mean
    torch.testing.assert_close(alone, made(session, {"mix": "none", "batch": 7}).mean, atol=2e-3, rtol=2e-3)


class Stopped(Exception):
    pass


def test_a_stopped_relabelling_goes_on_to_the_bytes_of_an_undisturbed_one(session, tmp_path):
    whole = content(made(session, {"epochs": 4}))
    session.store = Store(tmp_path / "again")
    observers, calls = Observers(5), []

    def stop(_, x):
        calls.append(len(x[0]))
        if len(calls) == 8:
            raise Stopped

    handle = observers.networks["b"].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        made(session, {"epochs": 4}, observers=observers)
    handle.remove()
    kept = len(list((tmp_path / "again").rglob("*.safetensors")))
    assert 0 < kept < 5
    assert content(made(session, {"epochs": 4}, observers=observers)) == whole


def test_two_processes_make_the_bytes_of_one(session, tmp_path, monkeypatch):
    whole = content(made(session, {"epochs": 4}))
    session.store = Store(tmp_path / "shared")
    together = threading.Barrier(2, timeout=60)

    def meet(told: list) -> list:
        together.wait()
        return told

    monkeypatch.setattr(work, "gather_object", meet)

    def process(rank: int) -> tuple[dict[str, bytes], int]:
        state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        observers = Observers(5)
        calls = []
        observers.networks["a"].register_forward_pre_hook(lambda *_: calls.append(1))
        return content(made(replace(session, state=state), {"epochs": 4}, observers=observers)), len(calls)

    with ThreadPoolExecutor(2) as pool:
        (first, share), (second, rest) = pool.map(process, (0, 1))
    assert first == second == whole
    assert share == 9 and rest == 6  # three of five units of three batches, and two


def test_finished_labels_are_found_again_without_loading_an_observer(session):
    made(session, {})
    observers = Observers(5)
    made(session, {}, observers=observers)
    assert observers.loaded == []


def test_more_label_epochs_keep_the_first_ones(session):
    few = made(session, {"epochs": 2})
    many = made(session, {"epochs": 4})
    assert many.units[:3] == few.units and many.epochs == 4


@pytest.mark.parametrize(
    "change", [{"crop_area": [0.3, 1.0]}, {"batch": 5}, {"observers": ["a"]}, {"mix": "mixup"}, {"magnitude": 3}]
)
def test_other_settings_are_other_labels(session, change):
    assert made(session, change).fingerprint != made(session, {}).fingerprint


def test_other_images_or_another_seed_are_other_labels_and_controls_see_the_same_views(session):
    first, other = made(session, {}), made(session, {}, images=noise(10, 16, seed=9))
    assert first.fingerprint != other.fingerprint
    (ours, soft), (theirs, soft_there) = first.epoch(0), other.epoch(0)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and not torch.equal(soft, soft_there)
    reseeded = made(session, {}, seed=1)
    assert not torch.equal(reseeded.epoch(0)[0]["crop"], ours["crop"])


def test_labels_do_not_touch_the_global_generator(session):
    observers = Observers(5)
    before = torch.get_rng_state()
    made(session, {"rand_augment": 2, "shuffle": 2, "mix": "mixup"}, observers=observers)
    assert torch.equal(torch.get_rng_state(), before)
