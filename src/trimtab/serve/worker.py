"""A worker of vLLM: hooks on the blocks that it holds, and the weights of its tokens at every step."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.serve.blocks import install
from trimtab.serve.registry import VectorRegistry
from trimtab.serve.request import unpack
from trimtab.serve.step import StepWeights
from trimtab.serve.tokens import Term

logger = logging.getLogger("vllm.trimtab")


def steer(runner: Any, registry: VectorRegistry) -> None:
    """Put the hooks on this worker's model, and have every step write its weights first."""
    prepare = getattr(runner, "_prepare_inputs", None)
    if prepare is None:
        raise TrimtabError(
            asked="to steer in this version of vLLM",
            found=f"{type(runner).__name__} without _prepare_inputs",
            advice="use the version that the documentation names",
        )
    utils = importlib.import_module("vllm.model_executor.models.utils")
    step = StepWeights(runner.max_num_tokens, len(registry.entries), runner.device)
    layers = install(runner.get_model(), registry, step, utils.PPMissingLayer)
    logger.info("Steering after the layers %s", layers)

    def terms_of(request: str) -> Sequence[Term]:
        params = runner.requests[request].sampling_params
        return () if params is None else unpack(params.extra_args)

    @functools.wraps(prepare)
    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any) -> Any:
        batch, count = runner.input_batch, len(num_scheduled_tokens)
        step.fill(
            batch.req_ids[:count],
            terms_of,
            batch.num_computed_tokens_cpu[:count],
            num_scheduled_tokens,
            batch.num_prompt_tokens[:count],
            fresh=bool(scheduler_output.scheduled_new_reqs),
        )
        return prepare(scheduler_output, num_scheduled_tokens, *args)

    runner._prepare_inputs = prepare_inputs
