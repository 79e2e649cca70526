"""The ready experiments' models: their published shapes, and stand-ins of a few layers with their formats.

A stand-in is a folder with a config of the real architecture, a small byte-level tokenizer with the real special
tokens, and a chat template of the real structure in our own words. Its weights are made up (`load_format=dummy`).
"""
# ruff: noqa: RUF001 - DeepSeek's tokens are spelt with another bar

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.support.vocabulary import make_tokenizer

# --- shapes ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a model's config.json says, as far as memory and parallelism go."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    head_size: int = 128
    tied: bool = False  # one matrix for embedding and output
    window: int = 131072  # max_position_embeddings

    @property
    def parameters(self) -> int:
        """Matrices only; norms and biases are under a thousandth."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.feed_forward
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def weight_bytes(self, gpus: int) -> float:
        """On each of so many, in 16 bits."""
        return 2 * self.parameters / gpus

    def kv_bytes(self, gpus: int) -> int:
        """A token's, on each of so many, in 16 bits: a KV head is not split but kept by several."""
        return 2 * 2 * self.layers * self.head_size * max(1, self.kv_heads // gpus)

    def can_be_split(self, gpus: int) -> bool:
        """As vLLM's tensor parallelism asks."""
        kv_heads = max(self.kv_heads, gpus)
        return self.heads % gpus == 0 and kv_heads % min(self.kv_heads, gpus) == 0 and self.feed_forward % gpus == 0


QWEN_32B = Shape(layers=64, hidden=5120, heads=40, kv_heads=8, feed_forward=27648, vocabulary=152064)
QWEN_1B = Shape(layers=28, hidden=1536, heads=12, kv_heads=2, feed_forward=8960, vocabulary=151936)
SHAPES: Mapping[str, Shape] = {
    "Qwen/QwQ-32B": Shape(
        layers=64, hidden=5120, heads=40, kv_heads=8, feed_forward=27648, vocabulary=152064, window=40960
    ),
    "Skywork/Skywork-OR1-32B-Preview": QWEN_32B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": QWEN_1B,
    "Zyphra/ZR1-1.5B": QWEN_1B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": Shape(
        layers=80, hidden=8192, heads=64, kv_heads=8, feed_forward=28672, vocabulary=128256
    ),
    "Qwen/Qwen3-32B": Shape(
        layers=64, hidden=5120, heads=64, kv_heads=8, feed_forward=25600, vocabulary=151936, window=40960
    ),
    "Qwen/Qwen3-1.7B": Shape(
        layers=28, hidden=2048, heads=16, kv_heads=8, feed_forward=6144, vocabulary=151936, tied=True, window=40960
    ),
}

# --- templates ---

_EARLIER = """\
{%- macro earlier(text) -%}
{{- (text.split('</think>') | last).lstrip('\\n') -}}
{%- endmacro -%}
"""
QWEN25 = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in messages -%}
{{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
QWQ = (
    _EARLIER
    + """\
{%- for turn in messages -%}
{%- set text = earlier(turn.content) if turn.role == 'assistant' else turn.content -%}
{{- '<|im_start|>' ~ turn.role ~ '\\n' ~ text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
)
QWEN3 = (
    _EARLIER
    + """\
{%- set last = namespace(user=0) -%}
{%- for turn in messages -%}{%- if turn.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for turn in messages -%}
{%- set text = turn.content -%}
{%- if turn.role == 'assistant' -%}
{%- set text = earlier(text) -%}
{%- if loop.index0 > last.user -%}{%- set text = '<think>\\n\\n</think>\\n\\n' ~ text -%}{%- endif -%}
{%- endif -%}
{{- '<|im_start|>' ~ turn.role ~ '\\n' ~ text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
)
DEEPSEEK = """\
{%- set first = namespace(system='') -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}{%- set first.system = turn.content -%}{%- endif -%}
{%- endfor -%}
{{- bos_token ~ first.system -}}
{%- for turn in messages -%}
{%- if turn.role == 'user' -%}{{- '<｜User｜>' ~ turn.content -}}{%- endif -%}
{%- if turn.role == 'assistant' -%}
{{- '<｜Assistant｜>' ~ (turn.content.split('</think>') | last) ~ '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""
DEEPSEEK_OLDER = DEEPSEEK.replace("<think>\\n' -}}{%- endif", "' -}}{%- endif")
LLAMA3 = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system, turns = messages[0].content | trim, messages[1:] -%}
{%- else -%}
{%- set system, turns = '', messages -%}
{%- endif -%}
{%- set day = date_string if date_string is defined else '26 Jul 2024' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' ~ day ~ '\\n\\n' ~ system ~ '<|eot_id|>' -}}
{%- for turn in turns -%}
{{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' ~ (turn.content | trim) ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
NO_SYSTEM = """\
{{- bos_token -}}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- set name = 'model' if turn.role == 'assistant' else turn.role -%}
{{- '<start_of_turn>' ~ name ~ '\\n' ~ (turn.content | trim) ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# --- tokenizers ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family is spoken to."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    markup: tuple[str, ...] = ()  # added tokens that the tokenizer does not call special, as the real ones don't
    other: bool = False  # another vocabulary than the rest


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
_R1_SPECIAL = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>")
_R1_MARKUP = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<|EOT|>")


def _deepseek(template: str, other: bool = False) -> Family:
    return Family(
        template=template,
        special=_R1_SPECIAL,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        markup=_R1_MARKUP,
        other=other,
    )


FAMILIES: Mapping[str, Family] = {
    "qwen2.5": Family(template=QWEN25, special=_CHATML, eos="<|im_end|>"),
    "qwq": Family(template=QWQ, special=_CHATML, eos="<|im_end|>", markup=("<tool_call>", "</tool_call>", *_THINK)),
    "qwen3": Family(template=QWEN3, special=_CHATML, eos="<|im_end|>", markup=("<tool_call>", "</tool_call>", *_THINK)),
    "deepseek": _deepseek(DEEPSEEK),
    "deepseek_older": _deepseek(DEEPSEEK_OLDER),
    "deepseek_llama": _deepseek(DEEPSEEK, other=True),
    "llama3": Family(
        template=LLAMA3,
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        markup=_THINK,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "no_system": Family(
        template=NO_SYSTEM,
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        markup=_THINK,
        bos="<bos>",
        eos="<end_of_turn>",
    ),
}


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    made = make_tokenizer(family.special, family.eos, family.template, other=family.other)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.markup])
    if family.bos is not None:
        made.bos_token = family.bos
    return made


# --- folders ---


@dataclass(frozen=True, slots=True)
class StandIn:
    """A model's stand-in: its family and its architecture."""

    family: str
    architecture: str
    model_type: str


_R1_QWEN = StandIn("deepseek", "Qwen2ForCausalLM", "qwen2")
_QWEN3 = StandIn("qwen3", "Qwen3ForCausalLM", "qwen3")
STAND_INS: Mapping[str, StandIn] = {
    "Qwen/QwQ-32B": StandIn("qwq", "Qwen2ForCausalLM", "qwen2"),
    "Skywork/Skywork-OR1-32B-Preview": _R1_QWEN,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_QWEN,
    "Zyphra/ZR1-1.5B": _R1_QWEN,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": StandIn("deepseek_llama", "LlamaForCausalLM", "llama"),
    "Qwen/Qwen3-32B": _QWEN3,
    "Qwen/Qwen3-1.7B": _QWEN3,
}


def write_stand_in(folder: Path, model: str, hidden: int = 64, layers: int = 2) -> Path:
    """A folder that stands for this model; its weights file is a stand-in too."""
    stand_in = STAND_INS[model]
    tokenizer = family_tokenizer(stand_in.family)
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(_config(stand_in, tokenizer, hidden, layers), indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    header = json.dumps({"__metadata__": {"stands_for": model}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    return folder


def _config(stand_in: StandIn, tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> dict[str, Any]:
    heads = hidden // 32
    return {
        "architectures": [stand_in.architecture],
        "model_type": stand_in.model_type,
        "hidden_size": hidden,
        "head_dim": 32,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": "float32",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
    }
