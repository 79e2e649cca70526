"""`jobs.report`: what runs did and cost, as a page, as data and on the terminal (docs/reports.md).

Whatever sections `accounting` makes are shown as they are: `side_by_side` lays them out; `page` (with `plot` on
`drawing`), `documents` and `terminal` show them; `output` puts files in place; `job` puts all of it together.
"""

from specreason_batch.report.config import ReportConfig

__all__ = ["ReportConfig"]
