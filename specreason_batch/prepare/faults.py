"""Why a row cannot be used: its kind, which is counted, and what of it."""

from enum import StrEnum


class Kind(StrEnum):
    """Every way in which a row is left out."""

    no_prompt = "prompt is null or empty"
    not_text = "not text"
    bad_id = "prompt_id cannot be used"
    bad_messages = "messages cannot be used"
    bad_system_prompt = "system prompt cannot be used"
    bad_gold = "gold answer cannot be used"
    bad_choices = "choices cannot be used"
    no_gold = "no gold letter"
    template_failed = "template cannot be filled"
    same_id = "prompt_id was used by an earlier row"
    same_text = "same text as an earlier row"


class RowFault(Exception):
    """One row cannot be used."""

    def __init__(self, kind: Kind, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else str(kind))
        self.kind = kind
