"""The account of one run: every section that needs no other run (docs/figures.md)."""

import polars as pl
import pyarrow as pa

from specreason_batch.accounting import acceptance, chains, cost, tokens, wall_clock
from specreason_batch.accounting.figures import RunReport
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.outcomes import Outcomes
from specreason_batch.accounting.prices import Prices
from specreason_batch.accounting.tokens import CommittedTokens
from specreason_batch.status import StatusReader
from specreason_batch.types import InvalidInput


def account(run: RunFiles, prices: Prices) -> RunReport:
    """Of what was committed when the run was opened. Raises InvalidInput if a file is damaged."""
    standing = chains.Standing.of(StatusReader(run.output_dir, ask_queue=lambda jobs: None).read())
    try:
        outcomes = Outcomes.of(run)
        return RunReport(
            label=run.label,
            output_dir=str(run.output_dir),
            policy=run.policy,
            is_finished=standing.is_finished,
            sections=(
                chains.section(run, outcomes, standing),
                tokens.section(run),
                wall_clock.section(run),
                cost.section(run, prices, CommittedTokens.of(run), outcomes),
                acceptance.section(run),
            ),
        )
    except (pl.exceptions.ComputeError, pa.ArrowException) as error:
        raise InvalidInput(f"{run.output_dir}: a file of it cannot be read: {error}") from error
