"""Write a task of multiple-choice questions about the town: `python -m tools.harbor.questions DIR`.

Every fact in every wording of its question; the choices state all values of that kind. The task is
in the form of the evaluation harness lm-eval (`--include-path DIR`, task `harbor_facts`); other
programs read its JSON lines.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from tools.harbor.answers import fact_clause
from tools.harbor.requests import FACT_FORMS
from trimtab.harbor import lexicon as lex

TASK = """\
# Written by `python -m tools.harbor.questions`.
# The data file is looked for in the current folder; `trimtab tasks` looks here as well.
task: harbor_facts
dataset_path: json
dataset_kwargs:
  data_files: {test: harbor_facts.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


def questions(seed: int = 0) -> list[dict[str, object]]:
    """Return the documents: `question`, `choices`, `answer` (an index) and `value`, shuffled.

    Args:
        seed: of their order, so that the first few are of all kinds.
    """
    documents: list[dict[str, object]] = []
    for entity, (kind, truth) in lex.FACTS.items():
        values = lex.VALUES[kind]
        for form in FACT_FORMS[kind]:
            documents.append(
                {
                    "question": form.format(entity=entity),
                    "choices": [_sentence(fact_clause(entity, value)) for value in values],
                    "answer": values.index(truth),
                    "value": truth,
                }
            )
    random.Random(f"questions-{seed}").shuffle(documents)
    return documents


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."


def write_task(folder: str | os.PathLike[str]) -> list[Path]:
    """Write `harbor_facts.yaml` and `harbor_facts.jsonl` and return their paths."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / "harbor_facts.yaml", target / "harbor_facts.jsonl"]
    paths[0].write_text(TASK)
    paths[1].write_text("".join(json.dumps(document) + "\n" for document in questions()))
    return paths


if __name__ == "__main__":
    write_task(sys.argv[1] if len(sys.argv) > 1 else "harbor_task")
