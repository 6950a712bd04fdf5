"""Shared set-up of the tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors are faster on one thread, and sums do not depend on the machine."""
    torch.set_num_threads(1)
