"""What several test files share."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# before torch is imported, here and in children: the tests' networks are tiny, and several tests run at once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from run_server import Server

# a loaded machine is slow for a moment, which is no fault of what is tested
# and .ci/run draws the same examples each time: other runs look for new ones
hypothesis.settings.register_profile("otmix", deadline=None, derandomize="OTMIX_CI" in os.environ)
hypothesis.settings.load_profile("otmix")


@pytest.fixture(autouse=True)
def nothing_registered_stays() -> Iterator[None]:
    """Losses, mixers and imported files of one test are none of another's in the same process."""
    from otmix.extensions import IMPORTED
    from otmix.losses import LOSSES
    from otmix.mixing import LOSS_NAMES, PIXEL_RULES

    tables: list[Any] = [LOSSES, LOSS_NAMES, PIXEL_RULES, IMPORTED]
    before, path = [table.copy() for table in tables], [*sys.path]
    yield
    sys.path[:] = path  # an imported file's folder is added
    for table, content in zip(tables, before, strict=True):
        if table != content:
            table.clear()
            table.update(content)


@pytest.fixture(autouse=True)
def hangups_count() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, here and in children, where the tests want to see what it does."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    before = None if hangup is None else signal.signal(hangup, signal.SIG_DFL)
    yield
    if hangup is not None:
        signal.signal(hangup, before)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Runs `train` in children of a process that has imported everything, and kills them where it is told to."""
    folder = Path(tempfile.mkdtemp())
    server = Server(folder)
    yield server
    server.close()
    shutil.rmtree(folder)
