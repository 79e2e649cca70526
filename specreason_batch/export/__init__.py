"""`jobs.export`: one or many runs' outputs in, a data set folder to train on out (docs/distillation.md).

Pure decisions: `measures` (of text), `filters` (one chain), `groups` (chains among each other), `formats` and
`rendering` (a chain to rows), `card`. Files: `runs` reads, `near` and `evaluation` hold what is compared with, `output`
writes, `survey` goes through the chains, `job` puts them together.
"""

from specreason_batch.export.config import DecontaminateConfig, ExportConfig, NearDuplicatesConfig, SelectConfig
from specreason_batch.export.job import export

__all__ = ["DecontaminateConfig", "ExportConfig", "NearDuplicatesConfig", "SelectConfig", "export"]
