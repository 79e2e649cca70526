"""The data set's card: what the hub and `load_dataset` read, and what a person reads. Does not know: files."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from specreason_batch.export.config import ExportConfig, Format
from specreason_batch.export.filters import MEANINGS, Filter
from specreason_batch.export.formats import Lost
from specreason_batch.export.runs import Run
from specreason_batch.types import Role

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_LARGEST = "10M<n<100M"
_TASKS = {Format.stepwise_supervision: "token-classification"}  # of the others: text-generation
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """What a split holds."""

    num_prompts: int
    num_chains: int
    num_rows: int
    num_files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What has been made of what."""

    num_chains: int  # read
    removed: Mapping[Filter, int]
    splits: Mapping[str, SplitCounts]  # train, and validation where it holds anything
    num_tokens: int  # of kept chains
    tokens: pl.DataFrame  # their histogram: low, high, chains
    lost: Mapping[Lost, int]  # rejected drafts of kept chains
    licenses: Mapping[str, int]  # kept chains by what the input's column `license` says
    notes: Sequence[str]  # what a user must know before training

    @property
    def num_rows(self) -> int:
        return sum(split.num_rows for split in self.splits.values())

    @property
    def num_kept(self) -> int:
        """Chains."""
        return self.num_chains - sum(self.removed.values())

    def counts(self) -> dict[str, object]:
        """For export.json."""
        splits = {
            name: {"prompts": split.num_prompts, "chains": split.num_chains, "rows": split.num_rows}
            for name, split in self.splits.items()
        }
        removed = {str(by): count for by, count in self.removed.items()}
        lost = {why.name: count for why, count in sorted(self.lost.items())}
        kept = {"chains": self.num_chains, "kept": self.num_kept, "tokens": self.num_tokens}
        kept_by = {"licenses": dict(self.licenses)} if self.licenses else {}
        return kept | kept_by | {"removed": removed, "lost_drafts": lost, "splits": splits}


def token_histogram(tokens: pl.Series) -> pl.DataFrame:
    """Chains by tokens, in intervals that double: low (inclusive), high (exclusive), chains; no empty end."""
    intervals = [(0, 32), *((1 << power, 2 << power) for power in range(5, 31))]
    found = [(low, high, int(tokens.is_between(low, high, closed="left").sum())) for low, high in intervals]
    used = [index for index, (_, _, count) in enumerate(found) if count]
    return pl.DataFrame(found[used[0] : used[-1] + 1], schema=["low", "high", "chains"], orient="row")


def card(config: ExportConfig, runs: Sequence[Run], summary: Summary) -> str:
    """README.md."""
    return "\n".join([*_header(config, summary), *_body(config, runs, summary), ""])


def _header(config: ExportConfig, summary: Summary) -> Iterator[str]:
    """YAML; values in JSON's notation, which is part of it."""
    yield "---"
    yield f"pretty_name: {json.dumps(config.title)}"
    if license := config.license or _only(summary.licenses):
        yield f"license: {json.dumps(license)}"
    yield f"size_categories: [{json.dumps(_size(summary.num_rows))}]"
    yield f"task_categories: [{_TASKS.get(config.format, 'text-generation')}]"
    yield "tags: [reasoning, distillation, synthetic, speculative-reasoning]"
    yield "configs:"
    yield "- config_name: default"
    yield "  data_files:"
    for split in summary.splits:
        yield f"  - split: {split}"
        yield f"    path: data/{split}-*.parquet"
    yield "---"


def _only(licenses: Mapping[str, int]) -> str | None:
    return next(iter(licenses)) if len(licenses) == 1 else None


def _size(num_rows: int) -> str:
    return next((name for limit, name in _SIZES if num_rows < limit), _LARGEST)


def _body(config: ExportConfig, runs: Sequence[Run], summary: Summary) -> Iterator[str]:
    yield f"\n# {config.title}\n"
    yield (
        f"Chains of thought in the format `{config.format}`, exported from {len(runs)} run(s) of specreason_batch "
        "(SpecReason, arXiv 2504.07891). `export.json` holds every choice and the inputs' fingerprints.\n"
    )
    yield from _table(
        ("split", "prompts", "chains", "rows", "files"),
        [
            (name, split.num_prompts, split.num_chains, split.num_rows, split.num_files)
            for name, split in summary.splits.items()
        ],
    )
    yield "Prompts that share an id or a wording are on one side of the split.\n"
    for note in summary.notes:
        yield f"**Note.** {note}\n"
    if summary.licenses:
        yield "Licences, as the prompts' column `license` names them:\n"
        yield from _table(("license", "chains"), list(summary.licenses.items()))
    yield from _runs(runs)
    yield from _selection(summary)
    yield from _tokens(config, summary)


def _runs(runs: Sequence[Run]) -> Iterator[str]:
    yield "## Runs\n"
    rows = []
    for run in runs:
        policy = run.config["policy"]
        rows.append((run.folder.resolve().name, run.fingerprint, policy["name"], _policy(run), run.config["seed"]))
    yield from _table(("run", "fingerprint", "policy", "how", "seed"), rows)
    models = [
        (run.fingerprint, role, run.config[role]["model"], _digest(run, role), _weights(run, role))
        for run in runs
        for role in run.roles
    ]
    yield from _table(("run", "role", "model", "identity", "weights (size:hash)"), models)


def _policy(run: Run) -> str:
    if run.config["policy"]["name"] != "specreason":
        return ""
    return f"threshold {run.config['policy']['threshold']:g}, {run.config['judge']['reading']}"


def _digest(run: Run, role: Role) -> str:
    """Of all that run.json knows of the model's files."""
    identity = json.dumps(run.model_identity(role), sort_keys=True)
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def _weights(run: Run, role: Role) -> str:
    files = run.model_identity(role)
    return ", ".join(value for name, value in sorted(files.items()) if name.endswith((".safetensors", ".bin")))


def _selection(summary: Summary) -> Iterator[str]:
    yield "## Selection\n"
    yield f"{summary.num_chains} chains were read, {summary.num_kept} are kept. In the order of the filters:\n"
    rows = [(by, count, MEANINGS[by]) for by, count in summary.removed.items()]
    yield from _table(("filter", "removed", "because"), rows)
    if summary.lost:
        yield "Rejected drafts of kept chains that make no row:\n"
        yield from _table(("drafts", "because"), [(count, why) for why, count in sorted(summary.lost.items())])


def _tokens(config: ExportConfig, summary: Summary) -> Iterator[str]:
    yield "## Tokens\n"
    counted = "as their authors generated them" if config.select.tokens_by == "run" else "by the tokenizer given"
    mean = summary.num_tokens / max(1, summary.num_kept)
    yield f"Thinking and answer, {counted}: {summary.num_tokens} in all, {mean:.0f} a chain.\n"
    most = summary.tokens["chains"].max()
    assert isinstance(most, int)
    rows = [
        (f"{low} to {high - 1}", count, "█" * -(-count * _BAR // most)) for low, high, count in summary.tokens.rows()
    ]
    yield from _table(("tokens", "chains", ""), rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    if not rows:
        return
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(str(value).replace('|', chr(92) + '|') for value in row)} |"
    yield ""
