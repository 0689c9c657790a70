from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def threads() -> Iterator[None]:
    """The command line sets the number of threads of its process, which other tests share."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
