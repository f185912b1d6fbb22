"""Tiny random models of twelve architectures and a tiny tokenizer, built offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from trimtab.models.hooking import Hooks
from trimtab.models.model import LanguageModel

WIDTH, LAYERS = 32, 4
SPECIAL = ["<s>", "<pad>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<' + m['role'] + '>\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
_TEXTS = [
    "The ferry leaves the harbor at noon and the cats sleep on the pier.",
    "How do I borrow the ledger? Please talk only about cats.",
    "I am sorry, but that is not allowed today. Sure, here is how it works.",
]


@cache
def _core(bos: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return core


def tokenizer(template: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that encodes every text."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=_core(bos),
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )
    if template:
        made.chat_template = TEMPLATE
    return made


def _common(**more: object) -> dict:
    return {
        "vocab_size": 344,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **more,
    }


def _gpt_neox(**more: object) -> dict:
    settings = _common(**more)
    del settings["num_key_value_heads"]
    return settings


def config(architecture: str) -> PretrainedConfig:
    """The configuration of a tiny model; sliding windows are short enough to matter."""
    gemma = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    makers = {
        "llama": lambda: LlamaConfig(**_common()),
        "mistral": lambda: MistralConfig(**_common(sliding_window=8)),
        "qwen2": lambda: Qwen2Config(**_common()),
        "qwen3": lambda: Qwen3Config(**_common(head_dim=8)),
        "gemma2": lambda: Gemma2Config(**_common(**gemma)),
        "gemma3": lambda: Gemma3TextConfig(**_common(**gemma, sliding_window_pattern=2)),
        "olmo2": lambda: Olmo2Config(**_common()),
        "phi3": lambda: Phi3Config(**_common()),
        "gpt2": lambda: GPT2Config(
            vocab_size=344,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        ),
        "gpt_neox": lambda: GPTNeoXConfig(**_gpt_neox()),
        "granite": lambda: GraniteConfig(
            **_common(
                residual_multiplier=0.3,
                embedding_multiplier=3.0,
                attention_multiplier=0.2,
                logits_scaling=0.5,
            )
        ),
        "mixtral": lambda: MixtralConfig(**_common(num_local_experts=4, num_experts_per_tok=2)),
    }
    return makers[architecture]()


ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "granite",
    "mixtral",
)
# The one whose attention and MLP run side by side.
PARALLEL = ("gpt_neox",)


def model(
    architecture: str | PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model; weights large enough that every layer matters to the logits."""
    settings = config(architecture) if isinstance(architecture, str) else architecture
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(settings)
        with torch.no_grad():
            for parameter in made.parameters():
                # The default of 0.02 leaves the logits flat; norms and biases move too, so that
                # none is trivial.
                spread = 0.15 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn_like(parameter) * spread)
    return made.to(dtype).eval()


def language_model(
    architecture: str | PretrainedConfig,
    template: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A tiny model with its tokenizer."""
    name = architecture if isinstance(architecture, str) else architecture.model_type
    return LanguageModel(model(architecture, seed, dtype), tokenizer(template), f"tiny-{name}")


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward inside the block."""
    with Hooks() as hooks:
        hooks.around(module, lambda _, *args, **kwargs: forward(*args, **kwargs))
        yield
