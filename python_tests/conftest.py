"""Every test starts from the same random state. Without a GPU, Triton kernels run in Triton's interpreter."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton or ops
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A small text with words that predict each other, prepared once."""
    from train.runs import DATA

    from stackbert_kernels.data.prepare import prepare

    folder = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me") for b in ("n", "r", "s", "t")]
    sentences = []
    for _ in range(400):
        first = choose.randrange(len(words))
        sentences.append(" ".join(words[(first + i) % len(words)] for i in range(choose.randint(4, 9))) + ".")
    (folder / "text.txt").write_text("\n\n".join("\n".join(sentences[i : i + 4]) for i in range(0, 400, 4)))
    return prepare([str(folder / "text.txt")], folder / "shards", DATA, progress=False, workers=1)


@pytest.fixture
def quick(monkeypatch):
    """Runs without the report and the export, which have their own tests, and without waiting for the disk."""
    from stackbert_kernels.train import loop

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    monkeypatch.setattr(loop, "exportable", lambda run, console: False)


def pytest_addoption(parser):
    parser.addoption("--all-mutants", action="store_true", help="every planted fault of the CUDA kernels, not a few")
    parser.addoption("--twin", metavar="FILE", help="a built _simt module to test instead of this tree's")
