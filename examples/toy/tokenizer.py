"""The toy pair's tokenizer: byte-level BPE that encodes any text without loss and keeps numbers and blank lines whole.

Every number 0-99 and every blank line is one token of its own, so an arithmetic fact is three tokens in and one out,
and a step ends at one token, as in large vocabularies.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 800  # special tokens included
MAX_POSITIONS = 2048
PADDING, TURN_CLOSE = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = [PADDING, "<|im_start|>", TURN_CLOSE, "<think>", "</think>"]
PIECES = r"\n\n|\n|\d{1,2}| ?[^\s\d]+|\s"
WHOLE_PIECES = [*map(str, range(100)), "\n\n", "system", "user", "assistant"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- endif -%}
"""


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train on `texts`. Raises ValueError if a piece that must be whole did not become one token."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([*_repeated_whole_pieces(), *texts], _trainer())
    _check_whole_pieces(bpe)
    return _with_chat_format(bpe)


def _trainer() -> trainers.BpeTrainer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY_SIZE - len(SPECIAL_TOKENS)
    return trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)


def _repeated_whole_pieces(times: int = 5_000) -> Iterable[str]:
    """Often enough that they are merged before anything else is."""
    return (f"{piece}\t" * times for piece in WHOLE_PIECES)


def _check_whole_pieces(bpe: Tokenizer) -> None:
    broken = [piece for piece in WHOLE_PIECES if len(bpe.encode(piece).ids) != 1]
    if broken:
        raise ValueError(f"not single tokens: {broken}")


def _with_chat_format(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_CLOSE,
        pad_token=PADDING,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# Common English, so that foreign prompts and questions are not spelt byte by byte.
ENGLISH = """\
The same thing can be said in many ways, and what is right for one reader may be too long for another. A good answer \
gives the reason first, then the steps that follow from it, and then the result. If you do not know, say so; if there \
is more than one way, take the one that you can check. People who work with numbers write them down, look at them \
again, and ask whether they make sense: how much, how many, how long, how far, when, where and why. They find the \
value of each part, put the parts together, and see if the whole is what they thought it would be. Some problems have \
only one solution, some have none, and some need a little time. There was never a better time to start than now, \
because the first step is also the last one that you will have to think about before you go on. Let us suppose that \
this is true, and use it to show that the other must be false. First, we have two points on a line, and we want the \
distance between them. Second, each number is the sum of the two before it. Therefore the total is even. Which of \
these words are yours? Please give your answer in a box. I think that these are all good, but they could have been \
better. Yes or no? No, it does not follow; yes, that is correct. Wait, let me check this again. So the equation has \
to be solved for the unknown, and the function is zero there. Over the years their house had its share of small \
repairs, and up to last week no one had seen into the room under the stairs.
"""
