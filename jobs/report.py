"""`python -m jobs.report`: what runs did and cost, on the terminal, as a page and as data. Choices: conf/report.yaml.

python -m jobs.report runs=outputs/mine
python -m jobs.report runs=[outputs/mine,outputs/base_only] output=outputs/compared
"""

import shlex

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from jobs.launch import converted, run_job
from specreason_batch.report import ReportConfig
from specreason_batch.report.job import report

ConfigStore.instance().store(name="report_schema", node=ReportConfig)


def to_config(composed: DictConfig) -> ReportConfig:
    """Raises InvalidInput."""
    return converted(composed, ReportConfig)


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
def main(composed: DictConfig) -> None:
    command = shlex.join(["python", "-m", "jobs.report", *HydraConfig.get().overrides.task])
    run_job(lambda console: report(to_config(composed), console, command))


if __name__ == "__main__":
    main()
