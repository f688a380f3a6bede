import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import ResNetConfig, ResNetForImageClassification

from edc_hub import networks, observers, source, weights
from edc_hub.errors import InputError
from edc_hub.recipe import Recipe
from edc_hub.work import Session, Store, generator


TINY = {"name": "tiny", "arch": "convnet", "args": {"width": 8, "depth": 2}}
# dropout and BatchNorm: what is easily forgotten when a training is taken up again
DROPOUT = {"name": "drop", "arch": "mobilenet_v2", "args": {"width": 0.1, "expansion": 2, "dropout": 0.5}}
AVERAGED = {**DROPOUT, "name": "averaged", "train": {"ema": 0.6}}
TRAIN = {"epochs": 2, "batch": 64, "lr": 0.02, "augment": "pad_crop", "pad": 1, "flip": False, "schedule": "cosine"}
SOURCE = {"holdout": 0.8, "size": 16}  # of the digits, 287 images


@pytest.fixture(scope="module")
def real():
    return source.load(recipe([TINY]).source)


@pytest.fixture
def calm(session):
    """A session that does not save inside a training."""
    session.checkpoint_seconds = 60.0
    return session


def recipe(nets, train=None, **rest):
    given = {"train": {**TRAIN, **(train or {})}, "networks": nets, "check_images": 100}
    return Recipe.model_validate({"source": SOURCE, "observers": {**given, **rest.pop("observers", {})}, **rest})


def learns(nets=(TINY,), **train):
    """A recipe whose observers get past the least accuracy in no time."""
    train = {"epochs": 4, "batch": 16, "lr": 0.05, "pad": 0, "schedule": "constant", **train}
    return recipe([dict(net) for net in nets], train)


def content(session, stage="observers"):
    return {path.name: path.read_bytes() for path in (session.store.root / stage).iterdir()}


class Watched:
    """A real set that records the training batches it gives and, if asked to, dies at one of them."""

    def __init__(self, real, dies_at=None):
        self.real, self.dies_at, self.seen = real, dies_at, []

    def __getattr__(self, name):
        return getattr(self.real, name)

    def batches(self, rows, batch, *, view=None):
        for item in self.real.batches(rows, batch, view=view):
            if len(self.seen) == self.dies_at:
                raise KeyboardInterrupt
            self.seen.append(item)
            yield item


def test_a_trained_observer_is_accurate_and_says_what_it_is(real, calm):
    found = observers.obtain(learns(snapshots=[1]), real, calm)
    facts = found.facts("tiny", 4)
    assert facts["accuracy"] > 0.6 and facts["epochs"] == 4
    assert facts["arch"] == "convnet" and facts["stem"] == "small" and facts["source"] == "trained here"
    network = found.load("tiny", 4)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert facts["sha256"] == weights.digest(network.module.state_dict())
    rows = real.rows()[torch.randperm(287, generator=generator(0, "observers", "check"))[:100]]
    with torch.no_grad():
        right = network(real.images(rows).float() / 255).argmax(1) == real.labels[rows]
    assert facts["accuracy"] == pytest.approx(right.float().mean().item(), abs=1e-4)
    assert found.facts("tiny", 1)["sha256"] != facts["sha256"]
    assert found.fingerprint("tiny", 1) != found.fingerprint("tiny", 4)


def test_the_same_recipe_finds_its_observers_and_makes_nothing(real, calm):
    observers.obtain(learns(), real, calm)
    before = content(calm)
    observers.obtain(learns(), Watched(real, dies_at=0), calm)
    assert content(calm) == before


@pytest.mark.parametrize("net", [TINY, DROPOUT, AVERAGED], ids=lambda net: net["name"])
def test_a_training_killed_at_any_step_goes_on_to_the_same_bytes(net, real, session, tmp_path, monkeypatch):
    monkeypatch.setattr(observers, "_report", lambda *_: None)
    given = recipe([net], {"epochs": 3, "snapshots": [1, 2]})
    quiet = dataclasses.replace(session, store=Store(tmp_path / "other"), checkpoint_seconds=60.0)
    observers.obtain(given, real, quiet)
    torch.manual_seed(5)  # the global generator plays no part
    for batches in (0, 3, 4):  # 287 images are 5 batches an epoch: dies in epochs 1, 1 and 2
        with pytest.raises(KeyboardInterrupt):
            observers.obtain(given, Watched(real, dies_at=batches), session)
    observers.obtain(given, real, session)
    assert content(session) == content(quiet)


def test_training_is_sgd_with_momentum_and_weight_decay_on_cross_entropy(real, calm, monkeypatch):
    monkeypatch.setattr(observers, "_report", lambda *_: None)
    given = recipe([TINY], {"momentum": 0.8, "weight_decay": 0.01})
    watched = Watched(real)
    network = observers.obtain(given, watched, calm).load("tiny", 2)

    rng = generator(0, "observers", "tiny")
    seed = torch.randint(2**48, (2,), generator=rng).tolist()[0]
    face = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    reference = networks.build("convnet", 10, seed=seed, args=TINY["args"], **face).double()
    slow = {name: [p, torch.zeros_like(p)] for name, p in reference.module.named_parameters()}
    assert len(watched.seen) == 10
    for step, (images, labels, rows) in enumerate(watched.seen):
        assert torch.equal(labels, real.labels[rows])
        loss = -reference(images.double() / 255).log_softmax(1)[range(len(labels)), labels].mean()
        grads = torch.autograd.grad(loss, [p for p, _ in slow.values()])
        rate = 0.02 * (1 + torch.cos(torch.tensor(torch.pi * step / 10, dtype=torch.float64))) / 2
        for (p, buffer), grad in zip(slow.values(), grads, strict=True):
            buffer.mul_(0.8).add_(grad + 0.01 * p.detach())
            p.data.sub_(rate * buffer)
    for name, p in network.module.named_parameters():
        torch.testing.assert_close(p.double(), slow[name][0].detach(), rtol=1e-4, atol=1e-5)
    for epoch in (watched.seen[:5], watched.seen[5:]):  # every image once an epoch, in another order
        assert torch.equal(torch.cat([rows for *_, rows in epoch]).sort().values, real.rows())
    assert not torch.equal(watched.seen[0][2], watched.seen[5][2])


def test_a_snapshot_is_what_a_training_of_that_length_ends_with(real, calm, monkeypatch):
    monkeypatch.setattr(observers, "_report", lambda *_: None)
    long = observers.obtain(recipe([TINY], {"epochs": 2, "snapshots": [1], "schedule": "constant"}), real, calm)
    short = observers.obtain(recipe([TINY], {"epochs": 1, "schedule": "constant"}), real, calm)
    assert long.facts("tiny", 1)["sha256"] == short.facts("tiny", 1)["sha256"]


def test_snapshots_keep_the_average_of_the_weights_with_batch_norms_statistics_of_its_own(real, calm, monkeypatch):
    monkeypatch.setattr(observers, "_report", lambda *_: None)
    kept = {}
    for name, net in {"live": DROPOUT, "averaged": {**DROPOUT, "train": {"ema": 0.6}}}.items():
        given = recipe([net], {"epochs": 3, "batch": 287, "snapshots": [1, 2], "lr": 0.5})  # an epoch is one step
        found = observers.obtain(given, real, calm)
        kept[name] = [found.load("drop", epoch).module.state_dict() for epoch in (1, 2, 3)]
    seed, of_epochs = torch.randint(2**48, (2,), generator=generator(0, "observers", "drop")).tolist()
    face = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    network = networks.build("mobilenet_v2", 10, seed=seed, args=DROPOUT["args"], **face)
    average = {key: value.double() for key, value in network.module.named_parameters()}
    near, far = [], []
    for epoch, (live, found) in enumerate(zip(kept["live"], kept["averaged"], strict=True)):
        for key in average:
            average[key] = 0.6 * average[key] + 0.4 * live[key].double()
            torch.testing.assert_close(found[key].double(), average[key], rtol=1e-5, atol=1e-6, msg=key)
        rng = generator(of_epochs, "observers", f"epoch {epoch}")
        torch.randperm(len(real.rows()), generator=rng)
        view = observers._view(given.observers.networks[0].train, int(torch.randint(2**48, (2,), generator=rng)[0]))
        ((images, *_),) = real.batches(real.rows(), 287, view=view)
        own = {key: found[key].double() for key in average}
        for name, (mean, var) in batch_statistics(network, own, images).items():
            for distances, state in ((near, found), (far, live)):
                distances.append(((state[f"{name}.running_mean"] - mean) / var.sqrt()).abs().max().item())
                distances.append((state[f"{name}.running_var"] / var - 1).abs().max().item())
    assert any((average[key] - kept["live"][2][key]).abs().max() > 1e-3 for key in average)
    assert max(near) < 0.01  # in channels last BatchNorm loses digits
    assert sorted(far)[len(far) // 2] > 0.1  # those of the live weights would not do


def batch_statistics(network, weights, images):
    """Mean and variance of what each BatchNorm layer sees of a batch in training with these weights."""
    module, found = copy.deepcopy(network.module).double().train(), {}
    module.load_state_dict(weights, strict=False)

    def look(layer, inputs, name):
        found[name] = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))

    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(functools.partial(look, name=name))
    with torch.no_grad():
        module((images.double() / 255 - 0.5) / 0.5)
    return found


@pytest.mark.parametrize("batch", [286, 26])
def test_a_last_batch_of_one_image_does_not_stop_batch_norm(batch, real, calm, monkeypatch):
    monkeypatch.setattr(observers, "_report", lambda *_: None)
    watched = Watched(real)
    observers.obtain(recipe([DROPOUT], {"epochs": 1, "batch": batch}), watched, calm)
    assert [len(rows) for *_, rows in watched.seen] == [batch] * (286 // batch)


def test_an_untrained_observer_is_the_same_network_and_writes_nothing(real, calm):
    given = learns()
    network = observers.untrained(given, given.observers.networks[0], 10, calm)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert network.facts == observers.obtain(given, real, calm).load("tiny", 4).facts
    with pytest.raises(InputError, match="observers.networks: bad: "):
        bad = recipe([{**TINY, "name": "bad", "arch": "convnett"}])
        observers.untrained(bad, bad.observers.networks[0], 10, calm)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, real):
    """A store with one good observer, and its state dictionary."""
    store = Store(tmp_path_factory.mktemp("trained"))
    session = Session(store, PartialState(cpu=True), torch.device("cpu"), progress="none")
    found = observers.obtain(learns(), real, session)
    return found.load("tiny", 4).module.state_dict(), found.facts("tiny", 4)


def loaded(path, **more):
    return recipe([{**TINY, "name": "given", "weights": str(path), **more}])


def write_pth(state, path):
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 4, "best": 0.5}
    torch.save(wrapped, path)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder", "relative"])
def test_weights_load_from_a_file_with_their_accuracy_checked(kind, trained, real, calm, tmp_path, monkeypatch):
    state, facts = trained
    path = tmp_path / {"pth": "net.pth", "folder": "model.safetensors"}.get(kind, "net.safetensors")
    (write_pth if kind == "pth" else save_file)(state, path)
    monkeypatch.chdir(tmp_path)
    given = loaded({"folder": tmp_path, "relative": path.name}.get(kind, path))
    found = observers.obtain(given, real, calm)
    assert found.facts("given", 0)["sha256"] == facts["sha256"]
    assert found.facts("given", 0)["accuracy"] == facts["accuracy"]
    assert str(tmp_path) not in json.dumps(found.facts("given", 0))
    network = found.load("given", 0)
    assert all(torch.equal(network.module.state_dict()[key], state[key]) for key in state)


def test_a_moved_weights_file_is_the_same_observer_and_a_changed_one_is_not(trained, real, calm, tmp_path):
    state, _ = trained
    save_file(state, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    save_file({**state, "classifier.bias": state["classifier.bias"] + 0.01}, tmp_path / "c.safetensors")
    a, b, c = (
        observers.obtain(loaded(tmp_path / f"{name}.safetensors"), real, calm).fingerprint("given", 0)
        for name in "abc"
    )
    assert a == b != c


def test_fine_tuning_starts_from_the_weights_and_gives_other_classes_a_new_head(trained, real, calm, tmp_path):
    state, _ = trained
    other = {**state, "classifier.weight": torch.rand(1000, 128), "classifier.bias": torch.rand(1000)}
    save_file(other, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="given: weights: .*1000.* train section"):
        observers.obtain(loaded(tmp_path / "net.safetensors"), real, calm)
    train = {"epochs": 1, "lr": 1e-4, "weight_decay": 0.0}
    given = loaded(tmp_path / "net.safetensors", train=train).observers.networks[0]
    network = networks.described(given, 10, seed=3, **recipe([TINY]).source.face)
    head = network.module.classifier.weight.detach().clone()
    weights.load_into(network, weights.find(given.arch, given.weights), new_head=True)
    assert torch.equal(network.module.features[0].weight, state["features.0.weight"])
    assert torch.equal(network.module.classifier.weight, head)
    tuned = loaded(tmp_path / "net.safetensors", train={**train, "epochs": 6, "lr": 0.05, "batch": 16, "pad": 0})
    facts = observers.obtain(tuned, real, calm).facts("given", 6)
    assert facts["source"] == "net.safetensors" and facts["accuracy"] > 0.5


def put_in_cache(repo, files):
    """Files as the Hub's client keeps them, for a repository that was downloaded before going offline."""
    commit = hashlib.sha1(repo.encode()).hexdigest()
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, write in files.items():
        write(snapshot / name)
    return commit


def test_weights_from_the_hub_work_offline_and_name_their_commit(trained, real, calm):
    state, facts = trained
    commit = put_in_cache("someone/tiny", {"model.safetensors": lambda path: save_file(state, path)})
    found = observers.obtain(loaded("someone/tiny"), real, calm)
    assert found.facts("given", 0)["sha256"] == facts["sha256"]
    assert found.facts("given", 0)["source"] == f"someone/tiny@{commit}"


def test_transformers_and_timm_repositories_load_through_their_libraries():
    face = {"seed": 4, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "stem": "standard"}
    config = ResNetConfig(layer_type="basic", depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, num_labels=10)
    model = ResNetForImageClassification(config)
    put_in_cache("someone/resnet", {"config.json": lambda path: model.save_pretrained(path.parent)})
    network = networks.build("transformers/someone/resnet", 10, **face)
    weights.load_into(network, weights.find("transformers/someone/resnet", "someone/resnet"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in network.module.state_dict().items())

    made = networks.build("timm/test_resnet", 10, **face)
    timm_config = {"architecture": "test_resnet", "num_classes": 10}

    def save(path):
        made.module.pretrained_cfg = {"architecture": "test_resnet", "num_classes": 10, "input_size": [3, 32, 32]}
        save_for_hf(made.module, path.parent, model_config=timm_config, safe_serialization=True)

    put_in_cache("someone/timm", {"config.json": save})
    network = networks.build("timm/test_resnet", 10, **{**face, "seed": 5})
    weights.load_into(network, weights.find("timm/test_resnet", "someone/timm"))
    assert all(torch.equal(made.module.state_dict()[k], v) for k, v in network.module.state_dict().items())


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("gone.safetensors", None, "no file"),
        ("someone/unknown", None, "from the Hub"),
        ("not an id", None, "give a Hub id"),
        ("torchvision/IMAGENET1K_V9", None, "torchvision has no weights for convnet"),
        (
            "other.safetensors",
            lambda s, p: save_file({"fc.weight": torch.rand(2)}, p),
            'Missing key(s) in state_dict: "features.0.',
        ),
        (
            "more.safetensors",
            lambda s, p: save_file({**s, "fc.weight": torch.rand(2)}, p),
            'Unexpected key(s) in state_dict: "fc.',
        ),
        (
            "wide.safetensors",
            lambda s, p: save_file({**s, "features.0.bias": torch.rand(9)}, p),
            "size mismatch for features.0.bias: copying a param with shape torch.Size([9])",
        ),
        (
            "head.safetensors",
            lambda s, p: save_file({**s, "classifier.weight": torch.rand(10, 9)}, p),
            "size mismatch for classifier.weight",
        ),
        ("cut.safetensors", lambda s, p: p.write_bytes(b"\x08\x00\x00\x00"), "no whole safetensors file"),
        ("cut.pth", lambda s, p: p.write_bytes(b"PK\x03\x04 no zip"), "damaged"),
        (
            "object.pth",
            lambda s, p: torch.save({"state_dict": s, "args": argparse.Namespace()}, p),
            "more than tensors",
        ),
        ("empty.pth", lambda s, p: torch.save({"epoch": 3}, p), "no state dictionary"),
        ("numbers.pth", lambda s, p: torch.save({0: torch.rand(2)}, p), "no state dictionary"),
        ("", lambda s, p: (p / "notes.txt").write_text(""), "neither model.safetensors"),
        ("", lambda s, p: (p / weights.OURS).write_text("{}"), "neither model.safetensors"),
    ],
)
def test_wrong_weights_are_refused_in_one_line_before_any_training(name, write, words, trained, real, calm, tmp_path):
    path = tmp_path / name if write else name
    if write:
        write(dict(trained[0]), path)
    nets = [TINY, {**TINY, "name": "given", "weights": str(path)}]
    with pytest.raises(InputError) as error:
        observers.obtain(recipe(nets), Watched(real, dies_at=0), calm)
    message = str(error.value)
    assert words in message and "\n" not in message
    assert message.startswith("observers.networks: given: ")


def test_torchvisions_weights_are_found_for_its_networks_alone():
    assert weights.find("shufflenet_v2", "torchvision/IMAGENET1K_V1").identity.startswith("shufflenetv2_x0.5-")
    with pytest.raises(InputError, match="convnext_tiny, which is timm's; write arch: torchvision/convnext_tiny"):
        weights.find("convnext_tiny", "torchvision/IMAGENET1K_V1")


def test_an_observer_with_nothing_to_match_is_refused_before_another_is_trained(real, calm):
    plain = {**TINY, "name": "plain"}  # it has no BatchNorm
    nets = [{**TINY, "args": {**TINY["args"], "norm": "batch"}}, plain]
    with pytest.raises(InputError, match="convnet has no bn input to match; .* name others in synthesize.observers"):
        observers.obtain(recipe(nets, synthesize={"layers": ["bn"]}), Watched(real, dies_at=0), calm)


@pytest.mark.parametrize(("classes", "least"), [(2, 0.75), (3, 2 / 3), (4, 0.5), (1000, 0.002)])
def test_the_least_accuracy_is_twice_chance_and_of_few_classes_half_way(classes, least):
    assert observers.least_accuracy(classes) == pytest.approx(least)


@pytest.fixture
def strange(trained, tmp_path):
    """A file of weights that see something else in these images: the last layer's are turned round."""
    turned = {name: -value if value.ndim == 2 else value for name, value in trained[0].items()}
    save_file(turned, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_weights_that_do_not_fit_the_images_are_an_error_that_names_their_normalisation(strange, real, calm):
    with pytest.raises(InputError, match=r"below 20.0% \(10 classes\); check mean \[0.25.*, std .*stem"):
        observers.obtain(loaded(strange, mean=[0.25] * 3), real, calm)


def test_weights_that_do_not_fit_are_found_before_another_observer_is_trained(strange, real, calm):
    wrong = {**TINY, "name": "given", "weights": str(strange)}
    with pytest.raises(InputError, match="given is right on .* below 20.0%"):
        observers.obtain(recipe([TINY, wrong]), Watched(real, dies_at=0), calm)


@pytest.mark.parametrize("accuracy", [{1: 0.11, 4: 0.9}, {1: 0.11, 4: 0.19}])
def test_only_snapshots_in_use_must_be_above_twice_chance(accuracy, calm):
    class Known:
        def facts(self, name, epoch):
            facts = {"classes": 10, "mean": [0.5] * 3, "std": [0.5] * 3, "stem": "small", "arch": "convnet"}
            return {**facts, "accuracy": accuracy[epoch]}

    unused, used = learns(snapshots=[1]), learns(snapshots=[1]).model_dump()
    if accuracy[4] > 0.2:
        observers._report(unused, Known(), calm, {"tiny"})
    else:
        with pytest.raises(InputError, match="tiny@4 is right on 19.0%.*lr and epochs"):
            observers._report(unused, Known(), calm, {"tiny"})
    used["relabel"]["observers"] = ["tiny@1"]
    with pytest.raises(InputError, match="tiny@"):
        observers._report(Recipe.model_validate(used), Known(), calm, {"tiny"})


def test_the_fingerprint_covers_what_decides_the_weights_and_nothing_else(real, calm):
    def of(real=real, **rest):
        given = recipe([TINY], **rest)
        return observers._fingerprint(given, given.observers.networks[0], real, None, calm)

    first = of()
    same = [
        of(seed=7, ipc=3, moments={"patch": 2}, precision="bfloat16", threads=2),
        of(observers={"networks": [{**TINY, "name": "renamed"}]}),
        of(observers={"networks": [{**TINY, "mean": [0.5] * 3}]}),  # the source's, written out
    ]
    relabelled = Watched(real)
    relabelled.labels = real.labels.roll(1)
    other = [
        of(train={"lr": 0.03}),
        of(observers={"seed": 1}),
        of(observers={"networks": [{**TINY, "args": {"width": 16}}]}),
        of(observers={"networks": [{**TINY, "mean": [0.4] * 3}]}),
        of(real=relabelled),
    ]
    assert set(same) == {first} and first not in other and len(set(other)) == len(other)


def test_loading_a_snapshot_reads_no_other(real, calm, monkeypatch):
    found, read = observers.obtain(learns(snapshots=[1, 2]), real, calm), []
    original = Store.open

    class Recorded:
        def __init__(self, file):
            self.file = file

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    @contextmanager
    def opened(self, unit):
        with original(self, unit) as file:
            yield Recorded(file)

    monkeypatch.setattr(Store, "open", opened)
    network = found.load("tiny", 2)
    assert sorted(read) == sorted(f"2/{key}" for key in network.module.state_dict())


def test_a_loss_on_real_images_falls_with_training(real, calm):
    found = observers.obtain(learns(snapshots=[1]), real, calm)
    x, y = real.images(real.rows()).float() / 255, real.labels[real.rows()]
    with torch.no_grad():
        early, late = (F.cross_entropy(found.load("tiny", epoch)(x), y) for epoch in (1, 4))
    assert late < early
