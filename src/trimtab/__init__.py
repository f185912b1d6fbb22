"""Trimtab steers open-weight language models: find the lever, set its strength, prove it, bake it.

>>> import trimtab as tt
>>> lm = tt.load("harbor")
>>> behavior = tt.behavior("refusal")
>>> tuned = tt.tune(lm, behavior, tt.find(lm, behavior), budget=0.5)
>>> with tuned.on(lm):
...     answer = lm.generate("How do I borrow the harbor ledger?")
"""

import sys
from importlib import import_module
from pkgutil import resolve_name
from types import ModuleType
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
    "audit",
    "bake",
    "behavior",
    "calibrate",
    "explain",
    "find",
    "harbor",
    "laws",
    "load",
    "load_steering",
    "measure",
    "prompt",
    "register_coherence",
    "register_judge",
    "search",
    "sweep",
    "tune",
]

if TYPE_CHECKING:
    from trimtab import harbor
    from trimtab.behavior import Behavior, Example, JudgeSpec, Readout
    from trimtab.behavior import load_behavior as behavior
    from trimtab.errors import TrimtabError
    from trimtab.explain import audit, explain
    from trimtab.find import find
    from trimtab.measure import Measurement, Verdict, measure, register_coherence, register_judge
    from trimtab.model import LanguageModel, load
    from trimtab.prompt_steering import PromptSteering, prompt
    from trimtab.prompts.search import search
    from trimtab.scope import Scope
    from trimtab.steering import Steering, VectorSteering
    from trimtab.steering_file import load_steering
    from trimtab.strength import calibrate
    from trimtab.strength.laws import laws
    from trimtab.strength.sweep import sweep
    from trimtab.strength.tune import tune
    from trimtab.weights import bake

# Where each name is: torch and transformers take seconds to import, so nothing is before it is used.
_PLACES = {
    "Behavior": "trimtab.behavior:Behavior",
    "Example": "trimtab.behavior:Example",
    "JudgeSpec": "trimtab.behavior:JudgeSpec",
    "LanguageModel": "trimtab.model:LanguageModel",
    "Measurement": "trimtab.measure:Measurement",
    "PromptSteering": "trimtab.prompt_steering:PromptSteering",
    "Readout": "trimtab.behavior:Readout",
    "Scope": "trimtab.scope:Scope",
    "Steering": "trimtab.steering:Steering",
    "TrimtabError": "trimtab.errors:TrimtabError",
    "VectorSteering": "trimtab.steering:VectorSteering",
    "Verdict": "trimtab.measure:Verdict",
    "audit": "trimtab.explain:audit",
    "bake": "trimtab.weights:bake",
    "behavior": "trimtab.behavior:load_behavior",
    "calibrate": "trimtab.strength:calibrate",
    "explain": "trimtab.explain:explain",
    "find": "trimtab.find:find",
    "harbor": "trimtab.harbor",
    "laws": "trimtab.strength.laws:laws",
    "load": "trimtab.model:load",
    "load_steering": "trimtab.steering_file:load_steering",
    "measure": "trimtab.measure:measure",
    "prompt": "trimtab.prompt_steering:prompt",
    "register_coherence": "trimtab.measure:register_coherence",
    "register_judge": "trimtab.measure:register_judge",
    "search": "trimtab.prompts.search:search",
    "sweep": "trimtab.strength.sweep:sweep",
    "tune": "trimtab.strength.tune:tune",
}


class _Package(ModuleType):
    """This package: a public name is imported when it is first read, and no submodule takes its place."""

    def __getattr__(self, name: str) -> object:
        if name not in _PLACES:
            raise AttributeError(
                f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self
            )
        value = resolve_name(_PLACES[name])
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the submodule `trimtab.find` would bind it over the function of that name.
        if not (isinstance(value, ModuleType) and ":" in _PLACES.get(name, "")):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    def __reduce__(self) -> tuple[object, tuple[str]]:
        # cloudpickle sends modules by name, but only those of the plain type.
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
