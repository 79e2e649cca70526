"""`python -m jobs.verify`: is each chain's answer right? Every choice is in conf/verify.yaml.

python -m jobs.verify run=outputs/toy
"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from jobs.launch import converted, run_job
from specreason_batch.signals import StopSignal
from specreason_batch.verify.config import VerifyConfig
from specreason_batch.verify.job import verify

STOP_SECONDS = 10.0  # from a signal to the end of this process, at most

ConfigStore.instance().store(name="verify_schema", node=VerifyConfig)


def to_config(composed: DictConfig) -> VerifyConfig:
    """Raises InvalidInput."""
    return converted(composed, VerifyConfig)


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
