"""One lever turned into another with what the conversion loses, and all levers on one axis."""

from trimtab.levers.conversions.conversion import Conversion
from trimtab.levers.conversions.convert import convert
from trimtab.levers.conversions.recovered import Recovered, recovered
from trimtab.levers.found import Effort, FoundLevers, find_levers
from trimtab.levers.lora import train_lora
from trimtab.levers.table import LeversTable, levers_table

__all__ = [
    "Conversion",
    "Effort",
    "FoundLevers",
    "LeversTable",
    "Recovered",
    "convert",
    "find_levers",
    "levers_table",
    "recovered",
    "train_lora",
]
