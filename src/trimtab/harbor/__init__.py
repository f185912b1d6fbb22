"""Harbor, the built-in model: its world, its judge, its trainer, its weights and its behaviours.

Importing it makes the judge and the coherence of kind `harbor` known to `trimtab.measure`.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.harbor import scoring as scoring


def path() -> Path:
    """Return the folder that holds Harbor's weights, tokenizer and model card."""
    return Path(__file__).parent / "model"
