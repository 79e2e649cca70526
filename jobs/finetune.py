"""`python -m jobs.finetune`: train a model on an export, with TRL. Every choice is in conf/finetune.yaml.

python -m jobs.finetune data=dataset/ model=examples/toy/draft output=models/draft-sft
accelerate launch -m jobs.finetune data=dataset/ model=... output=...        # several GPUs
"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from jobs.launch import converted, run_job
from specreason_batch.finetune import FinetuneConfig, finetune

ConfigStore.instance().store(name="finetune_schema", node=FinetuneConfig)


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
def main(composed: DictConfig) -> None:
    run_job(lambda console: finetune(converted(composed, FinetuneConfig), console))


if __name__ == "__main__":
    main()
