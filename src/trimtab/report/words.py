"""A behavior's figures as sentences: the answer, and what should make a reader doubt it.

The sentences are made from the measured figures alone, the terminal and the page print the same.
"""

from __future__ import annotations

from trimtab.report.figures import Row
from trimtab.results.tables import percent

COHERENCE_LOST = 0.9  # of the unsteered coherence; below, the text falls apart


def answer(name: str, entry: Row) -> str:
    """Say in one sentence what the vector did to the behavior, beside its prompt and its null."""
    vector, baseline = entry.get("vector"), entry.get("baseline")
    if not vector or not baseline:
        return entry.get("refused") or f"{name} was not measured."
    text = (
        f"A vector at {_layers(entry)}, strength {entry.get('strength', 1):.2f}, takes {name} "
        f"from {percent(baseline['score'])} to {percent(vector['score'])} of {vector['n']} "
        "unseen prompts"
    )
    if vector.get("low") is not None:
        text += f" (95 % interval {percent(vector['low'])} to {percent(vector['high'])})"
    if vector.get("coherence") is not None:
        text += f" with coherence {percent(vector['coherence'])}"
    beside = [
        f"{label} {percent(entry[lever]['score'])}"
        for lever, label in (
            ("prompt", "a plain prompt reaches"),
            ("null", "a random vector of the same size"),
            ("baked", "the baked checkpoint"),
        )
        if entry.get(lever)
    ]
    return text + ("; " + ", ".join(beside) if beside else "") + "."


def warnings(name: str, entry: Row) -> list[str]:
    """List what should make a reader doubt: collapse, no better than chance, than a prompt."""
    vector, baseline = entry.get("vector"), entry.get("baseline")
    if not vector or not baseline:
        return []
    found = []
    if _lost_coherence(vector, baseline):
        found.append(
            f"Collapse: coherence fell from {percent(baseline['coherence'])} to "
            f"{percent(vector['coherence'])}. The score counts text that has fallen apart."
        )
    null = entry.get("null")
    if null and vector.get("low") is not None and vector["low"] <= null["score"]:
        found.append(
            f"No evidence: a random vector of the same size reaches {percent(null['score'])}, "
            "inside or above the vector's interval."
        )
    prompt = entry.get("prompt")
    if prompt and prompt["score"] >= vector["score"] and not _lost_coherence(prompt, baseline):
        found.append(f"A plain prompt does as well: {percent(prompt['score'])}.")
    match = entry.get("baked_matches_hook")
    if match and match.get("equal_text") is False:
        found.append("The baked checkpoint does not write the same text as the hook.")
    return found


def _lost_coherence(row: Row, baseline: Row) -> bool:
    now, before = row.get("coherence"), baseline.get("coherence")
    return now is not None and before is not None and now < COHERENCE_LOST * before


def _layers(entry: Row) -> str:
    layers = list(entry.get("layers") or [])
    if not layers:
        return "an unnamed layer"
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(str(layer) for layer in layers)
