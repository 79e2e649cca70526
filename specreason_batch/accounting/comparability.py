"""Why the figures of two runs may not be comparable, in words for the reader."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from specreason_batch.accounting.load import RunFiles
from specreason_batch.types import Role

# What two runs may differ in and be comparable: it is what is compared, or it is looked at elsewhere.
_FREE = ("policy.", "seed", "seeded", "schema_version", "input.")
_MAX_NAMED = 3  # differing fields, in a warning


def warnings(first: RunFiles, other: RunFiles, prompts: "Prompts") -> Iterator[str]:
    """Of one pair; the first is the baseline, `prompts` how theirs meet."""
    texts = prompts.warnings(first.label, other.label)
    if prompts.num_common:
        texts += [*_settings(first, other), *_hardware(first, other), *_verification(first, other)]
    for text in texts:
        yield f"{first.label} and {other.label}: {text}"


def unverified(runs: Sequence[RunFiles]) -> Iterator[str]:
    """Of each by itself: verdicts that are not there, or not of one kind."""
    if not any(run.files("verdicts") for run in runs):
        yield "no run is verified: which answers are right is not known (python -m jobs.verify)"
        return
    for run in runs:
        missing = len(run.files("chains")) - len(run.files("verdicts"))
        if missing:
            told = "not verified" if not run.files("verdicts") else f"not verified in {missing:,} of its parts"
            yield f"{run.label} is {told}: python -m jobs.verify run={run.output_dir}"
        if len(_verify_settings(run)) > 1:
            yield f"the verdicts of {run.label} are of several settings; verify it again"


def _settings(first: RunFiles, other: RunFiles) -> Iterator[str]:
    """Differing fields of the fingerprints, by section: those that concern both runs."""
    fields = (first.manifest["fingerprint_fields"], other.manifest["fingerprint_fields"])
    shared = set.intersection(*(_roles(values) for values in fields))
    grading = first.policy == other.policy == "specreason"
    by_section: dict[str, list[str]] = {}
    for name in sorted({*fields[0], *fields[1]}):
        if fields[0].get(name) != fields[1].get(name) and _concerns(name, shared, grading):
            by_section.setdefault(_section(name), []).append(name)
    for section, names in by_section.items():
        yield f"{_SECTIONS.get(section, section)} ({_named(names, *fields)})"


_SECTIONS = {
    "budgets": "the budgets differ",
    "sampling": "the sampling differs",
    "samples_per_prompt": "the number of samples a prompt differs",
    "judge": "the grading differs",
    "base.model": "the base models differ",
    "draft.model": "the draft models differ",
    "base": "the base engines' settings differ",
    "draft": "the draft engines' settings differ",
}


def _roles(fields: Mapping[str, Any]) -> set[str]:
    """The models that a run used."""
    return {role.value for role in Role if any(name.startswith(f"{role}.") for name in fields)}


def _concerns(name: str, shared: set[str], grading: bool) -> bool:
    if name.startswith(_FREE) or (name.startswith("judge.") and not grading):
        return False
    parts = name.split(".")
    if parts[1:2] == ["speculative"]:  # what is compared, as the policy: it changes seconds, hardly rows
        return False
    role = parts[1] if parts[0] == "sampling" else parts[0]
    return role in shared or role not in [role.value for role in Role]


def _section(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[1:2] == ["model"] else parts[0]


def _named(names: Sequence[str], first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    told = [f"{name}: {first.get(name)!r}, {other.get(name)!r}" for name in names[:_MAX_NAMED]]
    more = [f"and {len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return "; ".join(told + more)


def _hardware(first: RunFiles, other: RunFiles) -> Iterator[str]:
    noted = [_machines(run) for run in (first, other)]
    if not all(noted):
        noted = [{", ".join(f"{k} {v}" for k, v in run.manifest["hardware"].items())} for run in (first, other)]
    if noted[0] != noted[1]:
        told = [" or ".join(sorted(machines)) for machines in noted]
        yield f"the hardware differs ({told[0]}; {told[1]}): times and costs are of different machines"


def _machines(run: RunFiles) -> set[str]:
    """What its attempts ran on, in words; empty: nobody noted it."""
    hardware = {attempt.hardware for attempt in run.attempts if attempt.hardware is not None}
    return {", ".join(item.devices) or f"{item.num_cores} cores of {item.cpu or 'a CPU'}" for item in hardware}


def _verification(first: RunFiles, other: RunFiles) -> Iterator[str]:
    settings = [_verify_settings(run) for run in (first, other)]
    if all(settings) and settings[0] != settings[1]:
        yield "verified with different settings: their accuracies are not comparable"


def _verify_settings(run: RunFiles) -> set[bytes]:
    """Of all verdicts files; empty: not verified."""
    return {(pq.read_schema(path).metadata or {}).get(b"settings", b"") for path in run.files("verdicts")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """How the prompts of two runs meet."""

    num_common: int  # the same prompt_id and the same text
    num_only_first: int
    num_only_other: int
    num_differing: int  # the same prompt_id, but another text: not the same prompt

    @classmethod
    def of(cls, first: pl.DataFrame, other: pl.DataFrame) -> "Prompts":
        """From a row a prompt: prompt_id, text (see `texts`)."""
        first, other = (prompts.select("prompt_id", "text") for prompts in (first, other))
        same_id = first.join(other, on="prompt_id", suffix="_other")
        num_common = int((same_id["text"] == same_id["text_other"]).sum())
        return cls(
            num_common=num_common,
            num_only_first=first.height - same_id.height,
            num_only_other=other.height - same_id.height,
            num_differing=same_id.height - num_common,
        )

    def warnings(self, first: str, other: str) -> list[str]:
        """`first`, `other`: the runs' labels."""
        apart = [
            f"{number:,} {where}"
            for number, where in (
                (self.num_only_first, f"only in {first}"),
                (self.num_only_other, f"only in {other}"),
                (self.num_differing, "of the same prompt_id but with different texts"),
            )
            if number
        ]
        if not self.num_common:
            return [f"no prompt in common ({', '.join(apart)}): the two cannot be compared"]
        if not apart:
            return []
        over = f"differences are over the {self.num_common:,} in both, throughput is over all"
        return [f"different prompts ({', '.join(apart)}); {over}"]


def texts(run: RunFiles) -> pl.LazyFrame:
    """A row a prompt: prompt_id, and `text`, a hash of what it says."""
    return run.chains.group_by("prompt_id").agg(text=pl.col("prompt").hash(seed=0).first())
