"""Likeness: PSNR and SSIM against loops over pixels, and what is compared with what."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers_labels import noise

from edc_hub import likeness


def slow_psnr(x, y) -> float:
    total = sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
    return 10 * math.log10(255**2 / (total / x.numel()))


def slow_ssim(x, y) -> float:
    side = x.shape[-1]
    size = max(s for s in range(1, 12, 2) if s <= side)
    line = [math.exp(-((i - size // 2) ** 2) / (2 * 1.5**2)) for i in range(size)]
    weights = [[a * b / sum(line) ** 2 for b in line] for a in line]
    found = []
    for one, two in zip(x.tolist(), y.tolist(), strict=True):
        for top in range(side - size + 1):
            for left in range(side - size + 1):
                cells = [(weights[i][j], one[top + i][left + j], two[top + i][left + j])
                         for i in range(size) for j in range(size)]  # fmt: skip
                mean_x, mean_y = sum(w * a for w, a, _ in cells), sum(w * b for w, _, b in cells)
                var_x = sum(w * (a - mean_x) ** 2 for w, a, _ in cells)
                var_y = sum(w * (b - mean_y) ** 2 for w, _, b in cells)
                both = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in cells)
                c1, c2 = 2.55**2, 7.65**2
                found.append((2 * mean_x * mean_y + c1) * (2 * both + c2)
                             / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))  # fmt: skip
    return sum(found) / len(found)


@pytest.mark.parametrize("size", [8, 13])
def test_figures_are_those_of_the_slow_reference(size):
    x = noise(2, size).double()
    y = (x * torch.tensor([0.9, 0.2])[:, None, None, None] + noise(2, size, seed=3) * 0.1).round()
    assert likeness.psnr(x, y).tolist() == pytest.approx([slow_psnr(*pair) for pair in zip(x, y, strict=True)])
    assert likeness.ssim(x, y).tolist() == pytest.approx([slow_ssim(*pair) for pair in zip(x, y, strict=True)])
    assert likeness.ssim(x, x).tolist() == pytest.approx([1, 1]) and likeness.psnr(x, x).isinf().all()


def facts(published, source_rows, real_images, whole=True):
    real = SimpleNamespace(images=lambda rows: real_images[rows])
    return likeness.facts(lambda numbers: published[numbers], torch.tensor(source_rows), real, whole=whole)


def test_each_image_is_compared_with_its_own_row_whatever_the_batches(monkeypatch):
    real = noise(50, 12, seed=5)
    rows = [40, 3, 17, 8, 21]
    published = (real[rows].int() + torch.arange(1, 6)[:, None, None, None]).clamp(max=255).to(torch.uint8)
    found = facts(published, [[row, -1] for row in rows], real)
    each = sorted(slow_psnr(published[i].double(), real[row].double()) for i, row in enumerate(rows))
    assert found["psnr"] == round(each[2], 2) and 0.9 < found["ssim"] < 1
    assert (found["compared"], found["parts"], found["noise"], found["identical"]) == (5, 0, 0, 0)
    monkeypatch.setattr(likeness, "BATCH", 2)
    assert facts(published, [[row, -1] for row in rows], real) == found


def test_images_without_one_whole_start_are_left_out():
    real, published = noise(9, 12, seed=5), noise(4, 12)
    published[0] = real[7]
    found = facts(published, [[7, -1], [1, 2], [-1, -1], [-1, 3]], real)
    assert (found["compared"], found["parts"], found["noise"], found["identical"]) == (2, 1, 1, 1)
    nothing = facts(published, [[7, -1], [1, 2], [-1, -1], [-1, 3]], real, whole=False)
    assert nothing == {"compared": 0, "parts": 3, "noise": 1, "identical": 0, "psnr": None, "ssim": None}


def test_identical_images_have_no_finite_psnr():
    real = noise(3, 12)
    found = facts(real, [[0], [1], [2]], real)
    assert found["psnr"] is None and found["identical"] == 3 and found["ssim"] == 1
