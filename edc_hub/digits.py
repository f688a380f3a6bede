"""The digits that ship with scikit-learn, as a `datasets.DatasetDict`: an image set that needs no network."""

import functools
import hashlib

import datasets
import numpy as np
import PIL.Image


@functools.cache  # a command opens each split by itself
def load(stratified) -> tuple[datasets.DatasetDict, str]:
    """The 1,797 images (8x8, greyscale) as `image` and `label`, a fifth of each class in `test`, and a fingerprint.

    `stratified(labels, fraction, seed)` draws a boolean mask with that fraction of each class.
    """
    from sklearn.datasets import load_digits  # takes seconds to import

    bunch = load_digits()
    pixels, labels = bunch.images, bunch.target.astype(np.int64)
    test = stratified(labels, 0.2, 0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    grey = np.rint(pixels * (255 / 16)).astype(np.uint8)  # intensities are 0 to 16

    def split(mask: np.ndarray) -> datasets.Dataset:
        images = [PIL.Image.fromarray(image) for image in grey[mask]]
        return datasets.Dataset.from_dict({"image": images, "label": labels[mask].tolist()}, features=features)

    content = hashlib.sha256(grey.tobytes() + labels.tobytes() + test.tobytes()).hexdigest()
    return datasets.DatasetDict(train=split(~test), test=split(test)), content
