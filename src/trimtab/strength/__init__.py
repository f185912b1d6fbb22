"""How hard to pull: norm calibration, units, default layers, sweeps and choosing by measurement."""

from trimtab.strength.layers import default_layers
from trimtab.strength.norms import NEUTRAL_PROMPTS, Norms, calibrate
from trimtab.strength.units import LayerStrength, StrengthTable, convert

__all__ = [
    "NEUTRAL_PROMPTS",
    "LayerStrength",
    "Norms",
    "StrengthTable",
    "calibrate",
    "convert",
    "default_layers",
]
