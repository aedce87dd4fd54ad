"""The processes that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed.harness import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"))
    yield found
    found.close()
