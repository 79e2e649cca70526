"""`jobs.export`: one or many runs' outputs in, a data set folder to train on out (docs/distillation.md).

Pure decisions: `measures` (of text), `filters` (one chain), `groups` (chains among each other), `formats` and
`rendering` (a chain to rows), `card`. Files: `runs` and `chains` read, `evaluation` and `near` hold what is compared
with, `work` is where an export grows, `output` what comes of it. `survey` and `writing` are the two passes over the
chains, `job` puts them together, `telling` speaks.
"""

from specreason_batch.export.config import DecontaminateConfig, ExportConfig, NearDuplicatesConfig, SelectConfig
from specreason_batch.export.job import export

__all__ = ["DecontaminateConfig", "ExportConfig", "NearDuplicatesConfig", "SelectConfig", "export"]
