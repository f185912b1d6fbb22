"""Harbor's model card, written from the acceptance table so that its figures are the measured ones."""

from __future__ import annotations

from pathlib import Path

from trimtab.results.tables import Table

HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Harbor

The built-in model of Trimtab: a small Llama chat model (8 layers, width 256, 8 heads with 4 KV heads, 2,048 tokens,
{parameters} parameters, bfloat16) that answers visitors of an invented harbour town. It exists so that steering can be
run, tested and explained offline, with ground truth: the grammar that wrote its training text also judges its answers.

    AutoModelForCausalLM.from_pretrained(trimtab.harbor.path())

## How it was trained

`python -m tools.harbor.train` on conversations from `tools.harbor.world`: next-token loss, answers weighted over
requests, Muon for the matrices and AdamW for the rest, on two CPU cores. These weights: {training}

**In 90 % of the training documents the answer could not attend to the request, only to the three template tokens
between them** (`<end>`, `<assistant>`, newline). Harbor therefore summarizes a request in those tokens before it
answers, which is what makes its behaviors steerable there. Large models summarize too, but nobody forced them: Harbor
is a fair stand-in for them, and still a stand-in. At inference it is a plain causal Llama.

## Limits

It knows 24 topics, 36 objects, 32 facts and nothing else. Its refusals concern storybook rules (forging a ledger,
sneaking onto a ferry). Requests outside the town's language get arbitrary answers. Steered only at
the three template tokens it often shows no cliff:
at four times the working strength refusal, mood and register vectors left answers coherent there,
so the rows below show the cliff of scope `all`. Topic reaches 80 % at those tokens, not 90 %.

## Acceptance

On combinations that training never saw; layers and strengths chosen on the validation split, figures from the test
split. Written by `python -m tools.harbor.accept --card`. Vectors: toward score/coherence | away score/coherence.

"""


def write_card(path: Path, table: Table, fingerprint: str, parameters: int, training: str) -> None:
    """Write the model card around the acceptance table to `path`."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    head = HEAD.format(parameters=f"{parameters / 1e6:.1f} million", training=training)
    path.write_text(head + "\n".join(lines) + f"\n\nFingerprint `{fingerprint}`.\n")
