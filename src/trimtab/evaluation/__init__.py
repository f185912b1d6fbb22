"""Scores that can be believed: judges, coherence, damage, spill, nulls and intervals."""

from trimtab.evaluation.coherence import coherence_for, register_coherence, text_coherence
from trimtab.evaluation.compare import measure
from trimtab.evaluation.judges import Verdict, judge_for, register_judge
from trimtab.evaluation.measurement import Measurement, Row

__all__ = [
    "Measurement",
    "Row",
    "Verdict",
    "coherence_for",
    "judge_for",
    "measure",
    "register_coherence",
    "register_judge",
    "text_coherence",
]
