"""Measures of text, each a plain count that a reader can repeat. Does not know: chains, files."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

_ONE_BY_ONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts written without spaces: a character is a word
_WORD = re.compile(rf"[{_ONE_BY_ONE}]|[^\W_{_ONE_BY_ONE}]+")
_COMMAND_OR_LETTERS = re.compile(rf"\\[a-zA-Z]+|([^\W\d_]{{2,}}|[{_ONE_BY_ONE}])")
_USED_SHARE = 0.1  # a script with fewer of a prompt's letters is a quotation, not its language
_JAPANESE = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # written together


def stable_hash(text: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def words(text: str) -> list[str]:
    """Letters and digits in lower case, punctuation and markup gone; of scripts without spaces, the characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(items: Sequence[str], size: int) -> list[str]:
    """Every `size` words in a row, joined; none where there are fewer."""
    return [" ".join(items[start : start + size]) for start in range(len(items) - size + 1)]


def repeated_share(text: str, size: int) -> float:
    """Of the word n-grams of a text, how many came before in it: 0 nothing is repeated, near 1 it goes in circles."""
    found = ngrams(words(text), size)
    return 1 - len(set(found)) / len(found) if found else 0.0


def num_repeated(steps: Iterable[str]) -> int:
    """Steps that are the same as an earlier one; those of white space alone are not counted."""
    texts = [text for step in steps if (text := step.strip())]
    return len(texts) - len(set(texts))


def foreign_share(prompt: str, text: str) -> float:
    """Of a text's letters, those in scripts that the prompt does not use.

    Single letters of alphabets are variables and LaTeX commands are markup: neither counts. 0 if the prompt has none.
    """
    own = _letters(prompt)
    used = {script for script, count in own.items() if count >= _USED_SHARE * own.total()}
    if not used:
        return 0.0
    found = _letters(text)
    return sum(count for script, count in found.items() if script not in used) / max(1, found.total())


def _letters(text: str) -> Counter[str]:
    """Letters by script."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    characters = Counter("".join(_COMMAND_OR_LETTERS.findall(text)))
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        scripts[_script(character)] += count
    return scripts


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """The first word of its Unicode name: LATIN, CYRILLIC, CJK, HANGUL ..."""
    script = unicodedata.name(character, "UNNAMED").split(" ")[0]
    return _JAPANESE.get(script, script)
