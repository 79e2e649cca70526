"""The card of a trained model: what the hub reads of it, and what a person reads. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specreason_batch.finetune.config import Stage
from specreason_batch.finetune.plan import Plan

_METHODS = {
    Stage.sft: "supervised finetuning on whole chains of thought",
    Stage.dpo: "direct preference optimisation on reasoning steps: the base's rewrite over the draft's rejected try",
}
_CURVES = (("train", "loss"), ("validation", "eval_loss"))


def card(plan: Plan, record: Mapping[str, Any]) -> str:
    """README.md. `record`: of the training, with its log."""
    return "\n".join([*_header(plan), *_body(plan, record), ""])


def _header(plan: Plan) -> Iterator[str]:
    """YAML; values in JSON's notation, which is part of it. A folder is no name that the hub knows."""
    yield "---"
    if not Path(plan.config.model).is_dir():
        yield f"base_model: {json.dumps(plan.config.model)}"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield f"tags: [trl, {plan.stage}, reasoning, distillation]"
    yield "---"


def _body(plan: Plan, record: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n# {Path(plan.config.output).name}\n"
    yield (
        f"`{plan.config.model}` after {_METHODS[plan.stage]}, by `jobs.finetune` of specreason_batch. "
        "Configuration, tokenizer and chat template are those of the model that was trained; `finetune.json` holds the "
        "fingerprints of model and data, every argument and the whole log.\n"
    )
    yield from _table(("data", ""), _data(plan, record))
    yield from _table(("argument", ""), sorted(plan.config.settings(plan.stage).items()))
    yield from _table(("training", ""), _training(record))


def _data(plan: Plan, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "folder", plan.config.data
    yield "format", plan.export.format
    yield "made from runs", ", ".join(run["fingerprint"] for run in plan.export.made_from["runs"])
    for name, rows in record["rows"].items():
        yield f"{name} rows", f"{rows['used']}, {rows['too_long']} left out as too long"


def _training(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "steps", f"{record['num_steps']}, {record['epochs']:.2f} epochs"
    yield "seconds", f"{record['seconds']:.0f} on {record['num_processes']} x {record['device']}"
    for split, name in _CURVES:
        losses = [entry[name] for entry in record["log"] if name in entry]
        if losses:
            yield f"{split} loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last"
    yield "versions", ", ".join(f"{package} {version}" for package, version in record["versions"].items())


def _table(header: Sequence[str], rows: Iterator[tuple[str, Any]] | Sequence[tuple[str, Any]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---|---|"
    for name, value in rows:
        yield f"| {name} | {_cell(value)} |"
    yield ""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
