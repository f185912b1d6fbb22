"""Where vLLM meets the steering: the entry point that every process of vLLM calls at its start.

Nothing of vLLM is replaced: five functions are wrapped, each in the processes where it runs.

    front end   making the configuration: the folder is read and recorded there, which also keeps
                compiled graphs of other folders apart; admitting a request: its steering is checked
    engine      extra keys of the prefix cache
    workers     after the model is loaded: hooks on its blocks; before each step: its weights

Written against vLLM 0.32; a version without one of these functions is refused at the start.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.serve.engine import refuse_what_moves_tokens, served_model
from trimtab.serve.prefix import TAG, block_key, salt
from trimtab.serve.registry import VectorRegistry, said
from trimtab.serve.request import RESOLVED, asked_for, pack, terms, unpack
from trimtab.serve.worker import steer

FOLDER = "TRIMTAB_STEER"
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_NOT_STEERED = {
    _RUNNER: "the second model runner",
    "VLLM_USE_RUST_FRONTEND": "a front end that loads no plugins",
}
_HASHER = "vllm.v1.core.kv_cache_utils"
_HASHERS_BY_NAME = ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
_REQUESTS = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
)

logger = logging.getLogger("vllm.trimtab")
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def register() -> None:
    """Wrap what steering needs, where `TRIMTAB_STEER` names a folder; else do nothing at all.

    Raises:
        TrimtabError: This vLLM lacks a function that steering needs.
    """
    if not os.environ.get(FOLDER):
        return
    for variable, what in _NOT_STEERED.items():
        if os.environ.get(variable, "0").lower() not in ("", "0", "false"):
            raise TrimtabError(
                asked=f"to steer with {variable}={os.environ[variable]}",
                found=f"{what}, which cannot be steered yet",
                advice=f"leave {variable} unset",
            )
    os.environ[_RUNNER] = "0"
    _wrap("vllm.engine.arg_utils", "EngineArgs.create_engine_config", _configured)
    _wrap("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", _admitted)
    _wrap("vllm.sampling_params", "SamplingParams.from_optional", _checked_early, static=True)
    _wrap(_HASHER, "generate_block_hash_extra_keys", _told_apart)
    for module in _HASHERS_BY_NAME:
        # They take the function by its name when they are imported: later is soon enough.
        if module in sys.modules:
            _wrap(module, "generate_block_hash_extra_keys", _told_apart)
    _wrap("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", _on_worker)


def _wrap(module: str, path: str, wrapper: Wrapper, static: bool = False) -> None:
    """Wrap a function once; plugins may be called several times."""
    try:
        owner: Any = importlib.import_module(module)
        *inside, name = path.split(".")
        for part in inside:
            owner = getattr(owner, part)
        original = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise TrimtabError(
            asked="to steer in this version of vLLM",
            found=f"no {path} in {module}",
            advice="use the version that the documentation names, or unset TRIMTAB_STEER",
        ) from error
    if getattr(original, "steered", False):
        return
    wrapped = functools.wraps(original)(wrapper(original))
    vars(wrapped)["steered"] = True
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


class _Front:
    """What the front end's process has registered last; a server registers once."""

    registry: VectorRegistry | None = None


def _configured(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        folder = os.environ.get(FOLDER)
        if not folder:
            return config
        refuse_what_moves_tokens(config)
        registry = VectorRegistry.read(folder, served_model(config))
        # Part of what vLLM hashes to find a compiled graph, and carried to every process.
        config.additional_config = {**config.additional_config, TAG: registry.record()}
        _registry.cache_clear()
        _Front.registry = registry
        for module, name in _REQUESTS:
            _wrap(module, f"{name}.to_beam_search_params", _without_beams)
        logger.info("Steering by %s: %s", registry.folder, ", ".join(registry.entries))
        for name, error in registry.refused.items():
            logger.warning("Not registered: %s: %s", name, said(error))
        return config

    return create_engine_config


def _admitted(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        registry = _registry_of(self.vllm_config)
        params = request.sampling_params
        if registry is None or params is None:
            return request
        found = _or_client_error(terms, params.extra_args, registry)
        if found and request.resumable:
            raise _client_error("a session whose prompt grows cannot be steered")
        extra = {k: v for k, v in (params.extra_args or {}).items() if k != RESOLVED}
        if found:
            extra[RESOLVED] = pack(found)
        params.extra_args = extra or None
        if self.vllm_config.kv_transfer_config is not None:
            request.cache_salt = salt(request.cache_salt, found, _prompt_length(request))
        return request

    return process_inputs


def _checked_early(original: Callable[..., Any]) -> Callable[..., Any]:
    """Over HTTP a wrong request is refused before a stream of answers is opened."""

    def from_optional(*args: Any, **kwargs: Any) -> Any:
        extra = kwargs.get("extra_args")
        if extra and _Front.registry is not None:
            _or_client_error(terms, extra, _Front.registry)
        return original(*args, **kwargs)

    return from_optional


def _without_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _or_client_error(asked_for, self.vllm_xargs) is not None:
            raise _client_error("beam search in vLLM forgets vllm_xargs, and with it the steering")
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _told_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start: int, stop: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, index = original(request, start, stop, *args, **kwargs)
        params = request.sampling_params
        if params is None or not params.extra_args or RESOLVED not in params.extra_args:
            return keys, index
        key = block_key(unpack(params.extra_args), start, stop, request.num_prompt_tokens)
        if key is not None:
            keys = (*(keys or ()), (TAG, key))
        return keys, index

    return generate_block_hash_extra_keys


def _on_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever the class of the worker: it is made before its device, and loads the model after."""

    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        worker, registry = self.worker, _registry_of(self.vllm_config)
        load = worker.load_model

        @functools.wraps(load)
        def load_model(*args: Any, **kwargs: Any) -> None:
            load(*args, **kwargs)
            if registry is not None:
                steer(worker.model_runner, registry)

        worker.load_model = load_model
        return original(self, *args, **kwargs)

    return init_device


def _registry_of(config: Any) -> VectorRegistry | None:
    record = config.additional_config.get(TAG)
    if record is None:
        return None
    front = _Front.registry
    if front is not None and front.record() == record:
        return front
    return _registry(tuple(record.items()))


@functools.lru_cache(maxsize=8)
def _registry(record: tuple[tuple[str, Any], ...]) -> VectorRegistry:
    return VectorRegistry.from_record(dict(record))


def _prompt_length(request: Any) -> int:
    ids = request.prompt_token_ids
    return len(request.prompt_embeds if ids is None else ids)


def _or_client_error(check: Callable[..., Any], *args: Any) -> Any:
    """What `check` returns; what it refuses is the client's error, status 400 over HTTP."""
    try:
        return check(*args)
    except TrimtabError as error:
        raise _client_error(said(error)) from None


def _client_error(message: str) -> Exception:
    errors = importlib.import_module("vllm.exceptions")
    return errors.VLLMValidationError(message, parameter="steer")
