"""Trimtab steers open-weight language models: find the lever, set its strength, prove it, bake it.

>>> import trimtab as tt
>>> lm = tt.load("harbor")
>>> behavior = tt.behavior("refusal")
>>> tuned = tt.tune(lm, behavior, tt.find(lm, behavior), budget=0.5)
>>> with tuned.on(lm):
...     answer = lm.generate("How do I borrow the harbor ledger?")
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Behavior",
    "Example",
    "JudgeSpec",
    "LanguageModel",
    "Measurement",
    "PromptSteering",
    "Readout",
    "Scope",
    "Steering",
    "TrimtabError",
    "VectorSteering",
    "Verdict",
    "WeightSteering",
    "audit",
    "bake",
    "behavior",
    "calibrate",
    "close_gap",
    "compare_levers",
    "convert",
    "explain",
    "fetch",
    "find",
    "harbor",
    "laws",
    "load",
    "load_steering",
    "measure",
    "predict_strength",
    "prompt",
    "register_coherence",
    "register_judge",
    "search",
    "sweep",
    "tasks",
    "tune",
]

if TYPE_CHECKING:
    from trimtab import harbor
    from trimtab.behaviors.behavior import Behavior, Example, JudgeSpec, Readout
    from trimtab.behaviors.file import load_behavior as behavior
    from trimtab.errors import TrimtabError
    from trimtab.evaluation.coherence import register_coherence
    from trimtab.evaluation.compare import measure
    from trimtab.evaluation.judges import Verdict, register_judge
    from trimtab.evaluation.measurement import Measurement
    from trimtab.evaluation.tasks.tasks import measure_tasks as tasks
    from trimtab.levers.conversions.convert import convert
    from trimtab.levers.table import compare_levers
    from trimtab.margins.audit import audit
    from trimtab.mechanism.explained import explain
    from trimtab.methods import find
    from trimtab.models.fetch import fetch
    from trimtab.models.load import load
    from trimtab.models.model import LanguageModel
    from trimtab.prediction.laws import laws
    from trimtab.prediction.predict import predict_strength
    from trimtab.prompts.gap.gap_search import close_gap
    from trimtab.prompts.search import search
    from trimtab.steering.load import load_steering
    from trimtab.steering.norms import calibrate
    from trimtab.steering.prompt import PromptSteering, prompt
    from trimtab.steering.scope import Scope
    from trimtab.steering.vector import Steering, VectorSteering
    from trimtab.steering.weights import WeightSteering
    from trimtab.strength.sweep import sweep
    from trimtab.strength.tune import tune
    from trimtab.weights.bake import bake

# Where each name is: torch and transformers take seconds to import, so nothing is before it is used.
_PLACES = {
    "Behavior": "trimtab.behaviors.behavior:Behavior",
    "Example": "trimtab.behaviors.behavior:Example",
    "JudgeSpec": "trimtab.behaviors.behavior:JudgeSpec",
    "LanguageModel": "trimtab.models.model:LanguageModel",
    "Measurement": "trimtab.evaluation.measurement:Measurement",
    "PromptSteering": "trimtab.steering.prompt:PromptSteering",
    "Readout": "trimtab.behaviors.behavior:Readout",
    "Scope": "trimtab.steering.scope:Scope",
    "Steering": "trimtab.steering.vector:Steering",
    "TrimtabError": "trimtab.errors:TrimtabError",
    "VectorSteering": "trimtab.steering.vector:VectorSteering",
    "Verdict": "trimtab.evaluation.judges:Verdict",
    "WeightSteering": "trimtab.steering.weights:WeightSteering",
    "audit": "trimtab.margins.audit:audit",
    "bake": "trimtab.weights.bake:bake",
    "behavior": "trimtab.behaviors.file:load_behavior",
    "calibrate": "trimtab.steering.norms:calibrate",
    "close_gap": "trimtab.prompts.gap.gap_search:close_gap",
    "compare_levers": "trimtab.levers.table:compare_levers",
    "convert": "trimtab.levers.conversions.convert:convert",
    "explain": "trimtab.mechanism.explained:explain",
    "fetch": "trimtab.models.fetch:fetch",
    "find": "trimtab.methods:find",
    "harbor": "trimtab.harbor",
    "laws": "trimtab.prediction.laws:laws",
    "load": "trimtab.models.load:load",
    "load_steering": "trimtab.steering.load:load_steering",
    "measure": "trimtab.evaluation.compare:measure",
    "predict_strength": "trimtab.prediction.predict:predict_strength",
    "prompt": "trimtab.steering.prompt:prompt",
    "register_coherence": "trimtab.evaluation.coherence:register_coherence",
    "register_judge": "trimtab.evaluation.judges:register_judge",
    "search": "trimtab.prompts.search:search",
    "sweep": "trimtab.strength.sweep:sweep",
    "tasks": "trimtab.evaluation.tasks.tasks:measure_tasks",
    "tune": "trimtab.strength.tune:tune",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first read."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = resolve_name(_PLACES[name])
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
