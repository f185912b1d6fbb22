"""Prompt levers on Harbor: twelve references and more, ten restarts each, against every baseline.

For each reference `trimtab.prompts.search` looks for a prefix that does what the reference does
without any of its words, in printable ASCII. Cross-entropies are those of test requests that
nothing was chosen on. Every reference keeps a journal in `--work`; a run that was cut off goes on
from it, and several processes may share the folder, each with its own `--references`. Whatever the
folder holds at the end is written as one result.

    python bench/prompt_levers.py --work DIR --references cats,dogs &
    python bench/prompt_levers.py --work DIR --references boats,storms
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import emit
from trimtab import load
from trimtab.prompts.pipeline.attempt import ARMS
from trimtab.prompts.search import search
from trimtab.prompts.task.references import built_in_references
from trimtab.results.intervals import bootstrap
from trimtab.results.tables import write_json

RESULT = Path(__file__).parent / "results" / "prompt_levers.json"
# About 40 seconds a restart of all arms on one thread; the library's defaults search longer.
SETTINGS: dict[str, Any] = {
    "compare": True,
    "projection_options": {"steps": 40, "batch_size": 3},
    "repair_steps": 12,
    "flip_steps": 12,
    "top_k": 24,
    "gcg_steps": 12,
}
PIPELINE, RIVAL = "repaired", "hotflip_random"
Data = Mapping[str, Any]


def main() -> None:
    """Search for each reference and combine what the folder holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of journals and reports")
    parser.add_argument("--references", default="", help="names, comma-separated; all by default")
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--gcg-restarts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--combine", action="store_true", help="search nothing, write the result")
    options = parser.parse_args()
    known = built_in_references()
    names = [name for name in options.references.split(",") if name] or list(known)
    lm = None
    for name in [] if options.combine else names:
        report = options.work / f"{name}.json"
        if report.exists():
            continue
        lm = lm or load("harbor", dtype=torch.float32)
        found = search(
            lm,
            known[name],
            "harbor",
            restarts=options.restarts,
            gcg_restarts=options.gcg_restarts,
            seed=options.seed,
            **SETTINGS,
            journal=options.work / f"{name}.jsonl",
            progress=lambda done, total, name=name: print(name, done, total, file=sys.stderr),
        )
        write_json(report, found.to_dict())
    reports = [json.loads(path.read_text()) for path in sorted(options.work.glob("*.json"))]
    emit("prompt_levers", [*map(per_reference, reports), pooled(reports)], options.json)


def per_reference(report: Data) -> dict[str, object]:
    """Return the figures of one reference, with every restart."""
    keep = ("reference", "reference_text", "length", "banned_words", "requests", "settings")
    return {
        **{key: report[key] for key in keep},
        "arms": {arm["arm"]: arm for arm in report["arms"]},
        "chosen": {"arm": report["chosen"], "text": report["chosen_text"], **report["check"]},
        "scores": {name: scored(entry) for name, entry in report["scores"].items()},
        "attempts": [
            {
                key: attempt[key]
                for key in ("arm", "restart", "text", "train", "validation", "test")
                + ("violated_start", "legal", "tokens", "calls", "seconds", "details")
            }
            for attempt in report["attempts"]
        ],
    }


def scored(entry: Data) -> dict[str, object]:
    """Return one lever's scores without the sample answers but two."""
    found = {"label": entry["label"], **entry["likelihood"], **entry["likeness"]}
    return {**found, "judged": entry["judged"], "answers": entry["answers"][:2]}


def pooled(reports: Sequence[Data]) -> dict[str, object]:
    """Return means over references, and the pipeline against pure HotFlip with an interval."""
    arms = {}
    for arm in ARMS:
        own = [a for r in reports for a in r["arms"] if a["arm"] == arm]
        losses = [a["test"] for r in reports for a in r["attempts"] if a["arm"] == arm]
        if own:
            arms[arm] = {
                "references": len(own),
                "restarts": len(losses),
                "infeasible_starts": sum(a["infeasible"] for a in own),
                "mean": statistics.fmean(losses),
                "sd": statistics.stdev(losses) if len(losses) > 1 else None,
                "sd_within": statistics.fmean([a["sd"] for a in own if a["sd"] is not None] or [0]),
                "min": min(losses),
                "max": max(losses),
                "mean_excess": statistics.fmean(a["excess"] for a in own),
                "gap_closed": interval([a["gap_closed"] for a in own]),
                "chosen_ce": statistics.fmean(a["chosen_ce"] for a in own),
                "chosen_gap_closed": interval([a["chosen_gap_closed"] for a in own]),
                "tokens_per_restart": statistics.fmean(a["tokens"] for a in own),
                **pooled_scores([r["scores"][arm] for r in reports if arm in r["scores"]]),
            }
    return {
        "reference": "pooled",
        "references": [r["reference"] for r in reports],
        "arms": arms,
        "no_prompt": pooled_scores([r["scores"]["no prompt"] for r in reports]),
        "pipeline_minus_pure_hotflip": {
            "of": "cross-entropy on test requests, nats per token; below 0 the pipeline is better",
            "mean_over_restarts": paired(reports, "mean"),
            "chosen_by_validation": paired(reports, "chosen_ce"),
            "worst_restart": paired(reports, "most"),
        },
        "scored_from_text": {
            "same_ids": sum(r["check"]["same_ids"] for r in reports),
            "of": len(reports),
            "largest_difference": max(
                (abs(r["check"]["search_loss"] - r["check"]["text_loss"]) for r in reports),
                default=None,
            ),
        },
    }


def pooled_scores(entries: Sequence[Data]) -> dict[str, object]:
    """Return means over references of the chosen prompts' scores."""
    if not entries:
        return {}
    like = [entry["likeness"] for entry in entries]
    found: dict[str, object] = {
        "chosen_kl": statistics.fmean(e["likelihood"]["kl"]["mean"] for e in entries),
        "exact": statistics.fmean(x["exact"]["mean"] for x in like),
    }
    for name in ("exact_at", "overlap_at"):
        for k in like[0][name]:
            found[f"{name}_{k}"] = statistics.fmean(x[name][k]["mean"] for x in like)
    judged = [entry["judged"] for entry in entries if entry["judged"]]
    if judged:
        found["judge_greedy"] = statistics.fmean(j["greedy"]["mean"] for j in judged)
        found["judge_sampled"] = statistics.fmean(j["sampled"]["mean"] for j in judged)
        found["coherence_greedy"] = statistics.fmean(j["coherence"] for j in judged)
        found["coherence_sampled"] = statistics.fmean(j["sampled_coherence"] for j in judged)
    return found


def paired(reports: Sequence[Data], figure: str) -> dict[str, object]:
    """Return the pipeline's figure minus pure HotFlip's, references resampled."""
    differences = []
    for report in reports:
        arms = {arm["arm"]: arm for arm in report["arms"]}
        differences.append(arms[PIPELINE][figure] - arms[RIVAL][figure])
    names = [report["reference"] for report in reports]
    return {**interval(differences), "each": dict(zip(names, differences, strict=True))}


def interval(values: Sequence[float | None]) -> dict[str, object]:
    """Return a mean with its bootstrap interval; an infinite end becomes null."""
    known = [float(v) for v in values if v is not None]
    if not known:
        return {"mean": None, "low": None, "high": None, "n": 0}
    ends = [end if math.isfinite(end) else None for end in bootstrap(known)]
    return {"mean": statistics.fmean(known), "low": ends[0], "high": ends[1], "n": len(known)}


if __name__ == "__main__":
    main()
