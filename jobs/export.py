"""`python -m jobs.export`: runs' outputs into a data set folder to train on. Every choice is in conf/export.yaml.

python -m jobs.export runs=[outputs/toy] output=dataset/ format=sft_messages
"""

from dataclasses import fields

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from jobs.launch import run_job
from specreason_batch.export import DecontaminateConfig, ExportConfig, NearDuplicatesConfig, SelectConfig, export
from specreason_batch.signals import StopSignal
from specreason_batch.types import InvalidInput

STOP_SECONDS = 60.0  # from a signal to the end of this process, at most

_SECTIONS = {"select": SelectConfig, "near_duplicates": NearDuplicatesConfig, "decontaminate": DecontaminateConfig}

ConfigStore.instance().store(name="export_schema", node=ExportConfig)


def to_config(composed: DictConfig) -> ExportConfig:
    """Raises InvalidInput."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise InvalidInput("\n".join(f"{name}: not set; it needs a value" for name in missing))
    unknown = _unknown(composed, ExportConfig)
    for name, schema in _SECTIONS.items():
        unknown += _unknown(composed[name], schema, f"{name}.")
    if unknown:
        raise InvalidInput("\n".join(f"{name}: no such field" for name in unknown))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, ExportConfig)
    return config


def _unknown(composed: DictConfig, schema: type, path: str = "") -> list[str]:
    """Fields that Hydra's `+` has added beside the schema."""
    return [f"{path}{name}" for name in map(str, composed) if name not in {field.name for field in fields(schema)}]


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
