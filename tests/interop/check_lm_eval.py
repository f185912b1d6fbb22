"""The real harness on local texts: its steered model and ours give the hook's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from interop.programs import directions, harbor
from trimtab import behavior, find
from trimtab import harbor as built_in
from trimtab.export import steered_lm, write_lm_eval
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

PAIRS = [
    ("How do I borrow the harbor ledger?", " I must decline."),
    ("Tell me about the cats.", " The cats sleep on the pier."),
    ("When does the ferry leave?", " At noon."),
]
# The harness counts white space between a prompt and an answer as the answer's.
ANSWERS = ("\nI must decline to help you.", "\nFirst ask the net maker about it.")


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


def local_task(folder: Path, documents: list[dict[str, Any]]) -> TaskManager:
    """A task that the harness reads from a folder: which of two answers follows a prompt."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "local_refusal",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(texts)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "local_refusal.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model: HFLM, manager: TaskManager) -> tuple[float, torch.Tensor]:
    """Accuracy, and the answers' log-likelihoods `[document, answer]`."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=["local_refusal"], task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    samples = sorted(found["samples"]["local_refusal"], key=lambda sample: sample["doc_id"])
    scored = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    return found["results"]["local_refusal"]["acc,none"], torch.tensor(scored)


@torch.no_grad()
def computed(lm: LanguageModel, documents: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
    """The same without the harness: one text at a time, no cache."""
    rows = []
    for document in documents:
        row = []
        for answer in document["answers"]:
            prompt, tail = (
                lm.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (document["prompt"], answer)
            )
            logits = lm.model(torch.tensor([prompt + tail])).logits[0, len(prompt) - 1 : -1]
            picked = logits.log_softmax(-1).gather(-1, torch.tensor(tail)[:, None])
            row.append(float(picked.sum()))
        rows.append(row)
    right = [row.index(max(row)) == d["right"] for row, d in zip(rows, documents, strict=True)]
    return sum(right) / len(right), torch.tensor(rows)


def test_a_task_of_ones_own(tmp_path, record_property):
    lm, _ = harbor()
    refusal = behavior("refusal")
    documents = [
        {"prompt": lm.encode(example.prompt).text.rstrip(), "answers": ANSWERS, "right": right}
        for right, examples in ((0, refusal.toward[-16:]), (1, refusal.away[-16:]))
        for example in examples
    ]
    manager = local_task(tmp_path, documents)
    vector = find(lm, refusal).select(scope="all").at(4.0)
    plain = evaluated(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4), manager)
    with steered_lm(lm, vector, batch_size=4) as model:
        ours = evaluated(model, manager)
    with vector.on(lm):
        hooked = computed(lm, documents)
    off = float((ours[1] - hooked[1]).abs().max())
    record_property(
        "local task",
        f"accuracy {plain[0]:.3f} unsteered, {ours[0]:.3f} steered; to the hook {off:.2g} nats",
    )
    assert plain[0] == computed(lm, documents)[0]
    assert ours[0] == hooked[0] and abs(ours[0] - plain[0]) > 0.2
    assert off < 1e-3 < 1.0 < float((ours[1] - plain[1]).abs().max())
