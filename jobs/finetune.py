"""`python -m jobs.finetune`: train a model on an export, with TRL. Every choice is in conf/finetune.yaml.

python -m jobs.finetune data=dataset/ model=examples/toy/draft output=models/draft-sft
accelerate launch -m jobs.finetune data=dataset/ model=... output=...        # several GPUs
"""

from dataclasses import fields

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from jobs.launch import run_job
from specreason_batch.config import ChatConfig
from specreason_batch.finetune import FinetuneConfig, finetune
from specreason_batch.types import InvalidInput

ConfigStore.instance().store(name="finetune_schema", node=FinetuneConfig)


def to_config(composed: DictConfig) -> FinetuneConfig:
    """Raises InvalidInput."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise InvalidInput("\n".join(f"{name}: not set; it needs a value" for name in missing))
    if unknown := [*_unknown(composed, FinetuneConfig), *_unknown(composed.chat, ChatConfig, "chat.")]:
        raise InvalidInput("\n".join(f"{name}: no such field" for name in unknown))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, FinetuneConfig)
    return config


def _unknown(composed: DictConfig, schema: type, path: str = "") -> list[str]:
    """Fields that Hydra's `+` has added beside the schema."""
    return [f"{path}{name}" for name in map(str, composed) if name not in {field.name for field in fields(schema)}]


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
def main(composed: DictConfig) -> None:
    run_job(lambda console: finetune(to_config(composed), console))


if __name__ == "__main__":
    main()
