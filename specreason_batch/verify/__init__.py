"""`jobs.verify`: a run's chains in, a verdict on each one's answer out (docs/verification.md).

Pure decisions: `spelling` (text), `extract` (the final answer of a text), `shapes` (lists, tuples, intervals),
`meaning` (mathematics), `compare` (by kind), `vote` (samples without a gold answer), `judging` (rows). `workers`
compares in processes that may hang or die; they import this package, so nothing is imported here. Files: `files` reads
and writes, `job` puts it together.
"""
