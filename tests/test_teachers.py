"""Soft labels made while a student trains: whose logits they are, of which weights, and what they cost."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate import PartialState
from helpers_evaluation import RECIPE, write_source
from helpers_evaluation import condensed as make
from hub import Hub, python
from safetensors.torch import save_file

from edc_hub import documents, labels, observers, recipes, source, teachers, views
from edc_hub.condensed import CondensedSet
from edc_hub.errors import InputError
from edc_hub.protocol import Evaluation
from edc_hub.recipe import Source
from edc_hub.section import Network
from edc_hub.work import Session, Store


ARCH = {"arch": "convnet", "args": {"depth": 1, "width": 8, "norm": "batch"}}


@pytest.fixture
def beside(toy_run):
    """A session with the run's own store."""
    return Session(Store(toy_run.parent / "artifacts"), PartialState(cpu=True), torch.device("cpu"))


def recipe(run):
    return recipes.resolve(documents.load(run / "recipe.yaml"))


def of_run(run, session, **section):
    """Teachers of the set of a run, and its observers as the run itself has them."""
    given = recipe(run)
    section = Evaluation.model_validate({"labels": "online", **section})
    made = teachers.Teachers(CondensedSet.load(run / "dataset"), section, given.source, session)
    return made, observers.obtain(given, source.load(given.source), session)


def batch(count=4, seed=3):
    return torch.rand((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def test_without_teachers_the_run_s_own_observers_label_and_nothing_is_trained(toy_run, beside):
    files = sorted((toy_run.parent / "artifacts").rglob("*.safetensors"))
    made, own = of_run(toy_run, beside)
    networks = [own.load(name, 3) for name in ("plain", "other")]
    x = batch()
    assert torch.equal(made.teach(x, {}), (networks[0](x) + networks[1](x)) / 2)
    assert made.fingerprints == [own.fingerprint(name, 3) for name in ("plain", "other")]
    assert sorted((toy_run.parent / "artifacts").rglob("*.safetensors")) == files


def test_a_run_that_was_moved_without_its_observers_trains_none(toy_run, beside, tmp_path):
    shutil.copytree(toy_run, tmp_path / "moved")
    elsewhere = replace(beside, store=Store(tmp_path / "artifacts"))
    condensed, section = CondensedSet.load(tmp_path / "moved/dataset"), Evaluation(labels="online")
    made = teachers.Teachers(condensed, section, recipe(toy_run).source, elsewhere)
    with pytest.raises(InputError, match="run: observers/plain is not in .*; give the command where the run was"):
        _ = made.fingerprints


def test_a_run_s_observers_are_found_though_its_real_set_has_new_commits(tmp_path):
    """A real set on the Hub, condensed by the real client, and then changed."""
    files = {str(path.relative_to(tmp_path / "toy")): path for path in write_source(tmp_path / "toy").rglob("*.*")}
    recipe = {**RECIPE, "source": {**RECIPE["source"], "path": "org/toy"}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**recipe, "relabel": {**recipe["relabel"], "controls": False}}))
    code = """
    import sys
    from huggingface_hub import HfApi
    from edc_hub import condense, evaluate
    machine, (recipe, run) = ["--threads", "1", "--device", "cpu"], sys.argv[1:]
    assert condense.main([recipe, "--output_dir", run, *machine]) == 0
    made = open(run + "/dataset/manifest.json").read()
    HfApi().upload_file(path_or_fileobj=b"new", path_in_repo="README.md", repo_id="org/toy", repo_type="dataset")
    assert condense.main([recipe, "--output_dir", run, *machine]) == 0  # finished, and left as it is
    assert open(run + "/dataset/manifest.json").read() == made
    asked = ["--evaluation.labels", "online", "--controls", "[]", "--seeds", "0"]
    sys.exit(evaluate.main(["--dataset", run, *asked, *machine]))
    """
    with Hub() as hub:
        first = hub.commit("org/toy", {path: file.read_bytes() for path, file in files.items()})
        place = [str(tmp_path / "toy.yaml"), str(tmp_path / "runs/toy")]
        done = python(code, hub.url, tmp_path / "home", hub.token, *place)
        assert done.returncode == 0, done.stderr
        assert hub.commits("org/toy")[0].oid != first
    about = json.loads((tmp_path / "runs/toy/dataset/results.json").read_text())["about"]
    assert about["test"]["commit"] == first and about["bytes"]["observers"] > 0


def test_a_set_by_a_relative_path_finds_its_run(toy_run, monkeypatch):
    monkeypatch.chdir(toy_run / "dataset")
    assert CondensedSet.load(".").run == toy_run
    monkeypatch.chdir(toy_run / "controls")
    assert CondensedSet.load("random/0").run == toy_run


def test_online_labels_of_the_stored_views_are_the_stored_labels(toy_run, beside):
    made, _ = of_run(toy_run, beside)
    condensed = CondensedSet.load(toy_run / "dataset")
    table, stored = condensed.views(1)
    for rows in torch.arange(len(stored)).split(3):
        x = views.apply(condensed.images, views.take(table, rows), 8)
        torch.testing.assert_close(made.teach(x, {}), stored[rows], atol=2e-3, rtol=1e-3)  # float16


def test_teachers_cost_the_bytes_of_their_weights(toy_run, beside):
    made, own = of_run(toy_run, beside)
    states = [own.load(name, 3).module.state_dict() for name in ("plain", "other")]
    assert made.bytes == sum(value.numel() * value.element_size() for state in states for value in state.values())


def test_teachers_from_a_safetensors_file_label_with_its_weights(toy_run, beside, tmp_path):
    own = of_run(toy_run, beside)[1].load("plain", 3)
    save_file(own.module.state_dict(), tmp_path / "plain.safetensors")
    network = Network(name="judge", weights=str(tmp_path / "plain.safetensors"), **ARCH)
    session = Session(Store(tmp_path / "artifacts"), PartialState(cpu=True), torch.device("cpu"))
    made, _ = of_run(toy_run, session, teachers=[network.model_dump()])
    x = batch()
    torch.testing.assert_close(made.teach(x, {}), own(x))
    assert len(made.fingerprints) == 1
    assert {path.name.split("-")[0] for path in (tmp_path / "artifacts").rglob("*.safetensors")} >= {"judge"}


def test_other_weights_have_another_fingerprint(toy_run, beside, tmp_path):
    own, found = of_run(toy_run, beside)[1], []
    for scale in (1, 2):
        state = {key: value * scale for key, value in own.load("plain", 3).module.state_dict().items()}
        save_file(state, tmp_path / "plain.safetensors")
        network = Network(name="judge", weights=str(tmp_path / "plain.safetensors"), **ARCH)
        session = Session(Store(tmp_path / "artifacts"), PartialState(cpu=True), torch.device("cpu"))
        section = Evaluation.model_validate({"teachers": [network.model_dump()]})
        given = recipe(toy_run)
        condensed = CondensedSet.load(toy_run / "dataset")
        found.append(teachers.Teachers(condensed, section, given.source, session).fingerprints)
    assert found[0] != found[1]


def test_a_teacher_may_be_trained_here_and_is_found_again(toy_run, beside, tmp_path):
    network = {"name": "fresh", "train": {"epochs": 3, "batch": 8, "augment": "none", "flip": False}, **ARCH}
    session = Session(Store(tmp_path / "artifacts"), PartialState(cpu=True), torch.device("cpu"))
    section = Evaluation.model_validate({"teachers": [network]})
    args = CondensedSet.load(toy_run / "dataset"), section, recipe(toy_run).source, session
    first = teachers.Teachers(*args)
    logits = first.teach(batch(), {})
    (file,) = (tmp_path / "artifacts/observers").glob("fresh-*.safetensors")
    stamp = file.stat().st_mtime_ns
    assert torch.equal(teachers.Teachers(*args).teach(batch(), {}), logits) and file.stat().st_mtime_ns == stamp


def test_a_teacher_that_cannot_be_is_named_as_a_teacher(toy_run, beside):
    made, _ = of_run(toy_run, beside, teachers=[{"name": "t", **ARCH, "weights": "./none.safetensors"}])
    with pytest.raises(InputError, match="^evaluation.teachers: t: weights: no file ./none.safetensors"):
        _ = made.fingerprints


def test_teachers_use_the_batch_s_statistics_where_the_set_s_labels_do(toy_run, beside, tmp_path, monkeypatch):
    made, own = of_run(toy_run, beside)
    given = made._recipe
    other = given.model_copy(update={"relabel": given.relabel.model_copy(update={"observer_mode": "batch"})})
    monkeypatch.setattr(teachers.Teachers, "_recipe", other)
    made, x = of_run(toy_run, beside)[0], batch()
    networks = [own.load(name, 3) for name in ("plain", "other")]
    assert torch.equal(made.teach(x, {}), labels.mean_logits(networks, x, other.relabel, beside))
    assert not torch.allclose(made.teach(x, {}), labels.mean_logits(networks, x, given.relabel, beside))


def test_networks_of_others_label_by_their_own_statistics_where_the_set_s_labels_use_the_batch_s(toy_run, beside):
    condensed, judge = CondensedSet.load(toy_run / "dataset"), {"name": "judge", "train": {"epochs": 1}, **ARCH}
    section = Evaluation.model_validate({"teachers": [judge]})
    condensed.recipe["relabel"]["observer_mode"] = "batch"
    assert not teachers.Teachers(condensed, section, recipe(toy_run).source, beside).of_batches


def test_only_the_observers_that_label_the_set_label_online(toy_run, beside):
    root = toy_run.parent.parent
    run = make(root, "one", "--relabel.observers", "other", "--relabel.controls", "false")
    made, own = of_run(run, beside)
    assert made.fingerprints == [own.fingerprint("other", 3)]


def test_a_set_without_a_run_needs_teachers(toy_run, beside, tmp_path):
    lonely = tmp_path / "copied"
    lonely.symlink_to(toy_run / "dataset")
    made = teachers.Teachers(CondensedSet.load(lonely), Evaluation(), Source(), beside)
    with pytest.raises(InputError, match="evaluation.labels: online, but the set lies beside no run .*teachers"):
        _ = made.fingerprints


def test_the_label_of_a_mixed_view_is_the_mixture_of_its_images_labels(toy_run, beside):
    condensed = CondensedSet.load(toy_run / "dataset")
    soft = condensed.soft_labels
    ids, partners = [0, 5, 3, 1], [2, -1, 3, 4]
    shares = [0.25, 0.5, 0.9, 0.0]  # a share without a partner means nothing
    table = {
        "image_id": torch.tensor(ids, dtype=torch.int32),
        "mix_image_id": torch.tensor(partners, dtype=torch.int32),
        "mix_lam": torch.tensor(shares),
    }
    made = teachers.of_images(condensed, beside)(batch(), table)
    expected = []
    for first, second, share in zip(ids, partners, shares, strict=True):
        expected.append(soft[first] if second < 0 else share * soft[first] + (1 - share) * soft[second])
    torch.testing.assert_close(made, torch.stack(expected))
