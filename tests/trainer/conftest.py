"""One short run that the tests of the trainer share."""

from pathlib import Path
from typing import Any

import pytest

from fastcl.trainer import TrainConfig, train

SHORT = {"steps": 24, "batch_size": 64, "probe_every": 12, "checkpoint_every": 8, "threads": 1}


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of a short MoCo run, MoCo because it has the most state."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    return folder, train(TrainConfig(method="moco", queue_size=100, output=str(folder), **SHORT))
