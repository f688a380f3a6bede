"""Top-1 accuracy."""

import pytest
import torch

from edc_hub.accuracy import top1


def test_top1_is_the_share_of_right_predictions_in_the_types_that_training_gives():
    predictions = torch.tensor([3, 1, 999, 0, 2, 2, 7], dtype=torch.int16)
    references = torch.tensor([3, 0, 999, 0, 1, 2, 7])
    assert top1(predictions, references) == 5 / 7
    assert top1(references, references) == 1.0 and top1(references + 1, references) == 0.0


def test_top1_of_ten_thousand_predictions_agrees_with_a_count():
    generator = torch.Generator().manual_seed(0)
    predictions, references = torch.randint(10, (2, 10_000), generator=generator)
    right = sum(1 for a, b in zip(predictions.tolist(), references.tolist(), strict=True) if a == b)
    assert top1(predictions.short(), references) == right / 10_000


def test_top1_refuses_predictions_that_are_not_one_for_each_image():
    with pytest.raises(ValueError, match="3.*2|2.*3"):
        top1(torch.zeros(3, dtype=torch.int16), torch.zeros(2, dtype=torch.long))
