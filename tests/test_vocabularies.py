"""The ways in which two vocabularies differ, on real engines: the toy draft with other ids says the same."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from specreason_batch.chat import VocabularyCase
from specreason_batch.clock import WallClock
from specreason_batch.engine import Engine
from specreason_batch.summary import Summary, summarise
from specreason_batch.types import Role
from specreason_batch.vllm_engine import VllmEngine
from tests.conftest import TOY, toy_engine_config
from tests.test_toy import plan_for, read, run

pytestmark = pytest.mark.vllm
NUM_SPECIALS = 5
OUTCOME = ["prompt_id", "thinking", "answer", "thinking_end", "answer_end", "num_steps", "num_base_tokens"]
STEP = ["prompt_id", "step_index", "author", "ended_by", "start", "end", "num_tokens", "rejected_text", "accepted"]


def retokenised(target: Path, new_ids: list[int]) -> Path:
    """The toy draft whose token n has the id `new_ids[n]`: tokenizer, embeddings and configuration agree."""
    shutil.copytree(TOY / "draft", target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {entry: new_ids[id] for entry, id in vocabulary.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])  # they are numbered as they come
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(target / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]  # tied: the output's too
    moved = embeddings.clone()
    moved[new_ids] = embeddings
    weights["model.embed_tokens.weight"] = moved
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        values = json.loads((target / name).read_text())
        values |= {key: new_ids[values[key]] for key in ("eos_token_id", "pad_token_id")}
        (target / name).write_text(json.dumps(values))
    return target


def other_specials(size: int) -> list[int]:
    """Ordinary ids as they are, special ones turned round."""
    ordinary = size - NUM_SPECIALS
    return [*range(ordinary), *range(size - 1, ordinary - 1, -1)]


def other_vocabulary(size: int) -> list[int]:
    """Nothing where it was."""
    ids = list(range(size - NUM_SPECIALS))
    random.Random(1).shuffle(ids)
    return [*ids, *range(size - 1, size - NUM_SPECIALS - 1, -1)]


@pytest.fixture(scope="module", params=[VocabularyCase.other_specials, VocabularyCase.different])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VocabularyCase, Path]:
    size = json.loads((TOY / "draft" / "config.json").read_text())["vocab_size"]
    new_ids = (other_specials if request.param is VocabularyCase.other_specials else other_vocabulary)(size)
    return request.param, retokenised(tmp_path_factory.mktemp("draft") / "model", new_ids)


@pytest.fixture(scope="module")
def engines(
    variant: tuple[VocabularyCase, Path], toy_engines: dict[Role, Engine], toy_clock: WallClock
) -> Iterator[dict[Role, Engine]]:
    """The suite's base, beside this draft."""
    draft = VllmEngine(toy_engine_config(Role.draft, model=str(variant[1])), clock=toy_clock)
    yield {Role.draft: draft, Role.base: toy_engines[Role.base]}
    draft.close()


def outcome(output: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    return read(output, "chains").select(OUTCOME), read(output, "steps").select(STEP)


def texts(output: Path) -> list[tuple[str, str]]:
    return read(output, "chains").select("thinking", "answer").rows()


def summary(output: Path) -> Summary:
    found = summarise(output)
    assert found is not None
    return found


def test_whatever_the_drafts_ids_are_the_chains_are_the_same(
    variant: tuple[VocabularyCase, Path],
    engines: dict[Role, Engine],
    toy_engines: dict[Role, Engine],
    tmp_path: Path,
) -> None:
    """Greedy: seeded sampling draws by id. Each step's text, author and decision, the draft it replaced: all equal."""
    case, draft = variant
    overrides = ["limit=60", "sampling=greedy"]
    assert plan_for(tmp_path / "plan", *overrides, f"draft.model={draft}").vocabulary_case is case
    same = run(toy_engines, tmp_path / "same", *overrides)
    other = run(engines, tmp_path / "other", *overrides, f"draft.model={draft}")
    if case is VocabularyCase.other_specials:
        for mine, theirs in zip(outcome(other), outcome(same), strict=True):
            assert mine.equals(theirs)
    # A model may spell a text otherwise than its tokenizer would; the other role then reads it in other pieces.
    assert sum(mine == theirs for mine, theirs in zip(texts(other), texts(same), strict=True)) >= 57
    drafted = read(other, "steps").filter(pl.col("author") == "draft")
    assert drafted.height > 200
    assert summary(other).accuracy == pytest.approx(summary(same).accuracy, abs=0.03)


def test_sampled_chains_are_as_right_and_both_prefix_caches_keep_hitting(
    variant: tuple[VocabularyCase, Path],
    engines: dict[Role, Engine],
    toy_engines: dict[Role, Engine],
    tmp_path: Path,
) -> None:
    same = summary(run(toy_engines, tmp_path / "same", "limit=150"))
    other = summary(run(engines, tmp_path / "other", "limit=150", f"draft.model={variant[1]}"))
    assert other.accuracy == pytest.approx(same.accuracy, abs=0.03)
    assert other.acceptance == pytest.approx(same.acceptance, abs=0.05)
    assert other.cached_share == pytest.approx(same.cached_share, abs=0.15)
    chains = read(tmp_path / "other", "chains")
    assert (chains["thinking_end"] == "closed").mean() > 0.95  # type: ignore[operator]


def test_rejected_drafts_and_steps_read_as_text_in_either_vocabulary(
    variant: tuple[VocabularyCase, Path], engines: dict[Role, Engine], tmp_path: Path
) -> None:
    output = run(engines, tmp_path / "out", "limit=40", f"draft.model={variant[1]}")
    chains = {row["prompt_id"]: row["thinking"] for row in read(output, "chains").rows(named=True)}
    steps = read(output, "steps").rows(named=True)
    for prompt_id, thinking in chains.items():
        own = [step for step in steps if step["prompt_id"] == prompt_id]
        assert "".join(thinking[step["start"] : step["end"]] for step in own) == thinking
    rejected = [step["rejected_text"] for step in steps if step["rejected_text"] is not None]
    assert len(rejected) > 20
    assert all(text.isascii() and ("=" in text or "result" in text) for text in rejected)
