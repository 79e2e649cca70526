"""A real run of the toy pair, verified, exported in each format, loaded by datasets and stepped by a real trainer."""

import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from specreason_batch.export import ExportConfig, SelectConfig, export
from specreason_batch.export.config import Answers, Format
from specreason_batch.export.rendering import load_target
from specreason_batch.export.runs import open_runs
from specreason_batch.store.reading import scan

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy"
DRAFT = str(TOY / "draft")
KEEPING = """{%- for message in messages -%}
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant\n<think>\n{% endif -%}"""
STEPS = 2


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "toy"
    command("jobs.generate", "limit=24", f"output_dir={folder}")
    command("jobs.verify", f"run={folder}")
    return folder


def export_config(run: Path, output: Path, format: Format, **choices: Any) -> ExportConfig:
    chosen = {"tokenizer": DRAFT, "validation": 0.2, "select": SelectConfig(answers=Answers.right), **choices}
    return ExportConfig(runs=[str(run)], output=str(output), format=format, **chosen)


@pytest.fixture(scope="module")
def exported(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., datasets.Dataset]:
    """Export the right chains, and load what was written: the train split."""

    def load(format: Format, **choices: Any) -> datasets.Dataset:
        place = tmp_path_factory.mktemp("exported")
        export(export_config(toy_run, place / "d", format, **choices), Console(file=StringIO()))
        found = datasets.load_dataset("parquet", data_dir=str(place / "d" / "data"), cache_dir=str(place / "cache"))
        assert set(found) == {"train", "validation"}
        return found["train"]

    return load


def chains(toy_run: Path) -> dict[str, dict[str, Any]]:
    found = scan(toy_run, "chains")
    assert found is not None
    return {row["prompt_id"]: row for row in found.collect().to_dicts()}


def arguments(kind: type[TrainingArguments], folder: Path, **further: Any) -> Any:
    return kind(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=1,
        **further,
    )


def stepped(trainer: Trainer) -> None:
    """It takes its steps, with a loss, and they change the weights."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and all(0 < loss < 100 for loss in losses)
    after = trainer.model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def tokenizer(**changes: Any) -> Any:
    found = AutoTokenizer.from_pretrained(DRAFT)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def sft_trainer(rows: datasets.Dataset, folder: Path, processing: Any) -> SFTTrainer:
    model = AutoModelForCausalLM.from_pretrained(DRAFT)
    args = arguments(SFTConfig, folder, max_length=None)
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processing)


@pytest.mark.parametrize(
    ("format", "choices"),
    [
        (Format.sft_messages, {}),
        (Format.prompt_completion, {}),
        (Format.prompt_completion, {"conversational": False}),
        (Format.text, {}),
    ],
)
def test_sft_learns_the_thinking_and_the_answer(
    exported: Callable[..., datasets.Dataset], toy_run: Path, tmp_path: Path, format: Format, choices: dict[str, Any]
) -> None:
    """As ids, the trainer's rows are the exported reply up to its end; a prompt of its own is not learnt."""
    rows = exported(format, **choices)
    trainer = sft_trainer(rows, tmp_path, tokenizer(chat_template=KEEPING))
    prepared = trainer.train_dataset
    assert len(prepared) == len(rows) > 3
    for row, source in zip(prepared, rows, strict=True):
        chain = chains(toy_run)[source["prompt_id"]]
        reply = f"<think>\n{chain['thinking']}</think>{chain['answer']}<|im_end|>"
        learnt = trainer.processing_class.decode([id for id in row["labels"] if id >= 0])
        read = trainer.processing_class.decode(row["input_ids"])
        assert read.rstrip("\n").endswith(reply) and chain["prompt"] in read
        has_prompt = format is Format.prompt_completion
        assert (chain["prompt"] in learnt) != has_prompt and chain["thinking"] in learnt
    stepped(trainer)


def test_sft_by_a_template_that_drops_thinking_would_not(
    exported: Callable[..., datasets.Dataset], toy_run: Path, tmp_path: Path
) -> None:
    """What the card warns of: the toy's own template."""
    rows = exported(Format.sft_messages)
    trainer = sft_trainer(rows, tmp_path, tokenizer())
    read = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert chains(toy_run)[rows[0]["prompt_id"]]["thinking"] not in read


@pytest.mark.parametrize(
    ("template", "keeps"), [("qwen3", True), ("deepseek_r1_distill", False), ("deepseek_r1_distill_training", True)]
)
def test_text_keeps_the_thinking_by_the_templates_of_real_families(
    exported: Callable[..., datasets.Dataset], toy_run: Path, template: str, keeps: bool
) -> None:
    """Whatever they do to messages, of which the export's note tells."""
    given = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    for row in exported(Format.text, chat_template=str(given)):
        chain = chains(toy_run)[row["prompt_id"]]
        assert row["text"].endswith(f"<think>\n{chain['thinking']}</think>{chain['answer']}<|im_end|>")
    config = export_config(toy_run, Path("d"), Format.text, chat_template=str(given))
    target = load_target(config, open_runs([str(toy_run)], allow_unfinished=False, needs_verdicts=True)[0])
    assert target is not None and target.keeps_thinking == keeps


def test_dpo_prefers_the_rewrite_after_the_chain_so_far(
    exported: Callable[..., datasets.Dataset], toy_run: Path, tmp_path: Path
) -> None:
    """`eos_token` empty: the trainer then appends none to a step in mid-thought (docs/distillation.md)."""
    rows = exported(Format.step_preferences)
    processing = tokenizer(eos_token="")
    args = arguments(DPOConfig, tmp_path, max_length=None, precompute_ref_log_probs=False)
    model = AutoModelForCausalLM.from_pretrained(DRAFT)
    trainer = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=processing)
    steps = scan(toy_run, "steps")
    assert steps is not None
    by_place = {(row["prompt_id"], row["step_index"]): row for row in steps.collect().to_dicts()}
    assert len(rows) > 3
    for row, source in zip(trainer.train_dataset, rows, strict=True):
        step = by_place[source["prompt_id"], source["step_index"]]
        thinking = chains(toy_run)[source["prompt_id"]]["thinking"]
        prompt, chosen, rejected = (processing.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        assert (prompt + chosen).endswith("<think>\n" + thinking[: step["end"]])
        assert (prompt + rejected).endswith("<think>\n" + thinking[: step["start"]] + step["rejected_text"])
        assert chosen != rejected
    stepped(trainer)


def labelled_ids(row: dict[str, Any], processing: Any) -> dict[str, list[int]]:
    """A row of TRL's stepwise supervision type: each step is labelled at the line's end after it."""
    ids = processing(row["prompt"], add_special_tokens=False).input_ids
    labels = [-100] * len(ids)
    for step, label in zip(row["completions"], row["labels"], strict=True):
        written = processing(f"{step}\n", add_special_tokens=False).input_ids
        ids, labels = ids + written, labels + [-100] * (len(written) - 1) + [int(label)]
    return {"input_ids": ids, "labels": labels}


def step_classifier() -> Any:
    return AutoModelForTokenClassification.from_pretrained(DRAFT, num_labels=2)


def test_a_classifier_of_steps_learns_from_stepwise_supervision(
    exported: Callable[..., datasets.Dataset], tmp_path: Path
) -> None:
    """What TRL's PRMTrainer does, which TRL has dropped after 1.13: token classification at the ends of steps."""
    rows = exported(Format.stepwise_supervision)
    processing = tokenizer()
    features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels")})
    given = {"processing": processing}
    encoded = rows.map(labelled_ids, fn_kwargs=given, remove_columns=rows.column_names, features=features)
    for row, source in zip(encoded, rows, strict=True):
        assert [label for label in row["labels"] if label >= 0] == source["labels"]
    collate = DataCollatorForTokenClassification(processing)
    args = arguments(TrainingArguments, tmp_path)
    stepped(Trainer(model=step_classifier(), args=args, train_dataset=encoded, data_collator=collate))


def test_trls_prm_trainer_learns_from_stepwise_supervision(
    exported: Callable[..., datasets.Dataset], tmp_path: Path
) -> None:
    """Up to TRL 1.13, which is why the tested environment has that one."""
    from trl.experimental import prm

    rows = exported(Format.stepwise_supervision)
    args = arguments(prm.PRMConfig, tmp_path, max_length=None)
    trainer = prm.PRMTrainer(model=step_classifier(), args=args, train_dataset=rows, processing_class=tokenizer())
    stepped(trainer)


def test_raw_rows_hold_the_chains_as_they_were_committed(
    exported: Callable[..., datasets.Dataset], toy_run: Path
) -> None:
    for row in exported(Format.raw):
        chain = chains(toy_run)[row["prompt_id"]]
        assert {name: row[name] for name in chain} == chain
        assert "".join(row["thinking"][step["start"] : step["end"]] for step in row["steps"]) == row["thinking"]
