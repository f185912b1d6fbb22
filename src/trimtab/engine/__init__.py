"""Where work is done besides this process: on a Ray cluster, or, for answers, in vLLM (docs/engines.md)."""

from trimtab.engine.choose import ENGINES, open_engine

__all__ = ["ENGINES", "open_engine"]
