"""One preparation from input to folder: scan, make rows, divide, put in place. The composition root of `prepare`.

Rows are made once and spooled in a file of the hidden folder, since the size of even shards is known only when all rows
have been looked at. What is held in memory for each row is a digest of its content and, where the input has ids, of its
id (16 bytes each; about 130 as Python holds them), and 8 bytes that decide about the holdout.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from specreason_batch.prepare.config import PrepareConfig
from specreason_batch.prepare.faults import Kind, RowFault
from specreason_batch.prepare.mapping import Mapped, carried_names, check_types, map_columns
from specreason_batch.prepare.output import (
    REJECTS,
    Manifest,
    chosen,
    divide,
    is_prepared,
    left_behind,
    num_shards_of,
    staged,
    write_rejects,
)
from specreason_batch.prepare.rows import DIGEST_BYTES, Ready, Recipe, id_of, make_row
from specreason_batch.prepare.sources import Batch, Carried, Scan, carry, column_names, list_inputs, read_batches, scan
from specreason_batch.prepare.telling import Progress, Summary, tell
from specreason_batch.prepare.templates import MULTIPLE_CHOICE, PLAIN, Template, check_fields, load_template
from specreason_batch.seeds import stable_seed
from specreason_batch.store.prompts import Reject
from specreason_batch.store.row_files import RowFile, even_sizes, file_sizes
from specreason_batch.store.schemas import REJECTS as REJECTS_SCHEMA
from specreason_batch.types import InvalidInput

VERSION = 1  # of what is made of the same input and choices
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TYPES = {"messages": _MESSAGES, "choices": pa.list_(pa.string())}  # the others are text


def prepare(config: PrepareConfig, console: Console) -> Summary | None:
    """The whole job; None if it was done already. Raises InvalidInput, OSError; then nothing has been written."""
    output = Path(config.output).resolve()
    own_template = load_template(config.template) if config.template is not None else None
    inputs = list_inputs(config.input)
    made_from = {
        "version": VERSION,
        "inputs": [file.fingerprint() for file in inputs],
        "choices": config.row_fields(),
        "template": own_template.text if own_template else None,
    }
    if is_prepared(output, made_from):
        console.print(f"{config.output}: already prepared from the same input by the same choices", soft_wrap=True)
        return None
    for folder in left_behind(output):
        console.print(f"note: {folder} is of a preparation that was killed, or is under way elsewhere", soft_wrap=True)
    progress = Progress(console, config.log_seconds)
    scans = [scan(file, progress.checked) for file in inputs]
    summary = _prepare(scans, config, own_template, output, made_from, progress)
    tell(summary, config.output, console)
    return summary


def _prepare(
    scans: Sequence[Scan],
    config: PrepareConfig,
    own_template: Template | None,
    output: Path,
    made_from: dict[str, Any],
    progress: Progress,
) -> Summary:
    recipe, carried = _decide(scans, config, own_template)
    maker = Maker(recipe=recipe, carried=carried, seed=config.seed)
    with staged(output) as folder:
        spool = folder / "spool.parquet"
        maker.make(scans, spool, folder, progress)
        if not maker.hashes:
            raise InvalidInput(f"input: no row can be used: {_reasons(maker)}")
        held_out = chosen(maker.hashes, config.holdout)
        sizes = _sizes(len(maker.hashes), len(held_out), config)
        divide(spool, folder, held_out, sizes)
        spool.unlink()
        summary = maker.summary(len(scans), len(held_out), sizes)
        Manifest(made_from=made_from, counts=summary.counts(), files=file_sizes(folder)).write(folder)
    return summary


def _sizes(num_kept: int, num_held_out: int, config: PrepareConfig) -> list[int]:
    left = num_kept - num_held_out
    if left <= 0 or config.holdout >= num_kept:
        raise InvalidInput(f"holdout: {config.holdout:g} leaves nothing of the {num_kept} prompts; allowed: less")
    return even_sizes(left, num_shards_of(left, config.num_shards, config.shard_rows))


def _reasons(maker: "Maker") -> str:
    if not maker.num_rows:
        return "there is none; allowed: at least one"
    counts = ", ".join(f"{count} x {kind}" for kind, count in maker.faults.most_common())
    return f"{counts}; the first: {maker.first_reject}"


def _decide(scans: Sequence[Scan], config: PrepareConfig, own_template: Template | None) -> tuple[Recipe, Carried]:
    """What each column is, before any row is read. Raises InvalidInput."""
    names = column_names(scans)
    if not names:
        raise InvalidInput(f"input: {config.input!r} has no rows; allowed: at least one")
    mapped = map_columns(config.columns, names)
    for found in scans:
        if found.num_rows:
            _check_columns(found, mapped)
    template = own_template or load_template(MULTIPLE_CHOICE if mapped.choices else PLAIN)
    own = {"prompt", *(["choices"] if mapped.choices else [])}
    check_fields(template, own | (set(names) - {"prompt", "choices"}))
    recipe = Recipe(
        mapped=mapped,
        template=template,
        gold_is=config.gold_answer_is,
        shuffle_seed=config.seed if config.shuffle_choices else None,
    )
    return recipe, carry(scans, carried_names(names, mapped, keeps_text=not template.is_plain))


def _check_columns(found: Scan, mapped: Mapped) -> None:
    if found.file.is_parquet:
        check_types(mapped, pa.schema(list(found.columns.items())), str(found.file.path))
        return
    for name, column in mapped.columns().items():
        if column not in found.columns:
            raise InvalidInput(f"{found.file.path}: no column {column!r} ({name}), which other files have")


@dataclass(slots=True, kw_only=True)
class Maker:
    """Makes rows of all files, and counts."""

    recipe: Recipe
    carried: Carried
    seed: int
    num_rows: int = 0
    num_made_ids: int = 0
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))  # of each kept row's id
    faults: Counter[Kind] = field(default_factory=Counter)
    first: Ready | None = None
    first_reject: str = ""
    _ids: set[bytes] = field(default_factory=set)
    _contents: set[bytes] = field(default_factory=set)

    @property
    def columns(self) -> list[str]:
        """Own columns of the output."""
        mapped = self.recipe.mapped
        optional = [name for name in ("gold_answer", "messages", "system_prompt", "choices") if getattr(mapped, name)]
        return ["prompt_id", "prompt", *optional]

    @property
    def schema(self) -> pa.Schema:
        own = [pa.field(name, _type(name)) for name in self.columns]
        return pa.schema([*own, *self.carried.schema])

    def make(self, scans: Sequence[Scan], spool: Path, folder: Path, progress: Progress) -> None:
        """Good rows into the spool, the others into rejects. Raises InvalidInput, OSError."""
        num_rows = sum(found.num_rows for found in scans)
        rows = RowFile(spool, self.schema, level=1)
        rejects = RowFile(folder / REJECTS, REJECTS_SCHEMA)
        for batch in self._batches(scans):
            ready, places, left_out = self._sort(batch)
            if ready:
                rows.add(self._table(ready, places, batch))
            write_rejects([reject.as_row() for reject in left_out], rejects, REJECTS_SCHEMA)
            progress.read(self.num_rows, num_rows, len(self.hashes))
        rows.close()
        rejects.close()

    def _batches(self, scans: Sequence[Scan]) -> Iterator[Batch]:
        read = dict.fromkeys([*self.recipe.mapped.columns().values(), *self.recipe.other_fields])
        for found in scans:
            yield from read_batches(found, list(read), self.carried)

    def _sort(self, batch: Batch) -> tuple[list[Ready], list[int], list[Reject]]:
        """Prompts with their places in the batch, and the rows that are left out."""
        ready, places, left_out = [], [], []
        for place, row in enumerate(batch.rows):
            values = {name: column[place] for name, column in batch.values.items()}
            self.num_rows += 1
            try:
                ready.append(self._new(make_row(values, self.recipe)))
                places.append(place)
            except RowFault as fault:
                left_out.append(self._reject(fault, id_of(values, self.recipe.mapped), batch.file, row))
        return ready, places, left_out

    def _new(self, ready: Ready) -> Ready:
        """Count it in. Raises RowFault if its id or its text was there before."""
        id_digest = _digest(ready.prompt_id) if self.recipe.mapped.prompt_id else None  # None: they are the contents'
        if id_digest in self._ids:
            raise RowFault(Kind.same_id)
        if ready.digest in self._contents:
            raise RowFault(Kind.same_text)
        self._contents.add(ready.digest)
        if id_digest:
            self._ids.add(id_digest)
        self.hashes.append(stable_seed("holdout", self.seed, ready.prompt_id))
        self.num_made_ids += ready.id_was_made
        self.first = self.first or ready
        return ready

    def _reject(self, fault: RowFault, prompt_id: str | None, file: str, row: int) -> Reject:
        self.faults[fault.kind] += 1
        self.first_reject = self.first_reject or f"{file}, row {row}: {fault}"
        reason = str(fault).encode(errors="replace").decode()
        return Reject(prompt_id=prompt_id, sample_index=None, file=file, row=row, reason=reason)

    def _table(self, ready: Sequence[Ready], places: Sequence[int], batch: Batch) -> pa.Table:
        own = [pa.array([item.value(name) for item in ready], _type(name)) for name in self.columns]
        taken = pa.array(places, pa.int64())
        return pa.Table.from_arrays([*own, *(column.take(taken) for column in batch.carried)], schema=self.schema)

    def summary(self, num_files: int, num_held_out: int, sizes: Sequence[int]) -> Summary:
        assert self.first is not None
        return Summary(
            num_files=num_files,
            num_rows=self.num_rows,
            faults=dict(self.faults.most_common()),
            num_made_ids=self.num_made_ids,
            num_held_out=num_held_out,
            sizes=list(sizes),
            mapped=self.recipe.mapped.columns(),
            carried=dict(self.carried.names),
            as_json=sorted(self.carried.as_json),
            template=self.recipe.template.name,
            first=self.first,
        )


def _type(name: str) -> pa.DataType:
    return _TYPES.get(name, pa.string())


def _digest(prompt_id: str) -> bytes:
    return hashlib.blake2b(prompt_id.encode(), digest_size=DIGEST_BYTES).digest()
