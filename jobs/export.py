"""`python -m jobs.export`: runs' outputs into a data set folder to train on. Every choice is in conf/export.yaml.

python -m jobs.export runs=[outputs/toy] output=dataset/ format=sft_messages
"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from jobs.launch import converted, run_job
from specreason_batch.export import ExportConfig, export
from specreason_batch.signals import StopSignal

STOP_SECONDS = 60.0  # from a signal to the end of this process, at most

ConfigStore.instance().store(name="export_schema", node=ExportConfig)


def to_config(composed: DictConfig) -> ExportConfig:
    """Raises InvalidInput."""
    return converted(composed, ExportConfig)


def export_until_stopped(config: ExportConfig, console: Console) -> None:
    """Raises what `export` does, and Stopped."""
    stop = StopSignal(STOP_SECONDS)
    with stop.installed():
        export(config, console, stop.check)


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
def main(composed: DictConfig) -> None:
    run_job(lambda console: export_until_stopped(to_config(composed), console))


if __name__ == "__main__":
    main()
