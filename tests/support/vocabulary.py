"""Small byte-level tokenizers with the chat templates of real families; every id's bytes are known here independently.

Ordinary entries come first, special tokens after them, so that "special" is a matter of comparing with `NUM_ORDINARY`.
"""

from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# "\n\n" and ".\n\n" are pieces of their own, digits are single, everything else is words.
PIECES = r"\.?\n\n|\n|\d| ?[^\s\d.]+|\.|\s"
OTHER_WORDS = (" so we", " ad", "aga", " yes", " no", "stem", " st", "x7")
WORDS = (" so", " we", " add", "again", " no", " yes", "user", "system", "assistant", " step", " wait", "box")

CHATML = """\
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
CHATML_WITHOUT_THINK = CHATML.replace("<think>\\n' -}}{%- endif", "' -}}{%- endif")
R1 = """\
{{- '<|begin|>' -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- message.content -}}{%- endif -%}
{%- if message.role == 'user' -%}{{- '<|User|>' + message.content -}}{%- endif -%}
{%- if message.role == 'assistant' -%}{{- '<|Assistant|>' + message.content.split('</think>')[-1] + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}
"""  # noqa: E501
LLAMA3 = """\
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool>")
R1_SPECIALS = ("<|begin|>", "<|end|>", "</think>", "<|User|>", "<|Assistant|>", "<think>", "<|pad|>", "<|fim|>")
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<think>",
    "</think>",
)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()


def _spelt(text: str) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in text.encode())


@cache
def _entries(
    blank_line: bool, extra: tuple[str, ...] = (), other: bool = False
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and the merges that build its words. `other`: one with other words, and other ids for all of it."""
    vocabulary = {character: byte for byte, character in BYTE_CHARACTERS.items()}
    merges: list[tuple[str, str]] = []
    pieces = [*(["\n\n"] if blank_line else []), *(OTHER_WORDS if other else WORDS), *extra]
    splits = [(_spelt(piece)[:size], _spelt(piece)[size]) for piece in pieces for size in range(1, len(_spelt(piece)))]
    if blank_line:
        splits.append((".", _spelt("\n\n")))
    for left, right in splits:
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    if other:
        vocabulary = {entry: len(vocabulary) - 1 - id for entry, id in vocabulary.items()}
    return vocabulary, merges


def make_tokenizer(
    specials: Sequence[str] = CHATML_SPECIALS,
    eos: str | None = "<|im_end|>",
    template: str | None = CHATML,
    blank_line: bool = True,
    extra_words: tuple[str, ...] = (),
    other: bool = False,
) -> PreTrainedTokenizerFast:
    """A whole tokenizer. `blank_line`: whether the vocabulary has entries with a blank line in them."""
    vocabulary, merges = _entries(blank_line, extra_words, other)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False)
    made.chat_template = template
    return made


@cache
def token_bytes(blank_line: bool = True, other: bool = False) -> dict[int, bytes]:
    """The bytes of each ordinary entry."""
    byte_of = {character: byte for byte, character in BYTE_CHARACTERS.items()}
    vocabulary, _ = _entries(blank_line, (), other)
    return {id: bytes(byte_of[character] for character in entry) for entry, id in vocabulary.items()}
