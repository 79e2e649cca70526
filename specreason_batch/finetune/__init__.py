"""`jobs.finetune`: an export of `jobs.export` in, a trained model folder out (docs/closing_the_loop.md).

`config` holds the choices, `dataset` knows an export's folder, `encoding` makes its rows the token ids that an engine sees,
`training` drives TRL's trainers and is the only file that imports torch, transformers and trl, `output` owns the folders,
`job` puts them together.
"""

from specreason_batch.finetune.config import FinetuneConfig, Precision, Stage
from specreason_batch.finetune.job import finetune

__all__ = ["FinetuneConfig", "Precision", "Stage", "finetune"]
