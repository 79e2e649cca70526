"""Policies: who writes each step, and whether a draft is kept (docs/design.md, 3 and 5)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specreason_batch.chain import Chain, Context, Limits
from specreason_batch.chat import ChatFormat
from specreason_batch.config import POLICY_NAMES
from specreason_batch.policies import POLICIES, Rules
from specreason_batch.schedules import SCHEDULES
from specreason_batch.seeds import stable_coin
from specreason_batch.types import (
    Completion,
    EndedBy,
    FinishReason,
    Grade,
    Phase,
    Prompt,
    Request,
    Role,
    ThinkingEnd,
    WriteAnswer,
    WrittenStep,
)
from tests.support.plain_loop import Row
from tests.support.running import Run, Script, policy_of, run_world
from tests.support.worlds import PROMPTS, World, worlds

NEVER, ALWAYS = 9.5, 0.0  # thresholds
RULED = World(prompts=PROMPTS, num_samples=2, windows=(4096, 4096), mass_floor=0.0, seed=5)

# What a step is, whoever may have been asked about it.
KEPT = ("step_index", "author", "ended_by", "start", "end", "token_ids", "num_tokens")
OUTCOME = ("thinking", "answer", "thinking_end", "answer_end", "num_steps", "seed")


def kept_rows(run: Run) -> dict[tuple[str, int], tuple[Row, list[Row]]]:
    return {
        key: ({name: chain[name] for name in OUTCOME}, [{name: step[name] for name in KEPT} for step in steps])
        for key, (chain, steps) in run.rows().items()
    }


def same_windows(world: World) -> World:
    """No chain's length depends on who else has a window, a grading turn to keep free, or ids to count it in."""
    limits = replace(world.limits, generated_tokens=None)
    world = replace(world, other_vocabulary=False)
    return replace(world, windows=(4096, 4096), limits=limits, mass_floor=0.0, temperature=0.6)


# --- the two ends of the threshold ---


@settings(max_examples=40, deadline=None)
@given(world=worlds(policies=("specreason",)))
def test_accepting_always_is_draft_only_step_by_step(world: World) -> None:
    world = replace(same_windows(world), threshold=ALWAYS, first_n_base_steps=0, answer_role=Role.draft)
    world = replace(world, reading=World().reading)  # a greedy reading may be unreadable, which accepts nothing
    run = run_world(world)
    draft_only = run_world(replace(world, policy="draft_only"))
    assert kept_rows(run) == kept_rows(draft_only)
    assert not any(_phase_of(request) is Phase.rewrite for request in run.engines[Role.base].requests)


@settings(max_examples=40, deadline=None)
@given(world=worlds(policies=("specreason",)))
def test_accepting_never_is_base_only_step_by_step(world: World) -> None:
    world = replace(same_windows(world), threshold=NEVER, answer_role=Role.base)
    run = run_world(world)
    assert kept_rows(run) == kept_rows(run_world(replace(world, policy="base_only")))
    for chain in run.finished:
        assert all(step.rejected is not None for step in chain.steps[world.first_n_base_steps :])


@settings(max_examples=20, deadline=None)
@given(world=worlds(policies=("random",)), rate=st.sampled_from([0.0, 1.0]))
def test_a_coin_of_rate_one_or_zero_is_draft_only_or_base_only(world: World, rate: float) -> None:
    role = Role.draft if rate else Role.base
    world = replace(same_windows(world), accept_rate=rate, first_n_base_steps=0, answer_role=role)
    assert kept_rows(run_world(world)) == kept_rows(run_world(replace(world, policy=f"{role}_only")))


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_always_and_never_differ(temperature: float) -> None:
    """Guards the equalities above: the two models do not write the same."""
    world = replace(RULED, temperature=temperature)
    always, never = (run_world(replace(world, threshold=threshold)) for threshold in (ALWAYS, NEVER))
    assert kept_rows(always) != kept_rows(never)


# --- all in one go ---


def _is_thinking(request: Request, chat: ChatFormat) -> bool:
    return chat.think_close_id in request.sampling.stop_token_ids or bool(request.sampling.stop_strings)


def autoregressive(world: World) -> Callable[[Role, Script], Script]:
    """A model whose next token does not depend on where a request began: it goes on from its own steps."""

    def wrap(role: Role, model: Script) -> Script:
        chat, limits = world.formats[role], world.limits
        blank_ids, strings = tuple(chat.blank_line_ids), () if chat.blank_line_ids else ("\n\n",)

        def generate(request: Request) -> Completion:
            ids: tuple[int, ...] = ()
            stops = request.sampling
            steps = replace(
                stops,
                stop_token_ids=(*stops.stop_token_ids, *blank_ids),
                stop_strings=(*strings, *stops.stop_strings),
            )
            while len(ids) < request.max_tokens:
                sofar = [*request.whole_prompt(), *ids]
                most = min(limits.max_step_tokens, request.max_tokens - len(ids))
                step = replace(request, prompt_token_ids=sofar, suffix_token_ids=(), max_tokens=most, sampling=steps)
                ids += model(step).token_ids
                spelt = chat.decode(ids)
                if ids[-1] in stops.stop_token_ids or any(stop in spelt for stop in stops.stop_strings):
                    return Completion(request_id=request.request_id, token_ids=ids, finish_reason=FinishReason.stop)
            return Completion(request_id=request.request_id, token_ids=ids, finish_reason=FinishReason.length)

        def script(request: Request) -> Completion:
            return generate(request) if _is_thinking(request, world.formats[role]) else model(request)

        return script

    return wrap


@settings(max_examples=150, deadline=None)
@given(world=worlds(policies=("base_only",)))
def test_the_base_in_one_generation_writes_the_steps_of_base_only(world: World) -> None:
    """Where one model's text depends on nothing but what stands before it."""
    world = replace(world, seeded=False)
    stepwise = run_world(world)
    if any(step.written.ended_by is EndedBy.special for step in _steps(stepwise)):
        # What a special token drops counts as generated, and one generation drops more than a step.
        world = replace(world, limits=replace(world.limits, generated_tokens=None))
        stepwise = run_world(world)
    direct = run_world(replace(world, policy="base_direct"), wrap=autoregressive(world))
    written, expected = kept_rows(direct), kept_rows(stepwise)
    for key, (_, steps) in written.items():
        for step, stepwise_step in zip(steps, expected[key][1], strict=True):
            if step["ended_by"] == "special" or step is steps[-1]:  # these count what they dropped
                assert step["num_tokens"] >= stepwise_step["num_tokens"]
                step["num_tokens"] = stepwise_step["num_tokens"]
    assert written == expected


def test_a_direct_chain_asks_once_and_counts_every_token() -> None:
    world = replace(RULED, policy="base_direct", seeded=False)
    world = replace(world, limits=replace(world.limits, max_step_tokens=5, thinking_tokens=200))
    run = run_world(world, wrap=autoregressive(world))
    chat = world.formats[Role.base]
    thinking = [request for request in run.engines[Role.base].requests if _is_thinking(request, chat)]
    specials = sum(step.written.ended_by is EndedBy.special for step in _steps(run))
    assert len(thinking) <= len(run.finished) + specials
    assert max(len(chain.steps) for chain in run.finished) > 3
    generated = sum(len(item.token_ids) for item in run.engines[Role.base].completions)
    answers = sum(chain.answer.num_tokens for chain in run.finished if chain.answer)
    assert generated == answers + sum(step.num_generated_tokens for step in _steps(run))


# --- who is asked ---


@settings(max_examples=40, deadline=None)
@given(world=worlds(policies=("specreason", "random")))
def test_the_base_is_never_asked_to_rewrite_an_accepted_step(world: World) -> None:
    run = run_world(world)
    steps = _steps(run)
    asked = sum(_phase_of(request) is Phase.rewrite for request in run.engines[Role.base].requests)
    answers = sum(chain.answer is not None for chain in run.finished) if world.answer_role is Role.base else 0
    assert asked - answers == sum(step.accepted is not True for step in steps)
    assert all(step.written.author is Role.draft and step.rejected is None for step in steps if step.accepted)
    assert all(step.written.author is Role.base for step in steps if not step.accepted)


@pytest.mark.parametrize("policy", ["specreason", "random"])
@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_the_base_writes_the_first_n_steps_ungraded(policy: str, first: int) -> None:
    run = run_world(replace(RULED, policy=policy, first_n_base_steps=first, threshold=ALWAYS, accept_rate=1.0))
    assert any(len(chain.steps) > first for chain in run.finished)
    for chain in run.finished:
        for step in chain.steps[:first]:
            assert (step.written.author, step.grade, step.accepted) == (Role.base, None, None)
        for step in chain.steps[first:]:
            assert step.written.author is Role.draft and step.accepted is True


def test_a_step_of_the_bases_own_is_not_graded() -> None:
    run = run_world(replace(RULED, first_n_base_steps=100))
    assert not any(_phase_of(request) is Phase.grade for request in run.engines[Role.base].requests)
    assert run.engines[Role.draft].requests == []


@pytest.mark.parametrize("policy", ["random", "base_only", "base_direct", "draft_only"])
def test_controls_and_baselines_never_grade(policy: str) -> None:
    role = Role.draft if policy == "draft_only" else Role.base
    run = run_world(replace(RULED, policy=policy, answer_role=role))
    requests = [request for engine in run.engines.values() for request in engine.requests]
    assert requests and not any(request.sampling.logprob_token_ids for request in requests)
    assert all(step.grade is None for step in _steps(run))


@pytest.mark.parametrize("policy", ["base_only", "base_direct", "draft_only"])
def test_baselines_ask_one_engine_and_decide_nothing(policy: str) -> None:
    role = Role.draft if policy == "draft_only" else Role.base
    run = run_world(replace(RULED, policy=policy, answer_role=role))
    assert set(run.engines) == POLICIES[policy].roles == {role}
    assert {(step.written.author, step.accepted, step.rejected) for step in _steps(run)} == {(role, None, None)}


@pytest.mark.parametrize("answer_role", Role)
def test_the_configured_role_writes_the_answer(answer_role: Role) -> None:
    run = run_world(replace(RULED, answer_role=answer_role))
    assert {chain.answer.role for chain in run.finished if chain.answer} == {answer_role}
    assert all(chain.answer is not None for chain in run.finished)


# --- accepting ---


@pytest.mark.parametrize(
    ("score", "threshold", "accepted"),
    [(7.0, 7.0, True), (6.999, 7.0, False), (0.0, 0.0, True), (None, 0.0, False), (None, 7.0, False), (9.0, 9.0, True)],
)
def test_a_draft_is_accepted_at_its_threshold_and_never_unreadable(
    score: float | None, threshold: float, accepted: bool
) -> None:
    assert Rules(threshold=threshold).accepts(Grade((0.0,) * 10, 0.0, score)) is accepted


def test_an_unreadable_grade_rewrites_the_step_and_is_counted() -> None:
    run = run_world(replace(RULED, mass_floor=0.9, threshold=0.0))
    unreadable = [step for step in _steps(run) if step.grade is not None and step.grade.score is None]
    assert unreadable and all(step.accepted is False and step.rejected is not None for step in unreadable)
    assert sum(report.stats.num_unreadable for report in run.reports) == len(unreadable)
    assert all(step.grade and 0.0 < step.grade.mass < 0.9 for step in unreadable)


@pytest.mark.parametrize("active_size", [1, 64])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_randoms_acceptance_is_the_coin_and_knows_no_batch(schedule: str, active_size: int) -> None:
    run = run_world(replace(RULED, policy="random", accept_rate=0.4), schedule=schedule, active_size=active_size)
    decided = [
        (step.accepted, stable_coin(0.4, chain.seed, index))
        for chain in run.finished
        for index, step in enumerate(chain.steps)
    ]
    assert [accepted for accepted, _ in decided] == [coin for _, coin in decided]
    assert {True, False} == {accepted for accepted, _ in decided}


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_coin_falls_at_its_rate(rate: float) -> None:
    tosses = [stable_coin(rate, "chain", index) for index in range(4000)]
    assert abs(sum(tosses) / len(tosses) - rate) < 0.03
    assert sum(tosses) in ({0} if rate == 0.0 else {4000} if rate == 1.0 else range(1, 4000))


# --- closing ---


def scripted(texts: dict[Role, list[str]], score: int = 9) -> Callable[[Role, Script], Script]:
    """Models that write these steps one after the other, then close; every draft gets this grade."""

    def wrap(role: Role, _script: Script) -> Script:
        chat = RULED.formats[role]
        left = [_with_specials(role, text) for text in texts.get(role, [])]

        def answer(request: Request) -> Completion:
            labels = request.sampling.logprob_token_ids
            if labels:
                return _completion(request, [labels[score]], {labels[score]: 0.0})
            if request.prompt_token_ids[-1] == chat.think_close_id:
                return _completion(request, [*chat.encode_text("\\boxed{4}"), min(chat.end_ids)])
            return _completion(request, left.pop(0) if left else [chat.think_close_id])

        return answer

    return wrap


def run_scripted(texts: dict[Role, list[str]], score: int = 9, **changes: Any) -> Chain:
    world = replace(RULED, prompts=("so",), num_samples=1, limits=Limits(max_step_tokens=64, thinking_tokens=500))
    run = run_world(replace(world, **changes), wrap=scripted(texts, score))
    (chain,) = run.finished
    return chain


def test_a_rejected_closing_step_does_not_close() -> None:
    chain = run_scripted({Role.draft: ["so</think>"] * 9, Role.base: ["we\n\n", "add</think>"]}, score=0)
    assert [step.written.ended_by for step in chain.steps] == [EndedBy.blank_line, EndedBy.think_close]
    assert all(step.rejected is not None and step.rejected.closes for step in chain.steps)
    assert chain.thinking_end is ThinkingEnd.closed


@pytest.mark.parametrize("end", ["</think>", "<|im_end|>", "<|endoftext|>"])
def test_a_kept_closing_step_closes_and_keeps_its_body_without_the_close(end: str) -> None:
    chain = run_scripted({Role.draft: ["so\n\n", f"we add{end}"]})
    chat = RULED.formats[Role.draft]
    assert chain.thinking_end is ThinkingEnd.closed
    assert list(chain.steps[-1].written.token_ids) == chat.encode_text("we add")
    assert chain.steps[-1].written.num_tokens == len(chat.encode_text("we add")) + 1
    assert chain.steps[-1].written.ended_by is (EndedBy.think_close if end == "</think>" else EndedBy.end_of_text)


def test_the_drafts_end_of_text_closes_only_if_the_step_is_accepted() -> None:
    texts = {Role.draft: ["so<|im_end|>"], Role.base: ["we\n\n"]}
    assert run_scripted(texts, score=9).steps[0].written.author is Role.draft
    rejected = run_scripted(texts, score=0)
    assert len(rejected.steps) > 1 and not rejected.steps[0].written.closes


def test_a_boxed_answer_in_mid_thought_ends_nothing() -> None:
    chain = run_scripted({Role.draft: ["\\boxed{3}\n\n", "wait\n\n", "so \\boxed{4}\n\n"]})
    assert [step.written.ended_by for step in chain.steps] == [EndedBy.blank_line] * 3 + [EndedBy.think_close]
    assert chain.thinking_end is ThinkingEnd.closed


def test_a_chain_of_many_steps_is_not_cut_at_any_number_of_rounds() -> None:
    steps = [f"so {index}\n\n" for index in range(60)]
    chain = run_scripted({Role.draft: steps})
    assert len(chain.steps) == 61 and chain.thinking_end is ThinkingEnd.closed


def test_the_same_step_three_times_running_ends_thinking_and_another_between_does_not() -> None:
    same = run_scripted({Role.draft: ["so\n\n"] * 9})
    assert (same.thinking_end, len(same.steps)) == (ThinkingEnd.repetition, 3)
    other = run_scripted({Role.draft: ["so\n\n", "so\n\n", "we\n\n"] * 3})
    assert (other.thinking_end, len(other.steps)) == (ThinkingEnd.closed, 10)


def test_steps_of_white_space_alone_are_no_progress() -> None:
    blanks = run_scripted({Role.draft: ["\n\n"] * 9})
    assert (blanks.thinking_end, len(blanks.steps)) == (ThinkingEnd.repetition, 3)
    between = run_scripted({Role.draft: ["so\n\n", "\n\n", "so\n\n", "we\n\n"]})
    assert (between.thinking_end, len(between.steps)) == (ThinkingEnd.repetition, 3)


def test_a_rejected_repetition_is_none() -> None:
    drafts, own = ["so\n\n"] * 9, ["we\n\n", "add\n\n", "again\n\n", "wait\n\n"]
    chain = run_scripted({Role.draft: drafts, Role.base: own}, score=0)
    assert (chain.thinking_end, len(chain.steps)) == (ThinkingEnd.closed, 5)


def test_every_end_of_thinking_is_followed_by_an_answer() -> None:
    for limits in (Limits(max_step_tokens=3, thinking_tokens=5), Limits(max_step_tokens=3, thinking_tokens=900)):
        for chain in run_world(replace(RULED, limits=limits, windows=(130, 130), stuck_rate=0.5)).finished:
            assert chain.thinking_end not in (None, ThinkingEnd.error)
            assert chain.answer is not None and chain.answer.num_tokens >= 1


# --- limits ---


@settings(max_examples=40, deadline=None)
@given(world=worlds())
def test_no_chain_outgrows_its_budgets_or_windows(world: World) -> None:
    run = run_world(world)
    for chain in run.finished:
        assert chain.num_kept_tokens <= world.limits.thinking_tokens
        assert all(len(step.written.token_ids) <= world.limits.max_step_tokens for step in chain.steps)
        assert all(context.room >= 0 for context in chain.contexts.values())
        if world.limits.generated_tokens is not None:
            before_last = chain.num_generated_tokens - chain.steps[-1].num_generated_tokens
            assert before_last < world.limits.generated_tokens
    for role, engine in run.engines.items():
        for request in engine.requests:
            assert len(request.prompt_token_ids) + request.max_tokens <= world.window(role)
            assert request.max_tokens >= 1


def test_a_limit_on_generated_tokens_counts_the_rejected_ones() -> None:
    """Budgets blind to rejected tokens let a chain cost twice what it was given."""
    limits = Limits(max_step_tokens=10, thinking_tokens=1000, generated_tokens=60)
    world = replace(RULED, threshold=NEVER, close_rate=0.0, stuck_rate=0.0, limits=limits)
    for chain in run_world(world).finished:
        rejected = sum(step.rejected.num_tokens for step in chain.steps if step.rejected)
        assert chain.thinking_end is ThinkingEnd.budget
        assert chain.num_kept_tokens < 60 <= chain.num_generated_tokens
        assert chain.num_generated_tokens == rejected + sum(step.written.num_tokens for step in chain.steps)


def test_a_limit_on_generated_tokens_is_passed_by_less_than_one_rewrite() -> None:
    """The base may still rewrite a draft that has spent the rest: a step must end in something kept."""
    limits = Limits(max_step_tokens=10, thinking_tokens=1000, generated_tokens=60)
    world = replace(RULED, threshold=NEVER, close_rate=0.0, stuck_rate=0.0, limits=limits)
    assert max(chain.num_generated_tokens for chain in run_world(world).finished) <= 60 + 10


# --- the table ---


def test_every_configurable_policy_exists_and_no_other() -> None:
    assert set(POLICIES) == set(POLICY_NAMES)


def test_policies_are_functions_of_the_chain_so_that_one_may_resume_anywhere() -> None:
    """Started anew on a chain that has steps, a policy asks for what it would have asked for next."""
    world = replace(RULED, num_samples=1, first_n_base_steps=2)
    run = run_world(world)
    policy = policy_of(world)
    for chain in run.finished:
        for cut in range(len(chain.steps) + 1):
            half = _copy_up_to(run, chain, cut)
            ask: Any = next(policy(half))
            if cut == len(chain.steps):
                assert isinstance(ask, WriteAnswer)
            else:
                expected = Role.base if cut < 2 else Role.draft
                assert ask.role is expected


def _copy_up_to(run: Run, chain: Chain, num_steps: int) -> Chain:
    half = run.translator.open(chain.prompt, chain.sample_index)
    for step in chain.steps[:num_steps]:
        half.append(step.written, rejected=step.rejected, grade=step.grade, accepted=step.accepted)
    return half


def _steps(run: Run) -> list[Any]:
    return [step for chain in run.finished for step in chain.steps]


def _phase_of(request: Request) -> Phase:
    """At the base engine; answers look like rewrites here."""
    return Phase.grade if request.sampling.logprob_token_ids else Phase.rewrite


def _with_specials(role: Role, text: str) -> list[int]:
    tokenizer: Any = RULED.formats[role].tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _completion(request: Request, ids: list[int], logprobs: dict[int, float] | None = None) -> Completion:
    return Completion(
        request_id=request.request_id, token_ids=tuple(ids), finish_reason=FinishReason.stop, logprobs=logprobs or {}
    )


def test_a_policy_may_be_asked_about_a_chain_without_any_engine() -> None:
    """Rules are pure: a chain made by hand is enough."""
    contexts = {role: Context([1, 2], 100, 10) for role in Role}
    limits = Limits(max_step_tokens=4, thinking_tokens=8)
    chain = Chain(Prompt(prompt_id="p", prompt="x"), 0, 1, limits, contexts)
    rules = Rules(first_n_base_steps=1)
    assert rules.base_writes_next(chain)
    chain.append(WrittenStep(Role.base, EndedBy.blank_line, dict.fromkeys(Role, (5,)), 1))
    assert not rules.base_writes_next(chain)
