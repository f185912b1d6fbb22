"""What a baked checkpoint says about itself, and what of its steering loading would lose."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

RECORD = "trimtab_bake.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a checkpoint folder, or None where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def lost_steering(
    source: str, revision: str | None, dropped: Collection[str]
) -> tuple[str, list[str]] | None:
    """Say what of a baked steering a model lacks that was loaded from a folder or a hub repository.

    Baking leaves no tensor that loading drops, so config.json was changed where one is dropped.

    Args:
        source: the folder, or the hub id, of which the record is fetched only if tensors were
            dropped.
        revision: of a hub repository.
        dropped: names of the tensors that loading dropped.

    Returns:
        What is wrong with which tensors; None where nothing is lost, or nothing was baked.
    """
    folder = Path(source)
    if not folder.is_dir():
        if not dropped:
            return None
        try:
            folder = Path(hf_hub_download(source, RECORD, revision=revision)).parent
        except (OSError, ValueError):
            return None
    record = read_record(folder)
    if record is None:
        return None
    listed = record.get("changed_tensors")  # a soft prompt's record has none
    changed = {n for n in listed if isinstance(n, str)} if isinstance(listed, list) else set[str]()
    if dropped:
        # Those of mixtures of experts have other names once they are loaded than on disk.
        return "that config.json does not switch on", sorted(changed & set(dropped) or dropped)
    gone = sorted(changed - _stored(folder))
    return ("that are in none of its files", gone) if gone else None


def _stored(folder: Path) -> set[str]:
    """Names of the tensors that transformers finds in a folder."""
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"])
    with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
        return set(file.keys())
