"""What the project needs of vLLM, on real engines; run against another release with `make test-vllm VERSION=...`.

Every trap of docs/vllm.md is here, either handled or refused.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from specreason_batch import vllm_engine
from specreason_batch.chat import ChatFormat, load_chat_format
from specreason_batch.clock import WallClock
from specreason_batch.config import ChatConfig
from specreason_batch.engine import DeathCause, Engine, EngineDead
from specreason_batch.engine_processes import KILL_SECONDS
from specreason_batch.engines import started_engines
from specreason_batch.judge import Judge, Question
from specreason_batch.probe import probe_cache, probe_grade
from specreason_batch.progress import Progress
from specreason_batch.types import Completion, FinishReason, InvalidInput, Request, Role, Sampling
from specreason_batch.vllm_engine import VllmEngine, llm_arguments, shared_out_cores
from tests.conftest import ROOT, TOY, toy_engine_config
from tests.support.configs import make_config

GREEDY = Sampling(temperature=0.0)
HOT = Sampling(temperature=1.0)
QUESTION = Question(question="Is the last step right? Grade 0-9.", reply_opening="Grade: ")


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    return load_chat_format(Role.base, str(TOY / "base"), ChatConfig().options())


@pytest.fixture(scope="session")
def judge(chat: ChatFormat) -> Judge:
    return Judge(QUESTION, chat)


@pytest.fixture(scope="session")
def opening(chat: ChatFormat) -> list[int]:
    return chat.opening("Start with 31 and work modulo 100.\n1) *9\n2) +8\n3) -2\nWhat is the result?")


@pytest.fixture(scope="session")
def separate_engine(toy_clock: WallClock) -> Iterator[VllmEngine]:
    """An engine in processes of its own."""
    engine = VllmEngine(toy_engine_config(Role.draft, in_process=False), clock=toy_clock)
    yield engine
    engine.close()


@pytest.fixture(params=["in_process", pytest.param("separate", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "separate":
        separate: Engine = request.getfixturevalue("separate_engine")
        return separate
    pair: dict[Role, Engine] = request.getfixturevalue("toy_engines")
    return pair[Role.draft]


def ask(
    prompt: list[int], id: str = "a", max_tokens: int = 8, sampling: Sampling = GREEDY, seed: int | None = None
) -> Request:
    return Request(request_id=id, prompt_token_ids=list(prompt), max_tokens=max_tokens, sampling=sampling, seed=seed)


def complete(engine: Engine, *requests: Request) -> dict[str, Completion]:
    """Submit, drain; completions by id, each exactly once."""
    engine.submit(requests)
    done: list[Completion] = []
    deadline = time.monotonic() + 120
    while engine.num_outstanding:
        done += engine.poll(0.5)
        assert time.monotonic() < deadline
    by_id = {completion.request_id: completion for completion in done}
    assert len(by_id) == len(done) == len(requests)
    return by_id


# --- what is asked for is what comes back ---


def test_every_request_completes_once_under_its_own_id(engine: Engine, opening: list[int]) -> None:
    done = complete(engine, *(ask(opening, str(n), max_tokens=n + 1) for n in range(8)))
    assert {id: len(completion.token_ids) for id, completion in done.items()} == {str(n): n + 1 for n in range(8)}
    assert all(completion.finish_reason is FinishReason.length for completion in done.values())


def test_same_seed_gives_same_tokens_in_any_batch_and_seeds_are_not_shared(engine: Engine, opening: list[int]) -> None:
    alone = complete(engine, ask(opening, max_tokens=16, sampling=HOT, seed=7))["a"].token_ids
    batch = complete(engine, *(ask(opening, str(n), max_tokens=16, sampling=HOT, seed=n) for n in range(8)))
    assert batch["7"].token_ids == alone
    assert len({completion.token_ids for completion in batch.values()}) > 1


def test_the_largest_seed_works_and_others_are_refused(engine: Engine, opening: list[int]) -> None:
    done = complete(
        engine,
        ask(opening, "largest", sampling=HOT, seed=(1 << 63) - 1),
        ask(opening, "too large", sampling=HOT, seed=1 << 63),
        ask(opening, "none in disguise", sampling=HOT, seed=-1),
    )
    assert len(done["largest"].token_ids) == 8
    assert {done[id].finish_reason for id in ("too large", "none in disguise")} == {FinishReason.refused}


def test_the_stop_token_is_part_of_the_completion(engine: Engine, opening: list[int]) -> None:
    free = complete(engine, ask(opening, max_tokens=16))["a"].token_ids
    stop = free[5]
    stopped = complete(engine, ask(opening, max_tokens=16, sampling=Sampling(temperature=0.0, stop_token_ids=(stop,))))[
        "a"
    ]
    assert stopped.finish_reason is FinishReason.stop
    assert stopped.token_ids == free[: free.index(stop) + 1]


def test_a_long_stop_list_stops_like_a_short_one(engine: Engine, opening: list[int], chat: ChatFormat) -> None:
    stops = tuple(sorted(id for id in range(290) if id not in chat.blank_line_ids)) + tuple(chat.blank_line_ids)
    done = complete(
        engine,
        ask(opening, "short", 24, Sampling(temperature=0.0, stop_token_ids=tuple(chat.blank_line_ids))),
        ask(opening, "long", 24, Sampling(temperature=0.0, stop_token_ids=stops)),
    )
    first = next(n for n, id in enumerate(done["short"].token_ids) if id in stops)
    assert done["long"].token_ids == done["short"].token_ids[: first + 1]


def test_a_stop_string_ends_a_completion_where_no_token_can(
    engine: Engine, opening: list[int], chat: ChatFormat
) -> None:
    free = complete(engine, ask(opening, max_tokens=16))["a"].token_ids
    text = chat.decode(free)[3:6]
    stopped = complete(engine, ask(opening, max_tokens=16, sampling=Sampling(temperature=0.0, stop_strings=(text,))))[
        "a"
    ]
    assert stopped.finish_reason is FinishReason.stop
    assert free[: len(stopped.token_ids)] == stopped.token_ids
    assert text in chat.decode(stopped.token_ids)


# --- nobody waits: an engine rings when a poll may have something ---

PATIENCE = 5.0  # seconds that no wait may take while something is outstanding


def complete_by_ringing(clock: WallClock, *engines: Engine) -> list[Completion]:
    """Until nothing is outstanding: wait for the clock, poll without waiting."""
    done: list[Completion] = []
    while any(engine.num_outstanding for engine in engines):
        began = time.monotonic()
        clock.wait(PATIENCE)
        assert time.monotonic() - began < PATIENCE / 2, "nobody rang"
        for engine in engines:
            done += engine.poll(0)
    return done


def test_waiting_for_the_clock_and_polling_without_waiting_completes_everything(
    engine: Engine, toy_clock: WallClock, opening: list[int]
) -> None:
    requests = [ask(opening, str(n), max_tokens=n + 1) for n in range(8)]
    engine.submit([*requests, ask([], "refused"), ask(opening, "gone", max_tokens=64)])
    engine.abort(["gone"])
    done = complete_by_ringing(toy_clock, engine)
    assert sorted(completion.request_id for completion in done) == sorted([*map(str, range(8)), "refused"])


def test_two_engines_are_waited_for_at_once(
    engine: Engine, toy_engines: dict[Role, Engine], toy_clock: WallClock, opening: list[int]
) -> None:
    engine.submit([ask(opening, f"one {n}", max_tokens=4) for n in range(4)])
    toy_engines[Role.base].submit([ask(opening, f"other {n}", max_tokens=40) for n in range(4)])
    assert len(complete_by_ringing(toy_clock, engine, toy_engines[Role.base])) == 8


def test_a_refusal_alone_rings(engine: Engine, toy_clock: WallClock) -> None:
    engine.submit([ask([], "refused")])
    assert [completion.request_id for completion in complete_by_ringing(toy_clock, engine)] == ["refused"]


def test_what_is_put_out_before_anybody_waits_is_not_missed(
    engine: Engine, toy_clock: WallClock, opening: list[int]
) -> None:
    engine.submit([ask(opening, str(n), max_tokens=4 * n + 1) for n in range(4)])
    time.sleep(1)
    assert len(complete_by_ringing(toy_clock, engine)) == 4


def test_with_nothing_outstanding_nobody_rings(engine: Engine, toy_clock: WallClock, opening: list[int]) -> None:
    engine.submit([ask(opening, "a")])
    complete_by_ringing(toy_clock, engine)
    toy_clock.wait(0.3)  # an engine's last word may come after its last completion
    began = time.monotonic()
    toy_clock.wait(0.3)
    assert time.monotonic() - began >= 0.3
    assert engine.poll(0) == []


# --- one bad request is refused alone ---


def test_bad_requests_are_refused_and_leave_the_others_alone(engine: Engine, opening: list[int]) -> None:
    window = engine.info.max_model_len
    done = complete(
        engine,
        ask(opening, "good"),
        ask([*opening, 1 << 30], "id past the vocabulary"),
        ask([], "empty"),
        ask(opening, "nothing to generate", max_tokens=0),
        ask([opening[0]] * (window + 1), "over-long"),
        ask(opening, "past the window", max_tokens=window),
        ask(opening, "129 labels", 1, Sampling(temperature=0.0, logprob_token_ids=tuple(range(129)))),
        ask(opening, "good too"),
    )
    refused = {id for id, completion in done.items() if completion.finish_reason is FinishReason.refused}
    assert refused == done.keys() - {"good", "good too"}
    assert all(done[id].error and not done[id].token_ids for id in refused)
    assert done["good"].token_ids == done["good too"].token_ids != ()


def test_a_completion_that_just_fits_the_window_is_not_cut_short(engine: Engine, opening: list[int]) -> None:
    prompt = (opening * 40)[: engine.info.max_model_len - 12]
    done = complete(engine, ask(prompt, max_tokens=12))["a"]
    assert len(done.token_ids) == 12


def test_aborted_requests_are_never_heard_of_again(engine: Engine, opening: list[int]) -> None:
    engine.submit([ask(opening, "gone", max_tokens=64), ask(opening, "kept", max_tokens=4)])
    engine.abort(["gone", "unknown"])
    seen = []
    while engine.num_outstanding:
        seen += engine.poll(0.5)
    assert [completion.request_id for completion in seen] == ["kept"]
    assert set(complete(engine, ask(opening, "later"))) == {"later"}


# --- grades and caches ---


def test_a_grade_has_the_ten_labels_raw_probabilities(engine: Engine, opening: list[int], judge: Judge) -> None:
    labels = Sampling(temperature=0.0, logprob_token_ids=judge.label_ids)
    everything = Sampling(temperature=0.0, logprob_token_ids=tuple(range(128)))
    prompt = [*opening, *judge.turn]
    done = complete(engine, ask(prompt, "grade", 1, labels), ask(prompt, "more", 1, everything))
    assert set(judge.label_ids) <= done["grade"].logprobs.keys()
    assert 0.0 < sum(math.exp(done["grade"].logprobs[id]) for id in judge.label_ids) <= 1.0 + 1e-4
    shared = done["grade"].logprobs.keys() & done["more"].logprobs.keys()
    assert shared
    assert all(math.isclose(done["grade"].logprobs[id], done["more"].logprobs[id], abs_tol=1e-4) for id in shared)


def test_grades_are_the_same_alone_and_in_a_batch(
    toy_engines: dict[Role, Engine], opening: list[int], judge: Judge
) -> None:
    base = toy_engines[Role.base]
    labels = Sampling(temperature=0.0, logprob_token_ids=judge.label_ids)
    prompts = [[*opening, *opening[:n], *judge.turn] for n in range(32)]
    batch = complete(base, *(ask(prompt, str(n), 1, labels) for n, prompt in enumerate(prompts)))
    for n in (0, 13, 31):
        alone = complete(base, ask(prompts[n], "alone", 1, labels))["alone"]
        assert judge.read(alone.logprobs, alone.token_ids[0]).probs == pytest.approx(
            judge.read(batch[str(n)].logprobs, batch[str(n)].token_ids[0]).probs, abs=1e-5
        )


def test_the_probes_pass_on_a_good_engine(toy_engines: dict[Role, Engine], opening: list[int], judge: Judge) -> None:
    base = toy_engines[Role.base]
    assert probe_grade(base, judge, opening).mass > 0
    assert probe_cache(base, opening).hits


def test_the_grade_probe_refuses_an_engine_without_label_logprobs(
    toy_engines: dict[Role, Engine], opening: list[int], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = toy_engines[Role.base]
    monkeypatch.setattr(base, "_template", _without_labels(base._template))
    monkeypatch.setattr(base, "_templates", {})
    with pytest.raises(InvalidInput, match="no log-probabilities"):
        probe_grade(base, judge, opening)


def _without_labels(template: Any) -> Any:
    def build(sampling: Sampling) -> Any:
        return template(Sampling(temperature=sampling.temperature))

    return build


def test_prompt_and_generated_blocks_are_found_in_the_prefix_cache(
    engine: Engine, opening: list[int], chat: ChatFormat
) -> None:
    block = engine.info.block_size
    prompt = chat.opening("words of their own " * 20)
    first = complete(engine, ask(prompt, max_tokens=2 * block))["a"]
    again = complete(engine, ask([*prompt, *first.token_ids], max_tokens=1))["a"]
    whole_blocks = (len(prompt) + len(first.token_ids) - 1) // block
    assert first.num_cached_tokens < len(prompt)
    assert again.num_cached_tokens == whole_blocks * block


def test_an_engine_that_never_caches_is_noticed(opening: list[int]) -> None:
    engine = VllmEngine(toy_engine_config(Role.draft, vllm_args={"enable_prefix_caching": False}))
    try:
        assert not probe_cache(engine, opening).hits
    finally:
        engine.close()


def test_grades_survive_speculative_decoding(toy_engines: dict[Role, Engine], opening: list[int], judge: Judge) -> None:
    speculative = {"method": "draft_model", "model": str(TOY / "draft"), "num_speculative_tokens": 3}
    engine = VllmEngine(toy_engine_config(Role.base, vllm_args={"speculative_config": speculative}))
    try:
        grade = probe_grade(engine, judge, opening)
        plain = probe_grade(toy_engines[Role.base], judge, opening)
        assert max(plain.probs) > 0.01
        assert all(
            math.isclose(one, other, abs_tol=0.01) for one, other in zip(grade.probs, plain.probs, strict=True) if one
        )
        assert grade.mass == pytest.approx(plain.mass, abs=0.05)
    finally:
        engine.close()


# --- start and end ---


def test_an_engine_knows_its_window_vocabulary_and_capacity(engine: Engine) -> None:
    assert engine.info.max_model_len == 1024
    assert engine.info.kv_capacity_tokens > 1024
    assert engine.info.block_size == 32
    assert engine.info.version.startswith("vllm ")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "no/such/model"}, "no/such/model"),
        ({"vllm_args": {"no_such_argument": 1}}, "no_such_argument"),
        ({"vllm_args": {"enable_chunked_prefill": True}}, "enable_chunked_prefill"),
        ({"vllm_args": {"max_num_batched_tokens": 64}}, "max_num_batched_tokens"),
        ({"max_model_len": 1 << 20}, "max_model_len"),
        ({"vllm_args": {"kv_offloading_size": 1.0}}, "offload"),
        ({"kv_offload_gib": 1}, "kv_offload_gib: 1 needs a GPU; allowed on a CPU: null"),
        (
            {"cpu_cores": [4095], "in_process": False},
            r"cpu_cores: this process may not use \[4095\]; allowed: some of ",
        ),
        ({"vllm_args": {"num_gpu_blocks_override": 32}}, "num_gpu_blocks_override: 32 .* allowed: at least 33"),
    ],
)
def test_what_vllm_does_not_take_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        VllmEngine(toy_engine_config(Role.draft, **changes))


@pytest.mark.parametrize("blocks", [33, 63, 626])
def test_a_small_cache_says_so_and_changes_no_token(
    blocks: int, toy_engines: dict[Role, Engine], opening: list[int]
) -> None:
    """Requests that outgrow the cache are preempted, and computed again where they stood."""
    engine = VllmEngine(toy_engine_config(Role.base, vllm_args={"num_gpu_blocks_override": blocks}))
    try:
        assert engine.info.kv_capacity_tokens == (blocks - 1) * 32
        requests = [ask([*opening, n], str(n), max_tokens=200, sampling=HOT, seed=n) for n in range(16)]
        requests.append(ask((opening * 40)[:1000], "whole window", max_tokens=24))
        done, roomy = complete(engine, *requests), complete(toy_engines[Role.base], *requests)
        assert sum(len(opening) + len(completion.token_ids) for completion in done.values()) > 2016
        assert {id: completion.token_ids for id, completion in done.items()} == {
            id: completion.token_ids for id, completion in roomy.items()
        }
    finally:
        engine.close()


def test_a_whole_cache_holds_a_prompt_of_its_capacity_and_nothing_beside_it(opening: list[int]) -> None:
    """After a prompt as long as the cache nothing of an earlier one is left; after one a block shorter, one block."""
    engine = VllmEngine(toy_engine_config(Role.base, vllm_args={"num_gpu_blocks_override": 33}))
    try:
        capacity = engine.info.kv_capacity_tokens
        left = []
        for length in (capacity, capacity - 32):
            complete(engine, ask([7] * 65, "early", 1))
            complete(engine, ask((opening * 40)[: length - 1], "long", 1))
            left.append(complete(engine, ask([7] * 65, "again", 1))["again"].num_cached_tokens)
        assert left == [0, 32]
    finally:
        engine.close()


def test_the_capacity_is_right_where_the_window_is_no_multiple_of_a_block() -> None:
    engine = VllmEngine(toy_engine_config(Role.base, max_model_len=1000))
    try:
        blocks: int = engine._engine.vllm_config.cache_config.num_gpu_blocks
        assert engine.info.kv_capacity_tokens == (blocks - 1) * 32
    finally:
        engine.close()


def test_on_a_gpu_offloading_is_passed_on_and_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    config = toy_engine_config(Role.base, kv_offload_gib=3, in_process=False)
    vllm_engine.check_platform(config)
    assert llm_arguments(config)["kv_offloading_size"] == 3
    assert "kv_offloading_size" not in llm_arguments(toy_engine_config(Role.base))
    sized = llm_arguments(toy_engine_config(Role.base, kv_cache_gib=2))
    assert (sized["kv_cache_memory_bytes"], sized["gpu_memory_utilization"]) == (2 << 30, 0.01)
    given = llm_arguments(toy_engine_config(Role.base, kv_cache_gib=2, gpu_memory_utilization=0.5))
    assert given["gpu_memory_utilization"] == 0.5
    assert "gpu_memory_utilization" not in llm_arguments(toy_engine_config(Role.base, kv_cache_gib=None))
    assert shared_out_cores(2) is None
    with pytest.raises(InvalidInput, match=r"cpu_cores: \[0\] binds CPU engines only; allowed on a GPU: null"):
        vllm_engine.check_platform(toy_engine_config(Role.base, cpu_cores=[0], in_process=False))


@pytest.mark.parametrize(
    ("usable", "threads", "taken", "shares"),
    [
        ({0, 1}, 1, (), [[0], [1]]),
        ({3, 5, 8}, 1, (), [[3, 5], [8]]),
        ({4}, 1, (), [[4], [4]]),
        ({0, 1, 2, 3, 4, 5, 6, 7}, 2, (), [[0, 1], [2, 3]]),
        ({0, 4}, 2, (), [[0], [4]]),
        ({0, 1, 2}, 1, (0,), [[1], [2]]),
        ({0, 1}, 1, (0, 1), [[0], [1]]),
    ],
)
def test_two_engines_share_out_the_cores(
    usable: set[int], threads: int, taken: tuple[int, ...], shares: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two threads a core, threads n and n + 4 are one core's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable)
    monkeypatch.setattr(vllm_engine, "_siblings", lambda core: (core % 4, core % 4 + 4) if threads == 2 else (core,))
    monkeypatch.delenv(vllm_engine.BINDING, raising=False)
    assert shared_out_cores(2, taken) == shares
    monkeypatch.setenv(vllm_engine.BINDING, "0-1")
    assert shared_out_cores(2, taken) is None


def test_an_exception_in_a_step_leaves_nothing_to_the_next_call(
    opening: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = VllmEngine(toy_engine_config(Role.draft))
    try:
        engine.submit([ask(opening, str(n), max_tokens=32) for n in range(5)])
        engine.poll(0.1)
        with monkeypatch.context() as patch:
            patch.setattr(engine._engine.engine_core, "get_output", _raise)
            with pytest.raises(EngineDead, match="MemoryError: no memory left") as raised:
                engine.poll(0.1)
        assert raised.value.cause is DeathCause.out_of_memory
        assert engine.num_outstanding == 0
        assert set(complete(engine, ask(opening, "next"))) == {"next"}
    finally:
        engine.close()


def _raise() -> None:
    raise MemoryError("no memory left")


def test_closing_twice_is_quick_and_harmless() -> None:
    engine = VllmEngine(toy_engine_config(Role.draft))
    began = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - began < 5


def test_closing_an_engine_leaves_those_beside_it_at_work(toy_engines: dict[Role, Engine], opening: list[int]) -> None:
    """In one process all share torch's process groups, which vLLM would take down with the first that goes."""
    request = ask(opening, max_tokens=16, sampling=HOT, seed=7)
    before = complete(toy_engines[Role.draft], request)["a"].token_ids
    VllmEngine(toy_engine_config(Role.draft)).close()
    assert complete(toy_engines[Role.draft], request)["a"].token_ids == before


# --- engines in processes of their own: how they end, and how they do not ---

CLOSING = vllm_engine.CLOSE_SECONDS + KILL_SECONDS
LONG = 900  # tokens


def long_requests(number: int = 8) -> list[Request]:
    """Some of which ramble on for LONG tokens: the toy models do after what is no prompt."""
    return [ask([5, 6, 7, 8, n + 9], str(n), max_tokens=LONG, sampling=HOT, seed=n) for n in range(number)]


@contextmanager
def separate(**changes: Any) -> Iterator[tuple[VllmEngine, list[psutil.Process]]]:
    """An engine in processes of its own, and these: the engine process and its worker. They end in bounded time."""
    before = set(_engine_processes())
    engine = VllmEngine(toy_engine_config(Role.draft, in_process=False, **changes))
    processes = sorted(set(_engine_processes()) - before, key=psutil.Process.create_time)
    try:
        yield engine, processes
    finally:
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < CLOSING
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in processes)


def death_of(engine: Engine, seconds: float = 30) -> EngineDead:
    began = time.monotonic()
    with pytest.raises(EngineDead) as raised:
        _poll_for(engine, seconds)
    assert time.monotonic() - began < seconds
    engine.abort(["0", "1"])  # nothing is left to forget, and nothing happens
    return raised.value


@pytest.mark.slow
def test_signals_to_the_whole_job_lose_nothing(separate_engine: VllmEngine) -> None:
    """A terminal's Ctrl-C and Slurm's signals go to the engine's processes too; the job itself must save first."""
    requests = long_requests()
    undisturbed = complete(separate_engine, *requests)
    separate_engine.submit(requests)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        for child in _engine_processes():
            child.send_signal(number)
        time.sleep(0.1)
    done = _poll_for(separate_engine, 60)
    assert {completion.request_id: completion.token_ids for completion in done} == {
        id: completion.token_ids for id, completion in undisturbed.items()
    }
    assert max(len(completion.token_ids) for completion in done) == LONG


@pytest.mark.slow
def test_a_stopped_engine_is_dead_after_its_time_out_and_can_be_closed() -> None:
    with separate(engine_timeout_seconds=3) as (engine, processes):
        engine.submit(long_requests())
        for child in processes:
            child.suspend()
        death = death_of(engine)
        assert death.cause is DeathCause.silent
        assert "no output" in str(death)


@pytest.mark.slow
def test_a_stopped_engine_that_nobody_knows_to_be_hung_can_be_closed() -> None:
    with separate() as (_, processes):
        for child in processes:
            child.suspend()


@pytest.mark.slow
def test_a_killed_engine_is_dead_at_once_and_stays_dead(opening: list[int]) -> None:
    with separate(engine_timeout_seconds=60) as (engine, processes):
        engine.submit(long_requests())
        processes[0].kill()
        death = death_of(engine)
        assert death.cause is DeathCause.died
        assert "EngineCore ended by SIGKILL" in str(death)
        with pytest.raises(EngineDead):
            engine.submit([ask(opening, "later")])
            _poll_for(engine, 50)


@pytest.mark.slow
def test_an_engine_built_after_its_worker_was_killed_gives_the_same_tokens(opening: list[int]) -> None:
    requests = [ask(opening, str(n), max_tokens=100, sampling=HOT, seed=n) for n in range(8)]
    with separate(engine_timeout_seconds=60) as (engine, processes):
        before = complete(engine, *requests)
        engine.submit(long_requests())
        processes[-1].kill()
        death = death_of(engine)
        assert death.cause is DeathCause.died
        assert "VllmWorker-0 ended by SIGKILL" in str(death)
    with separate() as (engine, _):
        after = complete(engine, *requests)
    assert {id: done.token_ids for id, done in after.items()} == {id: done.token_ids for id, done in before.items()}


@pytest.mark.slow
def test_an_exception_in_a_worker_is_told(opening: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By what this project refuses: on CPUs a seeded request whose prefill is chunked raises."""
    monkeypatch.setattr(vllm_engine, "_check_cpu_arguments", lambda _: None)
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    with separate(vllm_args=chunked) as (engine, _):
        engine.submit([ask(opening * 10, "0", sampling=HOT, seed=7)])
        death = death_of(engine)
        assert death.cause is DeathCause.died
        assert "RuntimeError: CPU Generator does not use offset" in str(death)


@pytest.mark.slow
def test_an_engine_that_fails_to_start_says_why_and_leaves_nothing() -> None:
    before = set(_engine_processes())
    with pytest.raises(EngineDead, match=r"died while starting: ValueError: .*weights") as raised:
        VllmEngine(
            toy_engine_config(Role.draft, in_process=False, vllm_args={"hf_overrides": {"num_hidden_layers": 7}})
        )
    assert raised.value.cause is DeathCause.starting
    assert set(_engine_processes()) <= before


JOB = """
import signal, sys, time
from tests.conftest import Role, VllmEngine, toy_engine_config
from specreason_batch.vllm_engine import check_platform

class Stopped(Exception):
    pass

def stop(*_):
    if sys.argv[1] == "stops":
        raise Stopped

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, stop)
    config = toy_engine_config(Role.draft, in_process=False)
    check_platform(config)
    print("starting", flush=True)
    try:
        engine = VllmEngine(config)
    except Stopped:
        sys.exit(75)
    print("up", flush=True)
    time.sleep(600)
"""


@contextmanager
def job(tmp_path: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that starts an engine; in a process group of its own, as a terminal's or Slurm's jobs are."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    process = subprocess.Popen(
        [sys.executable, str(script), how],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _line(process, "starting")
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _line(process: "subprocess.Popen[str]", wanted: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == wanted


def _tree(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _gone(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_start_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    with job(tmp_path, "stops") as process:
        while not (tree := _tree(process.pid)):
            time.sleep(0.5)
        time.sleep(5)
        tree = _tree(process.pid)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert time.monotonic() - began < 10
        assert _gone(tree, 5)


@pytest.mark.slow
def test_signals_to_all_do_not_reach_a_starting_engine_and_it_dies_with_its_job(tmp_path: Path) -> None:
    with job(tmp_path, "goes on") as process:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            time.sleep(2)
            os.killpg(process.pid, number)
        _line(process, "up")
        tree = _tree(process.pid)
        assert len([child for child in tree if _is_engine(child)]) == 2
        process.kill()
        assert _gone(tree, 5)


@pytest.mark.slow
def test_a_killed_engine_rings() -> None:
    before, clock = set(_engine_processes()), WallClock()
    engine = VllmEngine(toy_engine_config(Role.draft, in_process=False), clock=clock)
    try:
        engine.submit(long_requests())
        for child in set(_engine_processes()) - before:
            child.kill()
        with pytest.raises(EngineDead):
            complete_by_ringing(clock, engine)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
@pytest.mark.parametrize("configured", [True, False])
def test_two_engines_work_on_cores_of_their_own_and_ring_one_clock(
    configured: bool, opening: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configured the other way round than they are shared out."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to ask the workers how many threads they have
    if configured:
        monkeypatch.setenv(vllm_engine.BINDING, "nobind")
    base, draft = ([second], [first]) if configured else shared_out_cores(2) or ([], [])
    cores = {Role.base: base, Role.draft: draft} if configured else {}
    pair = {role: toy_engine_config(role, in_process=False, cpu_cores=cores.get(role)) for role in Role}
    config = make_config(tmp_path, draft=pair[Role.draft], base=pair[Role.base])
    before, threads, clock = set(_engine_processes()), _affinities(psutil.Process()), WallClock()
    with started_engines(config, frozenset(Role), Progress(Console(quiet=True), 1e9), clock) as engines:
        assert os.environ.get(vllm_engine.BINDING) == ("nobind" if configured else None)
        assert _affinities(psutil.Process()) == threads
        cores_of = [core for core in psutil.Process().children() if core in set(_engine_processes()) - before]
        trees = [[core, *core.children()] for core in sorted(cores_of, key=psutil.Process.create_time)]
        assert [len(tree) for tree in trees] == [2, 2]
        for tree, bound in zip(trees, (base, draft), strict=True):
            assert {_core_list(text) for process in tree for text in _affinities(process)} == {tuple(bound)}
        for role, engine in engines.items():
            workers: Any = engine
            [omp_threads] = workers._llm.collective_rpc(lambda _: __import__("torch").get_num_threads())
            assert omp_threads == len(base if role is Role.base else draft)
            engine.submit([ask(opening, f"{role} {n}", max_tokens=40) for n in range(8)])
        assert len(complete_by_ringing(clock, *engines.values())) == 16


def _affinities(process: psutil.Process) -> set[str]:
    """Of all threads, as the system writes them: 0-3,8."""
    status = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
    return {text.split("Cpus_allowed_list:")[1].split()[0] for text in status}


def _core_list(text: str) -> tuple[int, ...]:
    spans = [part.split("-") for part in text.split(",")]
    return tuple(core for span in spans for core in range(int(span[0]), int(span[-1]) + 1))


def _poll_for(engine: Engine, seconds: float) -> list[Completion]:
    deadline = time.monotonic() + seconds
    seen: list[Completion] = []
    while engine.num_outstanding and time.monotonic() < deadline:
        seen += engine.poll(0.5)
    return seen


def _engine_processes() -> list[psutil.Process]:
    """Python processes below this one that hold an engine or a worker."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and _is_engine(child)]


def _is_engine(process: psutil.Process) -> bool:
    name = " ".join([process.name(), *process.cmdline()])
    return "VLLM" in name or "EngineCore" in name or Path(name.split()[0]).name.startswith("VLLM")
