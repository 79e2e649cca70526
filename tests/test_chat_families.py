"""Real families' chat formats, against renderings written by hand: opening, steps, grading turn, think-close, answer.

The templates (tests/support/pairs.py) have the real ones' structure and special tokens; the renderings are those that
the families' own documentation shows.
"""
# ruff: noqa: RUF001 - DeepSeek's tokens are spelt with another bar

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specreason_batch.chain import Chain, Limits
from specreason_batch.chat import ChatFormat, ChatOptions, VocabularyCase, compare_vocabularies
from specreason_batch.judge import Judge, Question
from specreason_batch.translator import Decoding, Translator, Voice
from specreason_batch.types import (
    AnswerEnd,
    EndedBy,
    GradeOf,
    InvalidInput,
    Prompt,
    Request,
    Role,
    Write,
    WriteAnswer,
    WrittenAnswer,
    WrittenStep,
)
from tests.support.pairs import FAMILIES, family_tokenizer

QUESTION = Question(question="Is the last step right?", reply_opening="Grade: ")
STEPS = (" so we add 2\n\n", " wait.\n\n")
NEXT = " step 3\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """What a model of the family reads, by hand. The prompt is ` 2+2? `."""

    family: str
    kwargs: tuple[tuple[str, Any], ...] = ()
    opening: str  # before the reply, think tag included
    with_system: str | None  # the same with the system prompt `Be brief.`; None: refused
    turn: str  # from the end of the reply in mid-thought to the grade's digit
    close: str = "</think>"


RENDERINGS = [
    Rendering(
        family="qwen2.5",  # does not think by itself: the think tag is ours, and plain text
        opening=(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n"
        ),
        with_system=(
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n"
        ),
        turn=(
            "<|im_end|>\n<|im_start|>user\nIs the last step right?<|im_end|>\n<|im_start|>assistant\n<think>\nGrade: "
        ),
    ),
    Rendering(
        family="qwq",  # its template opens the think block
        opening="<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n",
        with_system=(
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n"
        ),
        turn=(
            "<|im_end|>\n<|im_start|>user\nIs the last step right?<|im_end|>\n<|im_start|>assistant\n<think>\nGrade: "
        ),
    ),
    Rendering(
        family="qwen3",  # its template leaves the think block to the model
        kwargs=(("enable_thinking", True),),
        opening="<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n",
        with_system=(
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n"
        ),
        turn=(
            "<|im_end|>\n<|im_start|>user\nIs the last step right?<|im_end|>\n<|im_start|>assistant\n<think>\nGrade: "
        ),
    ),
    *(
        Rendering(
            family=family,  # the older template does not open the think block
            opening="<｜begin▁of▁sentence｜><｜User｜> 2+2? <｜Assistant｜><think>\n",
            with_system="<｜begin▁of▁sentence｜>Be brief.<｜User｜> 2+2? <｜Assistant｜><think>\n",
            turn="<｜end▁of▁sentence｜><｜User｜>Is the last step right?<｜Assistant｜><think>\nGrade: ",
        )
        for family in ("deepseek", "deepseek_older", "deepseek_llama")
    ),
    Rendering(
        family="llama3",  # trims what it is given
        opening=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n"
        ),
        with_system=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
            "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n"
        ),
        turn=(
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nIs the last step right?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nGrade: "
        ),
    ),
    Rendering(
        family="no_system",
        opening="<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n<think>\n",
        with_system=None,
        turn=(
            "<end_of_turn>\n<start_of_turn>user\nIs the last step right?<end_of_turn>\n"
            "<start_of_turn>model\n<think>\nGrade: "
        ),
    ),
]
EVERY_FAMILY = pytest.mark.parametrize("wanted", RENDERINGS, ids=[rendering.family for rendering in RENDERINGS])


@cache
def _chat(family: str, options: tuple[tuple[str, Any], ...], kwargs: tuple[tuple[str, Any], ...]) -> ChatFormat:
    return ChatFormat(
        Role.base, family_tokenizer(family), ChatOptions(**dict(options), template_kwargs=dict(kwargs) or None)
    )


def chat(family: str, kwargs: tuple[tuple[str, Any], ...] = (), **options: Any) -> ChatFormat:
    return _chat(family, tuple(options.items()), kwargs)


def translator_of(made: ChatFormat) -> Translator:
    plain = Decoding(temperature=0.6, top_p=0.95, top_k=0)
    voices = {role: Voice(format=made, window=1000, steps=plain, answers=plain) for role in Role}
    limits = Limits(max_step_tokens=50, thinking_tokens=500, generated_tokens=None, repeated_steps=3)
    return Translator(voices, Judge(QUESTION, made), limits, max_answer_tokens=20, seed=0)


def step(made: ChatFormat, text: str, role: Role = Role.base) -> WrittenStep:
    ids = tuple(made.encode_text(text))
    return WrittenStep(
        author=role, ended_by=EndedBy.blank_line, bodies=dict.fromkeys(Role, ids), num_tokens=len(ids), is_blank=False
    )


def chain_of(made: ChatFormat, translator: Translator, prompt: str = " 2+2? ") -> Chain:
    chain = translator.open(Prompt(prompt_id="p", prompt=prompt), 0)
    for text in STEPS:
        chain.append(step(made, text))
    return chain


def read(made: ChatFormat, request: Request) -> str:
    return made.decode(request.whole_prompt())


# --- what the model reads ---


@EVERY_FAMILY
def test_an_opening_is_the_families_own_with_thinking_open(wanted: Rendering) -> None:
    made = chat(wanted.family, wanted.kwargs)
    assert made.opening_text(" 2+2? ") == wanted.opening
    assert made.decode(made.opening(" 2+2? ")) == wanted.opening


@EVERY_FAMILY
def test_a_system_prompt_has_its_turn_or_is_refused_by_name(wanted: Rendering) -> None:
    if wanted.with_system is None:
        with pytest.raises(InvalidInput, match="base model: its chat template does not take system, user: System role"):
            chat(wanted.family, wanted.kwargs, system_prompt="Be brief.")
        return
    made = chat(wanted.family, wanted.kwargs, system_prompt="Be brief.")
    assert made.opening_text(" 2+2? ") == wanted.with_system
    assert made.decode(made.opening(" 2+2? ")) == wanted.with_system
    asked = Judge(QUESTION, made).turn
    assert made.decode(asked) == wanted.turn, "the grading turn has no system turn"


@EVERY_FAMILY
def test_a_write_continues_the_open_thought(wanted: Rendering) -> None:
    made = chat(wanted.family, wanted.kwargs)
    translator = translator_of(made)
    chain = chain_of(made, translator)
    for role in Role:
        assert read(made, translator.request(chain, Write(role), "r")) == wanted.opening + "".join(STEPS)


@EVERY_FAMILY
def test_a_grade_is_asked_in_mid_thought_of_the_last_step(wanted: Rendering) -> None:
    made = chat(wanted.family, wanted.kwargs)
    translator = translator_of(made)
    chain = chain_of(made, translator)
    request = translator.request(chain, GradeOf(step(made, NEXT, Role.draft)), "r")
    assert read(made, request) == wanted.opening + "".join(STEPS) + NEXT + wanted.turn
    assert made.decode(request.sampling.logprob_token_ids) == "0123456789"
    assert request.max_tokens == 1


@EVERY_FAMILY
def test_an_answer_follows_the_closed_thought_and_ends_with_the_turn(wanted: Rendering) -> None:
    made = chat(wanted.family, wanted.kwargs)
    translator = translator_of(made)
    request = translator.request(chain_of(made, translator), WriteAnswer(), "r")
    assert read(made, request) == wanted.opening + "".join(STEPS) + wanted.close
    assert made.decode(request.sampling.stop_token_ids) == FAMILIES[wanted.family].eos
    ids = tuple(made.encode_text("\n\n4"))
    assert translator.answer_text(WrittenAnswer(Role.base, ids, len(ids), AnswerEnd.stop)) == "\n\n4"


@EVERY_FAMILY
def test_a_turn_change_is_a_continuation_of_the_templates_own_conversation(wanted: Rendering) -> None:
    """Opening without thinking, a reply, and the turn change: what the template itself makes of three messages."""
    made = chat(wanted.family, wanted.kwargs)
    whole: Any = made.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": QUESTION.question},
        ],
        tokenize=False,
        add_generation_prompt=True,
        **dict(wanted.kwargs),
    )
    turn = wanted.turn.removesuffix("Grade: ")
    assert whole.endswith(("4" + turn, "4" + turn.removesuffix("<think>\n")))


@EVERY_FAMILY
def test_opening_and_turn_have_the_families_special_tokens_as_single_ids(wanted: Rendering) -> None:
    made = chat(wanted.family, wanted.kwargs)
    family = FAMILIES[wanted.family]
    ids = [*made.opening("x"), *made.turn_change("y", "z")]
    rendered = made.decode(ids)
    spelt = [token for token in (*family.special, *family.markup) for _ in range(rendered.count(token))]
    assert sorted(id for id in ids if id in made.marker_ids) == sorted(made.special_ids[token] for token in spelt)


@EVERY_FAMILY
def test_thinking_ends_at_the_families_own_tag(wanted: Rendering) -> None:
    made = chat(wanted.family, wanted.kwargs)
    assert made.decode(made.think_close_ids) == "</think>"
    assert (made.think_close_id is None) == (wanted.family == "qwen2.5")
    assert made.end_ids == {made.special_ids[FAMILIES[wanted.family].eos]}


# --- text stays text ---


@EVERY_FAMILY
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_special_tokens_in_a_prompt_are_text(wanted: Rendering, data: st.DataObject) -> None:
    made = chat(wanted.family, wanted.kwargs)
    tokens = [token for family in FAMILIES.values() for token in (*family.special, *family.markup)]
    pieces = data.draw(st.lists(st.sampled_from([*tokens, " so", "\n\n", "é", "7"]), max_size=6))
    prompt = "a" + "".join(pieces) + "b"
    ids = made.opening(prompt)
    assert made.decode(ids) == wanted.opening.replace("2+2?", prompt, 1).replace(f" {prompt} ", prompt)
    assert sum(id in made.marker_ids for id in ids) == sum(id in made.marker_ids for id in made.opening("ab"))


@EVERY_FAMILY
def test_special_tokens_in_the_question_are_text(wanted: Rendering) -> None:
    made = chat(wanted.family, wanted.kwargs)
    family = FAMILIES[wanted.family]
    literal = "x" + "".join((*family.special, *family.markup)) + "x"
    turn = Judge(Question(question=literal, reply_opening="Grade: "), made).turn
    assert made.decode(turn) == wanted.turn.replace(QUESTION.question, literal)
    plain = made.turn_change("x", "Grade: ")
    assert [id for id in turn if id in made.marker_ids] == [id for id in plain if id in made.marker_ids]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama3", "\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"),
        ("qwq", "system\n Be brief.\n\n<|im_end|>"),
        ("deepseek", "<｜begin▁of▁sentence｜> Be brief.\n\n<｜User｜>"),
    ],
)
def test_a_system_prompt_is_trimmed_where_the_template_trims(family: str, expected: str) -> None:
    assert expected in chat(family, system_prompt=" Be brief.\n\n").opening_text("x")


@pytest.mark.parametrize("family", ["llama3", "no_system"])
def test_a_trimming_template_trims_the_question_too(family: str) -> None:
    made = chat(family)
    assert made.turn_change("\n Right? \n", "Grade: ") == made.turn_change("Right?", "Grade: ")


# --- what a user may set ---


def test_arguments_of_the_template_reach_it() -> None:
    dated = chat("llama3", (("date_string", "1 Jan 2030"),))
    assert "Today Date: 1 Jan 2030\n" in dated.opening_text("x")
    assert dated.turn_change("q", "g") == chat("llama3").turn_change("q", "g")


def test_a_template_that_closes_thinking_before_the_reply_is_refused() -> None:
    """Qwen3 with thinking off: there is nothing to draft."""
    with pytest.raises(InvalidInput, match="think"):
        chat("qwen3", (("enable_thinking", False),))


def test_a_template_of_the_configuration_speaks_for_a_tokenizer_without_one() -> None:
    tokenizer = family_tokenizer("deepseek")
    tokenizer.chat_template = None
    template = "{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}{{ m.content }}"
    template += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}<｜Assistant｜>"
    made = ChatFormat(Role.base, tokenizer, ChatOptions(template=template))
    assert made.opening_text("2+2?") == "<｜User｜>2+2?<｜Assistant｜><think>\n"
    asked = made.decode(Judge(QUESTION, made).turn)
    assert asked == "<｜end▁of▁sentence｜><｜User｜>Is the last step right?<｜Assistant｜><think>\nGrade: "
    assert made.opening("2+2?")[0] == made.special_ids["<｜User｜>"]


def test_think_tags_of_several_tokens_are_text_before_and_after_the_thought() -> None:
    made = ChatFormat(
        Role.base, family_tokenizer("no_system"), ChatOptions(think_open="[think]", think_close="[/think]")
    )
    translator = translator_of(made)
    request = translator.request(chain_of(made, translator), WriteAnswer(), "r")
    opening = "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n[think]\n"
    assert read(made, request) == opening + "".join(STEPS) + "[/think]"


# --- pairs of families ---


@pytest.mark.parametrize(
    ("draft", "base", "case"),
    [
        ("deepseek", "qwq", VocabularyCase.other_specials),
        ("deepseek", "deepseek", VocabularyCase.same),
        ("qwen3", "qwen3", VocabularyCase.same),
        ("deepseek", "deepseek_llama", VocabularyCase.different),
    ],
)
def test_the_vocabulary_case_of_the_papers_pairs(draft: str, base: str, case: VocabularyCase) -> None:
    assert compare_vocabularies(chat(draft), chat(base)) is case


def test_a_pair_of_two_families_reads_one_thought_in_two_formats() -> None:
    """The steps' ids are the same; what stands before them, closes them and asks about them is each role's own."""
    draft, base = chat("deepseek"), chat("qwq")
    plain = Decoding(temperature=0.6, top_p=0.95, top_k=0)
    voices = {
        role: Voice(format=made, window=1000, steps=plain, answers=plain)
        for role, made in ((Role.draft, draft), (Role.base, base))
    }
    limits = Limits(max_step_tokens=50, thinking_tokens=500, generated_tokens=None, repeated_steps=3)
    translator = Translator(voices, Judge(QUESTION, base), limits, max_answer_tokens=20, seed=0)
    chain = chain_of(base, translator)
    thought = "".join(STEPS)
    r1, qwq = "<｜begin▁of▁sentence｜><｜User｜> 2+2? <｜Assistant｜><think>\n", RENDERINGS[1].opening
    assert read(draft, translator.request(chain, Write(Role.draft), "r")) == r1 + thought
    assert read(base, translator.request(chain, Write(Role.base), "r")) == qwq + thought
    assert read(draft, translator.request(chain, WriteAnswer(Role.draft), "r")) == r1 + thought + "</think>"
    grade = translator.request(chain, GradeOf(step(base, NEXT, Role.draft)), "r")
    assert read(base, grade) == qwq + thought + NEXT + RENDERINGS[1].turn
