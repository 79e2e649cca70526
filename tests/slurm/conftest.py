"""One real Slurm for the tests of this folder, and a place for each test's run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.place import Place
from tests.support.configs import write_models


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes with two fake GPUs each. Skips where Slurm is not installed, or cannot be run."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm on this machine ({', '.join(missing)}): make test-slurm installs it")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root here: its daemons start jobs as other users")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))  # short: sockets lie in it
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_models(folder / "models")
    return folder / "models"


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path, models: Path) -> Iterator[Place]:
    """A run of the scripted job on the cluster; what is left of it in the queue is cancelled at the end."""
    (tmp_path / "models").symlink_to(models)
    place = Place(cluster, tmp_path)
    yield place
    place.cancel_everything()
