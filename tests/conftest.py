"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)
