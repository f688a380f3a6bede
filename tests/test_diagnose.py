"""The diagnosis of a finished run: its estimates against slow references, and the command as a user runs it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_evaluation import MACHINE, condensed
from torch import nn

from edc_hub import (
    arguments,
    curvature,
    diagnose,
    diagnosis,
    documents,
    evaluate,
    finished,
    labels,
    methods,
    networks,
    recipes,
    students,
)
from edc_hub.condensed import CondensedSet
from edc_hub.errors import InputError
from edc_hub.feed import Stored
from edc_hub.protocol import Evaluation
from edc_hub.recipe import Recipe, Synthesize
from edc_hub.taps import Taps
from edc_hub.targets import Targets
from edc_hub.trials import Trial


FEW = ["--every", "1", "--samples", "2", "--batches", "2,3,50", "--steps", "2", "--epochs", "1"]


# Curvature


def test_trace_and_norm_are_those_of_the_exact_hessian():
    weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))

    def loss(z):
        return (weights @ z.flatten()).cosh().log().sum() + z.square().prod()

    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) / 2
    exact = torch.autograd.functional.hessian(loss, z).view(12, 12)
    found = curvature.hutchinson(loss, z, 1000, torch.Generator().manual_seed(2))
    for estimate, error, wanted in (
        (found.trace, found.trace_se, exact.trace()),
        (found.frobenius, found.frobenius_se, exact.norm()),
    ):
        assert abs(estimate - wanted.item()) < 4 * error
        assert error < 0.05 * abs(wanted.item())
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf)
    assert found.gradient == pytest.approx(slope.norm().item()) and found.loss == pytest.approx(loss(z).item())


def test_random_signs_are_exact_on_a_diagonal_hessian():
    curve = torch.tensor([3.0, -1.0, 0.5])
    found = curvature.hutchinson(lambda z: (curve * z.square()).sum() / 2, torch.ones(3), 2, torch.Generator())
    assert found.trace == pytest.approx(2.5) and found.frobenius == pytest.approx(curve.norm().item())
    assert found.trace_se == found.frobenius_se == pytest.approx(0, abs=1e-6)


def smooth_network(size):
    """With tanh for ReLU, so that differences of gradients come near the second derivative."""
    network = networks.build("convnet", 3, seed=0, image_size=size, mean=[0.5] * 3, std=[0.3] * 3, args={"depth": 2})
    for name, part in list(network.module.named_modules()):
        if isinstance(part, nn.ReLU):
            network.module.set_submodule(name, nn.Tanh())
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("patch", [4, 5, 16])
def test_the_plain_moments_are_the_taps_with_a_second_derivative(patch):
    network = smooth_network(10)
    taps = Taps(network, patch=patch)
    taps.shift = torch.linspace(-0.5, 0.5, taps.layout.size)
    x = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    shares = torch.rand(2, 4, taps.layout.size, generator=torch.Generator().manual_seed(1))

    def loss(x, measure):
        with measure:
            logits = network(x)
        first, second = measure.collect()
        term = (shares[0] * first + shares[1] * second).square().mean()
        return term + F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))

    def slope(x, measure):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x, measure), x, create_graph=isinstance(measure, curvature.Plain))[0], x

    plain, leaf = slope(x, curvature.Plain(taps))
    torch.testing.assert_close(plain, slope(x, taps)[0], rtol=1e-4, atol=1e-7)
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(2)) * 2.0 - 1
    (product,) = torch.autograd.grad(plain, leaf, signs)
    ahead, behind = (slope(x + step * signs, taps)[0] for step in (2e-3, -2e-3))
    assert (product - (ahead - behind) / 4e-3).norm() < 0.01 * product.norm()


def test_every_look_is_at_as_many_steps_as_there_are_observers():
    def steps(iterations, observers, every):
        return curvature.watched(Synthesize(iterations=iterations), observers, every)

    assert steps(100, 2, 40) == [0, 1, 40, 41, 80, 81, 98, 99]
    assert steps(5, 3, 2) == [0, 1, 2, 3, 4]
    assert steps(2, 4, 25) == [0, 1]


# Gradients


def test_cosines_are_those_of_a_loop_over_single_views(dataset, session):
    made, section = CondensedSet.load(dataset), Evaluation(batch=4)
    network = networks.build("convnet", 5, seed=0, image_size=16, mean=[0.5] * 3, std=[0.5] * 3, args={"depth": 1})
    learner = students.Learner(network, section, session)
    singles = {}
    [whole] = Stored(made, 10, session.device, seed=0).epoch(0, torch.Generator().manual_seed(0))
    for one in range(10):
        network.zero_grad()
        logits = network(whole.x[one : one + 1])
        term = ((logits - whole.soft[one]) ** 2).mean() + section.ce_weight * F.cross_entropy(
            logits, whole.label[one : one + 1]
        )
        term.backward()
        gradient = np.concatenate([p.grad.numpy().ravel().astype(np.float64) for p in network.parameters()])
        singles[whole.x[one].numpy().tobytes()] = gradient
    average = sum(singles.values()) / 10

    batches = list(Stored(made, 4, session.device, seed=0).epoch(0, torch.Generator().manual_seed(1)))
    assert [len(batch.x) for batch in batches] == [4, 4, 2]
    found = diagnosis.cosines(learner, iter(batches), diagnosis.gradient(learner, whole))
    for batch, cosine in zip(batches, found, strict=True):
        mean = sum(singles[view.numpy().tobytes()] for view in batch.x) / len(batch.x)
        wanted = mean @ average / np.linalg.norm(mean) / np.linalg.norm(average)
        assert cosine.item() == pytest.approx(wanted, abs=1e-5) and wanted < 0.999


# Moments


def test_distances_are_those_of_moments_in_numpy(session):
    args = {"depth": 2, "width": 4, "norm": "batch"}
    network = networks.build("convnet", 3, seed=0, image_size=8, mean=[0.5] * 3, std=[0.3] * 3, args=args).eval()
    layout = Taps(network, patch=4).layout
    rng = torch.Generator().manual_seed(0)
    mean, var, shift = (torch.rand(*shape, layout.size, generator=rng) for shape in ((2,), (2,), ()))
    targets = Targets(layout, shift, shift, torch.tensor([0, 2]), mean, var, shift, shift)
    images = torch.randint(256, (7, 3, 8, 8), generator=rng, dtype=torch.uint8)
    classes = torch.tensor([0, 2, 2, 0, 2, 0, 2])
    recipe = Recipe.model_validate({"source": {"size": 8}, "moments": {"batch": 3}})
    found = diagnosis.class_distances(network, targets, images, classes, recipe, session)

    inputs = {}
    names = {part: name for name, part in network.module.named_modules()}

    def keep(part, given):
        inputs[names[part]] = given[0].double().numpy()

    for part in names:
        part.register_forward_pre_hook(keep)
    with torch.no_grad():
        network(images / 255.0)
    wanted = {kind: np.zeros(2) for kind in ("bn", "conv", "patch")}
    counts = dict.fromkeys(wanted, 0)
    for segment in layout.segments:
        counts[segment.kind] += 1
        for place, label in enumerate((0, 2)):
            h = inputs[segment.name][(classes == label).numpy()]
            if segment.kind == "patch":  # 8 and 4 pixels are whole tiles of 4
                tiles = [
                    h[:, :, i : i + 4, j : j + 4] for i in range(0, h.shape[2], 4) for j in range(0, h.shape[3], 4)
                ]
            else:
                tiles = [h[:, channel] for channel in range(h.shape[1])]
            columns = slice(segment.start, segment.start + segment.length)
            means, variances = (np.array([getattr(tile, name)() for tile in tiles]) for name in ("mean", "var"))
            for ours, theirs in ((means, mean), (variances, var)):
                wanted[segment.kind][place] += np.linalg.norm(ours - theirs[place, columns].numpy())
    assert set(found) == set(wanted)
    for kind, distances in found.items():
        np.testing.assert_allclose(distances.numpy(), wanted[kind] / counts[kind], rtol=1e-4)


# The command


@pytest.fixture(scope="module")
def diagnosed(toy_run, tmp_path_factory):
    """Where all measures of the toy went."""
    folder = tmp_path_factory.mktemp("diagnosis")
    made = {path: path.stat().st_mtime_ns for path in (toy_run.parent / "artifacts/observers").iterdir()}
    assert diagnose.main([str(toy_run), "--output_dir", str(folder), *FEW, *MACHINE]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (toy_run.parent / "artifacts/observers").iterdir()}
    return folder


def read(folder):
    return json.loads((folder / "diagnosis.json").read_text())


def of(run, session):
    """The run read back, with the artefacts beside it."""
    session.store.root = run.parent / "artifacts"
    return finished.Finished(run, recipes.of_run(run), session)


def test_all_measures_of_a_run_are_written_and_drawn(diagnosed, toy_run):
    found = read(diagnosed)
    assert found["unavailable"] == {} and set(found["seconds"]) == set(diagnose.MEASURES) < set(found)
    assert found["about"]["set"]["fingerprint"] == CondensedSet.load(toy_run / "dataset").manifest["fingerprint"]
    assert (diagnosed / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_the_block_that_is_watched_is_the_one_of_the_set(diagnosed):
    hessian = read(diagnosed)["hessian"]
    assert hessian["difference"] == 0 and hessian["block"]["images"] == 6
    assert [(step["step"], step["observers"]) for step in hessian["steps"]] == [(0, ["plain@3"]), (1, ["other@3"])]
    assert all(step["frobenius"] > 0 for step in hessian["steps"])


def test_a_block_of_canvases_with_all_observers_together_is_watched_too(toy_run, tmp_path):
    keys = {"images.grid": 2, "synthesize.class_scope": "local", "synthesize.together": 2, "relabel.controls": "false"}
    keys["relabel.epochs"] = 4
    run = condensed(toy_run.parent.parent, "canvases", *(f"--{key}={value}" for key, value in keys.items()))
    argv = ["--measures", "hessian,gradients,moments,views", "--output_dir", str(tmp_path), *FEW, *MACHINE]
    assert diagnose.main([str(run), *argv]) == 0
    found = read(tmp_path)
    assert found["hessian"]["difference"] == 0 and found["gradients"]["views"] == 6
    assert [step["observers"] for step in found["hessian"]["steps"]] == [["plain@3", "other@3"]] * 2
    assert found["views"]["views"] == 6 * 4 and found["moments"]["draws"] == {"set": 1}


def test_gradients_have_every_size_below_the_set_and_the_set(diagnosed):
    points = read(diagnosed)["gradients"]["points"]
    assert [point["steps"] for point in points] == [0, 2]
    for point in points:
        assert [size["batch"] for size in point["sizes"]] == [2, 3, 6]
        assert point["sizes"][0]["mean"] < point["sizes"][1]["mean"] < 1


def test_distances_are_of_each_observer_kind_and_set(diagnosed):
    found = read(diagnosed)["moments"]
    assert found["draws"] == {"set": 1, "initial": 1, "random": 2}
    assert set(found["observers"]["plain@3"]) == {"bn", "conv", "patch"}
    assert set(found["observers"]["other@3"]) == {"conv", "patch"}
    row = found["observers"]["plain@3"]["bn"]["set"]
    assert len(row["classes"]) == 3 and row["mean"] == pytest.approx(np.mean(row["classes"]), rel=1e-3)


def test_views_are_counted_as_replayed(diagnosed, toy_run, session):
    found, made = read(diagnosed)["views"], CondensedSet.load(toy_run / "dataset")
    run = of(toy_run, session)
    assert found["views"] == 18 and found["label_epochs"] == 3
    right = {"plain@3": [], "other@3": [], "mean": []}
    for epoch in range(3):
        (table, soft), x = made.views(epoch), made.replay(epoch)
        for name in right:
            logits = soft if name == "mean" else run.observers.load(name[:5], 3)(x)
            for view, largest in enumerate(logits.argmax(1)):
                right[name].append((largest == made.labels[table["image_id"][view].long()]).item())
    assert found["mean_label"]["first"] == pytest.approx(np.mean(right.pop("mean")))
    for name, own in right.items():
        assert found["observers"][name]["first"] == pytest.approx(np.mean(own))
        assert found["observers"][name]["either"] >= found["observers"][name]["first"]
        assert found["observers"][name]["roles"] == ["relabel", "synthesize"]


@pytest.mark.parametrize("batch, sizes", [(4, [4, 4, 4]), (8, [8, 8]), (50, [18])])
def test_views_that_were_labelled_by_the_statistics_of_a_batch_are_seen_in_whole_ones(
    toy_run, session, monkeypatch, batch, sizes
):
    run, seen = of(toy_run, session), []
    relabel = run.recipe.relabel.model_copy(update={"observer_mode": "batch", "batch": batch})
    logits = labels.mean_logits
    monkeypatch.setattr(labels, "mean_logits", lambda nets, x, *rest: seen.append(len(x)) or logits(nets, x, *rest))
    found = diagnosis.views_seen(
        run.recipe.model_copy(update={"relabel": relabel}), run.condensed, run.observers, session
    )
    assert seen[::2] == seen[1::2] == sizes and found["views"] == sum(sizes)  # by two observers


def test_agreement_is_on_the_holdout_with_the_student_that_evaluate_trains(diagnosed, toy_run, tmp_path, session):
    found = read(diagnosed)["agreement"]
    assert found["split"] == "holdout" and found["images"] == 9 and found["epochs"] == 1
    argv = ["--dataset", str(toy_run), "--split", "holdout", "--seeds", "0", "--controls", "[]", *MACHINE]
    assert evaluate.main([*argv, "--evaluation.epochs", "1", "--output_dir", str(tmp_path)]) == 0
    [each] = json.loads((tmp_path / "results.json").read_text())["students"]["narrow"]["rows"]["set"]["each"]
    assert found["accuracy"] == {weights: pytest.approx(each[weights], abs=1e-4) for weights in ("live", "ema")}
    run = of(toy_run, session)
    bench, name = run.bench(None, 1)
    [done] = bench.run([Trial("set", name, 0, 0, 0, run.condensed)])
    images, classes = bench.test
    for name in ("plain", "other"):
        seen, own = run.observers.load(name, 3)(images / 255).argmax(1), found["observers"][f"{name}@3"]
        assert own["accuracy"] == pytest.approx(np.mean((seen == classes).numpy()))
        for weights, share in own["agreement"].items():
            assert share == pytest.approx(np.mean((seen == done.tensors[weights]).numpy()))


def test_a_student_that_evaluate_has_trained_is_found_again(toy_run, tmp_path):
    argv = ["--dataset", str(toy_run), "--split", "holdout", "--seeds", "0", "--controls", "[]", *MACHINE]
    assert evaluate.main([*argv, "--output_dir", str(tmp_path)]) == 0
    there = set((toy_run.parent / "artifacts/students").iterdir())
    argv = ["--measures", "agreement", "--output_dir", str(tmp_path), *MACHINE]
    assert diagnose.main([str(toy_run), *argv]) == 0
    assert read(tmp_path)["agreement"]["epochs"] == 2  # of the protocol
    assert set((toy_run.parent / "artifacts/students").iterdir()) == there


def test_measures_of_an_earlier_call_stay(diagnosed, toy_run, tmp_path, capsys):
    shutil.copyfile(diagnosed / "diagnosis.json", tmp_path / "diagnosis.json")
    assert diagnose.main([str(toy_run), "--measures", "views", "--output_dir", str(tmp_path), *MACHINE]) == 0
    out = capsys.readouterr().out
    assert "mean label" in out and "cosine" not in out
    before, after = read(diagnosed), read(tmp_path)
    assert {name: after[name] for name in diagnose.MEASURES} == {name: before[name] for name in diagnose.MEASURES}


@pytest.mark.parametrize("damaged", ['{"about": ', "[]"])
def test_a_damaged_diagnosis_does_not_lose_what_was_measured(tmp_path, damaged):
    (tmp_path / "diagnosis.json").write_text(damaged)
    found = diagnose._merged(tmp_path / "diagnosis.json", {"set": 1}, {"views": {"n": 2}}, {"views": 3.0}, {})
    assert found["views"] == {"n": 2} and found["seconds"] == {"views": 3.0}


# What is refused


def refused(capsys, *argv):
    capsys.readouterr()
    assert diagnose.main([*map(str, argv), *MACHINE]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0].removeprefix("edc-hub: error: ")


def test_wrong_input_is_one_line(toy_run, tmp_path, capsys):
    out = ["--output_dir", tmp_path / "out"]
    assert "no finished set" in refused(capsys, tmp_path)
    assert "expected RUN" in refused(capsys)
    assert "measures[0]: expected one of 'hessian'" in refused(capsys, toy_run, "--measures", "hesian")
    assert "nothing to measure; name one" in refused(capsys, toy_run, "--measures", "[]", *out)
    with pytest.raises(InputError, match="threads: expected at most 1024"):
        arguments.of_run([str(toy_run), "--threads", "100000"], "diagnose", diagnose.Options)
    assert "samples: expected at least 2" in refused(capsys, toy_run, "--samples", "1")
    wrong = refused(capsys, toy_run, "--measures", "gradients", "--batches", "6,50", *out)
    assert wrong == "gradients: batches: [6, 50], and the set has 6 images; write sizes from 2 to 5"
    assert "no network 'nobody'" in refused(capsys, toy_run, "--measures", "agreement", "--student", "nobody", *out)


def test_artefacts_that_are_not_there_are_not_made_again(toy_run, tmp_path, capsys):
    shutil.copytree(toy_run, tmp_path / "runs/moved")
    wrong = refused(capsys, tmp_path / "runs/moved", "--measures", "views")
    assert wrong.startswith("views: run: observers/plain is not in ")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_images_that_a_function_made_have_no_hessian(monkeypatch):
    monkeypatch.setitem(methods.FUNCTIONS, "blend", "nobodys.module:blend")
    for method in ("blend", "package.module:function"):
        made = SimpleNamespace(recipe=Recipe(method=method), condensed=SimpleNamespace(manifest={"method": method}))
        with pytest.raises(InputError, match=f"the images were made by {method}, not by synthesize"):
            diagnose._hessian(made, diagnose.Options())


def test_a_run_that_synthesised_nothing_has_no_hessian_and_says_so(toy_run, tmp_path, capsys):
    run = condensed(toy_run.parent.parent, "nothing", "--synthesize.iterations", "0", "--relabel.random_draws", "1")
    assert documents.load(run / "recipe.yaml")["synthesize"]["iterations"] == 0
    assert "hessian: the run synthesised nothing" in refused(capsys, run, "--measures", "hessian,views")
    assert diagnose.main([str(run), *FEW, "--output_dir", str(tmp_path), *MACHINE]) == 0
    found = read(tmp_path)
    assert "the run synthesised nothing" in found["unavailable"]["hessian"] and "hessian" not in found
    assert "hessian: not available" in capsys.readouterr().out
    assert found["moments"]["draws"]["set"] == 1  # of the same observers, made by the first run
