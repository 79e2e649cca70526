"""Prompt templates with named fields. Does not know: where the fields' values come from.

`{{ name }}` stands for a field, so that braces of LaTeX stay as they are. Values are put in as they are and are never
read as templates themselves.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import StrictUndefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specreason_batch.types import InvalidInput

PLAIN = "plain"
MULTIPLE_CHOICE = "multiple_choice"
READY: Mapping[str, str] = {
    PLAIN: "{{ prompt }}",
    "math": (
        "{{ prompt }}\n\nWork the problem out step by step. Then give the final answer, and nothing else, "
        "inside \\boxed{}."
    ),
    MULTIPLE_CHOICE: (
        "{{ prompt }}\n\n{{ choices }}\n\nWork out step by step which of these is right. Then give its letter, and "
        "nothing else, inside \\boxed{}."
    ),
}
FILE_ENDINGS = (".jinja", ".j2", ".txt")


class TemplateFailed(Exception):
    """A template could not be filled with one row's values. The message says why."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template that compiles, and the names it uses."""

    name: str
    text: str
    fields: frozenset[str]
    _compiled: jinja2.Template

    @property
    def is_plain(self) -> bool:
        return self.text == READY[PLAIN]

    def fill(self, values: Mapping[str, Any]) -> str:
        """Raises TemplateFailed."""
        if self.is_plain:
            return str(values["prompt"])
        try:
            return self._compiled.render(values)
        except Exception as error:  # whatever an expression of the user's can raise
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error


def load_template(given: str) -> Template:
    """A ready one by name, a file, or a text with fields. Raises InvalidInput."""
    if given in READY:
        return _compile(given, READY[given])
    if "{{" in given or "{%" in given:
        return _compile("own text", given)
    if given.endswith(FILE_ENDINGS):
        return _compile(Path(given).name, _read(given))
    raise InvalidInput(
        f"template: {given!r} is unknown; allowed: {', '.join(READY)}, a file that ends in "
        f"{' or '.join(FILE_ENDINGS)}, or a text with {{{{ prompt }}}}"
    )


def check_fields(template: Template, known: Collection[str]) -> None:
    """Raises InvalidInput, naming every field that is not there."""
    if absent := sorted(template.fields - set(known)):
        raise InvalidInput(
            f"template: {template.name!r} uses {', '.join(absent)}, which the input has not; allowed: "
            f"{', '.join(sorted(known))}"
        )
    if not template.fields:
        raise InvalidInput(f"template: {template.name!r} uses no field: every prompt would be the same text")
    if "choices" in known and "choices" not in template.fields:
        raise InvalidInput(
            f"template: {template.name!r} does not use choices, so that no model would see them; allowed: a template "
            "with {{ choices }}, or columns.choices=''"
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"template: {path} cannot be read: {error}") from error


def _compile(name: str, text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        fields = meta.find_undeclared_variables(environment.parse(text)) - set(environment.globals)
        return Template(name, text, frozenset(fields), environment.from_string(text))
    except jinja2.TemplateSyntaxError as error:
        raise InvalidInput(f"template: {name!r}, line {error.lineno}: {error.message}") from error
