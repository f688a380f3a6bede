"""Test environment, set before any Hugging Face library is imported: no network, caches of their own."""

import gc
import os
import tempfile

import pytest


gc.disable()  # what is imported for tests stays to their end: no look for garbage goes through it, here or later

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="edc-hub-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests run side by side (pytest -n 2); one thread each, as two would wait for each other."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws without a generator is the same alone, in any order and on any worker."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def session(tmp_path):
    """A `work.Session` on the CPU with a store of its own, saving inside units at every opportunity."""
    import torch
    from accelerate import PartialState

    from edc_hub.work import Session, Store

    return Session(Store(tmp_path / "artifacts"), PartialState(cpu=True), torch.device("cpu"), checkpoint_seconds=0.0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A finished dataset folder of ten images in five classes. For reading alone: tests share it."""
    import torch
    from accelerate import PartialState
    from helpers_labels import written

    from edc_hub.work import Session, Store

    root = tmp_path_factory.mktemp("run")
    return written(root / "dataset", Session(Store(root / "artifacts"), PartialState(cpu=True), torch.device("cpu")))


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """The run folder of a finished condensation in three classes, made once. What it holds is not to be changed."""
    from helpers_evaluation import condensed

    return condensed(tmp_path_factory.mktemp("toy"), "first")
