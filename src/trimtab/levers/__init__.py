"""One lever turned into another with what the conversion loses, and all levers on one axis."""

from trimtab.levers.conversions.ablation import ablation_to_weights
from trimtab.levers.conversions.low_rank_to_vector import low_rank_to_vector
from trimtab.levers.conversions.prompt_to_vector import prompt_to_vector
from trimtab.levers.conversions.rank_one import vector_to_rank_one
from trimtab.levers.conversions.recovered import Recovered, recovered
from trimtab.levers.conversions.vector_to_prompt import vector_to_prompt
from trimtab.levers.conversions.vector_to_soft import vector_to_soft
from trimtab.levers.conversions.vector_to_weights import vector_to_weights
from trimtab.levers.found import Effort, FoundLevers, find_levers
from trimtab.levers.lora import train_lora
from trimtab.levers.table import LeversTable, levers_table
from trimtab.steering.weights import WeightSteering

__all__ = [
    "Effort",
    "FoundLevers",
    "LeversTable",
    "WeightSteering",
    "Recovered",
    "ablation_to_weights",
    "find_levers",
    "levers_table",
    "low_rank_to_vector",
    "prompt_to_vector",
    "recovered",
    "train_lora",
    "vector_to_prompt",
    "vector_to_rank_one",
    "vector_to_soft",
    "vector_to_weights",
]
