"""What carries a steering through the network."""

from trimtab.mechanism.case import Case
from trimtab.mechanism.circuits.attribution import Attribution, attribute
from trimtab.mechanism.circuits.teacher_forced import token_runs
from trimtab.mechanism.explained import Explanation, explain
from trimtab.mechanism.frozen.freeze import freeze_table
from trimtab.mechanism.geometry.geometry import geometry
from trimtab.mechanism.reading.value_vector import value_vectors
from trimtab.mechanism.sparse.curve import sparsity_curve
from trimtab.mechanism.sparse.sparsify import sparsify

__all__ = [
    "Attribution",
    "Case",
    "Explanation",
    "attribute",
    "explain",
    "freeze_table",
    "geometry",
    "sparsify",
    "sparsity_curve",
    "token_runs",
    "value_vectors",
]
