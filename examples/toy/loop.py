"""The loop closed on the toy pair: its own chains make the draft better, and the better draft makes chains faster.

    python -m examples.toy.loop                     # from the repository root: every stage, into outputs/loop
    python -m examples.toy.loop --out DIR --repeats 5

Each stage is a job's command line, printed before it runs. What is finished is not made again: the same command goes on
where it stopped. Chains are made of prompts/train.parquet and measured on prompts/heldout.parquet, which share no
prompt. The table at its end: docs/distillation.md, "The loop".
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import join
from statistics import median

import polars as pl

from specreason_batch.accounting.bootstrap import Array, interval
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.outcomes import Outcomes
from specreason_batch.summary import summarise

HERE = Path("examples") / "toy"
TRAINING = ("batch_size=32", "warmup=0.05", "gradient_checkpointing=false", "log_steps=50")
SFT = (*TRAINING, "learning_rate=3e-3", "epochs=1")
# DPO by itself makes the preferred step less likely too, if less so than the other: it undid the SFT.
WITH_SFT = "+trainer_args={loss_type:[sigmoid,sft],loss_weights:[1.0,1.0]}"
DPO = (*TRAINING, "learning_rate=1e-4", "max_steps=80", WITH_SFT)


# --- the stages ---


def training(out: Path) -> Iterator[list[str]]:
    """From prompts to better drafts."""
    run, right = f"{out}/train", "select.answers=right"
    yield ["generate", f"input.path={HERE}/prompts/train.parquet", "schedule.active_size=256", f"output_dir={run}"]
    yield ["verify", f"run={run}"]
    yield ["export", f"runs=[{run}]", f"output={out}/sft", "format=sft_messages", right]
    preferences = ["format=step_preferences", f"tokenizer={HERE}/draft", right]
    yield ["export", f"runs=[{run}]", f"output={out}/preferences", *preferences]
    yield ["finetune", f"data={out}/sft", f"model={HERE}/draft", f"output={out}/draft-sft", *SFT]
    yield ["finetune", f"data={out}/preferences", f"model={out}/draft-sft", f"output={out}/draft-dpo", *DPO]


def drafts(out: Path) -> dict[str, str]:
    """Model folders, by the variant's name."""
    return {"before": f"{HERE}/draft", "sft": f"{out}/draft-sft", "dpo": f"{out}/draft-dpo"}


def measuring(out: Path, repeats: int) -> Iterator[list[str]]:
    """Each draft alone; then the pair with each, several times in turn for its speed."""
    for folder, policy, times in (("alone", "draft_only", 1), ("pair", "specreason", repeats)):
        variants = [f"+variants.{name}=[policy={policy},draft.model={path}]" for name, path in drafts(out).items()]
        only = f"only=[{','.join(drafts(out))}]"
        yield ["compare", "limit=null", f"repeats={times}", f"output={out}/{folder}", only, *variants]


def run(words: Sequence[str]) -> None:
    """Raises subprocess.CalledProcessError."""
    job, *choices = words
    print(f"\n$ python -m jobs.{job} {join(choices)}", flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", f"jobs.{job}", *choices], check=True)
    print(f"{time.monotonic() - began:.0f} s", flush=True)


# --- what came of it ---


@dataclass(frozen=True)
class Measured:
    """Runs of one draft, the first seed's first."""

    runs: list[Path]

    @cached_property
    def accuracy(self) -> pl.DataFrame:
        """Right and judged chains of each prompt."""
        is_right = pl.col("is_judged") & (pl.col("outcome") == "right")
        return self._sums(lambda run: Outcomes.of(run).frame.lazy(), is_right, pl.col("is_judged"))

    @cached_property
    def acceptance(self) -> pl.DataFrame:
        """Accepted and decided drafts of each prompt."""
        return self._sums(lambda run: run.steps, pl.col("accepted"), pl.col("accepted").is_not_null())

    @cached_property
    def speeds(self) -> list[float]:
        """Chains a second of each run, start-up left out."""
        return [found.chains_per_second for path in self.runs if (found := summarise(path)) is not None]

    def _sums(self, rows: Callable[[RunFiles], pl.LazyFrame], above: pl.Expr, below: pl.Expr) -> pl.DataFrame:
        found = pl.concat(rows(RunFiles(path, path.name)).select("prompt_id", a=above, b=below) for path in self.runs)
        return found.group_by("prompt_id").agg(pl.col("a", "b").sum().cast(pl.Float64)).sort("prompt_id").collect()


def rate(sums: pl.DataFrame) -> str:
    return _interval(sums, lambda drawn: 100 * drawn[..., 0] / drawn[..., 1], "{:.1f} %")


def gains(measured: Sequence[pl.DataFrame]) -> list[str]:
    """Over the first."""
    return ["", *(gain(measured[0], other) for other in measured[1:])]


def gain(first: pl.DataFrame, other: pl.DataFrame) -> str:
    """In points, paired by prompt."""
    paired = first.join(other, on="prompt_id", suffix="_other")
    return _interval(
        paired, lambda drawn: 100 * (drawn[..., 2] / drawn[..., 3] - drawn[..., 0] / drawn[..., 1]), "{:+.1f}"
    )


def _interval(sums: pl.DataFrame, statistic: Callable[[Array], Array], form: str) -> str:
    values = sums.drop("prompt_id").to_numpy()
    low, high = interval(values, statistic)
    return f"{form.format(statistic(values.sum(axis=0)))} ({low:.1f} to {high:.1f})"


def middle(values: Sequence[float], unit: str = "") -> str:
    return f"{median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def table(out: Path, repeats: int) -> Iterator[str]:
    """Markdown. Intervals of rates are 95 %, by bootstrap over prompts; those of speeds hold all runs."""
    alone = {name: Measured([out / "alone" / name]) for name in drafts(out)}
    pair = {name: Measured([out / "pair" / f"{name}{n}" for n in _suffixes(repeats)]) for name in drafts(out)}
    first = pair["before"]
    yield "| | the draft as it was | after SFT | after DPO on top |"
    yield "|---|---|---|---|"
    yield _row("draft alone, right answers", (rate(one.accuracy) for one in alone.values()))
    yield _row("gain, points", gains([one.accuracy for one in alone.values()]))
    yield _row("drafts accepted", (rate(one.acceptance) for one in pair.values()))
    yield _row("gain, points", gains([one.acceptance for one in pair.values()]))
    yield _row("the pair, right answers", (rate(one.accuracy) for one in pair.values()))
    yield _row("gain, points", gains([one.accuracy for one in pair.values()]))
    yield _row(f"chains/s, median of {repeats}", (middle(one.speeds) for one in pair.values()))
    speed_ups = [[b / a for a, b in zip(first.speeds, one.speeds, strict=True)] for one in pair.values()]
    yield _row("speed-up in the same turn", (middle(found, "x") for found in speed_ups))


def _suffixes(repeats: int) -> list[str]:
    return ["", *(f".{n}" for n in range(2, repeats + 1))]


def _row(label: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([label, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/loop"))
    parser.add_argument("--repeats", type=int, default=3, help="timings of each draft in the pair, in turn")
    options = parser.parse_args()
    began = time.monotonic()
    for words in (*training(options.out), *measuring(options.out, options.repeats)):
        try:
            run(words)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)
    print("", *table(options.out, options.repeats), f"\n{time.monotonic() - began:.0f} s in all", sep="\n")


if __name__ == "__main__":
    main()
