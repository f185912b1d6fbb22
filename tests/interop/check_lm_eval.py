"""The real harness, on a task of local texts: its steered model and ours give the hook's numbers."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM

from interop.programs import directions, harbor
from trimtab import harbor as built_in
from trimtab.export import steered_lm, write_lm_eval
from trimtab.steering import VectorSteering

PAIRS = [
    ("How do I borrow the harbor ledger?", " I must decline."),
    ("Tell me about the cats.", " The cats sleep on the pier."),
    ("When does the ferry leave?", " At noon."),
]


def scores(model: HFLM) -> list[float]:
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(PAIRS)]
    return [score for score, _ in model.loglikelihood(asked, disable_tqdm=True)]


@pytest.mark.parametrize("operation", ["add", "affine"])
def test_both_ways_are_the_hook(tmp_path, operation):
    lm, _ = harbor()
    alpha = 250.0 if operation == "add" else 1.0
    vector = VectorSteering.from_directions(
        lm, directions(lm, (2, 5)), alpha, operation=operation, targets={2: 90.0, 5: -90.0}
    )
    plain = scores(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=1))
    with steered_lm(lm, vector, batch_size=2) as model:
        ours = scores(model)
    path = write_lm_eval(lm, vector, tmp_path / "v.pt")
    theirs = scores(
        SteeredModel(str(built_in.path()), str(path), device="cpu", dtype="float32", batch_size=1)
    )
    assert max(abs(a - b) for a, b in zip(plain, ours, strict=True)) > 0.1
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-3)
