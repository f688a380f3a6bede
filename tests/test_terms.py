"""Terms of a source: from the table, from its own card, or unknown."""

import pytest
from helpers_labels import real

from edc_hub import terms
from edc_hub.errors import InputError


@pytest.mark.parametrize(
    ("source", "license", "cited"),
    [
        ("sklearn/digits", "cc-by-4.0", "Alpaydin"),
        ("uoft-cs/cifar10", "unknown", "Krizhevsky"),
        ("uoft-cs/cifar100", "unknown", "Krizhevsky"),
        ("ILSVRC/imagenet-1k", "other", "Russakovsky"),
        ("zh-plus/tiny-imagenet", "other", "Russakovsky"),
        ("Sijuade/ImageNette", "other", "Russakovsky"),
    ],
)
def test_known_sources(source, license, cited):
    found = terms.of(source, source, None if source == "sklearn/digits" else "c" * 40)
    assert found["license"] == license and cited in found["citation"] and found["link"].startswith("https://")
    assert set(found) == set(terms.UNKNOWN)
    assert found["license_name"] == ("imagenet-terms-of-access" if license == "other" else None)


def test_a_folder_states_its_own(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.b\n---\n# Toys\n\n"
        "```bash\nls\n```\n\n```bibtex\n@misc{toys,\n  title = {Toys}\n}\n```\n"
    )
    found = terms.of("toys", str(tmp_path), None)
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "mine", "https://a.b")
    assert found["citation"] == "@misc{toys,\n  title = {Toys}\n}\n" and found["link"] is None


@pytest.mark.parametrize(
    ("text", "license"),
    [("---\nlicense:\n- mit\n---\n", "mit"), ("---\nlicense:\n- mit\n- cc0-1.0\n---\n", "other"),
     ("# No metadata\n", "unknown"), ("---\nlicense: [\n---\n", "unknown")],
)  # fmt: skip
def test_other_cards(tmp_path, text, license):
    (tmp_path / "README.md").write_text(text)
    assert terms.of("toys", str(tmp_path), None)["license"] == license


def test_nothing_is_assumed_without_a_card(tmp_path):
    assert terms.of("toys", str(tmp_path), None) == terms.UNKNOWN


def test_a_set_that_is_known_to_have_no_card_states_none():
    known = real(2)
    assert terms.of(known.id, known.id, known.commit)["license"] == "unknown"


def test_a_card_that_cannot_be_reached_is_not_taken_for_none():
    with pytest.raises(InputError, match="source.path: the card of toys/blocks, which states its license"):
        terms.of("toys/blocks", "toys/blocks", "c" * 40)  # without a network
