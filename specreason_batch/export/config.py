"""The choices of `jobs.export`: typed, with their ranges. Does not know: files, runs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from specreason_batch.types import AnswerEnd, InvalidInput, ThinkingEnd

MISSING: Any = "???"  # OmegaConf's: a value that must be given


class Format(StrEnum):
    """What a row is; each is read as it is by the library that it is named after (docs/distillation.md)."""

    sft_messages = "sft_messages"
    prompt_completion = "prompt_completion"
    text = "text"
    step_preferences = "step_preferences"
    stepwise_supervision = "stepwise_supervision"
    raw = "raw"


class Answers(StrEnum):
    """Which verdicts are kept."""

    all = "all"  # verdicts are not looked at
    right = "right"  # right by the gold answer
    right_or_majority = "right_or_majority"  # and, where a prompt has no gold answer, what most of its samples say


class Best(StrEnum):
    """Which samples of a prompt come first."""

    first = "first"  # in the order of the runs and their parts
    shortest = "shortest"  # fewest tokens
    highest_grade = "highest_grade"  # mean score of its graded kept steps; chains without any come last
    most_draft = "most_draft"  # share of its thinking's tokens that the draft wrote


class TokensBy(StrEnum):
    """Who counts a chain's tokens."""

    run = "run"  # thinking and answer, as their authors generated them
    tokenizer = "tokenizer"  # thinking and answer, by the tokenizer given


@dataclass(kw_only=True)
class SelectConfig:
    """Which chains are kept. None: no such limit."""

    thinking_ends: list[ThinkingEnd] = field(default_factory=lambda: [ThinkingEnd.closed])
    answer_ends: list[AnswerEnd] = field(default_factory=lambda: [AnswerEnd.stop])
    answers: Answers = Answers.all
    min_tokens: int | None = None  # of thinking and answer
    max_tokens: int | None = None
    tokens_by: TokensBy = TokensBy.run
    max_repeated_ngrams: float | None = None  # share of the thinking's word n-grams that came before in it, 0-1
    repeated_ngram: int = 8  # words
    max_repeated_steps: int | None = None  # steps that are the same as an earlier one of the chain
    max_foreign_letters: float | None = None  # share of letters in scripts that the prompt does not use, 0-1
    min_pass_rate: float | None = None  # right samples of the prompt by right and wrong ones, 0-1
    max_pass_rate: float | None = None
    drop_duplicates: bool = True  # the same prompt, thinking and answer once more
    per_prompt: int | None = None  # samples of a prompt, at most
    best: Best = Best.shortest  # which of them

    @property
    def needs_verdicts(self) -> bool:
        return self.answers is not Answers.all or self.min_pass_rate is not None or self.max_pass_rate is not None

    def problems(self, path: str) -> Iterator[str]:
        for name in ("thinking_ends", "answer_ends"):
            if not getattr(self, name):
                yield f"{path}.{name}: [] keeps nothing; allowed: at least one"
        for name, low in (("min_tokens", 0), ("max_tokens", 1), ("max_repeated_steps", 0), ("per_prompt", 1)):
            yield from _at_least(path, name, getattr(self, name), low)
        yield from _at_least(path, "repeated_ngram", self.repeated_ngram, 1)
        for name in ("max_repeated_ngrams", "max_foreign_letters", "min_pass_rate", "max_pass_rate"):
            yield from _share(path, name, getattr(self, name))
        for low_name, high_name in (("min_tokens", "max_tokens"), ("min_pass_rate", "max_pass_rate")):
            low_value, high_value = getattr(self, low_name), getattr(self, high_name)
            if low_value is not None and high_value is not None and low_value > high_value:
                yield f"{path}.{low_name}: {low_value} is out of range; allowed: at most {high_name}, {high_value}"


@dataclass(kw_only=True)
class NearDuplicatesConfig:
    """Chains that are nearly the same text, by MinHash over shingles of words."""

    threshold: float | None = None  # Jaccard similarity from which two are the same, over 0 to 1; None: not looked for
    num_perm: int = 128  # values of a sketch: its error is about 1 / sqrt(num_perm)
    shingle_words: int = 5

    def problems(self, path: str) -> Iterator[str]:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            yield f"{path}.threshold: {self.threshold} is out of range; allowed: null, over 0 to 1"
        if not 16 <= self.num_perm <= 1024:
            yield f"{path}.num_perm: {self.num_perm} is out of range; allowed: 16 to 1024"
        yield from _at_least(path, "shingle_words", self.shingle_words, 1)


@dataclass(kw_only=True)
class DecontaminateConfig:
    """Evaluation prompts that must not be trained on."""

    files: list[str] = field(default_factory=list)  # files, folders or globs of .parquet, .jsonl, .ndjson (also .gz)
    column: str | None = None  # the prompts'; None: found by a well-known name
    ngram: int = 13  # words that two prompts share

    def problems(self, path: str) -> Iterator[str]:
        yield from _at_least(path, "ngram", self.ngram, 5)


@dataclass(kw_only=True)
class ExportConfig:
    """`python -m jobs.export`. Raises InvalidInput that lists every field out of range."""

    runs: list[str] = MISSING  # output folders of jobs.generate
    output: str = MISSING  # a folder that does not exist yet
    format: Format = MISSING
    conversational: bool = True  # prompt_completion: as messages; false: as text, for which a tokenizer is needed
    tokenizer: str | None = None  # model folder whose chat template renders text, and which counts tokens
    chat_template: str | None = None  # Jinja text, or a file *.jinja, in place of the tokenizer's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. enable_thinking
    select: SelectConfig = field(default_factory=SelectConfig)
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    validation: float = 0.02  # share of the prompts that make the validation split; 0: none
    seed: int = 0  # of the split
    rows_per_file: int = 50_000  # at most
    aside: bool = False  # write what each filter removed to removed/<filter>.parquet
    allow_unfinished: bool = False  # export what is committed of runs that are not done
    license: str | None = None  # the card's, by its hub name; None: the prompts' column `license`, if it has one value
    name: str | None = None  # the card's title; None: the output folder's name
    log_seconds: float = 10.0  # between progress lines

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise InvalidInput("\n".join(problems))

    @property
    def renders_text(self) -> bool:
        """Whether rows hold text as a chat template renders it."""
        is_text = self.format is Format.prompt_completion and not self.conversational
        return is_text or self.format in (Format.text, Format.step_preferences)

    @property
    def title(self) -> str:
        return self.name or self.output.rstrip("/").rpartition("/")[2]

    def problems(self) -> Iterator[str]:
        for name in ("runs", "output", "format"):
            if not getattr(self, name) or getattr(self, name) == MISSING:
                yield f"{name}: not set; it needs a value"
        if len(set(self.runs)) < len(self.runs):
            yield f"runs: {self.runs} names a run twice; allowed: each once"
        yield from self.select.problems("select")
        yield from self.near_duplicates.problems("near_duplicates")
        yield from self.decontaminate.problems("decontaminate")
        if not 0 <= self.validation < 1:
            yield f"validation: {self.validation} is out of range; allowed: a share from 0 to under 1"
        for name, low in (("seed", 0), ("rows_per_file", 1), ("log_seconds", 0.1)):
            yield from _at_least("", name, getattr(self, name), low)
        yield from self._tokenizer_problems()

    def _tokenizer_problems(self) -> Iterator[str]:
        if self.tokenizer:
            return
        if self.renders_text:
            yield f"tokenizer: not set; {self.format} is rendered by one: the folder of the model that will be trained"
        if self.select.tokens_by is TokensBy.tokenizer:
            yield "tokenizer: not set; select.tokens_by=tokenizer counts by it"
        if self.chat_template or self.template_kwargs:
            yield "tokenizer: not set; chat_template and template_kwargs are for it"

    def row_fields(self) -> dict[str, Any]:
        """What decides the output, but for the inputs' content: two equal ones make the same files."""
        elsewhere = ("runs", "output", "log_seconds", "name", "tokenizer")
        kept = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        kept["decontaminate"] = {name: value for name, value in kept["decontaminate"].items() if name != "files"}
        return kept | {"title": self.title}


def _at_least(path: str, name: str, value: float | None, low: float) -> Iterator[str]:
    if value is not None and not value >= low:
        yield f"{path}{'.' if path else ''}{name}: {value} is out of range; allowed: at least {low}"


def _share(path: str, name: str, value: float | None) -> Iterator[str]:
    if value is not None and not 0 <= value <= 1:
        yield f"{path}.{name}: {value} is out of range; allowed: null, 0 to 1"
