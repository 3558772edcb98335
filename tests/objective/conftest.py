"""The noisy model, as every test of this folder gets it."""

import pytest
import torch
from noisy import Noisy


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Noisy()
