"""The card of an exported adapter: what it does, how hard, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.export.files import public_name
from trimtab.models.model import LanguageModel
from trimtab.steering.weights import Scaled
from trimtab.weights.card import HUB_ID, one_line, steering_section

_LOAD = """## How to load
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this folder")
```
`with model.disable_adapter():` is the base model, unsteered.
"""


def adapter_card(
    lm: LanguageModel, vectors: Sequence[Scaled], modules: Sequence[str], has_bias: bool
) -> str:
    """Return the README.md of a PEFT folder, Markdown with the hub's front matter."""
    base = public_name(lm.name or "a model without a name")
    linked = f"base_model: {base}\n" if HUB_ID.fullmatch(base) else ""
    limits = (
        "- It acts on every token, and no prompt switches it off.\n"
        "- What it does to the behavior, and what else it changes, was not measured by the"
        " export.\n"
    )
    if has_bias:
        limits += (
            "- It has biases: a base model without them cannot merge it (`trimtab bake` can).\n"
        )
    return "\n".join(
        (
            f"---\nlibrary_name: peft\ntags:\n- trimtab\n- steering\n{linked}---",
            f"# {one_line(base)}, a steering adapter\n",
            f"Fingerprint of the base: {lm.fingerprint}. Modules: {', '.join(modules)}.\n",
            *(steering_section(vector) for vector in vectors),
            _LOAD,
            f"## Limits\n\n{limits}",
        )
    )
