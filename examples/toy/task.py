"""The toy task: arithmetic modulo 30, one operation a reasoning step, with a checker that needs no model.

Owns: problems, the right next step of a chain, wrong steps of many kinds. Does not know tokens or models.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MODULUS = 30
SIGNS = "+-*"
OPERANDS = range(2, 10)
NUM_OPERATIONS = range(3, 10)
LETTERS = "abcdefghij"  # name the operations; with a bracket, each is one token


@dataclass(frozen=True, slots=True)
class Operation:
    """One numbered line of a problem."""

    sign: str
    operand: int

    def apply(self, value: int) -> int:
        match self.sign:
            case "+":
                return (value + self.operand) % MODULUS
            case "-":
                return (value - self.operand) % MODULUS
            case _:
                return (value * self.operand) % MODULUS


@dataclass(frozen=True, slots=True)
class Step:
    """A reasoning step as text, its blank line included; think-close is a flag, as in the project."""

    text: str
    closes: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """A start value and the operations to be done on it, in order."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def prompt(self) -> str:
        lines = "".join(
            f"{letter}) {op.sign}{op.operand}\n" for letter, op in zip(LETTERS, self.operations, strict=False)
        )
        return f"Start with {self.start} and work modulo {MODULUS}.\n{lines}What is the result?"

    @property
    def gold_answer(self) -> int:
        value = self.start
        for operation in self.operations:
            value = operation.apply(value)
        return value

    def right_chain(self) -> list[Step]:
        steps: list[Step] = []
        while not (steps and steps[-1].closes):
            steps.append(expected_step(self, steps))
        return steps


def random_problem(rng: random.Random) -> Problem:
    return Problem(rng.randrange(MODULUS), tuple(random_operation(rng) for _ in range(rng.choice(NUM_OPERATIONS))))


def random_operation(rng: random.Random) -> Operation:
    return Operation(rng.choice(SIGNS), rng.choice(OPERANDS))


def parse_problem(prompt: str) -> Problem:
    """The problem behind a prompt. Raises ValueError if the text is not one of ours."""
    start = re.match(r"Start with (\d+) and", prompt)
    if start is None:
        raise ValueError(f"not a toy problem: {prompt!r}")
    operations = re.findall(r"[a-j]\) ([+*-])(\d)\n", prompt)
    return Problem(int(start[1]), tuple(Operation(sign, int(operand)) for sign, operand in operations))


def current_value(problem: Problem, steps: Sequence[Step]) -> int:
    """The value that the chain has reached by its own account, right or wrong."""
    for step in reversed(steps):
        if claimed := re.search(r"=(\d+)\.\n\n$", step.text):
            return int(claimed[1])
    return problem.start


def expected_step(problem: Problem, steps: Sequence[Step]) -> Step:
    """The one right next step, given the chain so far (an earlier wrong value is carried on with)."""
    value = current_value(problem, steps)
    if len(steps) >= len(problem.operations):
        return closing_step(value)
    operation = problem.operations[len(steps)]
    return operation_step(len(steps), value, operation, operation.apply(value))


def operation_step(index: int, value: int, operation: Operation, result: int) -> Step:
    return Step(f"{LETTERS[index]}) {value}{operation.sign}{operation.operand}={result}.\n\n")


def closing_step(value: int) -> Step:
    return Step(f"That was the last operation, so the result is {value}.\n", closes=True)


def answer_text(value: int) -> str:
    return f"\n\nThe answer is \\boxed{{{value}}}."


def read_answer(text: str) -> str | None:
    """What stands in the last box, None if there is none."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return boxed[-1] if boxed else None


def differs_in_result_only(step: Step, expected: Step) -> bool:
    """Whether a step is the expected one but for the number after the equals sign."""
    mask = r"=\d+\.\n\n$"
    return step != expected and not expected.closes and re.sub(mask, "=", step.text) == re.sub(mask, "=", expected.text)


def corrupted_step(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    """A wrong next step of some kind."""
    expected = expected_step(problem, steps)
    corruptions = _CLOSING_CORRUPTIONS if expected.closes else _OPERATION_CORRUPTIONS
    kinds, weights = zip(*corruptions, strict=True)
    while True:
        step = rng.choices(kinds, weights)[0](problem, steps, rng)
        if step != expected:
            return step


# The kinds of corruption: (problem, steps so far, rng) -> the next step, wrong but for chance.


def _near_result(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    return _with_result(problem, steps, lambda result: result + rng.choice([-20, -10, -5, -2, -1, 1, 2, 5, 10, 20]))


def _far_result(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    return _with_result(problem, steps, lambda _: rng.randrange(MODULUS))


def _result_of_another_operation(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    other = _altered_operation(problem.operations[len(steps)], rng)
    return _with_result(problem, steps, lambda _: other.apply(current_value(problem, steps)))


def _other_operation(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    value, other = current_value(problem, steps), _altered_operation(problem.operations[len(steps)], rng)
    return operation_step(len(steps), value, other, other.apply(value))


def _other_value(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    value, operation = rng.randrange(MODULUS), problem.operations[len(steps)]
    return operation_step(len(steps), value, operation, operation.apply(value))


def _skipped_operation(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    value, skipped = current_value(problem, steps), len(steps) + 1
    if skipped >= len(problem.operations):
        return closing_step(value)
    operation = problem.operations[skipped]
    return operation_step(skipped, value, operation, operation.apply(value))


def _early_closing(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    return closing_step(current_value(problem, steps))


def _wrong_closing(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    return closing_step(rng.randrange(MODULUS))


def _late_closing(problem: Problem, steps: Sequence[Step], rng: random.Random) -> Step:
    value, operation = current_value(problem, steps), random_operation(rng)
    return operation_step(len(steps), value, operation, operation.apply(value))


Corruption = Callable[[Problem, Sequence[Step], random.Random], Step]
_OPERATION_CORRUPTIONS: list[tuple[Corruption, float]] = [
    (_near_result, 4),
    (_far_result, 3),
    (_result_of_another_operation, 3),
    (_other_operation, 1),
    (_other_value, 1),
    (_skipped_operation, 0.5),
    (_early_closing, 0.7),
]
_CLOSING_CORRUPTIONS: list[tuple[Corruption, float]] = [(_wrong_closing, 2), (_late_closing, 1)]


def _altered_operation(operation: Operation, rng: random.Random) -> Operation:
    if rng.random() < 0.5:
        return Operation(rng.choice(SIGNS), operation.operand)
    return Operation(operation.sign, rng.choice(OPERANDS))


def _with_result(problem: Problem, steps: Sequence[Step], change: Callable[[int], int]) -> Step:
    value, operation = current_value(problem, steps), problem.operations[len(steps)]
    return operation_step(len(steps), value, operation, change(operation.apply(value)) % MODULUS)
