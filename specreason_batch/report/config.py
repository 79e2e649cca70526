"""The choices of `jobs.report`: typed, with their ranges. Does not know: which sections there are."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from specreason_batch.accounting.latency_constants import LatencyConstants
from specreason_batch.accounting.prices import Prices
from specreason_batch.types import InvalidInput

MISSING: Any = "???"  # OmegaConf's: a value that must be given
HEADLINE, ALL = "headline", "all"


@dataclass(kw_only=True)
class ReportConfig:
    """`python -m jobs.report`. Raises InvalidInput that lists every field out of range."""

    runs: Any = MISSING  # output folders of jobs.generate, or globs of such: one, or several to compare
    output: str | None = None  # the report's folder; None: `report` in the run, or beside the runs
    baseline: str | None = None  # the end of its path; None: the first run of the base alone, else the first
    cost: Prices = field(default_factory=Prices)
    latency: LatencyConstants | None = None  # of one chain alone, from conf/latency; None: no modelled latency
    calibration: str | None = None  # in place of `latency`: a file of jobs.calibrate
    sections: Any = HEADLINE  # on the terminal, below the headline: `all`, or names; the files hold all

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        if not self.run_names or MISSING in self.run_names:
            yield "runs: not set; it needs a run's folder, or several as [A,B]"
        if self.output is not None and not self.output.strip():
            yield f"output: {self.output!r} is empty; allowed: null or a folder"
        if self.latency is not None and self.calibration is not None:
            yield f"calibration: {self.calibration!r} beside latency=...; allowed: one of the two"
        for name in ("runs", "sections"):
            value = getattr(self, name)
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                yield f"{name}: {value!r}; allowed: a text, or several as [A,B]"

    @property
    def run_names(self) -> list[Any]:
        return self.runs if isinstance(self.runs, list) else [self.runs]

    def shown_sections(self, known: list[str]) -> list[str]:
        """Raises InvalidInput if one is not known."""
        if self.sections in (HEADLINE, ALL):
            return known if self.sections == ALL else []
        wanted = self.sections if isinstance(self.sections, list) else [self.sections]
        if unknown := [name for name in wanted if name not in known]:
            raise InvalidInput(f"sections: {unknown[0]!r}; allowed: {HEADLINE}, {ALL}, or some of [{','.join(known)}]")
        return wanted
