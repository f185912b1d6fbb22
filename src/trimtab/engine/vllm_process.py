"""A vLLM that runs in processes of its own, with steering files registered by our serving plugin."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.probe import text_config
from trimtab.serve.engine import FINGERPRINT
from trimtab.serve.plugin import FOLDER
from trimtab.serve.prefix import TAG
from trimtab.serve.request import KEY

# Prompts with their answers; what is longer is answered by transformers.
LONGEST = 4096
# Of the GPU's free memory, where the model has its own place on the same one: the rest is for it.
SHARE_BESIDE = 0.7
# On a CPU vLLM would take all the memory there is for keys and values.
CPU_CACHE_BYTES = 4 * 2**30
# Seconds to end in; after vLLM's own 5 it is killed, and leaves shared memory behind.
PATIENCE = 30.0
_CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
_LEVEL = "VLLM_LOGGING_LEVEL"
# Unless the user says otherwise.
_QUIET = {_LEVEL: "ERROR", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Request:
    """One answer that is asked for; `steer` is "NAME@SCOPE" -> strength of registered vectors."""

    ids: list[int]
    steer: dict[str, float]


class VllmProcess:
    """Stock vLLM with the model of an `lm`.

    Attributes:
        longest: most tokens of a prompt and its answer.
    """

    def __init__(self, lm: LanguageModel, folder: Path | None, options: Mapping[str, Any]) -> None:
        """Start it, which takes from some seconds to minutes.

        Args:
            lm: what `trimtab.load` loaded; vLLM loads the same.
            folder: steering files; None for a vLLM without steering.
            options: arguments of `vllm.LLM` that replace those chosen here.

        Raises:
            TrimtabError: vLLM does not start, or loads no plugin of ours.
        """
        with _environment(lm, folder):
            self._vllm = importlib.import_module("vllm")
            if folder is not None:
                _check_plugin()
            arguments = {**_arguments(lm), **options}
            try:
                self._llm: Any = self._vllm.LLM(**arguments)
            except (RuntimeError, ValueError, OSError, ImportError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise TrimtabError(
                    asked="the engine vllm",
                    found=f"vLLM does not start: {reason}",
                    advice=f"{_LEVEL}=INFO shows what it says; --engine local does without it",
                ) from error
        config = self._llm.llm_engine.vllm_config
        self.longest = int(config.model_config.max_model_len)
        if folder is not None and TAG not in config.additional_config:
            self.close()
            raise _no_plugin("a vLLM that was started without it")

    def answer(
        self, requests: Sequence[Request], max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """Answer all requests in one batch, greedily, in tokens; one that ended has its end last."""
        found = self._generate(
            requests,
            max_tokens=max_new_tokens,
            stop_token_ids=list(ends),
            # The model's own idea of an end is among `ends`.
            ignore_eos=True,
        )
        return [list(answer.outputs[0].token_ids) for answer in found]

    def read(self, ids: Sequence[int]) -> list[float]:
        """The unsteered model's log-probability of every token of a prompt but the first, nats."""
        (found,) = self._generate([Request(list(ids), {})], max_tokens=1, prompt_logprobs=0)
        pairs = zip(ids[1:], found.prompt_logprobs[1:], strict=True)
        return [float(known[token].logprob) for token, known in pairs]

    def close(self) -> None:
        """End its processes."""
        self._llm.llm_engine.engine_core.shutdown(timeout=PATIENCE)
        del self._llm
        gc.collect()
        # Collects what has ended: nothing is left in the list of processes.
        multiprocessing.active_children()

    def _generate(self, requests: Sequence[Request], **settings: Any) -> list[Any]:
        params = [
            self._vllm.SamplingParams(
                temperature=0.0,
                detokenize=False,
                extra_args={KEY: request.steer} if request.steer else None,
                **settings,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.ids} for request in requests]
        dead = importlib.import_module("vllm.v1.engine.exceptions").EngineDeadError
        try:
            return self._llm.generate(prompts, params, use_tqdm=False)
        except dead as error:
            raise TrimtabError(
                asked=f"{len(requests)} answers of vLLM",
                found="its process has ended",
                advice="it says why above; less memory for it, or --engine local, may help",
            ) from error


def _arguments(lm: LanguageModel) -> dict[str, Any]:
    """What `vllm.LLM` is given."""
    source = lm.source
    assert source is not None  # the engine refuses a model without one
    chosen: dict[str, Any] = {
        "model": source.folder,
        "revision": source.revision,
        "dtype": source.dtype,
        "trust_remote_code": source.trust_remote_code,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "max_model_len": _longest(lm),
        "use_tqdm_on_load": False,
        # A graph is compiled for one folder of files: no other run could use it.
        "enforce_eager": True,
    }
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.is_cpu() and not os.environ.get(_CPU_CACHE):
        chosen["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    elif lm.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(lm.device)
        chosen["gpu_memory_utilization"] = round(free / total * SHARE_BESIDE, 3)
    return chosen


def _longest(lm: LanguageModel) -> int:
    limits = (
        getattr(text_config(lm.model), "max_position_embeddings", None),
        getattr(lm.tokenizer, "model_max_length", None),
    )
    return min([LONGEST, *(int(limit) for limit in limits if limit)])


@contextmanager
def _environment(lm: LanguageModel, folder: Path | None) -> Iterator[None]:
    """Set what vLLM reads at its start; afterwards all is as before, vLLM's own as well."""
    before = dict(os.environ)
    try:
        # What the user has there is for servers.
        os.environ.pop(FOLDER, None)
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if folder is not None:
            os.environ.update({FOLDER: str(folder), FINGERPRINT: lm.fingerprint})
        # Processes of its own can be ended, and take nothing of this one's threads with them.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_plugin() -> None:
    """See that vLLM's processes will load the plugin: without it requests are simply not steered."""
    plugins = importlib.import_module("vllm.plugins")
    register = plugins.load_plugins_by_group(plugins.DEFAULT_PLUGINS_GROUP).get("trimtab")
    if register is None:
        raise _no_plugin("none of that name among vLLM's plugins")
    # vLLM loads plugins once per process, and here that may have been before it was of use.
    register()


def _no_plugin(found: str) -> TrimtabError:
    return TrimtabError(
        asked="answers of vLLM under a steering vector",
        found=f"the serving plugin is missing: {found}",
        advice="install Trimtab where vLLM is, and leave VLLM_PLUGINS unset or name trimtab in it",
    )
