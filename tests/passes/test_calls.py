"""counting(): rows put through the model, whatever the batching."""

import pytest
import torch

from conftest import tiny_model
from trimtab.models.model import LanguageModel
from trimtab.passes.calls import counting
from trimtab.passes.slope import slopes
from trimtab.steering.vector import VectorSteering

PROMPTS = ["Hello there", "How do I find the ferry?", "Where is the pier?"]


def test_a_row_of_a_forward_pass_is_a_call(lm: LanguageModel) -> None:
    lm.sites  # noqa: B018  the probe runs the model once
    with counting(lm) as calls:
        lm.next_logits(PROMPTS)
        assert calls.rows == 3
        lm.next_logits(PROMPTS[0])
        with torch.no_grad():
            lm.model(torch.tensor([[5, 6], [7, 8]]))  # a direct call counts as well
            lm.model(inputs_embeds=torch.zeros(2, 3, lm.d_model))
    assert calls.rows == 3 + 1 + 2 + 2
    lm.next_logits(PROMPTS)
    assert calls.rows == 8  # nothing is counted outside


def test_batching_saves_no_calls(llama: LanguageModel) -> None:
    encoded = [llama.encode(prompt) for prompt in PROMPTS]
    for size in (1, 2, 3):
        with counting(llama) as calls:
            for batch in llama.batches(encoded, max_rows=size):
                llama.forward(batch)
        assert calls.rows == 3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_token_of_an_answer_is_a_call(architecture: str) -> None:
    lm = tiny_model(architecture)
    with counting(lm) as calls:
        answer = lm.generate(PROMPTS[0], max_new_tokens=4)
    assert len(lm.tokenizer(answer)["input_ids"]) >= 4  # it did not end early
    assert calls.rows == 4  # the prompt gives the first token
    with counting(lm) as calls:
        lm.generate(PROMPTS[0], max_new_tokens=1)
    assert calls.rows == 1


def test_a_derivative_counts_twice(llama: LanguageModel) -> None:
    vector = VectorSteering.from_directions(llama, {1: torch.ones(llama.d_model)})
    encoded = [llama.encode(prompt) for prompt in PROMPTS]
    with counting(llama) as calls:
        list(slopes(llama, vector, encoded))
    assert calls.rows == 2 * 3


def test_a_difference_counts_its_three_passes() -> None:
    lm = tiny_model("mixtral")
    vector = VectorSteering.from_directions(lm, {1: torch.ones(lm.d_model)})
    encoded = [lm.encode(prompt) for prompt in PROMPTS]
    list(slopes(lm, vector, encoded))  # here forward mode is found to fail
    with counting(lm) as calls:
        list(slopes(lm, vector, encoded))
    assert calls.rows == 3 * 3


def test_an_error_stops_the_count(llama: LanguageModel) -> None:
    seen = []
    with pytest.raises(KeyError), counting(llama) as calls:
        seen.append(calls)
        raise KeyError
    llama.next_logits(PROMPTS)
    assert seen[0].rows == 0
