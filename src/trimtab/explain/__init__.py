"""What carries a behaviour and how wide its margin is: measured, not searched."""

from trimtab.explain.margin.audit import AuditReport, audit
from trimtab.explain.margin.learned import LearnedSets, learn_sets

__all__ = ["AuditReport", "LearnedSets", "audit", "learn_sets"]
