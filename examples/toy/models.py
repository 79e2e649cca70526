"""The pair's shapes, and how they are made and saved."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from examples.toy.tokenizer import MAX_POSITIONS

HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes


@dataclass(frozen=True, slots=True)
class Shape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    initializer_range: float  # about hidden_size ** -0.5; the usual 0.02 is for wide models and learns slowly here


BASE = Shape(num_layers=10, hidden_size=96, intermediate_size=256, initializer_range=0.08)
DRAFT = Shape(num_layers=2, hidden_size=64, intermediate_size=128, initializer_range=0.12)


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    num_heads = shape.hidden_size // HEAD_DIM
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        initializer_range=shape.initializer_range,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model folder beside its place and then move it there, so that nobody loads half of one."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids, do_sample=True, temperature=0.6, top_p=0.95)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function under another architecture's name: Qwen2 is Llama with biases, but for one that we set to zero.

    In a folder whose model type is qwen2, transformers 5 replaces the pre-tokenizer of tokenizer.json by Qwen2's own,
    which splits numbers into digits; a llama folder's tokenizer is taken as it is.
    """
    source = model.config
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += [
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
    ]
    names += ["hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"]
    shared = {name: getattr(source, name) for name in names}
    llama = LlamaForCausalLM(LlamaConfig(**shared, head_dim=HEAD_DIM, attention_bias=True, dtype="float32")).eval()
    left_out = llama.load_state_dict(model.state_dict(), strict=False)
    assert not left_out.unexpected_keys and all(key.endswith("o_proj.bias") for key in left_out.missing_keys)
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    return llama


def num_parameters(model: Qwen2ForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
