"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network is a wrong test


@pytest.fixture
def global_random_state() -> Iterator[None]:
    """Fail the test if it moved the global random state: images depend on generators only."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())
