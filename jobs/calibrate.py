"""`python -m jobs.calibrate`: what one stream costs on this machine. Choices: conf/calibrate.yaml.

python -m jobs.calibrate experiment=toy output=outputs/calibration.json
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from jobs.compose import compose_generate, split_words
from jobs.launch import converted, run_job
from specreason_batch.calibrate import CalibrateConfig, Measured, Stream, calibrate
from specreason_batch.config import GenerateConfig
from specreason_batch.engines import Engines, started_engines
from specreason_batch.plan import Plan, make_plan
from specreason_batch.progress import Progress
from specreason_batch.signals import StopSignal
from specreason_batch.store.durable import replace_text
from specreason_batch.store.manifest import model_identity
from specreason_batch.types import InvalidInput, Prompt, Role

ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)
OWN_NAMES = tuple(field.name for field in fields(CalibrateConfig))


def run_calibration(config: CalibrateConfig, words: Sequence[str], console: Console) -> dict[str, Measured]:
    """The whole job. Raises what jobs.generate does."""
    generate = compose_generate([*words, "policy=specreason"])
    output = Path(config.output)
    if output.is_dir():
        raise InvalidInput(f"output: {output} is a folder; allowed: a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(console, generate.log.seconds)
    stop = StopSignal(generate.recovery.stop_seconds)
    with stop.installed(), stop.at_once():
        plan = _plan(generate)
        stream = _stream(plan, config)
        with started_engines(generate, frozenset(Role), progress) as engines:
            found = calibrate(engines, stream, lambda what: progress.say(f"measuring: {what}"))
            document = _document(found, engines, generate)
    replace_text(output, json.dumps(document, indent=2) + "\n")
    console.print(_table(found))
    console.print(f"{output}", style="bold", highlight=False, markup=False, soft_wrap=True)
    return found


def _plan(generate: GenerateConfig) -> Plan:
    """All that jobs.generate checks before it loads models; no output folder is claimed."""
    with tempfile.TemporaryDirectory() as nowhere:
        return make_plan(replace(generate, output_dir=nowhere))


def _stream(plan: Plan, config: CalibrateConfig) -> Stream:
    """Raises InvalidInput if there are too few prompts."""
    wanted = config.repeats + 1
    items = (item for shard in [*plan.pending, *plan.finished] for item in shard.shard.prompts())
    prompts = list(islice((item for item in items if isinstance(item, Prompt)), wanted))
    if len(prompts) < wanted:
        raise InvalidInput(f"repeats: {config.repeats} needs {wanted} prompts; allowed: at most {len(prompts) - 1}")
    assert plan.judge is not None
    return Stream(
        openings={role: [chat.opening(prompt.prompt) for prompt in prompts] for role, chat in plan.formats.items()},
        turn=plan.judge.turn,
        label_ids=plan.judge.label_ids,
        tokens=config.tokens,
    )


def _document(found: Mapping[str, Measured], engines: Engines, generate: GenerateConfig) -> dict[str, Any]:
    return {
        "constants": {name: measured.median for name, measured in found.items()},
        "spread": {
            name: {"quartiles": measured.quartiles, "num_measurements": len(measured.values)}
            for name, measured in found.items()
        },
        "machine": asdict(engines.hardware),
        "models": {role.value: _model(generate, role) for role in Role},
        "versions": {role.value: engines[role].info.version for role in Role},
        "measured_at": time.time(),
    }


def _model(generate: GenerateConfig, role: Role) -> dict[str, Any]:
    engine = generate.engine(role)
    return {
        "name": engine.model,
        "identity": model_identity(engine.model),
        "tensor_parallel_size": engine.tensor_parallel_size,
        "speculative": engine.speculative.method,
    }


def _table(found: Mapping[str, Measured]) -> Table:
    table = Table("constant", "median", "quartiles", "measurements", title="one stream alone, milliseconds")
    for name, measured in found.items():
        low, high = measured.quartiles
        table.add_row(
            name, f"{measured.median * 1e3:.3f}", f"{low * 1e3:.3f}-{high * 1e3:.3f}", f"{len(measured.values)}"
        )
    return table


# --- the command line ---


def to_config(composed: DictConfig) -> CalibrateConfig:
    """Raises InvalidInput."""
    return converted(composed, CalibrateConfig)


def main() -> None:
    own, others = split_words(sys.argv[1:], OWN_NAMES)

    @hydra.main(version_base="1.3", config_path="../conf", config_name="calibrate")
    def run(composed: DictConfig) -> None:
        run_job(lambda console: run_calibration(to_config(composed), others, console))

    sys.argv[1:] = own
    run()


if __name__ == "__main__":
    main()
