"""`python -m jobs.report`: what runs did and cost, on the terminal, as a page and as data. Choices: conf/report.yaml.

python -m jobs.report runs=outputs/mine
python -m jobs.report runs=[outputs/mine,outputs/base_only] output=outputs/compared
"""

import shlex
from dataclasses import fields

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from jobs.launch import run_job
from specreason_batch.report import ReportConfig
from specreason_batch.report.job import report
from specreason_batch.types import InvalidInput

ConfigStore.instance().store(name="report_schema", node=ReportConfig)


def to_config(composed: DictConfig) -> ReportConfig:
    """Raises InvalidInput."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise InvalidInput("\n".join(f"{name}: not set; it needs a value" for name in missing))
    known = {field.name for field in fields(ReportConfig)}
    if unknown := [name for name in map(str, composed) if name not in known]:
        raise InvalidInput("\n".join(f"{name}: no such field" for name in unknown))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, ReportConfig)
    return config


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
def main(composed: DictConfig) -> None:
    command = shlex.join(["python", "-m", "jobs.report", *HydraConfig.get().overrides.task])
    run_job(lambda console: report(to_config(composed), console, command))


if __name__ == "__main__":
    main()
