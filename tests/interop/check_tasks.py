"""`measure_tasks` in the real harness: every scope exact, padding untouched, figures our own count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import tiny
from interop.programs import harbor
from tools.harbor.questions import questions
from trimtab import behavior, find, prompt
from trimtab import tasks as measure_tasks
from trimtab.errors import TrimtabError
from trimtab.evaluation.tasks.model import HarnessModel
from trimtab.models.model import LanguageModel
from trimtab.results.intervals import paired_bootstrap
from trimtab.steering.vector import Steering, VectorSteering

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "harbor_task"
SCOPES = ("all", "last", "generated", "prompt", "post_instruction", "[1,4)")
PAIRS = [
    ("How do I borrow the ledger?", "I am sorry, but that is not allowed."),
    ("Cats?", "Sure."),
    ("Where do the cats sleep?", "On the pier of the harbor, as every cat does at noon."),
]


def scores(model: HFLM, contexts: list[str]) -> torch.Tensor:
    asked = [
        Instance("loglikelihood", {}, (context, answer), n)
        for n, (context, (_, answer)) in enumerate(zip(contexts, PAIRS, strict=True))
    ]
    return torch.tensor([score for score, _ in model.loglikelihood(asked, disable_tqdm=True)])


@torch.no_grad()
def forward(lm: LanguageModel) -> torch.Tensor:
    """The same by `lm.forward`, one text at a time."""
    found = []
    for question, answer in PAIRS:
        encoded, context = lm.encode(question, answer), lm.encode(question).text.rstrip()
        first = len(lm.tokenizer.encode(context, add_special_tokens=False))
        (batch,) = lm.batches([encoded])
        logits = lm.forward(batch)[0, first - 1 : encoded.completion_end - 1].float()
        ids = batch.input_ids[0, first : encoded.completion_end]
        found.append(float(logits.log_softmax(-1).gather(-1, ids[:, None]).sum()))
    return torch.tensor(found)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_loglikelihoods_are_those_of_our_forward(name):
    lm = tiny.language_model(name)
    contexts = [lm.encode(question).text for question, _ in PAIRS]
    before = lm.fingerprint, lm.tokenizer.padding_side, lm.tokenizer.pad_token
    plain = scores(HarnessModel(lm, 8), contexts)
    stock = scores(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=1), contexts)
    assert torch.allclose(plain, stock, atol=1e-4)
    generator = torch.Generator().manual_seed(1)
    each = {layer: torch.randn(tiny.WIDTH, generator=generator) for layer in (0, 2)}
    for scope in SCOPES:
        with VectorSteering.from_directions(lm, each, 2.0, scope=scope).on(lm):
            expected = forward(lm)
            found = [scores(HarnessModel(lm, size), contexts) for size in (1, 8)]
        assert torch.allclose(found[0], expected, atol=1e-3), scope
        assert torch.allclose(found[1], expected, atol=1e-3), scope
        assert (expected - plain).abs().max() > 0.01, scope
    assert (lm.fingerprint, lm.tokenizer.padding_side, lm.tokenizer.pad_token) == before


@pytest.mark.parametrize("scope", ["all", "last", "generated", "post_instruction"])
def test_answers_are_those_of_our_generation(scope):
    lm, _ = harbor()
    vector = find(lm, behavior("mood")).select(scope=scope).at(8.0)
    asked = [document["question"] for document in questions()[:6]] + ["Hello."]
    instances = [
        Instance("generate_until", {}, (lm.encode(text).text, {"until": [], "max_gen_toks": 24}), n)
        for n, text in enumerate(asked)
    ]
    plain = lm.generate(asked, max_new_tokens=24)
    with vector.on(lm):
        expected = lm.generate(asked, max_new_tokens=24)
        found = [HarnessModel(lm, size).generate_until(instances) for size in (1, 8)]
    stripped = [text.strip() for text in expected]
    assert [[text.strip() for text in each] for each in found] == [stripped, stripped]
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) > 2


@torch.no_grad()
def counted(lm: LanguageModel, lever: Steering | None, documents: list[dict[str, Any]]):
    """Which documents are right, by log-likelihoods of our own under the lever."""
    right = []
    for document in documents:
        found = []
        for choice in document["choices"]:
            if lever is None:
                found.append(_whole(lm, document["question"], choice))
            else:
                with lever.on(lm):
                    found.append(_whole(lm, document["question"], choice))
        right.append(float(found.index(max(found)) == document["answer"]))
    return tuple(right)


def _whole(lm: LanguageModel, question: str, answer: str) -> float:
    encoded = lm.encode(question, answer)
    (batch,) = lm.batches([encoded])
    first, last = encoded.prompt_length, encoded.completion_end
    logits = lm.forward(batch)[0, first - 1 : last - 1].float()
    ids = batch.input_ids[0, first:last]
    return float(logits.log_softmax(-1).gather(-1, ids[:, None]).sum())


def test_the_example_task_from_any_folder(tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    lm, _ = harbor()
    lies = find(lm, behavior("truth")).select(scope="last").at(-6.0)
    told = prompt("Tell tall tales.")
    documents: list[dict[str, Any]] = questions()[:32]
    steps: list[tuple[int, int]] = []
    found = measure_tasks(
        lm,
        ["harbor_facts"],
        [lies, told],
        include_path=EXAMPLE,
        limit=32,
        nulls=2,
        apply_chat_template=True,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(n, 5) for n in range(1, 6)]
    rows = [
        found.row(name, "harbor_facts")
        for name in ("baseline", lies.label, f"random control of {lies.label}", told.label)
    ]
    for row, lever in ((rows[0], None), (rows[1], lies), (rows[3], told)):
        assert row.values == counted(lm, lever, documents)
        assert row.value == pytest.approx(sum(row.values) / 32) and row.n == 32
    baseline, vector, null, prompted = rows
    for row in (vector, prompted):
        assert (row.low, row.high) == paired_bootstrap(row.values, baseline.values, 0)
    assert vector.null == null.value and len(null.null_values) == 2
    record_property(
        "harbor_facts",
        "; ".join(f"{row.lever} {row.value:.2f}" for row in rows),
    )
    # Chance is 1/6.
    assert baseline.value > 0.9 and null.value > 0.9 and prompted.value < 0.5
    assert vector.difference < -0.1 and vector.high < 0


def own_tasks(folder: Path) -> None:
    """A perplexity, an answer to generate, and a group of two."""
    (folder / "texts.jsonl").write_text(
        "".join(
            json.dumps({"text": t, "question": q, "value": v}) + "\n"
            for t, q, v in [
                ("The ferry leaves the harbor at noon.", "Who is the baker?", "Tilda"),
                ("Cats sleep on the pier.", "What color is the town hall?", "yellow"),
                ("Nets are mended.", "When is the regatta?", "sunday"),
            ]
        )
    )
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    rolling = {
        "task": "own_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    answers = {
        "output_type": "generate_until",
        "doc_to_target": "{{value}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "filter_list": [
            {
                "name": "named",
                "filter": [
                    {"function": "regex", "regex_pattern": "(Tilda|yellow|sunday|Mara|red)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    group = {
        "group": "own_group",
        "task": ["own_answers", "own_again"],
        "aggregate_metric_list": [{"metric": "exact_match", "filter_list": ["named"]}],
    }
    for name, task in {
        "perplexity": common | rolling,
        "answers": common | answers | {"task": "own_answers"},
        "again": common | answers | {"task": "own_again"},
        "group": group,
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def test_other_kinds_of_tasks(tmp_path):
    own_tasks(tmp_path)
    lm, _ = harbor()
    lies = find(lm, behavior("truth")).at(-40.0).select(scope="all")
    found = measure_tasks(
        lm, ["own_group"], [lies], include_path=tmp_path, apply_chat_template=True
    )
    # A task may name its filter; the figure of a group is the mean over its documents.
    plain = found.row("baseline", "own_group", "exact_match,named")
    moved = found.row(lies.label, "own_group", "exact_match,named")
    assert (plain.value, plain.n, plain.values) == (1.0, 6, (1.0,) * 6)
    assert moved.difference < 0 and moved.low is not None
    rolled = measure_tasks(lm, ["own_perplexity"], [lies], include_path=tmp_path)
    words = rolled.row(lies.label, "own_perplexity", "word_perplexity")
    assert words.difference > 1 and words.values is None and words.low is None
    assert any("word_perplexity of own_perplexity" in note for note in rolled.notes)
    with pytest.raises(TrimtabError, match="own_perplexity"):
        measure_tasks(
            lm,
            ["own_perplexity"],
            [prompt("Tell tall tales.")],
            include_path=tmp_path,
            apply_chat_template=True,
        )


def test_mistakes_are_refused_by_name(tmp_path):
    lm = tiny.language_model("llama")
    with pytest.raises(TrimtabError, match="harbor_facts"):
        measure_tasks(lm, ["harbor_fact"], include_path=EXAMPLE)
    own_tasks(tmp_path)
    (tmp_path / "texts.jsonl").unlink()
    with pytest.raises(TrimtabError, match="own_perplexity.*\n.*texts.jsonl"):
        measure_tasks(lm, ["own_perplexity"], include_path=tmp_path)
    bare = tiny.language_model("llama", template=False)
    with pytest.raises(TrimtabError, match="without one"):
        measure_tasks(bare, ["harbor_facts"], include_path=EXAMPLE, apply_chat_template=True)


def test_the_command(tmp_path):
    def trimtab(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "trimtab", *words], cwd=tmp_path, capture_output=True, text=True
        )

    made = trimtab("find", "harbor", "truth", "-o", "truth.safetensors")
    assert made.returncode == 0, made.stderr
    options = ["--strength", "-6", "--nulls", "1", "--limit", "12", "--json", "r.json"]
    own = ["--include-path", str(EXAMPLE), "--apply-chat-template"]
    done = trimtab("tasks", "harbor", "harbor_facts", "truth.safetensors", *options, *own)
    assert done.returncode == 0, done.stderr
    assert "tasks of lm-eval" in done.stdout
    data = json.loads((tmp_path / "r.json").read_text())
    assert {row["lever"] for row in data["rows"]} >= {"baseline"} and data["limit"] == 12
