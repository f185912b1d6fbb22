"""How wide a behavior's margin is: measured, not searched."""

from trimtab.margins.audit import AuditReport, audit
from trimtab.margins.learned import LearnedSets, learn_sets

__all__ = ["AuditReport", "LearnedSets", "audit", "learn_sets"]
