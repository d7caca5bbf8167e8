"""Every test starts from the same random state. Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton or ops
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--all-mutants", action="store_true", help="every planted fault of the CUDA kernels, not a few")
    parser.addoption("--twin", metavar="FILE", help="a built _simt module to test instead of this tree's")
