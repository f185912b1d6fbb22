"""Ways to find a steering vector, one method a file; `find` runs one by name.

Add one with a function that returns a vector per layer:

>>> @register("first_pair")
... def first_pair(task):
...     contrast = read_contrast(task)
...     pairs = {x: contrast.toward[x][0] - contrast.away[x][0] for x in contrast.telling}
...     return contrast.found(pairs)
"""

from trimtab.methods import (  # noqa: F401  they register themselves
    mean_difference,
    next_token,
    pca,
    preference,
    probe,
    selected_difference,
)
from trimtab.methods.contrast import Contrast, read_contrast
from trimtab.methods.find import find
from trimtab.methods.registry import METHODS, Found, Method, Task, register

__all__ = [
    "METHODS",
    "Contrast",
    "Found",
    "Method",
    "Task",
    "find",
    "read_contrast",
    "register",
]
