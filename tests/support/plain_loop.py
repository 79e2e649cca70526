"""The reference: SpecReason and its controls for one chain at a time, written straight from docs/design.md section 5.

No batching, no coroutine, no schedule. It shares with the package the nouns' enums, a role's token ids (`ChatFormat`,
`Judge.turn` and label ids) and the seeds' hash; every decision is made here again.
"""

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specreason_batch.judge import Reading
from specreason_batch.seeds import stable_coin, stable_seed
from specreason_batch.types import Completion, Request, Role, Sampling
from tests.support.worlds import World

Row = dict[str, Any]

# Not a function of the chain: they depend on when and beside whom it ran.
VOLATILE = ("num_cached_prompt_tokens", "num_redone_tokens", "active_seconds", "round")
# Not made here: tests/test_translator.py counts them.
COUNTED_ELSEWHERE = ("num_unsplit_blank_lines",)


@dataclass(slots=True)
class Written:
    """A step as one role wrote it."""

    author: Role
    body: list[int]
    num_tokens: int
    ended_by: str
    base_body: list[int]  # in each role's ids
    draft_body: list[int]

    def in_ids_of(self, role: Role) -> list[int]:
        return self.base_body if role is Role.base else self.draft_body

    @property
    def closes(self) -> bool:
        return self.ended_by in ("think_close", "end_of_text")


class PlainLoop:
    """One chain, from its prompt to its rows."""

    def __init__(self, world: World, prompt_id: str, prompt: str, sample_index: int):
        self.world = world
        self.formats = world.formats
        self.models = {role: world.model(role) for role in world.roles}
        self.bytes = {role: world.token_bytes(role) for role in Role}
        self.differ = len(self.formats) == 2 and world.other_vocabulary
        self.prompt_id, self.prompt, self.sample_index = prompt_id, prompt, sample_index
        self.seed = stable_seed(world.run_seed, prompt_id, sample_index)
        self.context = {role: list(chat.opening(prompt)) for role, chat in self.formats.items()}
        self.turn = list(world.judge.turn) if world.judge else []
        close = max(len(chat.think_close_ids) for chat in self.formats.values())
        self.reserve = close + world.max_answer_tokens + (len(self.turn) + 1 if self.turn else 0)
        self.kept = self.generated = self.grade_prompt_tokens = 0
        self.repeats = 0
        self.steps: list[Row] = []
        self.bodies: list[bytes] = []
        self.thinking_end: str | None = None
        self.last_words: list[int] | None = None

    def run(self) -> tuple[Row, list[Row]]:
        """The chain's row and its steps' rows, without the volatile columns."""
        while self.thinking_end is None:
            self.next_step()
        answer, num_answer_tokens, answer_end = self.answer()
        text, spans = self.sliced_text()
        steps = [row | {"start": start, "end": end} for row, (start, end) in zip(self.steps, spans, strict=True)]
        chain = {
            "prompt_id": self.prompt_id,
            "sample_index": self.sample_index,
            "prompt": self.prompt,
            "thinking": text,
            "answer": answer,
            "thinking_end": self.thinking_end,
            "answer_end": answer_end,
            "num_steps": len(steps),
            "num_draft_tokens_kept": sum(row["num_tokens"] for row in steps if row["author"] == "draft"),
            "num_draft_tokens_rejected": sum(row["rejected_num_tokens"] or 0 for row in steps),
            "num_base_tokens": sum(row["num_tokens"] for row in steps if row["author"] == "base"),
            "num_answer_tokens": num_answer_tokens,
            "num_grade_prompt_tokens": self.grade_prompt_tokens,
            "seed": self.seed,
        }
        return chain, steps

    # --- one step ---

    def next_step(self) -> None:
        world = self.world
        if world.policy == "draft_only":
            return self.keep(self.write(Role.draft))
        if world.policy == "base_only" or len(self.steps) < world.first_n_base_steps:
            return self.keep(self.write(Role.base))
        draft = self.write(Role.draft)
        graded: Row = {}
        if world.policy == "random":
            accepted = stable_coin(world.accept_rate, self.seed, len(self.steps))
        else:
            graded = self.grade(draft)
            accepted = graded["score"] is not None and graded["score"] >= world.threshold
        if accepted:
            self.keep(draft, accepted=True, **graded)
        else:
            self.keep(self.write(Role.base), rejected=draft, accepted=False, **graded)

    def room(self) -> int:
        return min(self.world.window(role) - self.reserve - len(ids) for role, ids in self.context.items())

    def budget_left(self) -> int:
        left = self.world.limits.thinking_tokens - self.kept
        if self.world.limits.generated_tokens is not None:
            left = min(left, self.world.limits.generated_tokens - self.generated)
        return left

    def write(self, role: Role) -> Written:
        chat = self.formats[role]
        known = self.bytes[role]
        tag = chat.options.think_close.encode() if len(chat.think_close_ids) > 1 else b""
        blank_ids = {id for id, spelt in known.items() if b"\n\n" in spelt}
        sampling = Sampling(
            temperature=self.world.temperature,
            top_p=0.95,
            stop_token_ids=tuple({*chat.end_ids, *blank_ids} | (set() if tag else set(chat.think_close_ids))),
            stop_strings=(*([] if blank_ids else ["\n\n"]), *([tag.decode()] if tag else [])),
        )
        max_tokens = min(self.world.limits.max_step_tokens, self.budget_left(), self.room())
        ids = self.ask(role, self.context[role], max_tokens, sampling, "step").token_ids
        body: list[int] = []
        ended_by = ""
        for id in ids:
            if id not in known:
                ended_by = "special"
                if [id] == list(chat.think_close_ids):
                    ended_by = "think_close"
                elif id in chat.end_ids:
                    ended_by = "end_of_text"
                break
            body.append(id)
        spelt = self.spell(role, body)
        if tag and tag in spelt:
            return self.in_both(role, self.before(role, body, spelt.index(tag)), len(ids), "think_close")
        if ended_by:
            return self.in_both(role, body, len(ids), ended_by)
        ends_blank = b"\n\n" in known[body[-1]] if blank_ids else spelt.endswith(b"\n\n")
        return self.in_both(role, body, len(ids), "blank_line" if ends_blank else "max_tokens")

    def before(self, role: Role, body: list[int], end: int) -> list[int]:
        """The step up to that byte: whole tokens, and the rest of one that goes beyond it spelt anew."""
        size = 0
        while len(self.spell(role, body[: size + 1])) <= end:
            size += 1
        rest = self.spell(role, body)[len(self.spell(role, body[:size])) : end]
        return body[:size] + list(self.formats[role].encode_text(rest.decode()))

    def in_both(self, role: Role, body: list[int], num_tokens: int, ended_by: str) -> Written:
        """In the other role's ids too: the same, or its own of the same whole characters, as many as fit."""
        if not self.differ:
            return Written(role, body, num_tokens, ended_by, body, body)
        other = Role.base if role is Role.draft else Role.draft
        fits = self.world.window(other) - self.reserve - len(self.context[other])
        if other is Role.base:
            fits = min(self.room(), self.budget_left(), self.world.limits.max_step_tokens)
        left = list(body)
        while True:
            while self.spell(role, left).decode(errors="replace").endswith("\ufffd"):
                left = left[:-1]
            text = self.spell(role, left).decode(errors="replace")
            theirs = list(self.formats[other].encode_text(text))
            if len(theirs) <= fits:
                break
            left, ended_by = left[:-1], "max_tokens"
        base, draft = (left, theirs) if role is Role.base else (theirs, left)
        return Written(role, left, num_tokens, ended_by, base, draft)

    def grade(self, draft: Written) -> Row:
        judge = self.world.judge
        assert judge is not None
        prompt = self.context[Role.base] + draft.base_body + self.turn
        self.grade_prompt_tokens += len(prompt)
        sampling = Sampling(temperature=0.0, logprob_token_ids=judge.label_ids)
        completion = self.ask(Role.base, prompt, 1, sampling, "grade")
        probs = [math.exp(completion.logprobs.get(id, -math.inf)) for id in judge.label_ids]
        mass = sum(probs)
        score: float | None = None
        if self.world.reading is Reading.greedy:
            if completion.token_ids[0] in judge.label_ids:
                score = float(judge.label_ids.index(completion.token_ids[0]))
        elif mass > 0 and mass >= self.world.mass_floor:
            score = sum(value * prob for value, prob in enumerate(probs)) / mass
        return {"score": score, "digit_probs": probs if len(probs) == 10 else None, "digit_mass": mass}

    def keep(
        self,
        step: Written,
        rejected: Written | None = None,
        accepted: bool | None = None,
        score: float | None = None,
        digit_probs: list[float] | None = None,
        digit_mass: float | None = None,
    ) -> None:
        self.steps.append(
            {
                "prompt_id": self.prompt_id,
                "sample_index": self.sample_index,
                "step_index": len(self.steps),
                "author": str(step.author),
                "ended_by": step.ended_by,
                "token_ids": step.body,
                "num_tokens": step.num_tokens,
                "rejected_text": None if rejected is None else self.text_of(rejected),
                "rejected_num_tokens": None if rejected is None else rejected.num_tokens,
                "score": score,
                "digit_probs": digit_probs,
                "digit_mass": digit_mass,
                "accepted": accepted,
            }
        )
        self.bodies.append(self.spell(step.author, step.body))
        for role in self.context:
            self.context[role] = self.context[role] + step.in_ids_of(role)
        self.kept += len(step.base_body)
        self.generated += step.num_tokens + (rejected.num_tokens if rejected else 0)
        self.count_repeats(step)
        self.thinking_end = self.end_after(step)

    def count_repeats(self, step: Written) -> None:
        if step.base_body == self.last_words or not self.spell(step.author, step.body).strip():
            self.repeats += 1
        else:
            self.repeats, self.last_words = 1, step.base_body

    def end_after(self, step: Written) -> str | None:
        if step.closes:
            return "closed"
        left = min(self.budget_left(), self.room())
        nothing_fitted = step.ended_by == "max_tokens" and not step.base_body
        if nothing_fitted and left < self.world.limits.max_step_tokens:
            return "budget" if left == self.budget_left() else "context"
        if self.repeats >= self.world.limits.repeated_steps:
            return "repetition"
        if self.budget_left() <= 0:
            return "budget"
        return "context" if self.room() <= 0 else None

    # --- the answer and the text ---

    def answer(self) -> tuple[str, int, str]:
        role = self.world.answer_role
        chat = self.formats[role]
        sampling = Sampling(temperature=self.world.temperature, top_p=0.95, stop_token_ids=tuple(chat.end_ids))
        prompt = [*self.context[role], *chat.think_close_ids]
        ids = list(self.ask(role, prompt, self.world.max_answer_tokens, sampling, "answer").token_ids)
        if ids[-1] in chat.end_ids:
            return self.shown(ids[:-1], role), len(ids), "stop"
        return self.shown(ids, role), len(ids), "length"

    def sliced_text(self) -> tuple[str, list[tuple[int, int]]]:
        """Each step's characters, where a character belongs to the step that brings its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = len(self.bodies) - 1
        pieces = [decoder.decode(body, final=index == last) for index, body in enumerate(self.bodies)]
        ends = [sum(map(len, pieces[: index + 1])) for index in range(len(pieces))]
        return "".join(pieces), list(zip([0, *ends[:-1]], ends, strict=True))

    def spell(self, role: Role, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes[role][id] for id in ids)

    def text_of(self, step: Written) -> str:
        return self.spell(step.author, step.body).decode(errors="replace")

    def shown(self, ids: Sequence[int], role: Role) -> str:
        """With special tokens as their names."""
        names = {id: name.encode() for name, id in self.formats[role].special_ids.items()}
        pieces: list[bytes] = [b""]
        for id in ids:
            if id in names:
                pieces += [names[id], b""]
            else:
                pieces[-1] += self.bytes[role][id]
        return b"".join(piece for piece in pieces).decode(errors="replace")

    def ask(self, role: Role, prompt: list[int], max_tokens: int, sampling: Sampling, kind: str) -> Completion:
        assert max_tokens >= 1
        seed = None
        if self.world.seeded and sampling.temperature > 0:
            seed = stable_seed(self.seed, len(self.steps), role, kind, 0)
        request = Request(
            request_id="plain", prompt_token_ids=list(prompt), max_tokens=max_tokens, sampling=sampling, seed=seed
        )
        return self.models[role](request)


def plain_rows(world: World) -> dict[tuple[str, int], tuple[Row, list[Row]]]:
    """What every schedule must write for this world, by chain."""
    return {key: PlainLoop(world, key[0], world.prompts[int(key[0][1:])], key[1]).run() for key in world.keys}
