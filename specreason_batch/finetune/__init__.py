"""`jobs.finetune`: an export of `jobs.export` in, a trained model folder out (docs/closing_the_loop.md).

`config` holds the choices, `dataset` knows an export's folder, `encoding` makes its rows the token ids that an engine
sees, `plan` checks what belongs together, `training` drives TRL's trainers and is the only file that imports torch and
trl, `output` owns the folders, `card` tells a reader what was made, `job` puts them together.
"""

from specreason_batch.finetune.config import FinetuneConfig, Precision, Stage
from specreason_batch.finetune.job import finetune

__all__ = ["FinetuneConfig", "Precision", "Stage", "finetune"]
