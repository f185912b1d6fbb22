"""One lever turned into another with what the conversion loses, and all levers on one axis."""

from trimtab.levers.conversions.conversion import Conversion
from trimtab.levers.conversions.convert import convert
from trimtab.levers.conversions.recovered import Recovered, recovered
from trimtab.levers.found import Effort, FoundLevers, find_levers
from trimtab.levers.lora import train_lora
from trimtab.levers.table import LeversTable, compare_levers

__all__ = [
    "Conversion",
    "Effort",
    "FoundLevers",
    "LeversTable",
    "Recovered",
    "compare_levers",
    "convert",
    "find_levers",
    "recovered",
    "train_lora",
]
