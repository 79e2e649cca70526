"""Between policies and engines: an ask becomes a request, a completion becomes a result, a finished chain becomes text.

Owns: token-level semantics of docs/design.md section 5 (openings, step boundary, grading turn, closing, seeds).
Does not know: batching, schedules, vLLM, files.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from specreason_batch.chain import Chain, Context, Limits
from specreason_batch.chat import ChatFormat, VocabularyCase
from specreason_batch.judge import Judge
from specreason_batch.seeds import stable_seed
from specreason_batch.types import (
    AnswerEnd,
    Ask,
    Completion,
    EndedBy,
    FinishReason,
    Grade,
    GradeOf,
    InvalidInput,
    Prompt,
    Request,
    Result,
    Role,
    Sampling,
    Write,
    WriteAnswer,
    WriteThinking,
    WrittenAnswer,
    WrittenStep,
)

BLANK_LINE = "\n\n"
_HELD_BACK = "\ufffd"  # what decoding shows for an incomplete character


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How one kind of text is sampled."""

    temperature: float
    top_p: float
    top_k: int

    def sampling(self, stop_token_ids: Iterable[int], stop_strings: tuple[str, ...] = ()) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop_token_ids=tuple(sorted(stop_token_ids)),
            stop_strings=stop_strings,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """One role as the translator needs it: how it is spoken to, how long its window is, how it samples."""

    format: ChatFormat
    window: int  # tokens
    steps: Decoding
    answers: Decoding


@dataclass(frozen=True, slots=True)
class ThinkingText:
    """A chain's thinking, and where each step stands in it."""

    text: str
    spans: list[tuple[int, int]]  # character offsets [start, end) by step
    num_unsplit_blank_lines: int  # steps that hold a blank line which ended no step, being made of several tokens


class Translator:
    """Knows both roles' formats and the judge; holds no state of any chain."""

    def __init__(
        self,
        voices: Mapping[Role, Voice],
        judge: Judge | None,
        limits: Limits,
        max_answer_tokens: int,
        seed: int,
        seeded: bool = True,
        case: VocabularyCase | None = None,
    ):
        """`case`: how the two roles' vocabularies relate; None: one role."""
        self._voices = voices
        self._judge = judge
        self._limits = limits
        self._max_answer_tokens = max_answer_tokens
        self._seed = seed
        self._seeded = seeded
        close = max(len(voice.format.think_close_ids) for voice in voices.values())
        self._reserve = close + max_answer_tokens + (len(judge.turn) + 1 if judge else 0)
        self._differ = case is VocabularyCase.different
        self._thinking_sampling = {role: _thinking_sampling(voice) for role, voice in voices.items()}
        self._step_sampling = {role: _step_sampling(voice) for role, voice in voices.items()}
        self._answer_sampling = {role: voice.answers.sampling(voice.format.end_ids) for role, voice in voices.items()}
        self._grade_sampling = Sampling(temperature=0.0, logprob_token_ids=judge.label_ids) if judge else None
        self._text_format = voices[Role.base if Role.base in voices else Role.draft].format

    def open(self, prompt: Prompt, sample_index: int) -> Chain:
        """A new chain. Raises InvalidInput if its prompt leaves no room for a single step."""
        contexts = {role: self._open_context(prompt, role, voice) for role, voice in self._voices.items()}
        chain_seed = stable_seed(self._seed, prompt.prompt_id, sample_index)
        chain = Chain(prompt, sample_index, chain_seed, self._limits, contexts)
        chain.begin()
        return chain

    def request(self, chain: Chain, ask: Ask, request_id: str) -> Request:
        """The request that answers this ask. It borrows the chain's ids: its cost does not depend on their number."""
        suffix: tuple[int, ...] = ()
        match ask:
            case Write(role=role):
                max_tokens, sampling = chain.max_next_tokens, self._step_sampling[role]
            case WriteThinking(role=role):
                max_tokens, sampling = chain.max_thinking_tokens, self._thinking_sampling[role]
            case GradeOf(draft=draft):
                assert self._judge is not None and self._grade_sampling is not None
                suffix = (*draft.bodies[Role.base], *self._judge.turn)
                max_tokens, sampling = 1, self._grade_sampling
            case WriteAnswer(role=role):
                suffix = self._voices[role].format.think_close_ids
                max_tokens, sampling = self._max_answer_tokens, self._answer_sampling[role]
        seed = self._request_seed(chain, ask) if sampling.temperature > 0 else None
        return Request(
            request_id=request_id,
            prompt_token_ids=chain.contexts[ask.engine].ids,
            suffix_token_ids=suffix,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
        )

    def result(self, chain: Chain, ask: Ask, completion: Completion) -> Result:
        """What the policy gets for its ask. The completion must be a finished one (stop or length)."""
        assert completion.finish_reason in (FinishReason.stop, FinishReason.length)
        match ask:
            case Write(role=role):
                return self._read_step(chain, role, completion)
            case WriteThinking(role=role):
                return tuple(self._read_thinking(role, completion))
            case GradeOf():
                return self._read_grade(completion)
            case WriteAnswer(role=role):
                return self._read_answer(role, completion)

    def thinking(self, chain: Chain) -> ThinkingText:
        """The chain's thinking as text: the concatenated steps decoded, cut at step ends.

        A character whose bytes are split over two steps belongs to the later one. Linear in the chain's length.
        """
        if self._differ:
            return self._joined_thinking(chain)
        ends, unsplit, length = [], 0, 0
        before: tuple[int, ...] = ()
        for step in chain.steps:
            body = step.written.token_ids
            known = self._decode_whole(before)
            piece = self._decode_whole((*before, *body))[len(known) :]
            length += len(piece)
            ends.append(length)
            unsplit += self._has_unsplit_blank_line(step.written)
            # One step is context enough, unless it leaves a character incomplete.
            before = body if body and not self._decode(body).endswith(_HELD_BACK) else (*before, *body)
        bodies = [step.written.token_ids for step in chain.steps]
        text = self._decode(tuple(id for body in bodies for id in body))
        if ends and ends[-1] != len(text.rstrip(_HELD_BACK)):  # a tokenizer that decodes with more context than that
            ends = self._ends_from_prefixes(bodies)
        if ends:
            ends[-1] = len(text)
        return ThinkingText(text, list(zip([0, *ends[:-1]], ends, strict=True)) if ends else [], unsplit)

    def _joined_thinking(self, chain: Chain) -> ThinkingText:
        """Of steps in two vocabularies, each of whole characters."""
        pieces = [self.step_text(step.written) for step in chain.steps]
        ends = list(accumulate(map(len, pieces)))
        unsplit = sum(self._has_unsplit_blank_line(step.written) for step in chain.steps)
        return ThinkingText("".join(pieces), list(zip([0, *ends][: len(ends)], ends, strict=True)), unsplit)

    def step_text(self, step: WrittenStep) -> str:
        return self._voices[step.author].format.decode(step.token_ids)

    def answer_text(self, answer: WrittenAnswer) -> str:
        return self._voices[answer.role].format.decode(answer.token_ids)

    # --- requests ---

    def _open_context(self, prompt: Prompt, role: Role, voice: Voice) -> Context:
        opening = voice.format.opening(prompt.prompt, prompt.messages, prompt.system_prompt)
        context = Context(opening, voice.window, self._reserve)
        if context.room <= 0:
            raise InvalidInput(
                f"prompt of {len(context.ids)} tokens with {self._reserve} reserved for grade and answer leaves no "
                f"room in the {role}'s window of {voice.window}"
            )
        return context

    def _request_seed(self, chain: Chain, ask: Ask) -> int | None:
        if not self._seeded:
            return None
        candidate = ask.candidate if isinstance(ask, Write) else 0
        kind = "answer" if isinstance(ask, WriteAnswer) else "step"
        return stable_seed(chain.seed, len(chain.steps), ask.engine, kind, candidate)

    # --- completions ---

    def _read_step(self, chain: Chain, role: Role, completion: Completion) -> WrittenStep:
        chat = self._voices[role].format
        body, marked = _cut_at_marker(chat, completion.token_ids)
        ended_by = marked or self._ended_by(chat, completion)
        bodies, is_whole = self._in_both_vocabularies(chain, role, body)
        return WrittenStep(
            author=role,
            ended_by=ended_by if is_whole else EndedBy.max_tokens,
            bodies=bodies,
            num_tokens=len(completion.token_ids),
            is_blank=_is_blank(chat, bodies[role]),
        )

    def _read_thinking(self, role: Role, completion: Completion) -> Iterator[WrittenStep]:
        """Steps as they would have been written one by one. Only where one model writes all."""
        assert not self._differ
        chat = self._voices[role].format
        body, marked = _cut_at_marker(chat, completion.token_ids)
        *pieces, last = _pieces(chat, body, self._limits.max_step_tokens)
        left = len(completion.token_ids)
        for piece in pieces:
            left -= len(piece)
            yield _whole_step(role, chat, piece, len(piece))
        if last or marked:
            yield _whole_step(role, chat, last, left, marked)

    def _in_both_vocabularies(
        self, chain: Chain, author: Role, body: tuple[int, ...]
    ) -> tuple[dict[Role, tuple[int, ...]], bool]:
        """The step in each role's ids, and whether that is all of it.

        Where vocabularies differ, the other role's ids are its own of the same text: of whole characters, and of the
        longest beginning that fits where the author's ids were counted for but the other's are more.
        """
        if not self._differ:
            return dict.fromkeys(Role, body), True
        mine, (other,) = self._voices[author].format, [role for role in self._voices if role is not author]
        limit = chain.max_next_tokens if other is Role.base else chain.contexts[other].room
        for size in range(len(body), -1, -1):
            whole = _whole_characters(mine, body[:size])
            translated = tuple(self._voices[other].format.encode_text(mine.decode(whole)))
            if len(translated) <= limit:
                break
        return {author: whole, other: translated}, size == len(body)

    def _ended_by(self, chat: ChatFormat, completion: Completion) -> EndedBy:
        if completion.finish_reason is FinishReason.length and not _ends_blank(chat, completion.token_ids):
            return EndedBy.max_tokens
        return EndedBy.blank_line

    def _read_grade(self, completion: Completion) -> Grade:
        assert self._judge is not None
        return self._judge.read(completion.logprobs, completion.token_ids[0])

    def _read_answer(self, role: Role, completion: Completion) -> WrittenAnswer:
        end_ids = self._voices[role].format.end_ids
        ids = completion.token_ids
        stopped = completion.finish_reason is FinishReason.stop
        body = ids[:-1] if stopped and ids and ids[-1] in end_ids else ids
        return WrittenAnswer(role, body, len(ids), AnswerEnd.stop if stopped else AnswerEnd.length)

    # --- text ---

    def _decode(self, ids: Sequence[int]) -> str:
        return self._text_format.decode(ids)

    def _decode_whole(self, ids: Sequence[int]) -> str:
        """Without what is still incomplete at its end."""
        return self._decode(ids).rstrip(_HELD_BACK)

    def _has_unsplit_blank_line(self, step: WrittenStep) -> bool:
        """Whether it holds a blank line besides the token that ended it."""
        ids = step.token_ids[:-1] if step.ended_by is EndedBy.blank_line else step.token_ids
        return BLANK_LINE in self._voices[step.author].format.decode(ids)

    def _ends_from_prefixes(self, bodies: list[tuple[int, ...]]) -> list[int]:
        prefix: tuple[int, ...] = ()
        ends = []
        for body in bodies:
            prefix += body
            ends.append(len(self._decode_whole(prefix)))
        return ends


def _step_sampling(voice: Voice) -> Sampling:
    chat, thinking = voice.format, _thinking_sampling(voice)
    strings = () if chat.blank_line_ids else (BLANK_LINE,)
    return voice.steps.sampling({*thinking.stop_token_ids, *chat.blank_line_ids}, (*strings, *thinking.stop_strings))


def _thinking_sampling(voice: Voice) -> Sampling:
    """Without the stops at a blank line."""
    chat = voice.format
    if chat.think_close_id is None:
        return voice.steps.sampling(chat.end_ids, (chat.options.think_close,))
    return voice.steps.sampling({*chat.end_ids, chat.think_close_id})


def _cut_at_marker(chat: ChatFormat, ids: tuple[int, ...]) -> tuple[tuple[int, ...], EndedBy | None]:
    """What stands before the first special token or think-close tag, and what that says; None: there is none."""
    cut = next((index for index, id in enumerate(ids) if id in chat.marker_ids), None)
    body, marked = (ids, None) if cut is None else (ids[:cut], _marker_meaning(chat, ids[cut]))
    if chat.think_close_id is None and (before := _before_spelt_close(chat, body)) is not None:
        return before, EndedBy.think_close
    return body, marked


def _pieces(chat: ChatFormat, body: tuple[int, ...], max_step_tokens: int) -> list[tuple[int, ...]]:
    """Cut after each blank line, and where a step is as long as one may be; the last one may be empty."""
    pieces, start = [], 0
    for end in range(1, len(body) + 1):
        if end - start == max_step_tokens or _has_ended(chat, body[start:end]):
            pieces.append(body[start:end])
            start = end
    return [*pieces, body[start:]]


def _has_ended(chat: ChatFormat, piece: tuple[int, ...]) -> bool:
    return _ends_blank(chat, piece) if chat.blank_line_ids else BLANK_LINE in chat.decode(piece)


def _whole_step(
    role: Role, chat: ChatFormat, body: tuple[int, ...], num_tokens: int, marked: EndedBy | None = None
) -> WrittenStep:
    return WrittenStep(
        author=role,
        ended_by=marked or (EndedBy.blank_line if _has_ended(chat, body) else EndedBy.max_tokens),
        bodies=dict.fromkeys(Role, body),
        num_tokens=num_tokens,
        is_blank=_is_blank(chat, body),
    )


def _is_blank(chat: ChatFormat, body: tuple[int, ...]) -> bool:
    return all(id in chat.blank_ids for id in body)


def _before_spelt_close(chat: ChatFormat, body: tuple[int, ...]) -> tuple[int, ...] | None:
    """What stands before a think-close tag that is spelt out; None if there is none. A token may hold both."""
    text = chat.decode(body)
    end = text.find(chat.options.think_close)
    if end < 0:
        return None
    for size in range(len(body), -1, -1):
        before = chat.decode(body[:size])
        if len(before) <= end and text.startswith(before):
            return (*body[:size], *chat.encode_text(text[len(before) : end]))
    raise AssertionError("the empty beginning fits")


def _whole_characters(chat: ChatFormat, body: tuple[int, ...]) -> tuple[int, ...]:
    """Without the tokens at its end that leave a character incomplete."""
    while body and chat.decode(body).endswith(_HELD_BACK):
        body = body[:-1]
    return body


def _marker_meaning(chat: ChatFormat, id: int) -> EndedBy:
    if id == chat.think_close_id:
        return EndedBy.think_close
    return EndedBy.end_of_text if id in chat.end_ids else EndedBy.special


def _ends_blank(chat: ChatFormat, ids: Sequence[int]) -> bool:
    return bool(ids) and ids[-1] in chat.blank_line_ids
