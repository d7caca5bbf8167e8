"""Tests give back their GPU memory: other processes run beside them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
