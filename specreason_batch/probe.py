"""Start-up probes of a real engine: are grades right, does the prefix cache hit? Seconds now, or days of wrong rows."""

from dataclasses import dataclass

from specreason_batch.engine import Engine, EngineDead
from specreason_batch.judge import Judge
from specreason_batch.types import Completion, Grade, InvalidInput, Request, Sampling

_TOLERANCE = 0.02  # of a digit's probability, alone against in a batch: bf16 kernels differ by batch shape
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class CacheProbe:
    """What the second of two equal prompts found in the prefix cache."""

    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def hits(self) -> bool:
        return self.num_cached_tokens > 0


def probe_grade(engine: Engine, judge: Judge, prompt_ids: list[int]) -> Grade:
    """Grade alone, and beside a decoding request; the label probabilities must be there and agree.

    `prompt_ids`: any opening of the base's. Raises InvalidInput on a mismatch: vLLM drops `logprob_token_ids` without a
    word in some configurations.
    """
    grade = Request(
        request_id="probe-grade",
        prompt_token_ids=[*prompt_ids, *judge.turn],
        max_tokens=1,
        sampling=Sampling(temperature=0.0, logprob_token_ids=judge.label_ids),
    )
    decoding = Request(
        request_id="probe-decoding", prompt_token_ids=list(prompt_ids), max_tokens=8, sampling=Sampling(temperature=0.0)
    )
    alone = _read(judge, _complete(engine, [grade])["probe-grade"])
    beside = _read(judge, _complete(engine, [decoding, grade])["probe-grade"])
    worst = max(abs(one - other) for one, other in zip(alone.probs, beside.probs, strict=True))
    if worst > _TOLERANCE:
        raise InvalidInput(
            f"base engine: a grade beside a decoding request differs from the same grade alone (by {worst:.3f} in a "
            f"label's probability; allowed: {_TOLERANCE}); its grades cannot be trusted"
        )
    return alone


def probe_cache(engine: Engine, prompt_ids: list[int]) -> CacheProbe:
    """Send one prompt of at least two cache blocks twice."""
    length = min(2 * engine.info.block_size + 1, engine.info.max_model_len - 1)
    prompt = (prompt_ids * (length // len(prompt_ids) + 1))[:length]
    request = Request(
        request_id="probe-cache", prompt_token_ids=prompt, max_tokens=1, sampling=Sampling(temperature=0.0)
    )
    _complete(engine, [request])
    return CacheProbe(length, _complete(engine, [request])["probe-cache"].num_cached_tokens)


def _read(judge: Judge, completion: Completion) -> Grade:
    if not completion.logprobs or not any(id in completion.logprobs for id in judge.label_ids):
        raise InvalidInput(
            "base engine: it returned no log-probabilities for the grade's labels "
            f"({completion.error or completion.finish_reason}); check base.vllm_args"
        )
    return judge.read(completion.logprobs, completion.token_ids[0])


def _complete(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done: dict[str, Completion] = {}
    while len(done) < len(requests):
        done |= {completion.request_id: completion for completion in engine.poll(_POLL_SECONDS)}
        if len(done) < len(requests) and not engine.num_outstanding:
            raise EngineDead(f"the engine for {engine.info.model!r} lost a request")
    return done
