"""The card of a condensed set: metadata the Hub accepts, facts of the set alone, and code that runs as it stands."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers_labels import CLASSES, COUNT, IPC, noise, written
from huggingface_hub import DatasetCard
from PIL import Image
from test_results import about, trained

from edc_hub import CondensedSet, card, documents, recipes, results, snippets, students
from edc_hub.feed import Batch
from edc_hub.protocol import Evaluation


def test_the_card_has_valid_metadata_and_only_facts_of_the_set(dataset):
    shown = DatasetCard.load(dataset / "README.md")
    data = shown.data.to_dict()
    assert data["license"] == "unknown" and data["task_categories"] == ["image-classification"]
    assert data["size_categories"] == ["n<1K"] and data["source_datasets"] == ["extended|toys/blocks"]
    assert "ipc-2" in data["tags"] and "dataset-distillation" in data["tags"]
    assert [config["config_name"] for config in data["configs"]] == ["images", "soft_labels"]
    assert data["configs"][0]["default"] is True
    assert data["dataset_info"][0]["splits"][0]["num_examples"] == 10
    for part in (
        "assets/grid.png",
        "https://huggingface.co/datasets/toys/blocks",
        "## License",
        "## Versions",
        "| `soft_labels` | 20 | 1 |",
        "@inproceedings",
        "75.0 %",
        "median of\n5: PSNR",
        "5 images start from pieces of several",
        "Not anonymised",
        "states no license",
        "hfds/./dataset",
    ):
        assert part in shown.text
    assert not re.search(r"\{\{|\}\}|\{%|None|Undefined|nan", shown.text)


def test_the_example_of_the_card_trains_a_student(dataset, monkeypatch):
    text = DatasetCard.load(dataset / "README.md").text
    example = re.search(r"```python\n(import timm.*?)```", text, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line and "import" not in line]) <= 10
    assert "edc_hub" not in example
    monkeypatch.chdir(dataset.parent)
    exec(example, found := {})
    assert found["logits"].shape == (10, 5) and found["loss"].isfinite() and found["epoch"] == 1


@pytest.mark.parametrize("loss, optimizer", [("mse_ce", "adamw"), ("kl", "adam"), ("cosine", "sgd"), ("ce", "adamw")])
def test_the_example_has_loss_and_optimiser_of_the_protocol(dataset, monkeypatch, loss, optimizer):
    values = {"loss": loss, "optimizer": optimizer, "lr": 0.003, "momentum": 0.7, "weight_decay": 0.02, "epochs": 1}
    section = Evaluation.model_validate({**values, "temperature": 4.0, "ce_weight": 0.3, "batch": 5})
    monkeypatch.chdir(dataset.parent)
    exec(snippets.example(json.loads((dataset / "manifest.json").read_text()), section, "dataset"), found := {})
    batch, logits = found["batch"], found["logits"]
    share = torch.ones(len(logits))
    whole = Batch(x=logits, soft=batch["soft_label"], label=batch["label"], mixed=batch["label"], share=share)
    torch.testing.assert_close(found["loss"], students.loss_of(section, logits, whole))
    group = found["optimizer"].param_groups[0]
    assert type(found["optimizer"]).__name__.lower() == optimizer and len(logits) == 5
    assert (group["lr"], group["weight_decay"], group.get("momentum")) == (
        0.003,
        0.02,
        0.7 if optimizer == "sgd" else None,
    )


@pytest.mark.parametrize("batch", [3, 4, 6, 9, 50])
def test_no_batch_of_the_example_is_one_image_whatever_the_prefix(dataset, batch):
    manifest = json.loads((dataset / "manifest.json").read_text()) | {"ipc": 10}
    text = snippets.example(manifest, Evaluation(batch=batch), "dataset")
    shown = int(re.search(r"DataLoader\(ds, (\d+),", text)[1])
    sizes = [len(part) for k in range(1, 11) for part in torch.arange(CLASSES * k).split(shown)]
    assert min(sizes) > 1 and shown >= batch and (shown == batch or batch != 50)


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("edc-plus", ["shao2024edc"], "as its authors ask and EDC, whose"),
        ("cda", ["yin2024cda", "shao2024edc"], "the method and EDC, whose"),
        ("mine:blend", ["shao2024edc"], "the method, mine:blend, as its authors ask and EDC, whose"),
    ],
)
def test_a_card_says_whom_to_cite_for_the_method(dataset, method, keys, words):
    manifest = json.loads((dataset / "manifest.json").read_text()) | {"method": method}
    text = card.render(manifest, Evaluation(), "org/toy", old=(dataset / "README.md").read_text())
    cited = text.partition("## Citation")[2]
    assert re.findall(r"^@\w+\{(\w+),", cited, re.MULTILINE) == keys and words in cited


def test_a_relabelled_set_says_by_which_flags_its_images_were_read(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["origin"] = {"id": "org/theirs", "commit": "c" * 40, "flags": "--split validation --ipc 1"}
    text = card.render(manifest, Evaluation(), "org/toy", old=(dataset / "README.md").read_text())
    assert f"relabel recipe.yaml --images org/theirs --revision {'c' * 40} --split validation --ipc 1" in text
    assert "org/theirs, whose images these are, as its authors ask" in text


def test_the_replay_of_the_card_runs(dataset, monkeypatch):
    text = DatasetCard.load(dataset / "README.md").text
    replay = re.search(r"```python\n(from edc_hub.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(dataset.parent)
    names: dict = {}
    exec(replay, names)
    assert names["x"].shape == (COUNT, 3, 16, 16) and names["logits"].shape == (COUNT, CLASSES)


def test_the_stream_of_the_card_runs(dataset, monkeypatch):
    text = DatasetCard.load(dataset / "README.md").text
    stream = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "streaming=True" in code)
    monkeypatch.chdir(dataset.parent)
    exec(stream, found := {})
    assert len(found["batch"]["image_id"]) == 4 and found["batch"]["soft_label"].shape == (4, 5)


def test_the_command_of_the_card_makes_the_same_recipe(dataset, monkeypatch):
    text = DatasetCard.load(dataset / "README.md").text
    command = re.search(r"```bash\n.*?edc-hub condense ([^`]*)```", text, re.DOTALL)[1].split()
    monkeypatch.chdir(dataset)
    recipe, *_ = recipes.parse(command, prog="condense")
    assert recipe.source.revision == json.loads((dataset / "manifest.json").read_text("utf-8"))["source"]["commit"]
    recipe = recipe.model_copy(update={"source": recipe.source.model_copy(update={"revision": None})})
    assert recipes.published(recipe) == (dataset / "recipe.yaml").read_text("utf-8")


def again(folder, repo, **options):
    """The card of a dataset folder, rendered anew."""
    old, manifest, evaluation = read(folder)
    return card.render(manifest, evaluation, repo, old=old, **options)


def read(folder):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    evaluation = recipes.resolve(documents.load(folder / "recipe.yaml")).evaluation
    return (folder / "README.md").read_text("utf-8"), manifest, evaluation


def test_the_card_of_a_published_set_names_its_place(dataset):
    text = again(dataset, "org/toy")
    assert 'load_dataset("org/toy", "images", split="train")' in text
    assert "hf download org/toy recipe.yaml --repo-type dataset" in text and "./dataset" not in text
    old = (dataset / "README.md").read_text("utf-8")
    assert DatasetCard(text).data.to_dict() == DatasetCard(old).data.to_dict()
    assert again(dataset, "./dataset") == old
    assert "hf download" not in old and "This set is not published" in old
    assert not re.search(r"""["/]dataset["` ]""", old.replace("./dataset", ""))  # a set of this id may be cached


def test_what_was_measured_is_in_the_card_where_it_is_of_these_lines(dataset):
    text, manifest, evaluation = read(dataset)
    assert text.count("Not measured yet. `edc-hub evaluate --dataset RUN`") == 1
    assert text.count("Not measured yet. `edc-hub showcase RUN`") == 2
    found = results.summarise(trained("set", 0.52, student="convnet"), about())
    sha = snippets.digest(manifest, evaluation)
    figures = [(1, [0.5]), (2, [0.4, 0.6])]
    found["prefixes"] = [{"images_per_class": k, "accuracy": it, "example_sha256": sha} for k, it in figures]
    made = card.render(manifest, evaluation, "./dataset", old=text, measured=found)
    assert (
        "under the same training.\n\n| student |" in made
        and "| **convnet** | condensed set | 3 | 52.4 ± 0.4 |" in made
    )
    table = "| k | top-1, last epoch, test split; 2 students |\n|--:|---|\n| 1 | 50.0 % |\n| 2 | 50.0 ± 14.1 % |\n"
    assert f"lines below:\n\n{table}\n## " in made and "exactly these lines:\n\n50.0 ± 14.1 %, 2 students.\n\n" in made
    assert "Not measured yet." not in made and card.render(manifest, evaluation, "./dataset", old=made) == text
    other = evaluation.model_copy(update={"epochs": evaluation.epochs + 1})  # then they are of other lines
    made = card.render(manifest, other, "org/toy", old=text, measured=found)
    assert "| **convnet** |" in made and made.count("Not measured yet.\n") == 2  # its readers have no run


def test_accuracies_in_a_card_of_an_older_release_are_not_taken_over(dataset):
    text, manifest, evaluation = read(dataset)
    older = text.replace("Not measured yet.", "<!-- results -->\n| **old** |\n<!-- /results -->", 1)
    assert card.render(manifest, evaluation, "./dataset", old=older) == text


def test_tags_and_license_of_an_older_card_of_ours_are_no_person_s(dataset):
    text, manifest, evaluation = read(dataset)
    manifest["source"] |= {"license": "other", "license_name": "mine", "license_link": "https://a.b"}
    old = card.render({**manifest, "ipc": 50, "method": "random"}, evaluation, "org/toy", old=text)
    old = old.replace("- soft-labels\n", "- soft-labels\n- mine\n")
    manifest["source"] |= {"license": "mit", "license_name": None, "license_link": None}
    data = DatasetCard(card.render(manifest, evaluation, "org/toy", old=old)).data.to_dict()
    assert data["license"] == "mit" and not {"license_name", "license_link"} & set(data)
    assert {"mine", "ipc-2"} <= set(data["tags"]) and not {"ipc-50", "random"} & set(data["tags"])


def test_the_card_pins_the_source_and_names_published_observers(dataset):
    text, manifest, evaluation = read(dataset)
    manifest["source"]["commit"] = None
    assert "--source.revision" not in card.render(manifest, evaluation, "org/toy", old=text)
    manifest["source"]["commit"] = "c" * 40
    found = {"a@3": {"weights": "org/toy-a@v1.0.0", "arch": "convnet", "bytes": 4321}}
    made = card.render(manifest, evaluation, "org/toy", old=text, published=found)
    assert f"edc-hub condense recipe.yaml --source.revision {'c' * 40} --output_dir" in made
    assert "| weights of a@3 | `org/toy-a@v1.0.0`, convnet, 4.32 kB |" in made
    assert "same `revision=`" in made


def test_sections_and_metadata_that_a_person_added_stay(dataset):
    text = (dataset / "README.md").read_text("utf-8")
    own = "## Ethics\n\nThink first.\n\n```bash\n## no heading\n```\n"
    edited = text.replace("## Train on it\n", f"{own}\n## Train on it\n").replace(
        "license: unknown\n", "license: mit\nlanguage:\n- en\n"
    )
    edited = edited.replace("- soft-labels\n", "- soft-labels\n- mine\n") + "\n## Contact\n\nMe.\n"
    kept = card.kept(text, edited)
    data = DatasetCard(kept).data.to_dict()
    assert data["license"] == "mit" and data["language"] == ["en"] and data["tags"].count("mine") == 1
    assert f"{own}\n## Train on it\n" in kept and kept.endswith("## Contact\n\nMe.\n")
    assert kept.count("## Results") == 1 and kept.count("## no heading") == 1
    assert card.kept(text, kept) == kept and card.kept(kept, text) == kept and card.kept(text, text) == text
    assert "\n## Contact\n\nMe.\n\n## Results\n" in card.kept(text, "no metadata\n\n## Contact\n\nMe.\n")


@pytest.mark.parametrize(("tags", "there"), [("vision", "vision"), ("3", "3"), ("[a, {b: c}]", "a")])
def test_tags_that_a_person_wrote_as_no_list_of_words_are_whole_tags(dataset, tags, there):
    text = (dataset / "README.md").read_text("utf-8")
    own = DatasetCard(text).data.to_dict()["tags"]
    found = DatasetCard(card.kept(text, f"---\ntags: {tags}\n---\n# Mine\n")).data.to_dict()["tags"]
    assert found[: len(own)] == own and found[len(own)] == there and len(found) <= len(own) + 2


@pytest.mark.parametrize(
    "code", ["````\n```\n````", "~~~\n```\n~~~~", "```\n~~~\n```", "``` `a` ```", "  ```\n## A\n  ```"]
)
def test_a_section_behind_any_block_of_code_stays(dataset, code):
    text = (dataset / "README.md").read_text("utf-8")
    edited = text.replace("## Versions\n", f"## Versions\n\n{code}\n\n## Mine\n\nWords.\n\n## License\n", 1)
    kept = card.kept(text, edited)
    assert "\n## Mine\n\nWords.\n" in kept and kept.count("## License") == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"license": "mit"}, "under the license `mit` as"),
        ({"license": "other", "license_name": "mine", "license_link": "https://a.b"}, "[mine](https://a.b)"),
        (
            {"license": "other", "license_name": "imagenet-terms-of-access", "license_link": "https://a.b"},
            "non-commercial research",
        ),
        ({"license": "unknown"}, "states no license"),
        ({"citation": "@misc{toys,\n}\n"}, "@misc{toys,\n}\n```"),
    ],
)
def test_the_terms_of_the_source_stand_in_the_card(dataset, tmp_path, source, said):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["source"] |= source
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    text = again(folder, "org/toy")
    assert said in text
    assert DatasetCard(text).data.license == source.get("license", "unknown")


def test_timm_reads_the_images(dataset, tmp_path):
    from timm.data.readers.reader_hfds import ReaderHfds

    reader = ReaderHfds(str(dataset), root=str(tmp_path), split="train")
    assert len(reader) == COUNT and reader.class_to_idx == {f"class {i}": i for i in range(CLASSES)}
    image, label = reader[3]
    assert label == 1 and np.array_equal(np.asarray(Image.open(image)), noise(COUNT, 16)[3].permute(1, 2, 0))


@pytest.mark.parametrize("control", ["initial", "random"])
def test_a_control_says_that_it_is_one(session, tmp_path, control):
    folder = written(tmp_path / "dataset", session, control=control)
    assert CondensedSet.load(folder).manifest["control"] == control
    roles = [observer["roles"] for observer in CondensedSet.load(folder).manifest["observers"]]
    assert roles == [["relabel"], ["relabel"]]  # nothing was synthesised here
    title = DatasetCard.load(folder / "README.md").data.pretty_name
    assert f"{control} images" in title and "condensed" not in title


def test_the_grid_shows_each_start_beside_its_image(dataset):
    sheet = np.asarray(Image.open(dataset / "assets/grid.png"))
    start, final = noise(COUNT, 16, seed=7), noise(COUNT, 16)
    assert sheet.shape == (CLASSES * 72, IPC * 136, 3)
    tile = sheet[72 + 4 : 72 + 68, 136 + 4 : 136 + 132]  # class 1, second image
    assert np.array_equal(tile[::4, :64:4], start[3].permute(1, 2, 0)) and np.array_equal(
        tile[::4, 64::4], final[3].permute(1, 2, 0)
    )


def test_a_card_tells_observers_of_one_architecture_apart(dataset):
    text, manifest, evaluation = read(dataset)
    manifest["observers"][0]["args"] = {"depth": 3, "width": 64}
    made = card.render(manifest, evaluation, "org/toy", old=text)
    assert f"| {manifest['observers'][0]['arch']} `{{'depth': 3, 'width': 64}}` |" in made
