"""What an engine's configuration says: the model that is served, and what cannot be steered in it."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError

from trimtab.errors import TrimtabError
from trimtab.models.checked_weights import load_weights
from trimtab.models.fingerprint import fingerprint
from trimtab.serve.registry import UNCHECKED, Served

FINGERPRINT = "TRIMTAB_FINGERPRINT"


def served_model(config: Any) -> Served:
    """Return the model of an engine's configuration, as far as a vector has to fit it."""
    model = config.model_config
    given = os.environ.get(FINGERPRINT)
    return Served(
        name=str(model.model),
        n_layers=model.get_total_num_hidden_layers(),
        d_model=model.get_hidden_size(),
        fingerprint=given or _fingerprint(model),
        largest=float(torch.finfo(model.dtype).max),
    )


def _fingerprint(model: Any) -> str:
    """Of the checkpoint on disk: what vLLM holds is fused, cut and perhaps quantized."""
    try:
        found = load_weights(
            model.model,
            str(model.model),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype="auto",
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise TrimtabError(
            asked=f"the fingerprint of {model.model}",
            found=f"transformers cannot load it: {str(error).splitlines()[0]}",
            advice=f"set {FINGERPRINT} to the model's fingerprint, or to {UNCHECKED} to check "
            "width and depth alone",
        ) from error
    return fingerprint(found)


def refuse_what_moves_tokens(config: Any) -> None:
    """Refuse what hands a block other tokens than the step's, in order, or a graph a fixed buffer."""
    parallel = config.parallel_config
    frozen = config.compilation_config.inductor_compile_config.get("max_autotune", False)
    for what, used in (
        ("dual-batch overlap", parallel.use_ubatching),
        ("prefill context parallelism", parallel.prefill_context_parallel_size > 1),
        ("fast prefill", config.cache_config.kv_sharing_fast_prefill),
        ("max_autotune on a CPU", frozen and config.device_config.device_type == "cpu"),
    ):
        if used:
            raise TrimtabError(
                asked=f"to steer with {what}",
                found="blocks that do not see a step's tokens as they were scheduled",
                advice=f"serve without {what}",
            )
