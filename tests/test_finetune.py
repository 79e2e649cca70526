"""What jobs.export wrote is trained on as an engine reads it; out comes a model folder, whole, that a run can use."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console
from safetensors.numpy import load_file

import jobs.finetune  # noqa: F401  (its schema)
from examples.toy.task import Problem, answer_text, corrupted_step, random_problem
from jobs.launch import ExitStatus, converted
from specreason_batch.chat import ChatFormat, ChatOptions, load_chat_format
from specreason_batch.config import ChatConfig
from specreason_batch.export import ExportConfig, export
from specreason_batch.export.config import Format
from specreason_batch.finetune import FinetuneConfig, Stage, finetune
from specreason_batch.finetune.dataset import open_export
from specreason_batch.finetune.encoding import IGNORED, Encoder
from specreason_batch.finetune.output import WorkFolder
from specreason_batch.schedules import Stopped
from specreason_batch.signals import STOP_SIGNALS
from specreason_batch.types import InvalidInput, Role
from tests.support.finished import TOY, Finished, Told, write_run

ROOT = Path(__file__).parent.parent
DRAFT = TOY / "draft"
NUM_PROBLEMS = 96
Row = dict[str, Any]


def toy_chain(number: int, rng: random.Random) -> Finished:
    """The right chain of a toy problem; of some steps, a draft went wrong before."""
    problem = random_problem(rng)
    return Finished(
        prompt_id=f"p{number}",
        prompt=problem.prompt,
        steps=list(told(problem, rng)),
        answer=answer_text(problem.gold_answer),
    )


def told(problem: Problem, rng: random.Random) -> Iterator[Told]:
    chain = problem.right_chain()
    for index, step in enumerate(chain):
        wrong = corrupted_step(problem, chain[:index], rng).text if rng.random() < 0.4 else None
        yield Told(text=step.text, rejected=wrong, score=1.0 if wrong else 8.5)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(7)
    return write_run(tmp_path_factory.mktemp("run") / "run", [toy_chain(n, rng) for n in range(NUM_PROBLEMS)])


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run in a format; the same one again is not made again."""
    folder = tmp_path_factory.mktemp("exports")

    def make(format: str, conversational: bool = True, **changes: Any) -> Path:
        choices: Row = {"conversational": conversational, "tokenizer": str(DRAFT), "validation": 0.1, **changes}
        output = folder / "-".join(map(str, (format, conversational, *changes)))
        config = ExportConfig(runs=[str(run_folder)], output=str(output), format=Format(format), **choices)
        export(config, Console(file=StringIO()))
        return output

    return make


@pytest.fixture
def signals() -> Iterator[None]:
    """A run that was stopped ignores further signals: its process is about to end. This one is not."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def choices(data: Path, output: Path, **changes: Any) -> Row:
    """Of a short training."""
    given = {"batch_size": 8, "learning_rate": 1e-3, "log_steps": 1, "gradient_checkpointing": False}
    return {"data": str(data), "model": str(DRAFT), "output": str(output), **given, **changes}


def train(data: Path, output: Path, console_file: StringIO | None = None, **changes: Any) -> str:
    """What was printed."""
    file = console_file or StringIO()
    finetune(FinetuneConfig(**choices(data, output, **changes)), Console(file=file, width=200))
    return file.getvalue()


def command(data: Path, output: Path, **changes: Any) -> list[str]:
    words = [f"{name}={json.dumps(value)}" for name, value in choices(data, output, **changes).items()]
    return [sys.executable, "-m", "jobs.finetune", *words]


def told_by(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def record(model: Path) -> Row:
    found: Row = json.loads((model / "finetune.json").read_text())
    return found


def curve(model: Path, name: str) -> list[float]:
    return [entry[name] for entry in record(model)["log"] if name in entry]


def first_row(data: Path) -> Row:
    row: Row = pq.read_table(sorted(data.glob("data/train-*.parquet"))[0]).to_pylist()[0]
    return row


# --- the rows, as an engine sees them ---


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return load_chat_format(Role.draft, str(DRAFT), ChatOptions())


def chain_of(run_folder: Path, prompt_id: str) -> Row:
    rows = pq.read_table(next(run_folder.glob("*/chains/*.parquet"))).to_pylist()
    return next(row for row in rows if row["prompt_id"] == prompt_id)


@pytest.mark.parametrize(
    ("format", "conversational"),
    [("sft_messages", True), ("prompt_completion", True), ("prompt_completion", False), ("text", True)],
)
def test_a_chain_is_learnt_in_the_ids_of_a_run_whatever_the_format(
    format: str, conversational: bool, exported: Callable[..., Path], run_folder: Path, chat: ChatFormat
) -> None:
    """The thinking that a chat template would strip included; the prompt is read and not learnt."""
    data = open_export(str(exported(format, conversational)), Stage.auto)
    row = first_row(data.folder)
    ids = Encoder(chat).for_format(data.format, data.is_conversational)(row)
    chain = chain_of(run_folder, row["prompt_id"])
    opening = chat.opening(chain["prompt"])
    learnt = [*chat.encode_text(chain["thinking"]), chat.think_close_id, *chat.encode_text(chain["answer"])]
    assert ids["input_ids"] == [*opening, *learnt, chat.tokenizer.eos_token_id]
    assert ids["labels"] == [IGNORED] * len(opening) + ids["input_ids"][len(opening) :]


def test_a_preference_is_two_steps_after_the_chain_so_far_and_neither_ends_the_text(
    exported: Callable[..., Path], run_folder: Path, chat: ChatFormat
) -> None:
    data = open_export(str(exported("step_preferences")), Stage.dpo)
    row = first_row(data.folder)
    ids = Encoder(chat).for_format(data.format, data.is_conversational)(row)
    chain = chain_of(run_folder, row["prompt_id"])
    before, chosen, _ = chain["thinking"].partition(row["chosen"])
    assert chosen and row["chosen"] != row["rejected"]
    assert ids["prompt_ids"] == chat.opening(chain["prompt"]) + chat.encode_text(before)
    assert (ids["chosen_ids"], ids["rejected_ids"]) == (
        chat.encode_text(row["chosen"]),
        chat.encode_text(row["rejected"]),
    )


# --- the stages ---


@pytest.fixture(scope="module")
def sft(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "draft-sft"
    train(exported("sft_messages"), output, max_steps=24)
    return output


def test_sft_lowers_the_loss(sft: Path) -> None:
    """Over two epochs and a little: chains come again."""
    losses = curve(sft, "loss")
    assert len(losses) == 24
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert len(curve(sft, "eval_loss")) == 2


def test_what_comes_out_is_the_given_model_with_other_weights_of_the_same_type_and_a_card(sft: Path) -> None:
    inherited = {path.name for path in DRAFT.iterdir()} - {"model.safetensors"}
    assert {path.name for path in sft.iterdir()} == inherited | {"model.safetensors", "finetune.json", "README.md"}
    assert all((sft / name).read_bytes() == (DRAFT / name).read_bytes() for name in inherited)
    old, new = load_file(DRAFT / "model.safetensors"), load_file(sft / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in old.items()} == {
        name: (t.shape, t.dtype) for name, t in new.items()
    }
    assert all((old[name] != new[name]).any() for name in old if name.endswith("weight"))
    assert not list(sft.parent.glob(".*"))  # nothing is left of the training


def test_the_card_tells_model_data_arguments_and_losses(sft: Path) -> None:
    card = (sft / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers" in card
    assert f"`{DRAFT}` after supervised finetuning" in card
    [run] = record(sft)["made_from"]["data"]["made_from"]["runs"]
    for row in ("format | sft_messages", f"made from runs | {run['fingerprint']}", "learning_rate | 0.001"):
        assert f"| {row} |" in card
    assert re.search(r"\| train loss \| 0\.\d+ at first, 0\.\d+ at last \|", card)


def test_a_run_takes_what_came_out_as_its_draft(sft: Path, tmp_path: Path) -> None:
    words = ["policy=draft_only", "limit=4", f"draft.model={sft}", f"output_dir={tmp_path}/run"]
    done = told_by([sys.executable, "-m", "jobs.generate", *words])
    assert done.returncode == ExitStatus.finished, done.stdout + done.stderr
    chains = pq.read_table(next((tmp_path / "run").glob("*/chains/*.parquet"))).to_pylist()
    assert len(chains) == 4 and all(chain["thinking"].startswith("a) ") for chain in chains)


def test_dpo_comes_to_prefer_what_the_base_wrote(sft: Path, exported: Callable[..., Path], tmp_path: Path) -> None:
    """From the reference's indifference, log 2."""
    output = tmp_path / "draft-dpo"
    train(exported("step_preferences"), output, model=str(sft), max_steps=16, batch_size=32, learning_rate=1e-3)
    losses = curve(output, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=0.001)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert sum(curve(output, "rewards/accuracies")[-4:]) > 4 * 0.75


# --- whole or not at all ---


class Interrupted(StringIO):
    """A terminal whose user presses Ctrl-C when a line begins so."""

    def __init__(self, line: str):
        super().__init__()
        self._line = line

    def write(self, text: str) -> int:
        if text.startswith(self._line):
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def weights(model: Path) -> Row:
    return dict(load_file(model / "model.safetensors"))


def test_a_training_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    exported: Callable[..., Path], tmp_path: Path, signals: None
) -> None:
    data = exported("sft_messages")
    train(data, tmp_path / "whole", max_steps=6)
    with pytest.raises(Stopped, match=r"step [34] of 6"):
        train(data, tmp_path / "stopped", Interrupted("step 3 of 6"), max_steps=6)
    assert not (tmp_path / "stopped").exists()
    assert "going on from checkpoint-" in train(data, tmp_path / "stopped", max_steps=6)
    assert curve(tmp_path / "stopped", "loss") == pytest.approx(curve(tmp_path / "whole", "loss"), rel=1e-3)
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(abs(whole[name] - stopped[name]).max() < 1e-4 for name in whole)


def test_a_training_that_was_killed_leaves_no_model_and_goes_on_from_its_checkpoint(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    data, output = exported("sft_messages"), tmp_path / "killed"
    given = {"max_steps": 40, "checkpoint_seconds": 0.001}
    work = WorkFolder(output)
    with subprocess.Popen(command(data, output, **given), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while work.checkpoint is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert work.checkpoint is not None
    assert not output.exists()
    with pytest.raises(InvalidInput, match=r"begun otherwise \(settings.seed: 0, now 1\)"):
        train(data, output, **given, seed=1)
    assert "going on from checkpoint-" in train(data, output, **given)
    assert len(curve(output, "loss")) == 40


def test_the_same_command_again_trains_nothing_and_another_one_is_refused(
    sft: Path, exported: Callable[..., Path]
) -> None:
    data, before = exported("sft_messages"), (sft / "model.safetensors").stat().st_mtime_ns
    assert "nothing to do" in train(data, sft, max_steps=24)
    with pytest.raises(InvalidInput, match=r"trained otherwise \(settings.learning_rate: 0.001, now 0.01\)"):
        train(data, sft, max_steps=24, learning_rate=1e-2)
    assert (sft / "model.safetensors").stat().st_mtime_ns == before


def test_a_model_that_was_changed_is_not_taken_for_what_was_made(
    sft: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(sft, changed)
    (changed / "model.safetensors").write_bytes((DRAFT / "model.safetensors").read_bytes())
    with pytest.raises(InvalidInput, match="not as it was written"):
        train(exported("sft_messages"), changed, max_steps=24)


# --- what cannot be used ---


def other_tokenizer(tmp_path: Path) -> Path:
    """The draft with another chat template."""
    model = tmp_path / "other"
    shutil.copytree(DRAFT, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|> "))
    return model


def without_train_rows(data: Path, tmp_path: Path) -> Path:
    """As an export is whose rows all fell to the validation split."""
    empty = tmp_path / "empty"
    shutil.copytree(data, empty)
    manifest = json.loads((empty / "export.json").read_text())
    for name in [name for name in manifest["files"] if "train-" in name]:
        (empty / name).unlink()
        del manifest["files"][name]
    (empty / "export.json").write_text(json.dumps(manifest))
    return empty


def torn(data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "torn"
    shutil.copytree(data, folder)
    path = next(folder.glob("data/train-*.parquet"))
    path.write_bytes(path.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("format", "spoil", "changes", "message"),
    [
        (
            "sft_messages",
            lambda data, path: path / "nowhere",
            {},
            "data: there is no folder .*; allowed: the output of",
        ),
        ("sft_messages", lambda data, path: TOY / "prompts", {}, "data: .*export.json is not what jobs.export has"),
        ("raw", None, {}, "has the format raw; allowed for stage=auto: sft_messages, prompt_completion, text, step_"),
        ("sft_messages", None, {"stage": Stage.dpo}, "format sft_messages; allowed for stage=dpo: step_preferences"),
        (
            "step_preferences",
            None,
            {"stage": Stage.sft},
            "allowed for stage=sft: sft_messages, prompt_completion, text",
        ),
        ("sft_messages", without_train_rows, {}, "has no rows to train on; allowed: an export with a train split"),
        ("sft_messages", torn, {}, "train-00000-of-00001.parquet is not as it was exported; export it again"),
        (
            "sft_messages",
            None,
            {"model": "no/such-model"},
            "model: 'no/such-model' is neither a folder with config.json",
        ),
        ("sft_messages", None, {"chat": "<ponder>"}, "allowed: the assistant, who begins with chat.think_open"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(
    format: str, spoil: Any, changes: Row, message: str, exported: Callable[..., Path], tmp_path: Path
) -> None:
    data = exported(format)
    if "chat" in changes:
        changes = {"chat": ChatConfig(think_open=changes["chat"])}
    with pytest.raises(InvalidInput, match=message):
        train(spoil(data, tmp_path) if spoil else data, tmp_path / "model", **changes)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("format", ["text", "step_preferences"])
def test_text_that_another_chat_template_rendered_is_refused_and_messages_are_not(
    format: str, exported: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(other_tokenizer(tmp_path))
    with pytest.raises(InvalidInput, match=r"rendered by another tokenizer .* \(chat_template.jinja differs\)"):
        train(exported(format), tmp_path / "model", model=model)
    train(exported("sft_messages"), tmp_path / "model", model=model, max_steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: 0 is out of range; allowed: over 0"),
        ({"warmup": 1}, "warmup: 1 is out of range; allowed: a share from 0 to under 1"),
        ({"batch_size": 0, "beta": -1}, "batch_size: 0 is out of range.*\nbeta: -1 is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is out of range"),
        ({"max_length": 5}, "max_length: every row is longer than 5 tokens"),
        ({"lr_schedule": "wavy"}, "SFTConfig refuses these settings: .*wavy"),
        ({"trainer_args": {"learning_rate": 1}}, "trainer_args.learning_rate: jobs.finetune sets it"),
        ({"trainer_args": {"lerning_rate": 1}}, "trainer_args.lerning_rate: no such field of trl.SFTConfig"),
    ],
)
def test_a_choice_out_of_range_is_refused(
    changes: Row, message: str, exported: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message):
        train(exported("sft_messages"), tmp_path / "model", **changes)
    assert not (tmp_path / "model").exists()


def test_the_yaml_holds_the_schemas_defaults_and_takes_what_trl_takes_beside() -> None:
    words = ["data=a", "model=b", "output=c", "+trainer_args.loss_type=[sigmoid,sft]"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = converted(compose("finetune", words), FinetuneConfig)
    assert config == FinetuneConfig(data="a", model="b", output="c", trainer_args={"loss_type": ["sigmoid", "sft"]})


def test_a_users_mistake_is_one_message_before_any_trainer_is_imported(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    program = (
        "import sys, runpy\n"
        "try: runpy.run_module('jobs.finetune', run_name='__main__', alter_sys=True)\n"
        "finally: assert 'trl' not in sys.modules\n"
    )
    words = command(exported("raw"), tmp_path / "model")[3:]
    done = told_by([sys.executable, "-c", program, *words])
    assert done.returncode == ExitStatus.invalid
    assert done.stderr.startswith("error: data: ") and done.stderr.count("\n") == 1
