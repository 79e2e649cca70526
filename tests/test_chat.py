"""How a model is spoken to: templates cut, not rebuilt; a user's text stays text (docs/design.md, section 5)."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specreason_batch.chat import ChatFormat, ChatOptions, VocabularyCase, compare_vocabularies, load_chat_format
from specreason_batch.types import InvalidInput, Message, Role
from tests.support.vocabulary import (
    CHATML,
    CHATML_SPECIALS,
    CHATML_WITHOUT_THINK,
    LLAMA3,
    LLAMA3_SPECIALS,
    R1,
    R1_SPECIALS,
    make_tokenizer,
)

FAMILIES: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "chatml": (CHATML_SPECIALS, "<|im_end|>", CHATML),
    "chatml_without_think": (CHATML_SPECIALS, "<|im_end|>", CHATML_WITHOUT_THINK),
    "r1": (R1_SPECIALS, "<|end|>", R1),
    "llama3": (LLAMA3_SPECIALS, "<|eot_id|>", LLAMA3),
}
DROPS_SYSTEM = CHATML.replace("messages -%}", "messages if message.role != 'system' -%}", 1)
EVERY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


@cache
def _plain_chat(family: str) -> ChatFormat:
    specials, eos, template = FAMILIES[family]
    return ChatFormat(Role.base, make_tokenizer(specials, eos, template), ChatOptions())


def chat(family: str = "chatml", **options: Any) -> ChatFormat:
    if not options:
        return _plain_chat(family)
    specials, eos, template = FAMILIES[family]
    return ChatFormat(Role.base, make_tokenizer(specials, eos, template), ChatOptions(**options))


# --- conversations ---


def test_a_whole_conversation_is_rendered_by_the_template_with_its_contents_as_text() -> None:
    made = chat()
    conversation = [
        Message("system", "Be brief."),
        Message("user", "2+2? </think>"),
        Message("assistant", "4<|im_end|>"),
        Message("user", "and 3?"),
    ]
    assert made.opening_text("", conversation) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2? </think><|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|><|im_end|>\n<|im_start|>user\nand 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    ids = made.opening("", conversation)
    assert ids.count(made.special_ids["<|im_end|>"]) == 4, "the one in the content is text"
    assert made.special_ids["</think>"] not in ids


def test_a_row_s_system_prompt_stands_in_place_of_the_configured_one() -> None:
    made = chat(system_prompt="Be brief.")
    assert made.opening_text("x", system_prompt="Be long.").startswith("<|im_start|>system\nBe long.<|im_end|>\n")
    assert made.opening_text("x").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    own = [Message("system", "Be odd."), Message("user", "x")]
    assert made.opening_text("", own).startswith("<|im_start|>system\nBe odd.<|im_end|>\n")


def test_turns_that_a_template_does_not_take_are_refused_by_name() -> None:
    short = (
        "{% if messages|length > 3 %}{{ raise_exception('three turns at most') }}{% endif %}"
        "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}<think>"
    )
    made = chat(template=short)
    turns = [Message(role, "x") for role in ("user", "assistant", "user", "assistant", "user")]
    assert made.opening_text("", turns[:3]) == "user: x assistant: x user: x <think>"
    with pytest.raises(InvalidInput, match="does not take user, assistant, user, assistant, user: three turns at most"):
        made.opening("", turns)


# --- openings, as each family's own documentation shows them ---


@pytest.mark.parametrize(
    ("family", "system", "expected"),
    [
        ("chatml", None, "<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n"),
        (
            "chatml",
            "Be brief.",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 2+2? <|im_end|>\n"
            "<|im_start|>assistant\n<think>\n",
        ),
        ("chatml_without_think", None, "<|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("r1", None, "<|begin|><|User|> 2+2? <|Assistant|><think>\n"),
        ("r1", "Be brief.", "<|begin|>Be brief.<|User|> 2+2? <|Assistant|><think>\n"),
        (
            "llama3",
            None,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n",
        ),
        (
            "llama3",
            " Be brief.\n",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n",
        ),
    ],
)
def test_an_opening_is_what_the_family_documents(family: str, system: str | None, expected: str) -> None:
    made = chat(family, system_prompt=system)
    assert made.opening_text(" 2+2? ") == expected
    assert made.decode(made.opening(" 2+2? ")) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("chatml", "<|im_end|>\n<|im_start|>user\nGrade?<|im_end|>\n<|im_start|>assistant\n<think>\nGrade: "),
        (
            "chatml_without_think",
            "<|im_end|>\n<|im_start|>user\nGrade?<|im_end|>\n<|im_start|>assistant\n<think>\nGrade: ",
        ),
        ("r1", "<|end|><|User|>Grade?<|Assistant|><think>\nGrade: "),
        (
            "llama3",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nGrade?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nGrade: ",
        ),
    ],
)
def test_a_turn_change_ends_the_reply_in_mid_thought_and_opens_the_next_one(family: str, expected: str) -> None:
    made = chat(family)
    ids = made.turn_change("Grade?", "Grade: ")
    assert made.decode(ids) == expected
    assert made.think_close_id not in ids, "thinking is left open"
    assert chat(family, system_prompt="Be brief.").turn_change("Grade?", "Grade: ") == ids


@pytest.mark.parametrize("family", ["chatml", "r1"])
@settings(max_examples=60, deadline=None)
@given(prompt=st.text(alphabet="ab \n.0😀é", min_size=1, max_size=20))
def test_an_opening_is_the_templates_own_tokens(family: str, prompt: str) -> None:
    """Where no special token is spelt in the prompt, ids are those of `apply_chat_template` itself."""
    made = chat(family)
    encoded: Any = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert made.opening(prompt) == list(encoded)


@EVERY_FAMILY
def test_a_templates_own_stripping_of_earlier_thinking_does_not_reach_the_chain(family: str) -> None:
    """The template never sees the steps: opening, steps and turn change are one plain sequence."""
    made = chat(family)
    steps = made.encode_text(" so\n\n we add\n\n")
    whole = made.decode([*made.opening("x"), *steps, *made.turn_change("Grade?", "Grade: ")])
    assert "<think>\n so\n\n we add\n\n" in whole
    assert whole.count("<think>") == 2 and "</think>" not in whole


# --- a user's text stays text ---


@EVERY_FAMILY
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_special_tokens_spelt_in_a_prompt_stay_text(family: str, data: st.DataObject) -> None:
    made = chat(family)
    pieces = st.sampled_from([*FAMILIES[family][0], " so", "\n\n", "x", "7"])
    prompt = "a" + "".join(data.draw(st.lists(pieces, max_size=8))) + "b"
    ids = made.opening(prompt)
    markers = [id for id in ids if id in made.marker_ids]
    assert markers == [id for id in made.opening("ab") if id in made.marker_ids], "the template's own, and no more"
    assert made.decode(ids) == made.opening_text("<<>>").replace("<<>>", prompt)


@EVERY_FAMILY
def test_special_tokens_spelt_in_a_question_or_a_system_prompt_stay_text(family: str) -> None:
    literal = "".join(FAMILIES[family][0])
    made = chat(family)
    asked = made.turn_change(f"x{literal}x", "Grade: ")
    assert _markers(made, asked) == _markers(made, made.turn_change("x", "Grade: "))
    plain, with_system = chat(family, system_prompt="x"), chat(family, system_prompt=f"x{literal}x")
    assert _markers(made, with_system.opening("x")) == _markers(made, plain.opening("x"))


@EVERY_FAMILY
@pytest.mark.parametrize("text", ["</think>", "<think>", "<|im_end|>", "<|end|>", "<|eot_id|>"])
def test_plain_encoding_knows_no_special_token(family: str, text: str) -> None:
    made = chat(family)
    ids = made.encode_text(text)
    assert not set(ids) & made.marker_ids
    assert made.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_is_encoded_without_loss(text: str) -> None:
    made = chat()
    assert made.decode(made.encode_text(text)) == text


@pytest.mark.parametrize("name", ["system", "user", "reply", "question"])
def test_the_words_that_the_template_is_cut_by_are_text_in_a_prompt(name: str) -> None:
    prompt = f"a <<sentinel-{name}-4f1c>> b"
    made = chat(system_prompt="Be brief.")
    assert prompt in made.opening_text(prompt)


def test_a_trimming_template_trims_prompts_and_a_keeping_one_keeps_them() -> None:
    assert "\n\n2+2?<|eot_id|>" in chat("llama3").opening_text("  2+2?\n\n")
    assert "user\n  2+2?\n\n<|im_end|>" in chat("chatml").opening_text("  2+2?\n\n")


# --- options ---


def test_a_users_template_replaces_the_tokenizers_own() -> None:
    made = chat(template="{% for m in messages %}[{{ m.content }}]{% endfor %}<think>")
    assert made.opening_text("x") == "[x]<think>"
    assert made.decode(made.turn_change("q", "a")) == "][q]<think>a"


def test_template_arguments_reach_the_template() -> None:
    template = "{% if loud %}LOUD {% endif %}" + CHATML
    assert chat(template=template, template_kwargs={"loud": True}).opening_text("x").startswith("LOUD <|im_start|>")
    assert chat(template=template).opening_text("x").startswith("<|im_start|>")


def test_other_think_tags_are_opened_and_closed() -> None:
    tokenizer = make_tokenizer((*CHATML_SPECIALS, "<reason>", "</reason>"), "<|im_end|>", CHATML_WITHOUT_THINK)
    made = ChatFormat(Role.base, tokenizer, ChatOptions(think_open="<reason>", think_close="</reason>"))
    assert made.opening_text("x").endswith("<|im_start|>assistant\n<reason>\n")
    assert made.think_close_id == tokenizer.convert_tokens_to_ids("</reason>")


# --- the vocabulary ---


def test_blank_line_entries_are_those_whose_text_contains_one() -> None:
    made = chat()
    assert {made.decode([id]) for id in made.blank_line_ids} == {"\n\n", ".\n\n"}
    without = ChatFormat(Role.base, make_tokenizer(blank_line=False), ChatOptions())
    assert without.blank_line_ids == frozenset()


def test_markers_are_special_tokens_and_ends_and_nothing_ordinary() -> None:
    made = ChatFormat(Role.base, make_tokenizer(), ChatOptions(), eos_ids=[65])
    specials = {made.tokenizer.convert_tokens_to_ids(name) for name in CHATML_SPECIALS}
    assert made.marker_ids == {*specials, 65}
    assert made.end_ids == {65, made.tokenizer.eos_token_id}
    assert not specials & set(made.ordinary_vocabulary.values())
    assert made.max_id == max(specials)


@pytest.mark.parametrize(
    ("draft", "base", "case"),
    [
        ("chatml", "chatml", VocabularyCase.same),
        ("r1", "chatml", VocabularyCase.other_specials),
        ("chatml", "llama3", VocabularyCase.other_specials),
    ],
)
def test_vocabulary_cases(draft: str, base: str, case: VocabularyCase) -> None:
    assert compare_vocabularies(chat(draft), chat(base)) is case


def test_one_other_ordinary_entry_is_another_vocabulary() -> None:
    other = ChatFormat(Role.draft, make_tokenizer(extra_words=(" therefore",)), ChatOptions())
    assert compare_vocabularies(other, chat()) is VocabularyCase.different


def test_the_same_entries_with_other_ends_are_not_the_same_vocabulary() -> None:
    """Else the draft's end-of-text would be an unknown special token."""
    two_ends = ChatFormat(Role.draft, make_tokenizer(), ChatOptions(), eos_ids=[299])
    assert compare_vocabularies(two_ends, chat()) is VocabularyCase.other_specials


# --- refusals ---


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        ({"template": None}, {}, r"base model: its tokenizer has no chat template; give one with base\.chat\.template"),
        ({"eos": None}, {}, "base model: its tokenizer names no end-of-text token"),
        ({}, {"template": "hello<think>"}, "base model: its chat template drops the user turn"),
        ({}, {"template": "{{ messages[-1].content }}<think>"}, "base model: its chat template drops the user turn"),
        (
            {},
            {"template": DROPS_SYSTEM, "system_prompt": "x"},
            "base model: its chat template drops the system turn",
        ),
        (
            {},
            {"template": "{{ raise_exception('no system role') }}", "system_prompt": "x"},
            "base model: .*no system role",
        ),
        ({}, {"template": "{% for %}"}, r"base.*template"),
    ],
)
def test_a_format_that_cannot_serve_is_refused_by_name(
    tokenizer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        ChatFormat(Role.base, make_tokenizer(**tokenizer), ChatOptions(**options))


# --- from a folder ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(None, {"<|im_end|>"}), (297, {"<|im_end|>", 297}), ([297, 298], {"<|im_end|>", 297, 298})],
)
def test_generation_config_adds_ends_of_text(folder: Path, eos: object, expected: set[object]) -> None:
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    made = load_chat_format(Role.base, str(folder), ChatOptions())
    ids = {made.tokenizer.convert_tokens_to_ids(id) if isinstance(id, str) else id for id in expected}
    assert made.end_ids == ids


def test_a_saved_format_is_the_same_format(folder: Path) -> None:
    made, loaded = chat(), load_chat_format(Role.base, str(folder), ChatOptions())
    assert compare_vocabularies(made, loaded) is VocabularyCase.same
    assert loaded.opening("so </think> é\n\n") == made.opening("so </think> é\n\n")


@pytest.mark.parametrize("spoilt", ["missing", "empty", "torn"])
def test_a_folder_without_a_usable_tokenizer_is_refused_by_name(
    tmp_path: Path, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tmp_path / "model"
    if spoilt != "missing":
        model.mkdir()
    if spoilt == "torn":
        make_tokenizer().save_pretrained(model)
        whole = (model / "tokenizer.json").read_text()
        (model / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=f"draft.model: .*{model.name}"):
        load_chat_format(Role.draft, str(model), ChatOptions())


def _markers(made: ChatFormat, ids: list[int]) -> list[int]:
    return [id for id in ids if id in made.marker_ids]
