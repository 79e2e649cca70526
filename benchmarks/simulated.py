"""Schedules on GPUs' cost profiles, in virtual time: chains/s over base_only, deterministic, in a minute or two.

    python -m benchmarks.simulated

Every chain is as long as its case says (a steady state), steps vary in length. "shared": draft and base on the same
GPUs, so equal hardware; "own": the draft on one GPU more, and the ratio per GPU beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console
from rich.table import Table

from specreason_batch.profiles import H200, H200_TP8
from specreason_batch.schedules import SCHEDULES, Schedule, continuous, overlapped
from specreason_batch.simulation import Hardware, Simulated, Workload, simulate

CACHE_REST = 8  # tokens that a request computes again on average: half a cache block
SCHEDULES_SHOWN: dict[str, Schedule] = {**SCHEDULES, "overlapped, 2 cohorts": partial(overlapped, cohorts=2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pair on its hardware, and its chains."""

    name: str
    hardware: Hardware
    num_gpus: int
    active_size: int
    context_tokens: int
    step_tokens: int
    grade_tokens: int  # new prompt tokens a grade: the step, the grading turn, the rest of a cache block

    def hardware_here(self, shared: bool) -> Hardware:
        draft, base = (profile.at_context(self.context_tokens) for profile in (self.hardware.draft, self.hardware.base))
        return Hardware(draft=draft, base=base, shared=shared)

    def workload(self, accept_rate: float) -> Workload:
        turn = self.grade_tokens - self.step_tokens - CACHE_REST
        return Workload(step_tokens=self.step_tokens, turn_tokens=turn, accept_rate=accept_rate)

    @property
    def seconds(self) -> float:
        """Virtual: what base_only takes for 40 steps of each chain."""
        base = self.hardware_here(shared=True).base
        return (
            40 * self.step_tokens * (base.host_seconds + base.pass_seconds + base.sequence_seconds * self.active_size)
        )


def _case(
    name: str, active: int, context: int, step: int, grade: int, hardware: Hardware = H200, gpus: int = 1
) -> Case:
    return Case(
        name=name,
        hardware=hardware,
        num_gpus=gpus,
        active_size=active,
        context_tokens=context,
        step_tokens=step,
        grade_tokens=grade,
    )


# The table of the design notes (docs/performance.md).
CASES = (
    _case("32B, one H200, B 46, 5k, S 32, G 100", 46, 5_000, 32, 100),
    _case("32B, one H200, B 46, 5k, S 32, G 50", 46, 5_000, 32, 50),
    _case("32B, one H200, B 46, 5k, S 64, G 82", 46, 5_000, 64, 82),
    _case("32B, one H200, B 14, 16k, S 32, G 50", 14, 16_000, 32, 50),
    _case("32B, eight H200, B 100, 16k, S 32, G 50", 100, 16_000, 32, 50, H200_TP8, 8),
    _case("32B, one H200, B 8, 5k, S 32, G 50", 8, 5_000, 32, 50),
    _case("32B, one H200, B 1, 5k, S 32, G 100", 1, 5_000, 32, 100),
)
ACCEPT_RATES = (0.7, 0.9)


def simulate_case(case: Case, schedule: Schedule, policy: str, accept_rate: float, shared: bool = True) -> Simulated:
    """One cell: a policy under a schedule. base_only does not look at the acceptance."""
    hardware = case.hardware_here(shared)
    return simulate(schedule, policy, case.workload(accept_rate), hardware, case.active_size, case.seconds)


def base_alone(case: Case) -> dict[str, float]:
    """Tokens/s of the base: step by step as base_only goes, and each chain in one generation."""
    stepwise = simulate_case(case, continuous, "base_only", 0.0)
    workload = replace(case.workload(0.0), num_steps=1, step_tokens=20 * case.step_tokens)
    whole = simulate(
        continuous, "base_only", workload, case.hardware_here(shared=True), case.active_size, 10 * case.seconds
    )
    return {"base_only": stepwise.tokens_per_second, "base in one generation": whole.tokens_per_second}


def rows(case: Case) -> Iterator[list[str]]:
    alone = base_alone(case)
    yield ["base in one generation", f"{alone['base in one generation'] / alone['base_only']:.2f}", "", ""]
    for name, schedule in SCHEDULES_SHOWN.items():
        ratios = {
            shared: [
                simulate_case(case, schedule, "specreason", rate, shared).tokens_per_second / alone["base_only"]
                for rate in ACCEPT_RATES
            ]
            for shared in (True, False)
        }
        per_gpu = [ratio * case.num_gpus / (case.num_gpus + 1) for ratio in ratios[False]]
        yield [name, *(" / ".join(f"{ratio:.2f}" for ratio in cell) for cell in (ratios[True], ratios[False], per_gpu))]


def main() -> None:
    console = Console()
    for case in CASES:
        table = Table("schedule", "shared", "own", "own, per GPU", title=f"{case.name}: over base_only at p 0.7 / 0.9")
        for row in rows(case):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
