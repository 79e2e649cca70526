"""Make the toy pair from its seed: prompts, tokenizer, draft, base, figures.

    python -m examples.toy.make                     # everything, into examples/toy
    python -m examples.toy.make --out DIR --stages grades measure

Stages run in the order of `Stage`; a later one reads what the earlier ones left in the output folder.
"""

import argparse
import json
import random
from dataclasses import replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from examples.toy.generation import PAPER, CheckerAuthor, ModelAuthor, accept_right, simulate
from examples.toy.lessons import Attempt, BaseLessons, GradeLesson, Writer
from examples.toy.measure import Pair, measure, measure_draft
from examples.toy.models import BASE, DRAFT, as_llama, new_model, num_parameters, save_model
from examples.toy.task import Problem, answer_text, parse_problem, random_problem
from examples.toy.tokenizer import ENGLISH, make_tokenizer
from examples.toy.training import Aid, EarlyExit, Schedule, VerdictProbe, train
from specreason_batch.chat import ChatFormat, ChatOptions, load_chat_format
from specreason_batch.judge import Judge, Question, Reading
from specreason_batch.types import Role

HERE = Path(__file__).parent
JUDGES = HERE.parents[1] / "conf" / "judge"
NUM_TRAIN, NUM_HELDOUT = 5_000, 500
NUM_ATTEMPTS = 8_000  # chains of the draft's that the base learns to grade
LENIENCE = 0.3  # of the draft's wrong results, how many stay in such a chain

DRAFT_SCHEDULE = Schedule(num_batches=600, batch_size=64, peak_rate=6e-3)
LONGER_DRAFT = 3  # times as many batches, to show that the draft is not too small but trained too little
STEPS_SCHEDULE = Schedule(num_batches=500, batch_size=32, peak_rate=3e-3)
GRADES_SCHEDULE = Schedule(num_batches=650, batch_size=32, peak_rate=2e-3, num_warmup=50)
PROMPT_SCHEMA = pa.schema(
    [("prompt_id", pa.string()), ("prompt", pa.string()), ("gold_answer", pa.string()), ("num_operations", pa.int64())]
)


class Stage(StrEnum):
    prompts = "prompts"
    tokenizer = "tokenizer"
    draft = "draft"
    steps = "steps"
    grades = "grades"
    export = "export"
    measure = "measure"
    longer_draft = "longer_draft"


class Maker:
    """One run of the script: where to, from which seed, at what length."""

    def __init__(self, out: Path, work: Path, seed: int, speed: float):
        """`work` holds the tokenizer and the models in training; `export` brings them to `out`.

        `speed` > 1 trains that many times fewer batches: for trying the script out.
        """
        self.out = out
        self.work = work
        self.seed = seed
        self.speed = speed

    def prompts(self) -> None:
        rng = self._rng("prompts")
        problems: dict[str, Problem] = {}
        while len(problems) < NUM_TRAIN + NUM_HELDOUT:
            problem = random_problem(rng)
            problems[problem.prompt] = problem
        (self.out / "prompts").mkdir(parents=True, exist_ok=True)
        self._write_prompts("heldout", list(problems.values())[:NUM_HELDOUT])
        self._write_prompts("train", list(problems.values())[NUM_HELDOUT:])

    def tokenizer(self) -> None:
        """Saved once on its own; the model folders get their copies of it."""
        chains = (_chain_text(problem) for problem in self._read_prompts("train")[:1_000])
        questions = (f"{judge.question}\n{judge.reply_opening}" for judge in _questions().values())
        tokenizer = make_tokenizer([*chains, *list(questions) * 100, *[ENGLISH] * 5])
        tokenizer.save_pretrained(self.work / "tokenizer")

    def draft(self) -> None:
        save_model(self._trained_draft(self._scaled(DRAFT_SCHEDULE)), self._tokenizer, self.work / "draft")
        self._report("draft", measure_draft(self._pair("draft"), self._heldout))

    def longer_draft(self) -> None:
        """Not kept: only its figures are."""
        longer = replace(DRAFT_SCHEDULE, num_batches=DRAFT_SCHEDULE.num_batches * LONGER_DRAFT)
        model = self._trained_draft(self._scaled(longer))
        self._report("longer_draft", measure_draft(replace(self._pair("draft"), draft=model), self._heldout))

    def steps(self) -> None:
        """The base, as far as it can write chains but not grade them."""
        lessons = BaseLessons(writer=self._writer(self._chat(Role.base), "steps"))
        self._train_base(new_model(BASE, self._tokenizer, self.seed), lessons, STEPS_SCHEDULE, "steps")

    def grades(self) -> None:
        """The base goes on with chains, and learns to grade: grades build on results that it has learnt already."""
        chat = self._chat(Role.base)
        judges = self._judges(chat)
        lessons = BaseLessons(
            writer=self._writer(chat, "grades"),
            attempts=self._draft_attempts(),
            grade_lessons=[
                GradeLesson(judge=judges["short"], share=0.8, num_pairs=2),
                GradeLesson(judge=judges["paper"], share=0.2, num_pairs=1),
            ],
        )
        self._train_base(self._model("base"), lessons, GRADES_SCHEDULE, "grades")

    def export(self) -> None:
        for name in ("draft", "base"):
            save_model(as_llama(self._model(name)), self._tokenizer, self.out / name)

    def measure(self) -> None:
        judges = self._judges(self._chat(Role.base))
        self._report("pair", measure(self._pair("base"), judges, self._heldout, self.seed))

    def _train_base(self, model: Qwen2ForCausalLM, lessons: BaseLessons, schedule: Schedule, name: str) -> None:
        torch.manual_seed(self.seed)
        aids: list[Aid] = [EarlyExit(model)]
        if lessons.grade_lessons:
            aids.append(VerdictProbe(model))
        seconds = train(model, lessons, self._scaled(schedule), self.seed, aids)
        save_model(model, self._tokenizer, self.work / "base")
        self._report(name, {"num_parameters": num_parameters(model), "train_seconds": round(seconds)})

    def _judges(self, chat: ChatFormat) -> dict[str, Judge]:
        return {name: Judge(question, chat) for name, question in _questions().items()}

    def _trained_draft(self, schedule: Schedule) -> Qwen2ForCausalLM:
        writer = self._writer(self._chat(Role.draft), "draft")
        model = new_model(DRAFT, self._tokenizer, self.seed)
        seconds = train(model, lambda: writer.pack(writer.fresh_attempt())[0], schedule, self.seed)
        print(f"draft: {num_parameters(model):,} parameters, {seconds:.0f} s")
        return model

    def _draft_attempts(self) -> list[Attempt]:
        chat, rng = self._chat(Role.draft), self._rng("attempts")
        writer = self._writer(chat, "attempts")
        problems = [writer.fresh_problem() for _ in range(int(NUM_ATTEMPTS / self.speed))]
        draft = ModelAuthor(self._model("draft"), chat, PAPER)
        torch.manual_seed(self.seed)
        runs = simulate(problems, chat, draft, CheckerAuthor(chat), accept_right(LENIENCE, rng))
        return [Attempt(run.problem, run.steps, run.drafts) for run in runs]

    def _pair(self, base: str) -> Pair:
        return Pair(chat=self._chat(Role.base), draft=self._model("draft"), base=self._model(base))

    def _model(self, folder: str) -> Qwen2ForCausalLM:
        return AutoModelForCausalLM.from_pretrained(self.work / folder, dtype=torch.float32).eval()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(self.work / "tokenizer")

    def _chat(self, role: Role) -> ChatFormat:
        return load_chat_format(role, str(self.work / "tokenizer"), ChatOptions())

    def _writer(self, chat: ChatFormat, name: str) -> Writer:
        return Writer(chat, self._rng(name), {problem.prompt for problem in self._heldout})

    @cached_property
    def _heldout(self) -> list[Problem]:
        return self._read_prompts("heldout")

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def _scaled(self, schedule: Schedule) -> Schedule:
        return replace(schedule, num_batches=int(schedule.num_batches / self.speed))

    def _write_prompts(self, name: str, problems: list[Problem]) -> None:
        rows = [_prompt_row(f"{name}-{index:04}", problem) for index, problem in enumerate(problems)]
        pq.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA), self.out / "prompts" / f"{name}.parquet")

    def _read_prompts(self, name: str) -> list[Problem]:
        table = pq.read_table(self.out / "prompts" / f"{name}.parquet", columns=["prompt"])
        return [parse_problem(prompt) for prompt in table["prompt"].to_pylist()]

    def _report(self, name: str, figures: dict[str, object]) -> None:
        path = self.out / "figures.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | {name: figures}, indent=2) + "\n")
        print(json.dumps({name: figures}), flush=True)


def _prompt_row(prompt_id: str, problem: Problem) -> dict[str, object]:
    return {
        "prompt_id": prompt_id,
        "prompt": problem.prompt,
        "gold_answer": str(problem.gold_answer),
        "num_operations": len(problem.operations),
    }


def _chain_text(problem: Problem) -> str:
    return problem.prompt + "".join(step.text for step in problem.right_chain()) + answer_text(problem.gold_answer)


def _questions() -> dict[str, Question]:
    return {name: _read_question(JUDGES / f"{name}.yaml") for name in ("short", "paper")}


def _read_question(path: Path) -> Question:
    values = yaml.safe_load(path.read_text())
    return Question(**values | {"reading": Reading(values["reading"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, default=Path("build/toy"))
    parser.add_argument("--stages", nargs="+", type=Stage, default=list(Stage), choices=list(Stage))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", type=float, default=1.0, help="train this many times fewer batches")
    options = parser.parse_args()
    torch.set_num_threads(2)
    maker = Maker(options.out, options.work, options.seed, options.speed)
    for stage in Stage:
        if stage in options.stages:
            getattr(maker, stage)()


if __name__ == "__main__":
    main()
