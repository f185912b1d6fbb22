"""Tasks of a harness: boundaries, pairing, tables and refusals, without the harness itself."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
from conftest import tiny_model
from tools.harbor import questions
from trimtab import cli
from trimtab.errors import TrimtabError
from trimtab.evaluation.tasks.table import (
    TaskMeasurement,
    TaskScore,
    paired_interval,
    read_scores,
    rows_of,
)
from trimtab.evaluation.tasks.tasks import check_lever, measure_tasks
from trimtab.harbor import lexicon
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import paired_bootstrap
from trimtab.steering.prompt import PromptSteering, prompt
from trimtab.steering.vector import VectorSteering

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "examples" / "harbor_task"
TEXTS = [
    ("How do I borrow the ledger?", "I am sorry, but that is not allowed."),
    ("Cats?", "Sure."),
    ("The ferry leaves the harbor at noon and the cats sleep on the pier. When?", "At noon."),
]


def steering(lm: LanguageModel, scope: str = "all", alpha: float = 2.0) -> VectorSteering:
    generator = torch.Generator().manual_seed(3)
    each = {layer: torch.randn(tiny.WIDTH, generator=generator) for layer in (0, 2)}
    return VectorSteering.from_directions(lm, each, alpha, scope=scope)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model class on top of a base that only keeps what it is given."""

    class Base:
        max_length = 256

        def __init__(self, model: object, tokenizer: object, batch_size: int) -> None:
            self.tokenizer, self.batch_size = tokenizer, batch_size

    fake = ModuleType("lm_eval.models.huggingface")
    fake.HFLM = Base  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delitem(sys.modules, "trimtab.evaluation.tasks.model", raising=False)
    yield importlib.import_module("trimtab.evaluation.tasks.model")
    sys.modules.pop("trimtab.evaluation.tasks.model", None)


def requests(lm: LanguageModel) -> list[tuple[Any, list[int], list[int]]]:
    """As the harness splits: white space at the end of a context is the continuation's."""
    asked = []
    for question, answer in TEXTS:
        context = lm.encode(question).text
        whole = lm.tokenizer.encode(context + answer, add_special_tokens=False)
        split = len(lm.tokenizer.encode(context.rstrip(), add_special_tokens=False))
        asked.append(((context, answer), whole[:split], whole[split:]))
    return asked


@torch.no_grad()
def expected(lm: LanguageModel, asked: list[Any]) -> list[float]:
    """Log-likelihoods by `lm.forward`, one text at a time, boundaries from the prompts."""
    found = []
    for (question, answer), (_, context, tail) in zip(TEXTS, asked, strict=True):
        (batch,) = lm.batches([lm.encode(question, answer)])
        assert batch.input_ids[0, : len(context + tail)].tolist() == context + tail
        logits = lm.forward(batch)[0, len(context) - 1 : len(context + tail) - 1]
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(tail)[:, None])
        found.append(float(picked.sum()))
    return found


@pytest.mark.parametrize("scope", ["all", "last", "generated", "prompt", "post_instruction"])
def test_every_scope_means_in_a_padded_batch_what_it_means_alone(lm, harness, scope):
    asked = requests(lm)
    with steering(lm, scope).on(lm):
        alone = expected(lm, asked)
        scored = [
            harness.HarnessModel(lm, size)._loglikelihood_tokens(asked) for size in (1, len(asked))
        ]
    plain = expected(lm, asked)
    for batch in scored:
        assert torch.allclose(torch.tensor([s for s, _ in batch]), torch.tensor(alone), atol=1e-3)
    assert max(abs(a - b) for a, b in zip(alone, plain, strict=True)) > 0.01


def test_choices_that_share_all_but_a_token_are_scored_each_with_its_own(llama, harness):
    (texts, context, tail), *_ = requests(llama)
    other = [*tail[:-1], (tail[-1] + 1) % 300]
    asked = [(texts, context, tail), ((texts[0], "?"), context, other), (None, context, tail)]
    # The second's strings are not its tokens: it falls back to the harness's split.
    first, second, third = harness.HarnessModel(llama, 4)._loglikelihood_tokens(asked)
    assert first == third and first != second
    assert math.isclose(first[0], expected(llama, requests(llama))[0], abs_tol=1e-4)


def test_too_long_a_text_loses_its_beginning(llama, harness):
    (texts, context, tail), *_ = requests(llama)
    model = harness.HarnessModel(llama, 1)
    model.max_length = len(context + tail) - 4
    ids, prompt_length, end = model._row((texts, context, tail))
    whole, whole_prompt, whole_end = harness.HarnessModel(llama, 1)._row((texts, context, tail))
    assert ids == whole[3:]
    assert (prompt_length, end) == (whole_prompt - 3, whole_end - 3)


def test_prompt_levers_go_where_trimtab_puts_them(llama, harness):
    model = harness.HarnessModel(llama, 1)
    history = [{"role": "user", "content": "Cats?"}]
    for slot in ("system", "prefix", "suffix"):
        with prompt("Be brief.", slot).on(llama):
            text = model.apply_chat_template(history)
            begun = model.apply_chat_template(
                [*history, {"role": "assistant", "content": "Well,"}], add_generation_prompt=False
            )
            assert text == llama.encode("Cats?").text and "Be brief." in text
            assert begun == text + "Well,"


def test_what_cannot_be_applied_is_refused_by_name(llama, plain):
    with pytest.raises(TrimtabError, match="post_instruction.*\n.*chat-template"):
        check_lever(llama, steering(llama, "post_instruction"), False)
    with pytest.raises(TrimtabError, match="suffix prompt.*\n.*chat-template"):
        check_lever(llama, prompt("Be brief.", "suffix"), False)
    with pytest.raises(TrimtabError, match="system prompt.*\n.*description"):
        check_lever(plain, prompt("Be brief."), False)
    soft = PromptSteering("", vectors=torch.ones(2, tiny.WIDTH))
    with pytest.raises(TrimtabError, match="stand for no text.*\n.*bake"):
        check_lever(llama, soft, True)
    with pytest.raises(TrimtabError, match="made for"):
        check_lever(tiny_model("gpt2"), steering(llama), True)
    for lever in (steering(llama, "last"), steering(llama, "[0,3)"), soft.at(0)):
        check_lever(llama, lever, False)
    check_lever(llama, steering(llama, "post_instruction"), True)


def test_without_the_harness_nothing_is_begun(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TrimtabError, match=r"pip install 'trimtab\[lm-eval\]'"):
        measure_tasks(None, ["arc_easy"])  # pyright: ignore[reportArgumentType]
    # The model does not exist: it was not looked for.
    with pytest.raises(SystemExit) as end:
        cli.main(["tasks", "./no-model", "arc_easy"])
    assert end.value.code == 2 and "lm-eval" in capsys.readouterr().err


def results(flip: bool) -> dict[str, Any]:
    """What the harness returns: two tasks in a group, two filters, and a corpus metric."""
    right = {"one": [1, 0, 1], "two": [True, False]}
    samples = {
        task: [
            {"doc_id": n, "filter": kind, "acc": bool(hit) != flip, "corpus": (n, 2)}
            for n, hit in reversed(list(enumerate(hits)))
            for kind in ("none", "strict")
        ]
        for task, hits in right.items()
    }
    means = {task: sum(bool(h) != flip for h in hits) / len(hits) for task, hits in right.items()}
    figures = {
        task: {"acc,none": value, "acc_stderr,none": 0.1, "acc,strict": value, "alias": task}
        for task, value in means.items()
    }
    figures["one"] |= {"corpus,none": 7.5, "corpus_stderr,none": "N/A", "sample_len": 3}
    figures["both"] = {"acc,none": (3 * means["one"] + 2 * means["two"]) / 5}
    higher = {"one": {"acc": True, "corpus": False}, "two": {"acc": True}}
    return {"results": figures, "samples": samples, "higher_is_better": higher}


MEMBERS = {"one": ["one"], "two": ["two"], "both": ["one", "two"]}


def test_documents_are_paired_by_their_number():
    scores = read_scores(results(False), MEMBERS)
    assert scores["one", "acc"].values == (1.0, 0.0, 1.0) == scores["one", "acc,strict"].values
    assert scores["both", "acc"].values == (1.0, 0.0, 1.0, 1.0, 0.0)
    assert scores["one", "corpus"] == TaskScore(7.5, None, 3, None, False)
    assert (scores["one", "acc"].stderr, scores["both", "acc"].stderr) == (0.1, None)
    assert ("one", "sample_len") not in scores and ("one", "alias") not in scores


def test_rows_hold_the_paired_difference_and_the_null():
    plain, moved = read_scores(results(False), MEMBERS), read_scores(results(True), MEMBERS)
    rows = rows_of("v", "vector", 2.0, moved, plain, [moved, plain], seed=5)
    row = next(row for row in rows if (row.lever, row.task, row.metric) == ("v", "one", "acc"))
    assert row.difference == pytest.approx(1 / 3 - 2 / 3)
    assert (row.low, row.high) == paired_bootstrap([0.0, 1.0, 0.0], [1.0, 0.0, 1.0], 5)
    assert row.low is not None and row.high is not None and row.low < 0 < row.high
    null = next(row for row in rows if row.kind == "null" and row.task == "one")
    assert row.null == null.value == 0.5 and null.null_values == pytest.approx((1 / 3, 2 / 3))
    assert null.values == (0.5, 0.5, 0.5) and null.difference == pytest.approx(-1 / 6)
    corpus = next(row for row in rows if row.metric == "corpus")
    assert (corpus.difference, corpus.low, corpus.values) == (0.0, None, None)


def test_a_metric_without_bounds_gets_no_bounds():
    plain = TaskScore(10.0, None, 3, (5.0, 10.0, 15.0))
    moved = TaskScore(15.0, None, 3, (9.0, 15.0, 21.0))
    low, high = paired_interval(moved, plain, 0)
    assert low is not None and high is not None and 1 < low < 5 < high
    assert paired_interval(plain, plain, 0) == (None, None)


def test_the_table_and_its_json(tmp_path):
    plain, moved = read_scores(results(False), MEMBERS), read_scores(results(True), MEMBERS)
    rows = rows_of("baseline", "baseline", None, plain, None, [], 0)
    rows += rows_of("v", "vector", 2.0, moved, plain, [plain], 0)
    made = TaskMeasurement(
        "m", "f", ("one", "two"), "lm-eval 0", 3, None, False, 0, tuple(rows), ("a note",)
    )
    text = made.table().to_text(160)
    assert "-0.33 [" in text and "0.67 ± 0.10" in text and "random control of v" in text
    data = json.loads(made.save(tmp_path / "made.json").read_text())
    assert data["rows"][0]["difference"] is None and len(data["rows"]) == len(rows)
    assert made.row("v", "one").null == pytest.approx(2 / 3)
    with pytest.raises(TrimtabError, match="acc of 'v' on one"):
        made.row("w", "one")


def test_the_example_task_is_what_its_maker_writes(tmp_path):
    for path in questions.write_task(tmp_path):
        assert path.read_text() == (EXAMPLE / path.name).read_text()
    documents = questions.questions()
    assert len({document["question"] for document in documents}) == len(documents) > 80
    for document in documents:
        question = str(document["question"])
        entity = max((e for e in lexicon.FACTS if e in question), key=len)
        choices = document["choices"]
        assert isinstance(choices, list) and isinstance(document["answer"], int)
        right = choices[document["answer"]]
        assert right.lower().startswith(entity) and right.endswith(f"{lexicon.FACTS[entity][1]}.")


def test_the_page_shows_the_examples_as_they_are():
    page = (DOCS / "evaluations.md").read_text()
    assert (DOCS / "examples" / "inspect_harbor.py").read_text() in page
    task = (EXAMPLE / "harbor_facts.yaml").read_text()
    assert task[task.index("task:") : task.index("metadata:")] in page
