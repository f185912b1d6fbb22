"""The real chat model that comes by name: its tokens, its template, its weights, its sense of English."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import trimtab as tt
from trimtab.models.model import LanguageModel

# Strings and their ids in llama.cpp's own tokenizer of the same file (llama-cpp-python 0.3.36).
TOKENS = json.loads((Path(__file__).parents[1] / "data" / "smollm2_tokens.json").read_text())
PARAGRAPHS = (
    "The river rises in the hills above the town and runs south for about forty miles before it "
    "reaches the sea. In spring, when the snow melts, the water is high and cold, and the lower "
    "fields are often flooded for a week or two. Farmers in the valley have learned to plant late, "
    "and most of the older houses stand on raised ground well away from the banks.",
    "Bread is made from flour, water, salt and yeast. The flour is mixed with the water and left to "
    "rest, so that the dough becomes smooth and easy to shape. After the yeast and salt have been "
    "added, the dough is kneaded for ten minutes and then left in a warm place until it has doubled "
    "in size. It is baked in a hot oven until the crust is brown.",
    "When she was a child, her family moved from the city to a small village near the coast. At "
    "first she missed her friends and the noise of the streets, but she soon found that there was "
    "plenty to do. She learned to swim and to sail, and in the evenings she read every book that "
    "the village library had to offer.",
)


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    return tt.load("smollm2")


def perplexity(lm: LanguageModel, text: str) -> float:
    ids = torch.tensor([lm.tokenizer(text).input_ids])
    with torch.no_grad():
        nats = lm.model(ids).logits[0, :-1].log_softmax(-1)
    return float(-nats.gather(1, ids[0, 1:, None]).mean().exp())


def test_it_is_what_it_says(smollm2: LanguageModel) -> None:
    config = smollm2.model.config
    assert (smollm2.n_layers, smollm2.d_model, config.vocab_size) == (30, 576, 49152)
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters["rope_theta"] == 100000.0
    assert getattr(config, "quantization_config", None) is None
    tokenizer = smollm2.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.model_max_length == 8192 == config.max_position_embeddings


def test_tokens_are_those_of_an_independent_tokenizer(smollm2: LanguageModel) -> None:
    assert len(TOKENS) >= 40
    for text, ids in TOKENS:
        assert smollm2.tokenizer(text).input_ids == ids, text
        assert smollm2.tokenizer.decode(ids) == text


def test_the_chat_template_is_chatml_with_its_own_system_turn(smollm2: LanguageModel) -> None:
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    said = smollm2.tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": "Bye."}], tokenize=False, add_generation_prompt=True
    )
    assert said == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, turns[0]]
    assert smollm2.tokenizer.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
    )


def test_it_reads_english_and_stumbles_over_shuffled_words(smollm2: LanguageModel) -> None:
    rng = random.Random(0)
    for paragraph in PARAGRAPHS:
        words = paragraph.split()
        rng.shuffle(words)
        plain = perplexity(smollm2, paragraph)
        assert plain < 35 and perplexity(smollm2, " ".join(words)) > 15 * plain
