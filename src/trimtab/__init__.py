"""Trimtab steers open-weight language models: find the lever, set its strength, prove it, bake it.

>>> import trimtab as tt
>>> lm = tt.load("harbor")
>>> behavior = tt.behavior("refusal")
>>> tuned = tt.tune(lm, behavior, tt.find(lm, behavior), budget=0.5)
>>> with tuned.on(lm):
...     answer = lm.generate("How do I borrow the harbor ledger?")
"""

from trimtab import harbor as harbor  # makes the built-in judge known
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
