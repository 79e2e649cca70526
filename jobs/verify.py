"""`python -m jobs.verify`: is each chain's answer right? Every choice is in conf/verify.yaml.

python -m jobs.verify run=outputs/toy
"""

from dataclasses import fields

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from jobs.launch import run_job
from specreason_batch.signals import StopSignal
from specreason_batch.types import InvalidInput
from specreason_batch.verify.config import VerifyConfig
from specreason_batch.verify.job import verify

STOP_SECONDS = 10.0  # from a signal to the end of this process, at most

ConfigStore.instance().store(name="verify_schema", node=VerifyConfig)


def to_config(composed: DictConfig) -> VerifyConfig:
    """Raises InvalidInput."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise InvalidInput("\n".join(f"{name}: not set; it needs a value" for name in missing))
    known = {field.name for field in fields(VerifyConfig)}
    if unknown := [name for name in map(str, composed) if name not in known]:
        raise InvalidInput("\n".join(f"{name}: no such field" for name in unknown))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, VerifyConfig)
    return config


def verify_until_stopped(config: VerifyConfig, console: Console) -> None:
    """Raises what `verify` does, and Stopped."""
    stop = StopSignal(STOP_SECONDS)
    with stop.installed():
        verify(config, console, stop.check)


@hydra.main(version_base="1.3", config_path="../conf", config_name="verify")
def main(composed: DictConfig) -> None:
    run_job(lambda console: verify_until_stopped(to_config(composed), console))


if __name__ == "__main__":
    main()
