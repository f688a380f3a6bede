"""Observers as model repositories: the same weights by timm, by transformers and by our recipes."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from hub import Hub, python
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification

from edc_hub import documents, networks, observer_repo, recipes, weights
from edc_hub.errors import InputError
from edc_hub.recipe import Recipe
from edc_hub.work import Store, Unit


CLASSES = ["ant", "bee", "cow"]
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
NETWORKS = [
    {"name": "own", "arch": "convnet", "args": {"depth": 2, "width": 8}, "train": {"epochs": 3, "snapshots": [1]}},
    {"name": "theirs", "arch": "timm/test_resnet", "stem": "standard", "train": {"epochs": 3}},
    {"name": "small", "arch": "timm/test_resnet", "stem": "small", "train": {"epochs": 3}},
    {"name": "face", "arch": "transformers/resnet", "args": TINY, "stem": "standard", "train": {"epochs": 3}},
]


def build(net, recipe, seed=0):
    options = {"args": net.args, "stem": net.stem, "image_size": recipe.source.size, "input_size": net.input_size}
    options |= {"mean": recipe.source.mean, "std": recipe.source.std}
    return networks.build(net.arch, len(CLASSES), seed=seed, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What observer_repo reads of a finished run, with weights that were never trained."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    (run / "dataset").mkdir(parents=True)
    recipe = Recipe(name="toy", source={"size": 32}, observers={"networks": NETWORKS})
    store, entries = Store(run.parent / "artifacts"), []
    for net in recipe.observers.networks:
        tensors, snapshots = {}, {}
        for epoch in sorted({*(net.train.snapshots or []), net.train.epochs}):
            network = build(net, recipe, seed=epoch)
            state = network.module.state_dict()
            tensors |= {f"{epoch}/{key}": value for key, value in state.items()}
            snapshots[str(epoch)] = {"sha256": weights.digest(state), "accuracy": 0.9}
        facts = {**network.facts, "source": "trained here", "snapshots": snapshots}
        store.save(Unit("observers", net.name, "a" * 16), tensors, facts)
        other = {key: value + 1 for key, value in tensors.items()}
        wrong = {**facts, "snapshots": {key: {**it, "sha256": "0" * 64} for key, it in snapshots.items()}}
        store.save(Unit("observers", net.name, "0" * 16), other, wrong)  # of another run
        used = {**snapshots["3"], "epochs": 3, "roles": ["relabel"], "name": f"{net.name}@3"}
        entries.append(used)
    source = {"id": "org/toys", "name": None, "split": "train", "commit": "c" * 40, "fingerprint": "f" * 16}
    source |= {"license": "mit", "link": "https://huggingface.co/datasets/org/toys"}
    manifest = {"format_version": "1.0", "name": "toy", "control": None, "classes": CLASSES}
    manifest |= {"source": source, "observers": entries, "ipc": 1, "seed": 0}
    manifest |= dict.fromkeys(("method", "fingerprint", "recipe_sha256"), "edc")
    manifest |= dict.fromkeys(("images", "soft_labels", "versions", "configs", "files"), {})
    (run / "dataset/manifest.json").write_text(json.dumps(manifest), "utf-8")
    (run / "recipe.yaml").write_text(recipes.dump(recipe), "utf-8")
    (run / "dataset/recipe.yaml").write_text(recipes.published(recipe), "utf-8")
    return run


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    written = observer_repo.write(run / "dataset", tmp_path_factory.mktemp("repos"), "org/obs", dataset="org/toy")
    assert list(written) == [f"org/obs-{net['name']}" for net in NETWORKS]
    return {name.removeprefix("org/obs-"): folder for name, folder in written.items()}


@pytest.fixture(scope="module")
def expected(run):
    recipe = recipes.resolve(documents.load(run / "recipe.yaml"))
    nets = {net.name: net for net in recipe.observers.networks}
    return lambda name, epoch=3: build(nets[name], recipe, seed=epoch).module.state_dict()


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["own", "theirs", "small", "face"])
def test_the_entry_of_the_card_loads_the_weights_in_our_recipes(run, folders, expected, name):
    text = ModelCard.load(folders[name] / "README.md").text
    content = documents.read(text.split("```yaml\n")[1].split("```")[0], "card")
    content["observers"]["networks"][0]["weights"] = str(folders[name])
    recipe = Recipe(source={"size": 32}, observers=content["observers"])
    net = recipe.observers.networks[0]
    network = build(net, recipe)
    weights.load_into(network, weights.find(net.arch, net.weights))
    assert same(network.module.state_dict(), expected(name))
    first = folders[name] / "snapshots/epoch-1.safetensors"
    assert first.is_file() == (name == "own")
    if first.is_file():
        weights.load_into(network, weights.find(net.arch, str(first)))
        assert same(network.module.state_dict(), expected(name, 1))


def test_timm_and_transformers_load_theirs(folders, expected):
    theirs = timm.create_model(f"local-dir:{folders['theirs']}", pretrained=True)
    assert same(theirs.state_dict(), expected("theirs"))
    assert theirs.pretrained_cfg["label_names"] == CLASSES and theirs.pretrained_cfg["input_size"] == (3, 32, 32)
    face = AutoModelForImageClassification.from_pretrained(folders["face"])
    assert same(face.state_dict(), expected("face")) and face.config.id2label == dict(enumerate(CLASSES))
    for name in ("own", "small"):  # no library would build these
        assert not (folders[name] / "config.json").exists()


def test_the_cards_say_what_they_are(folders):
    for name, folder in folders.items():
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        library = {"theirs": "timm", "face": "transformers"}.get(name, "edc_hub")
        assert (data["license"], data["library_name"], data["datasets"]) == ("mit", library, ["org/toys"])
        assert "90.0 %" in card.text and "org/toy" in card.text and "None" not in card.text
        assert (folder / "recipe.yaml").is_file()
        facts = json.loads((folder / "edc_hub.json").read_text("utf-8"))
        assert facts["classes"] == CLASSES and facts["snapshots"][-1]["file"] == "model.safetensors"


def test_equal_runs_give_equal_files(run, folders, tmp_path):
    again = observer_repo.write(run / "dataset", tmp_path, "org/obs", dataset="org/toy")
    for name, folder in folders.items():
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        assert files == sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*") if p.is_file())
        assert all((folder / file).read_bytes() == (again[f"org/obs-{name}"] / file).read_bytes() for file in files)


def test_what_is_missing_is_named(run, tmp_path):
    with pytest.raises(InputError, match="manifest.json is missing"):
        observer_repo.write(tmp_path, tmp_path / "out", "org/obs")
    alone = tmp_path / "alone" / "toy"
    (alone / "dataset").mkdir(parents=True)
    for file in ("recipe.yaml", "dataset/manifest.json", "dataset/recipe.yaml"):
        (alone / file).write_bytes((run / file).read_bytes())
    with pytest.raises(InputError, match="weights of observer 'own'"):
        observer_repo.write(alone / "dataset", tmp_path / "out", "org/obs")


def test_observers_of_another_run_than_the_set_s_own_are_not_published_as_its_labellers(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    manifest = json.loads((run / "dataset/manifest.json").read_text())
    for entry in manifest["observers"]:
        entry["sha256"] = "0" * 64
    (other / "dataset/manifest.json").write_text(json.dumps(manifest))
    for place in (shutil.copytree(run / "dataset", other / "copy"), shutil.copytree(run / "dataset", tmp_path / "x")):
        with pytest.raises(InputError, match=f"^observers: {place} does not lie in the run whose observers made it"):
            observer_repo.write(Path(place), tmp_path / "out", "org/obs")
    twin = Path(shutil.copytree(run / "dataset", run / "twin"))  # beside the very run
    assert list(observer_repo.write(twin, tmp_path / "out", "org/obs"))[0] == "org/obs-own"
    shutil.rmtree(twin)


def test_the_hub_gives_them_to_all_three(folders, tmp_path):
    code = f"""
    import sys, timm, torch
    from huggingface_hub import HfApi
    from transformers import AutoModelForImageClassification
    from edc_hub import weights

    for name in ("own", "theirs", "face"):
        HfApi().create_repo(f"org/obs-{{name}}")
        HfApi().upload_folder(repo_id=f"org/obs-{{name}}", folder_path=f"{folders["own"].parent}/{{name}}")
        HfApi().create_tag(f"org/obs-{{name}}", tag="v1.0.0")
    one = timm.create_model("hf-hub:org/obs-theirs", pretrained=True).state_dict()
    two = AutoModelForImageClassification.from_pretrained("org/obs-face", revision="v1.0.0").state_dict()
    print(weights.digest(one), weights.digest(two))
    for arch, place in (("timm/test_resnet", "org/obs-theirs@v1.0.0"), ("transformers/resnet", "org/obs-face"),
                        ("convnet", "org/obs-own"), ("convnet", "org/obs-own/snapshots/epoch-1.safetensors@v1.0.0")):
        found = weights.find(arch, place)
        assert "@" in found.source and len(found.source.partition("@")[2]) == 40
        print(weights.digest(found.read()))
    """
    with Hub() as hub:
        done = python(code, hub.url, tmp_path, hub.token)
    assert done.returncode == 0, done.stderr
    facts = {name: json.loads((folder / "edc_hub.json").read_text())["snapshots"] for name, folder in folders.items()}
    theirs, face, own, first = (
        facts[name][index]["sha256"] for name, index in (("theirs", -1), ("face", -1), ("own", -1), ("own", 0))
    )
    assert done.stdout.split() == [theirs, face, theirs, face, own, first]
