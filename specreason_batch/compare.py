"""Several variants of one experiment: what each run is, and in which order they are made.

Does not know: how a run is started (jobs/compare.py), Hydra.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from specreason_batch.accounting.prices import Prices
from specreason_batch.types import InvalidInput

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_REFERENCE = re.compile(r"\{(\w[\w-]*)\}")
SAME_FOR_ALL = ("experiment", "limit", "seed", "output_dir")  # what a variant cannot set


@dataclass(kw_only=True)
class CompareConfig:
    """`python -m jobs.compare`. Raises InvalidInput that lists every field out of range."""

    overrides: list[str] = field(default_factory=list)  # of jobs.generate, for every variant
    output: str | None = None  # None: outputs/compare/<the experiment's name>
    limit: int | None = None  # the first prompts of each shard; None: all
    repeats: int = 1  # runs of each variant, with a seed each
    seed: int = 0  # of the first repeat
    only: list[str] | None = None  # some of the variants; None: all
    verify: bool = True
    cost: Prices = field(default_factory=Prices)  # for the report
    variants: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides of jobs.generate

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        if self.output is not None and not self.output.strip():
            yield f"output: {self.output!r} is empty; allowed: null or a folder"
        for name, low in (("limit", 1), ("repeats", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                yield f"{name}: {value} is out of range; allowed: at least {low}"
        if not self.chosen:
            yield "variants: there are none; allowed: one or more, as +variants.mine=[policy.threshold=5]"
        yield from (f"only: {name!r} is no variant; allowed: {self._names}" for name in self._unknown)
        for word in self.overrides:
            if _named(word) == "output_dir":
                yield f"{word}: each variant has a folder of its own; allowed: output=<a folder for all>"
        for name, words in self.variants.items():
            if not _NAME.fullmatch(name):
                yield f"variants: {name!r}; allowed: names of letters, digits, _ and -, for they name folders"
            yield from self._word_problems(f"variants.{name}", words, known=self._before(name))

    def _word_problems(self, path: str, words: list[str], known: tuple[str, ...]) -> Iterator[str]:
        for word in words:
            if _named(word) in SAME_FOR_ALL:
                yield f"{path}: {word!r} is the same for all variants; allowed: on the command line of jobs.compare"
            for reference in _REFERENCE.findall(word):
                if reference not in known:
                    yield f"{path}: {word!r} names no variant before it; allowed: {', '.join(known) or 'none'}"

    @property
    def chosen(self) -> list[str]:
        """The variants to run, in the order of `variants`."""
        return [name for name in self.variants if self.only is None or name in self.only]

    @property
    def _unknown(self) -> list[str]:
        return [name for name in self.only or () if name not in self.variants]

    @property
    def _names(self) -> str:
        return ", ".join(self.variants)

    def _before(self, name: str) -> tuple[str, ...]:
        names = list(self.variants)
        return tuple(names[: names.index(name)])


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRun:
    """One run of one variant."""

    variant: str
    repeat: int  # from 0
    output_dir: Path
    seed: int
    words: tuple[str, ...]  # overrides of jobs.generate, but for limit, seed and output folder; paths as they are
    refers_to: frozenset[Path]  # output folders of the runs that its words name

    @property
    def name(self) -> str:
        return self.output_dir.name


def _named(word: str) -> str:
    """What an override sets."""
    return word.partition("=")[0].lstrip("+~")


def planned_runs(config: CompareConfig, output: Path) -> list[VariantRun]:
    """Every run, in the order in which they are to be made: round robin."""
    return [_run(config, output, name, repeat) for repeat in range(config.repeats) for name in config.chosen]


def _run(config: CompareConfig, output: Path, variant: str, repeat: int) -> VariantRun:
    def folder(name: str) -> Path:
        return output / (name if repeat == 0 else f"{name}.{repeat + 1}")

    words = [*config.overrides, *config.variants[variant]]
    return VariantRun(
        variant=variant,
        repeat=repeat,
        output_dir=folder(variant),
        seed=config.seed + repeat,
        words=tuple(_REFERENCE.sub(lambda found: str(folder(found[1])), word) for word in words),
        refers_to=frozenset(folder(name) for word in words for name in _REFERENCE.findall(word)),
    )
