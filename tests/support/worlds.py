"""Worlds for property tests: two scripted models, their formats, prompts and every setting that can change a row.

A scripted model is a function of (prompt ids, seed): whatever asks for the right thing gets the same answer, and
whatever asks for anything else gets another one. It knows nothing of chains.
"""

import hashlib
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from hypothesis import strategies as st

from specreason_batch.chain import Limits
from specreason_batch.chat import ChatFormat, ChatOptions, VocabularyCase, compare_vocabularies
from specreason_batch.judge import Judge, Question, Reading
from specreason_batch.types import Completion, FinishReason, Request, Role
from tests.support.vocabulary import CHATML, CHATML_SPECIALS, R1, R1_SPECIALS, make_tokenizer, token_bytes

CHARACTERS = ("é", "€", "😀")
PROMPTS = (
    "so we add 2 to 3.",
    " how much is 12? ",
    "write </think> and <|im_end|> as text\n\nthen stop",
    "é€😀",
    "again again",
    "x",
    "<think>",
    "two\n\n\n\nblank lines",
)


@cache
def chat_format(
    role: Role, family: str = "chatml", blank_line: bool = True, other: bool = False, spelt_close: bool = False
) -> ChatFormat:
    """A role's format of a family, chatml or r1. `other`: with another vocabulary; `spelt_close`: see World."""
    options = ChatOptions(think_close="</box>") if spelt_close else ChatOptions()
    if family == "r1":
        tokenizer = make_tokenizer(R1_SPECIALS, "<|end|>", R1, blank_line, other=other)
        return ChatFormat(role, tokenizer, options)
    tokenizer = make_tokenizer(CHATML_SPECIALS, "<|im_end|>", CHATML, blank_line)
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return ChatFormat(role, tokenizer, options, [end_of_text])


@cache
def _question(reading: Reading, mass_floor: float) -> Question:
    if reading is Reading.yes_no:
        return Question(
            question="so?", reply_opening="so:", reading=reading, mass_floor=mass_floor, labels=(" no", " yes")
        )
    return Question(question="so 0-9?", reply_opening="so: ", reading=reading, mass_floor=mass_floor)


@cache
def _judge(reading: Reading, mass_floor: float, blank_line: bool) -> Judge:
    return Judge(_question(reading, mass_floor), chat_format(Role.base, "chatml", blank_line))


USUAL_LIMITS = Limits(max_step_tokens=12, thinking_tokens=60)


@dataclass(frozen=True, slots=True)
class World:
    """Everything that a run's rows depend on."""

    seed: int = 0  # of the models
    run_seed: int = 0
    seeded: bool = True
    policy: str = "specreason"
    other_specials: bool = False  # the draft of another family: vocabulary case (b)
    other_vocabulary: bool = False  # and with another vocabulary: case (c)
    spelt_close: bool = False  # the draft's think-close takes several tokens
    blank_line: bool = True  # False: a vocabulary without an entry for a blank line
    threshold: float = 4.0
    first_n_base_steps: int = 0
    accept_rate: float = 0.5
    answer_role: Role = Role.base
    reading: Reading = Reading.expected
    mass_floor: float = 0.5
    limits: Limits = USUAL_LIMITS
    max_answer_tokens: int = 6
    temperature: float = 0.6
    windows: tuple[int, int] = (400, 400)  # draft, base
    prompts: tuple[str, ...] = PROMPTS[:3]
    num_samples: int = 1
    close_rate: float = 0.04  # of think-close and of end-of-text, each, by token
    stuck_rate: float = 0.1  # of steps that are always the same, or white space alone

    @property
    def roles(self) -> tuple[Role, ...]:
        alone = {"base_only": (Role.base,), "base_direct": (Role.base,), "draft_only": (Role.draft,)}
        return alone.get(self.policy, (Role.draft, Role.base))

    @property
    def grades(self) -> bool:
        return self.policy == "specreason"

    @property
    def formats(self) -> dict[Role, ChatFormat]:
        family = "r1" if self.other_specials or self.other_vocabulary else "chatml"
        both = {
            Role.draft: chat_format(Role.draft, family, self.blank_line, self.other_vocabulary, self.spelt_close),
            Role.base: chat_format(Role.base, "chatml", self.blank_line),
        }
        return {role: both[role] for role in self.roles}

    @property
    def vocabulary_case(self) -> VocabularyCase | None:
        formats = self.formats
        return compare_vocabularies(formats[Role.draft], formats[Role.base]) if len(formats) == 2 else None

    def token_bytes(self, role: Role) -> dict[int, bytes]:
        return token_bytes(self.blank_line, self.other_vocabulary and role is Role.draft)

    @property
    def judge(self) -> Judge | None:
        return _judge(self.reading, self.mass_floor, self.blank_line) if self.grades else None

    def window(self, role: Role) -> int:
        return self.windows[0] if role is Role.draft else self.windows[1]

    @property
    def keys(self) -> list[tuple[str, int]]:
        return [(f"p{index}", sample) for index in range(len(self.prompts)) for sample in range(self.num_samples)]

    def model(self, role: Role) -> "ScriptedModel":
        return ScriptedModel(self, role)


@dataclass(frozen=True, slots=True)
class ScriptedModel:
    """One role's language model, as an engine's script."""

    world: World
    role: Role

    def __call__(self, request: Request) -> Completion:
        random = self._random(request)
        if request.sampling.logprob_token_ids:
            return self._graded(request, random)
        ids, reason = self._generate(request, random)
        return Completion(
            request_id=request.request_id,
            token_ids=ids,
            finish_reason=reason,
            num_cached_tokens=random.randrange(len(request.prompt_token_ids)),
        )

    def _random(self, request: Request) -> Random:
        """By what a model's output depends on. Length limits and stops only cut it."""
        sampling = request.sampling
        what = (self.world.seed, self.role, request.seed, sampling.temperature, sampling.top_p, sampling.top_k)
        digest = hashlib.blake2b(array("q", request.prompt_token_ids).tobytes(), digest_size=8)
        digest.update(repr(what).encode())
        return Random(int.from_bytes(digest.digest(), "big"))

    def _generate(self, request: Request, random: Random) -> tuple[tuple[int, ...], FinishReason]:
        """Cut as vLLM cuts: at a stop token, which stays; at the token that completes a stop string; at max_tokens."""
        ids: list[int] = []
        for id in self._stream(request.prompt_token_ids, random):
            ids.append(id)
            if id in request.sampling.stop_token_ids or self._has_stop_string(ids, request):
                return tuple(ids), FinishReason.stop
            if len(ids) == request.max_tokens:
                return tuple(ids), FinishReason.length
        raise AssertionError("a stream never ends")

    def _has_stop_string(self, ids: list[int], request: Request) -> bool:
        if not request.sampling.stop_strings:
            return False
        known = self.world.token_bytes(self.role)
        text = b"".join(known.get(id, b"<>") for id in ids)
        return any(stop.encode() in text for stop in request.sampling.stop_strings)

    def _stream(self, prompt: list[int], random: Random) -> Iterator[int]:
        chat = self.world.formats[self.role]
        yield from self._rest_of_character(prompt)
        if random.random() < self.world.stuck_rate:
            yield from chat.encode_text(random.choice(["again\n\n", "again\n\n", " \n\n", "\n\n"]))
        while True:
            draw = random.random()
            if draw < 2 * self.world.close_rate:
                yield from (
                    chat.think_close_ids if draw < self.world.close_rate else [random.choice(sorted(chat.end_ids))]
                )
            elif draw > 0.98:
                yield random.choice(sorted(chat.marker_ids - chat.end_ids - {chat.think_close_id}))
            elif draw > 0.88:
                yield from chat.encode_text(random.choice(["\n\n", ".\n\n", "\n\n", "\n"]))
            elif draw > 0.80:
                yield from chat.encode_text(random.choice(CHARACTERS))
            else:
                yield from chat.encode_text(random.choice([" so", " we", " add", "x", "7", ".", " ", "\\boxed{4}"]))

    def _rest_of_character(self, prompt: list[int]) -> list[int]:
        """What completes a character whose bytes a step's end has split."""
        known = self.world.token_bytes(self.role)
        tail = b"".join(known.get(id, b"<>") for id in prompt[-3:])
        for character in CHARACTERS:
            spelt = character.encode()
            for size in range(len(spelt) - 1, 0, -1):
                if tail.endswith(spelt[:size]):
                    ids = {bytes_: id for id, bytes_ in known.items()}
                    return [ids[bytes([byte])] for byte in spelt[size:]]
        return []

    def _graded(self, request: Request, random: Random) -> Completion:
        """Label probabilities of a random mass around a random label; now and then one is missing."""
        labels = request.sampling.logprob_token_ids
        mass = random.choice([0.02, 0.3, 0.45, 0.55, 0.9, 0.999])
        favourite = random.randrange(len(labels))
        weights = [random.random() * 0.5 ** abs(index - favourite) for index in range(len(labels))]
        probs = {id: mass * weight / sum(weights) for id, weight in zip(labels, weights, strict=True)}
        likeliest = max(probs, key=lambda id: probs[id])
        if 1.0 - mass > probs[likeliest]:
            likeliest = ord("?")
        if random.random() < 0.1:
            probs.pop(labels[(favourite + 5) % len(labels)])
        return Completion(
            request_id=request.request_id,
            token_ids=(likeliest,),
            finish_reason=FinishReason.length,
            logprobs={id: math.log(prob) for id, prob in probs.items() if prob > 0.0},
            num_cached_tokens=random.randrange(len(request.prompt_token_ids)),
        )


LIMITS = st.builds(
    Limits,
    max_step_tokens=st.integers(4, 24),
    thinking_tokens=st.sampled_from([1, 7, 30, 80, 400]),
    generated_tokens=st.none() | st.integers(1, 120),
    repeated_steps=st.integers(2, 4),
)

POLICY_NAMES = ("specreason", "random", "base_only", "draft_only")


@st.composite
def worlds(draw: st.DrawFn, policies: tuple[str, ...] = POLICY_NAMES) -> World:
    """Any world: every policy, vocabulary case, reading, limit and end."""
    policy = draw(st.sampled_from(policies))
    reading = draw(st.sampled_from(Reading))
    only = {"base_only": Role.base, "draft_only": Role.draft}.get(policy)
    threshold = st.floats(0.0, 1.0) if reading is Reading.yes_no else st.floats(0.0, 9.0)
    return World(
        seed=draw(st.integers(0, 1 << 32)),
        run_seed=draw(st.integers(0, 5)),
        seeded=draw(st.booleans()),
        policy=policy,
        other_specials=draw(st.booleans()),
        other_vocabulary=draw(st.booleans()),
        spelt_close=draw(st.booleans()),
        blank_line=draw(st.sampled_from([True, True, False])),
        threshold=draw(threshold),
        first_n_base_steps=draw(st.sampled_from([0, 0, 1, 3])),
        accept_rate=draw(st.floats(0.0, 1.0)),
        answer_role=only or draw(st.sampled_from(Role)),
        reading=reading,
        mass_floor=draw(st.sampled_from([0.0, 0.5, 0.9])),
        limits=draw(LIMITS),
        max_answer_tokens=draw(st.integers(1, 10)),
        temperature=draw(st.sampled_from([0.0, 0.6])),
        windows=(draw(st.integers(110, 420)), draw(st.integers(110, 420))),
        prompts=tuple(draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=6))),
        num_samples=draw(st.integers(1, 2)),
        close_rate=draw(st.sampled_from([0.0, 0.01, 0.05])),
        stuck_rate=draw(st.sampled_from([0.0, 0.2, 0.8])),
    )
