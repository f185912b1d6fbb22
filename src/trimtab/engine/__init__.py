"""Where work is done: here, on the workers of a Ray cluster, or, for answers, in vLLM (docs/engines.md).

- `local.py`: the contract, and the engine that does everything in this process.
- `job.py`: what independent pieces of work need besides their own arguments.
- `ray_engine.py`: the pieces spread over workers that hold the model.
- `vllm_engine.py`: answers by vLLM through the serving plugin.
- `choose.py`: an engine by name.
"""

from trimtab.engine.choose import ENGINES, open_engine
from trimtab.engine.job import Job
from trimtab.engine.local import Engine

__all__ = ["ENGINES", "Engine", "Job", "open_engine"]
