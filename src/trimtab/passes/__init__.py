"""Nothing is computed twice: many strengths, shared beginnings, and the contract of an engine."""
