"""One chain as a person reads it: each step with its author and grade, rejected drafts struck out. Reads files only."""

from pathlib import Path
from typing import Any

import polars as pl
from rich.text import Text

from specreason_batch.store.reading import scan


def show_chain(output_dir: Path) -> Text | None:
    """The first chain in which something was rejected, else the first one; None if there is none."""
    chains, steps = scan(output_dir, "chains"), scan(output_dir, "steps")
    if chains is None or steps is None:
        return None
    rejected = steps.filter(pl.col("rejected_text").is_not_null()).select("prompt_id", "sample_index").head(1).collect()
    wanted = rejected if rejected.height else chains.select("prompt_id", "sample_index").head(1).collect()
    keys = ["prompt_id", "sample_index"]
    chain = chains.join(wanted.lazy(), on=keys, how="semi").collect().row(0, named=True)
    rows = steps.join(wanted.lazy(), on=keys, how="semi").sort("step_index").collect().rows(named=True)
    return _render(chain, rows)


def _render(chain: dict[str, Any], steps: list[dict[str, Any]]) -> Text:
    text = Text(f"{chain['prompt_id']}: {chain['prompt']}\n\n")
    for step in steps:
        if step["rejected_text"] is not None:
            text.append(f"{'draft':>5} {_score(step)}  ", style="dim")
            text.append(f"{step['rejected_text'].strip()}\n", style="strike red")
        graded = _score(step) if step["accepted"] else "   "
        text.append(f"{step['author']:>5} {graded}  ", style="dim")
        text.append(f"{chain['thinking'][step['start'] : step['end']].strip()}\n", style=_style(step["author"]))
    text.append(f"answer     {(chain['answer'] or '').strip()}")
    gold = chain.get("gold_answer")
    return text if gold is None else text.append(f"   (gold: {gold})", style="dim")


def _score(step: dict[str, Any]) -> str:
    return "  ?" if step["score"] is None else f"{step['score']:.1f}"


def _style(author: str) -> str:
    return "cyan" if author == "draft" else "bold"
