"""`python -m jobs.status OUTPUT`: what is done, what goes on, what is wrong, from the files of a run.

    python -m jobs.status outputs/run                    a table, once
    python -m jobs.status outputs/run --watch 10         again every 10 s, until all is done
    python -m jobs.status outputs/run --json             one JSON document (docs/data.md)

The exit status is 0 whatever the state, so that a script asks the JSON; 2 if the folder holds no run.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.launch import BATCH_LOG_WIDTH, ExitStatus
from specreason_batch.status import RunStatus, ShardState, ShardStatus, StatusReader
from specreason_batch.types import InvalidInput

_WATCH_SECONDS = 5.0
_STYLES = {
    ShardState.in_flight: "cyan",
    ShardState.failed: "bold red",
    ShardState.idle: "yellow",
    ShardState.done: "dim",
}
_URGENCY = list(_STYLES)  # which shards are shown where there is no room for all
_MAX_ERRORS = 10
_MAX_NAME = 24  # characters of a shard's name
_FULL_WIDTH = 100  # columns, from which on everything is shown
_WIDE = 120  # and from which on there is room between
_SUMS = (
    *("num_shards", "num_done", "num_chains", "num_in_flight", "num_rejects", "tokens_per_second"),
    *("chains_per_second", "acceptance", "eta_seconds", "oldest_beat_seconds", "is_done"),
)
_FRAME_LINES = 9  # of a screen, that are not shards: header, totals, notes


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else BATCH_LOG_WIDTH)
    reader = StatusReader(options.output)
    try:
        if options.json:
            print(json.dumps(as_document(reader.read()), indent=1))
        elif options.watch is None:
            console.print(render(reader.read(), console.width))
        else:
            with suppress(KeyboardInterrupt):
                watch(reader, console, options.watch)
    except (InvalidInput, OSError) as error:
        _leave(error)


def watch(reader: StatusReader, console: Console, seconds: float) -> None:
    """Redraw until all is done. Without a terminal, print one below the other. Raises InvalidInput."""
    if not console.is_terminal:
        while not _shown(reader, console):
            time.sleep(seconds)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = reader.read()
            live.update(render(status, console.width, max(1, console.height - _FRAME_LINES)), refresh=True)
            if status.is_done:
                return
            time.sleep(seconds)


def _shown(reader: StatusReader, console: Console) -> bool:
    """Print the status; whether all is done."""
    status = reader.read()
    console.print(render(status, console.width))
    return status.is_done


def as_document(status: RunStatus) -> dict[str, Any]:
    """The JSON of docs/data.md."""
    failure = status.last_failure
    return {
        "output": status.output,
        "read_at": status.read_at,
        "input_path": status.input_path,
        "input_reachable": status.input_reachable,
        "total": {name: getattr(status, name) for name in _SUMS}
        | {
            "last_error": failure.last_error if failure else None,
            "last_error_shard": failure.name if failure else None,
        },
        "shards": [asdict(shard) | {"acceptance": shard.acceptance} for shard in status.shards],
        "squeue": None if status.queue is None else [asdict(job) for job in status.queue],
    }


def render(status: RunStatus, width: int, max_shards: int | None = None) -> RenderableType:
    """Shards, their sum, and what needs a person's eye. `max_shards`: the most urgent ones, where not all fit."""
    shards = status.shards
    if max_shards is not None and len(shards) > max_shards:
        shards = tuple(sorted(shards, key=lambda shard: _URGENCY.index(shard.state))[:max_shards])
    table = _empty_table(width)
    num_columns = len(table.columns)
    for shard in shards:
        table.add_row(*_row(shard)[:num_columns], style=_STYLES[shard.state])
    if hidden := len(status.shards) - len(shards):
        table.add_row(_cut(f"… {hidden:,} more"), style="dim")
    table.add_section()
    table.add_row(*_total_row(status)[:num_columns], style="bold")
    return Group(table, *(Text(line) for line in _notes(status, _MAX_ERRORS if max_shards is None else 1)))


def _empty_table(width: int) -> Table:
    """What gives way on a narrow screen is who works on a shard, and then the shard's name; never a figure."""
    is_narrow = width < _FULL_WIDTH
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, int(width >= _WIDE), 0, 0))
    table.add_column("shard", no_wrap=not is_narrow)
    table.add_column("state", no_wrap=True)
    for name in ("chains", "in flight", "rej", "tok/s", "acc", "ETA", "heard"):
        table.add_column(name, justify="right", no_wrap=True)
    if not is_narrow:
        table.add_column("try", justify="right", no_wrap=True)
        table.add_column("by")
    return table


def _cut(text: str) -> Text:
    """One line, as long as its column lets it be."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _row(shard: ShardStatus) -> list[Text | str]:
    is_live = shard.state is ShardState.in_flight
    return [
        _cut(_short(shard.name)),
        _state(shard),
        _of(shard.num_done, shard.num_chains),
        _in_flight(shard) if is_live else "",
        f"{shard.num_rejects:,}" if shard.num_rejects else "",
        f"{shard.tokens_per_second:,.0f}" if is_live else "",
        _share(shard.acceptance),
        "" if shard.state is ShardState.done else _duration(shard.eta_seconds) if is_live else "",
        _age(shard.beat_age_seconds),
        f"{shard.num_attempts}" if shard.num_attempts else "",
        _cut(_owner(shard)),
    ]


def _total_row(status: RunStatus) -> list[Text | str]:
    return [
        _cut(f"{len(status.shards):,} shards"),
        "",
        _of(status.num_done, status.num_chains),
        f"{status.num_in_flight:,}" if status.num_in_flight else "",
        f"{status.num_rejects:,}" if status.num_rejects else "",
        f"{status.tokens_per_second:,.0f}" if status.num_shards[ShardState.in_flight] else "",
        _share(status.acceptance),
        "" if status.is_done else _duration(status.eta_seconds),
        _age(status.oldest_beat_seconds),
    ]


def _notes(status: RunStatus, max_errors: int) -> Iterable[str]:
    counts = [f"{count:,} {_words(state)}" for state, count in status.num_shards.items() if count]
    queue = f"; squeue: {_queue_counts(status)}" if status.queue else ""
    yield f"{', '.join(counts) or 'no shards'}{queue}"
    if not status.input_reachable:
        yield f"the input {status.input_path} cannot be reached from here: shards never started are not listed"
    failed = [shard for shard in status.shards if shard.last_error and shard.state is not ShardState.done]
    failed.sort(key=lambda shard: shard.last_error_at or 0.0, reverse=True)
    for shard in failed[:max_errors]:
        yield f"{shard.name}: {shard.last_error}"
    if (more := len(failed) - max_errors) > 0:
        yield f"… and {more:,} more shards with an error (--json)"


def _in_flight(shard: ShardStatus) -> str:
    """Chains, and their mean steps."""
    steps = shard.mean_steps_in_flight
    return f"{shard.num_in_flight:,} at {steps:.{1 if steps < 100 else 0}f}"


def _state(shard: ShardStatus) -> str:
    detail = "" if shard.detail is None or shard.detail.value == shard.state.value else f": {shard.detail}"
    return f"{_words(shard.state)}{detail}"


def _owner(shard: ShardStatus) -> str:
    """Slurm's view, where it is not simply that the job runs; then job and host: what matters most comes first."""
    if shard.state is ShardState.done or not shard.host:
        return ""
    view = _queue_view(shard)
    return f"{view}{' ' if view else ''}{shard.slurm_job or f'pid {shard.pid}'} {shard.host}"


def _queue_view(shard: ShardStatus) -> str:
    job = shard.queued
    if job is None or (job.state == "R" and shard.state is ShardState.in_flight):
        return ""
    return f"{job.state} ({job.reason})" if job.state == "PD" else job.state


def _queue_counts(status: RunStatus) -> str:
    return ", ".join(
        f"{count:,} {state}" for state, count in sorted(Counter(j.state for j in status.queue or ()).items())
    )


def _short(name: str) -> str:
    """Its end tells shards apart."""
    return name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}"


def _words(state: str) -> str:
    return state.replace("_", " ")


def _of(num_done: int, num_chains: int | None) -> str:
    return f"{num_done:,}/{'?' if num_chains is None else f'{num_chains:,}'}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} d"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _age(seconds: float | None) -> str:
    """One figure: nobody needs the seconds of a day."""
    if seconds is None:
        return ""
    for limit, unit, name in ((120, 1, "s"), (120 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.status", description="How a run stands, from its files.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the run's output_dir")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--watch", nargs="?", type=_seconds, const=_WATCH_SECONDS, metavar="SECONDS", help="redraw until all is done"
    )
    shape.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds (OUTPUT comes first)") from None
    if not 0.1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: at least 0.1 seconds")
    return seconds


def _leave(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(ExitStatus.invalid if isinstance(error, InvalidInput) else ExitStatus.failed)


if __name__ == "__main__":
    main()
