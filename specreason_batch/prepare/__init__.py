"""`jobs.prepare`: Parquet or JSONL of any shape in, validated prompt shards out (docs/prompts.md).

Pure decisions: `mapping` (which column is what), `templates`, `choices` and `rows` (one row to one prompt, or why not).
Files: `sources` reads, `output` writes, `job` puts them together.
"""

from specreason_batch.prepare.config import ColumnsConfig, PrepareConfig
from specreason_batch.prepare.job import prepare

__all__ = ["ColumnsConfig", "PrepareConfig", "prepare"]
