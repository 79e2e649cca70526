"""`python -m jobs.prepare`: Parquet or JSONL into validated prompt shards. Every choice is in conf/prepare.yaml.

python -m jobs.prepare input=raw/math500.parquet output=prompts/ template=math num_shards=8
"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from jobs.launch import converted, run_job
from specreason_batch.prepare import PrepareConfig, prepare

ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)


def to_config(composed: DictConfig) -> PrepareConfig:
    """Raises InvalidInput."""
    return converted(composed, PrepareConfig)


@hydra.main(version_base="1.3", config_path="../conf", config_name="prepare")
def main(composed: DictConfig) -> None:
    run_job(lambda console: prepare(to_config(composed), console))


if __name__ == "__main__":
    main()
