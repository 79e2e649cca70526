"""`python -m jobs.prepare`: Parquet or JSONL into validated prompt shards. Every choice is in conf/prepare.yaml.

python -m jobs.prepare input=raw/math500.parquet output=prompts/ template=math num_shards=8
"""

from dataclasses import fields

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from jobs.launch import run_job
from specreason_batch.prepare import ColumnsConfig, PrepareConfig, prepare
from specreason_batch.types import InvalidInput

ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)


def to_config(composed: DictConfig) -> PrepareConfig:
    """Raises InvalidInput."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise InvalidInput("\n".join(f"{name}: not set; it needs a value" for name in missing))
    if unknown := [*_unknown(composed, PrepareConfig), *_unknown(composed.columns, ColumnsConfig, "columns.")]:
        raise InvalidInput("\n".join(f"{name}: no such field" for name in unknown))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, PrepareConfig)
    return config


def _unknown(composed: DictConfig, schema: type, path: str = "") -> list[str]:
    """Fields that Hydra's `+` has added beside the schema."""
    return [f"{path}{name}" for name in map(str, composed) if name not in {field.name for field in fields(schema)}]


@hydra.main(version_base="1.3", config_path="../conf", config_name="prepare")
def main(composed: DictConfig) -> None:
    run_job(lambda console: prepare(to_config(composed), console))


if __name__ == "__main__":
    main()
