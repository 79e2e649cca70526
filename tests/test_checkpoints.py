"""A checkpoint gives back the chains that were saved, or is passed over for the one before (docs/design.md, 6)."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specreason_batch.chain import Chain
from specreason_batch.schedules import SCHEDULES, Stopped
from specreason_batch.store.checkpoints import About, Checkpoint, Saved, read_checkpoint, write_checkpoint
from specreason_batch.types import Prompt, Role
from tests.support.commits import Uncontended
from tests.support.running import Run
from tests.support.worlds import PROMPTS, World, worlds

FINGERPRINT, SOURCE = "f00d", "5:abc"
BUSY = World(prompts=PROMPTS, num_samples=2, windows=(4096, 4096), threshold=3.0, seed=11)


def save(root: Path, chains: list[Chain], keep: int = 2, rounds: list[dict[str, Any]] | None = None) -> Path:
    saved = {chain.key: Saved.of(chain) for chain in chains}
    return write_checkpoint(
        root,
        Uncontended(root),
        lambda digests: About(FINGERPRINT, SOURCE, 3, 7, 99, digests),
        saved,
        rounds or [],
        keep,
    )


def read(root: Path, warnings: list[str] | None = None, fingerprint: str = FINGERPRINT) -> Checkpoint | None:
    return read_checkpoint(root, fingerprint, SOURCE, (warnings if warnings is not None else []).append)


def interrupted(world: World, after: int, schedule: str = "waves") -> Run:
    """A run of which the engines saw so many requests, and then it was stopped."""
    run = Run(world, schedule=schedule, active_size=5)

    def stop() -> None:
        if sum(len(engine.completions) for engine in run.engines.values()) >= after:
            raise Stopped("enough")

    run.check_stop = stop
    driver = run.driver()
    try:
        for report in SCHEDULES[schedule](driver):
            run.reports.append(report)
    except Stopped:
        driver.abandon()
    return run


def reopened(run: Run, chain: Chain) -> Chain:
    prompt = Prompt(prompt_id=chain.prompt.prompt_id, prompt=chain.prompt.prompt)
    return run.translator.open(prompt, chain.sample_index)


def state(chain: Chain) -> dict[str, Any]:
    """Everything of a chain, by value."""
    names = [name for name in Chain.__slots__ if name not in ("contexts", "usage", "round")]
    contexts = {role: (context.ids, context.window, context.reserve) for role, context in chain.contexts.items()}
    return {name: getattr(chain, name) for name in names} | {"contexts": contexts, "usage": repr(chain.usage)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=worlds(), after=st.integers(0, 60), schedule=st.sampled_from(sorted(SCHEDULES)))
def test_a_chain_is_restored_to_what_it_was_whatever_it_was_at(
    tmp_path: Path, world: World, after: int, schedule: str
) -> None:
    run = interrupted(world, after, schedule)
    root = tmp_path / "shard"
    shutil.rmtree(root, ignore_errors=True)
    save(root, run.chains)
    found = read(root)
    assert found is not None and list(found.chains) == [chain.key for chain in run.chains]
    for chain in run.chains:
        assert state(found.chains[chain.key].restore(reopened(run, chain))) == state(chain)


def test_it_says_what_it_is_of(tmp_path: Path) -> None:
    save(tmp_path, interrupted(BUSY, 40).chains)
    found = read(tmp_path)
    assert found is not None
    about = found.about
    assert (about.fingerprint, about.source, about.attempt, about.round, about.num_generated_tokens) == (
        *(FINGERPRINT, SOURCE),
        *(3, 7, 99),
    )
    assert any(saved.steps for saved in found.chains.values())


def test_tokens_on_their_way_are_counted_as_redone(tmp_path: Path) -> None:
    chain = interrupted(BUSY, 40).chains[0]
    before = chain.usage.num_redone_tokens
    assert Saved.of(chain, 12).usage.num_redone_tokens == before + 12
    assert chain.usage.num_redone_tokens == before, "the chain itself goes on and loses nothing"


def test_two_vocabularies_keep_their_own_ids(tmp_path: Path) -> None:
    chain = next(chain for chain in interrupted(BUSY, 60).chains if chain.steps)
    step = chain.steps[0]
    bodies = {Role.base: step.written.bodies[Role.base], Role.draft: (5, 6, 7)}
    chain.steps[0] = replace(step, written=replace(step.written, bodies=bodies))
    save(tmp_path, [chain])
    found = read(tmp_path)
    assert found is not None and found.chains[chain.key].steps == chain.steps


def test_the_newest_few_stay(tmp_path: Path) -> None:
    chains = interrupted(BUSY, 30).chains
    made = [save(tmp_path, chains[:count], keep=2) for count in (1, 2, 3, 4)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == made[-2:]
    found = read(tmp_path)
    assert found is not None and len(found.chains) == 4


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    save(tmp_path, [])
    found = read(tmp_path)
    assert found is not None and found.chains == {} and found.rounds == []


def tear(folder: Path, how: str) -> None:
    chains = folder / "chains.parquet"
    content = chains.read_bytes()
    match how:
        case "cut":
            chains.write_bytes(content[: len(content) // 2])
        case "empty":
            chains.write_bytes(b"")
        case "flipped":
            middle = len(content) // 2
            chains.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "gone":
            chains.unlink()
        case "no about":
            (folder / "about.json").unlink()
        case "half an about":
            os.truncate(folder / "about.json", 20)
        case "another about":
            (folder / "about.json").write_text('{"something": "else"}')
        case "a list":
            (folder / "about.json").write_text("[]")
        case "empty folder":
            shutil.rmtree(folder)
            folder.mkdir()


TEARS = ("cut", "empty", "flipped", "gone", "no about", "half an about", "another about", "a list", "empty folder")


@pytest.mark.parametrize("how", TEARS)
def test_a_torn_one_is_passed_over_with_a_warning_for_the_one_before(tmp_path: Path, how: str) -> None:
    chains = interrupted(BUSY, 50).chains
    save(tmp_path, chains[:2])
    tear(save(tmp_path, chains[:3]), how)
    warnings: list[str] = []
    found = read(tmp_path, warnings)
    assert found is not None and len(found.chains) == 2
    (warning,) = warnings
    assert "checkpoint-0000002 cannot be used, the one before it is taken" in warning
    newest = save(tmp_path, chains[:4])
    assert newest.name == "checkpoint-0000003", "the torn one's number is not used again"


def test_all_torn_is_a_start_from_the_parts(tmp_path: Path) -> None:
    chains = interrupted(BUSY, 50).chains
    for _ in range(2):
        tear(save(tmp_path, chains), "flipped")
    warnings: list[str] = []
    assert read(tmp_path, warnings) is None and len(warnings) == 2


def test_one_of_another_configuration_or_version_is_not_taken(tmp_path: Path) -> None:
    folder = save(tmp_path, interrupted(BUSY, 50).chains)
    warnings: list[str] = []
    assert read(tmp_path, warnings, fingerprint="beef") is None and "another configuration" in warnings[0]
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"schema_version": "0"}))
    assert read(tmp_path) is None


def test_a_write_that_fails_leaves_the_one_before_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = interrupted(BUSY, 50).chains
    save(tmp_path, chains[:2])
    with monkeypatch.context() as patched:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("specreason_batch.store.checkpoints.write_table", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, chains[:3])
    found = read(tmp_path)
    assert found is not None and len(found.chains) == 2
    assert list(Uncontended(tmp_path).staging.iterdir()) == []
    save(tmp_path, chains[:3])
    found = read(tmp_path)
    assert found is not None and len(found.chains) == 3
