"""What many tests start from: the toy pair on engines, one in-process pair for the whole suite; a folder to run in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from specreason_batch.clock import WallClock
from specreason_batch.config import ChatConfig, EngineConfig
from specreason_batch.engine import Engine
from specreason_batch.types import Role
from specreason_batch.vllm_engine import VllmEngine
from tests.support.configs import write_models, write_prompts

ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy"


def toy_engine_config(role: Role, **changes: object) -> EngineConfig:
    """The toy experiment's engine of this role."""
    values: dict[str, object] = {
        "model": str(TOY / role),
        "max_model_len": 1024,
        "kv_cache_gib": 1,
        "in_process": True,
        "chat": ChatConfig(),
    }
    return EngineConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def toy_clock() -> WallClock:
    """What the suite's engines ring."""
    return WallClock()


@pytest.fixture(scope="session")
def toy_engines(toy_clock: WallClock) -> Iterator[dict[Role, Engine]]:
    """Both toy models on real in-process vLLM engines."""
    engines: dict[Role, Engine] = {
        role: VllmEngine(toy_engine_config(role), clock=toy_clock) for role in (Role.base, Role.draft)
    }
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_models(folder / "models")
    return folder / "models"


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Path:
    """A folder with models and a shard of prompts."""
    (tmp_path / "models").symlink_to(models)
    write_prompts(tmp_path / "prompts.parquet")
    return tmp_path
