"""What carries a behavior and how wide its margin is: measured, not searched."""

from trimtab.explain.attribution import Attribution, attribute
from trimtab.explain.explained import Explanation, explain
from trimtab.explain.freeze import freeze_table
from trimtab.explain.geometry import geometry
from trimtab.explain.margin.audit import AuditReport, audit
from trimtab.explain.margin.learned import LearnedSets, learn_sets
from trimtab.explain.sparse.curve import sparsity_curve
from trimtab.explain.sparsify import sparsify
from trimtab.explain.teacher_forced import four_sets, token_runs
from trimtab.explain.value_vector import value_vectors

__all__ = [
    "Attribution",
    "AuditReport",
    "Explanation",
    "LearnedSets",
    "attribute",
    "audit",
    "explain",
    "four_sets",
    "freeze_table",
    "geometry",
    "learn_sets",
    "sparsify",
    "sparsity_curve",
    "token_runs",
    "value_vectors",
]
