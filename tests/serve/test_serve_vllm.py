from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from serving import fill, served, term, vector
from trimtab.errors import TrimtabError
from trimtab.serve import VectorRegistry, plugin, terms
from trimtab.serve.blocks import find_blocks, install
from trimtab.serve.engine import FINGERPRINT
from trimtab.serve.prefix import block_key
from trimtab.serve.registry import EMBEDDED
from trimtab.serve.request import RESOLVED, pack, unpack
from trimtab.serve.step import StepWeights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny.language_model("llama")


@pytest.fixture
def registry(lm: Any, tmp_path: Path) -> VectorRegistry:
    return fill(tmp_path, lm)


@pytest.fixture
def folder(registry: VectorRegistry) -> Path:
    return registry.folder


# --- blocks


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_hooks_add_what_the_steering_adds(name, tmp_path):
    lm = tiny.language_model(name)
    behind, before = vector(lm, (0, 2)), vector(lm, (0, 3), seed=4, site="resid_pre")
    behind.save(tmp_path / "behind.safetensors")
    before.save(tmp_path / "before.safetensors")
    registry = VectorRegistry.read(tmp_path, served(lm))
    ids = torch.arange(6, 26)[None]
    found = terms({"steer": ["behind:3@prompt", "before:-2"]}, registry)
    with torch.no_grad():
        plain = lm.model(ids).logits
        with behind.select(scope="prompt").at(3.0).on(lm), before.at(-2.0).on(lm):
            expected = lm.model(ids).logits
        step = StepWeights(64, 2, CPU)
        assert install(lm.model, registry, step, nn.Identity) == [EMBEDDED, 0, 2]
        torch.testing.assert_close(lm.model(ids).logits, plain, rtol=0, atol=0)
        numbers = (np.array([n]) for n in (0, 20, 20))
        step.fill(["one"], lambda _: found, *numbers, fresh=True)
        torch.testing.assert_close(lm.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.01


class Block(nn.Module):
    """A block as vLLM has them: the stream is the sum of what it returns."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return torch.tanh(residual) + positions[:, None], residual


class Decoder(nn.Module):
    def __init__(self, depth: int, missing: int = 0) -> None:
        super().__init__()
        blocks = [Block() for _ in range(depth - missing)]
        self.layers = nn.ModuleList([*(nn.Identity() for _ in range(missing)), *blocks])
        self.first = missing

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        residual = None
        for block in self.layers[self.first :]:
            hidden, residual = block(positions, hidden, residual)
        assert residual is not None
        return hidden + residual


def test_blocks_that_return_a_residual_are_steered_in_a_graph_made_once(lm, registry):
    decoder, step = Decoder(lm.n_layers), StepWeights(48, 2, CPU)
    install(decoder, registry, step, nn.Identity)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(decoder, backend=backend, fullgraph=True, dynamic=True)
    steps = {layer: registry.vectors(layer) for layer in registry.layers}
    for tokens, strengths in ((48, (0.0, 0.0)), (5, (2.0, 0.0)), (7, (1.0, -3.0))):
        hidden, positions = torch.randn(tokens, lm.d_model), torch.zeros(tokens)
        weights = torch.zeros(tokens, 2)
        weights[2:] = torch.tensor(strengths)
        step.values[:tokens] = weights
        stream = hidden + weights @ steps[EMBEDDED]
        for layer in range(lm.n_layers):
            stream = stream + torch.tanh(stream)
            if layer in steps:
                stream = stream + weights @ steps[layer]
        torch.testing.assert_close(compiled(positions, hidden), stream)
    assert len(graphs) == 1


def test_a_rank_of_a_pipeline_steers_its_own_blocks(lm, registry):
    part = Decoder(lm.n_layers, missing=2)
    assert install(part, registry, StepWeights(8, 2, CPU), nn.Identity) == [2]


def test_models_without_one_stack_of_blocks_are_refused(lm):
    both = nn.ModuleDict({"encoder": Decoder(4), "decoder": Decoder(4)})
    for model in (both, Decoder(3)):
        with pytest.raises(TrimtabError, match="lists of 4 blocks"):
            find_blocks(model, 4)


# --- the plugin, with a stand-in for vLLM


class Refused(Exception):
    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)


class Processor:
    def __init__(self, config: Any) -> None:
        self.vllm_config = config

    def process_inputs(self, extra: dict[str, Any] | None, **more: Any) -> Any:
        params = SimpleNamespace(extra_args=extra)
        given = {"cache_salt": None, "resumable": False, "prompt_token_ids": [1, 2, 3]} | more
        return SimpleNamespace(sampling_params=params, **given)


@pytest.fixture
def vllm(monkeypatch, folder, lm) -> Iterator[Any]:
    """Modules named as vLLM's, with what the plugin wraps."""
    model = SimpleNamespace(
        model="tiny",
        dtype=torch.float16,
        get_total_num_hidden_layers=lambda: lm.n_layers,
        get_hidden_size=lambda: lm.d_model,
    )
    split = SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1)
    config = SimpleNamespace(
        additional_config={"theirs": 1},
        model_config=model,
        parallel_config=split,
        kv_transfer_config=None,
        compilation_config=SimpleNamespace(inductor_compile_config={}),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    asking = {"to_beam_search_params": lambda self: "beams"}
    content: dict[str, dict[str, Any]] = {
        "vllm.exceptions": {"VLLMValidationError": Refused},
        "vllm.engine.arg_utils": {
            "EngineArgs": type("EngineArgs", (), {"create_engine_config": lambda self: config})
        },
        "vllm.v1.engine.input_processor": {"InputProcessor": type("P", (Processor,), {})},
        "vllm.sampling_params": {
            "SamplingParams": type("S", (), {"from_optional": staticmethod(lambda **given: given)})
        },
        "vllm.v1.core.kv_cache_utils": {
            "generate_block_hash_extra_keys": lambda request, start, stop, index: (None, index)
        },
        "vllm.v1.worker.worker_base": {"WorkerWrapperBase": type("W", (), {"init_device": id})},
        "vllm.entrypoints.openai.completion.protocol": {"CompletionRequest": type("C", (), asking)},
        "vllm.entrypoints.openai.chat_completion.protocol": {
            "ChatCompletionRequest": type("C", (), asking)
        },
    }
    for name, inside in content.items():
        module = ModuleType(name)
        vars(module).update(inside)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(plugin.FOLDER, str(folder))
    monkeypatch.setenv(FINGERPRINT, lm.fingerprint)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(plugin._Front, "registry", None)
    plugin.register()
    plugin.register()
    yield SimpleNamespace(
        config=config, **{name.split(".")[-1]: sys.modules[name] for name in content}
    )
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


def test_without_a_folder_the_plugin_does_nothing(monkeypatch):
    monkeypatch.delenv(plugin.FOLDER, raising=False)
    plugin.register()
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("variable", plugin._NOT_STEERED)
def test_parts_of_vllm_that_cannot_be_steered_are_refused(vllm, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(TrimtabError, match=variable):
        plugin.register()


def test_the_configuration_carries_the_registry_to_every_process(vllm, registry):
    made = vllm.arg_utils.EngineArgs().create_engine_config()
    record = made.additional_config["trimtab"]
    assert made.additional_config["theirs"] == 1 and record["digest"] == registry.digest
    assert record["largest"] == torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("where", "name", "value", "what"),
    [
        ("parallel_config", "use_ubatching", True, "dual-batch overlap"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context"),
        ("cache_config", "kv_sharing_fast_prefill", True, "fast prefill"),
        ("compilation_config", "inductor_compile_config", {"max_autotune": True}, "max_autotune"),
    ],
)
def test_what_moves_tokens_is_refused(vllm, where, name, value, what):
    setattr(getattr(vllm.config, where), name, value)
    with pytest.raises(TrimtabError, match=what):
        vllm.arg_utils.EngineArgs().create_engine_config()


def test_an_admitted_request_carries_its_terms_and_nothing_that_a_user_forged(vllm, registry):
    processor = vllm.input_processor.InputProcessor(
        vllm.arg_utils.EngineArgs().create_engine_config()
    )
    forged = {RESOLVED: [[0, 9.0, "all", "x"]]}
    given = {"steer": "mood:2@last", **forged}
    request = processor.process_inputs(given)
    (found,) = unpack(request.sampling_params.extra_args)
    assert (found.column, found.strength, found.scope) == (0, 2.0, "last")
    assert found.digest == registry.entries["mood"].digest and given[RESOLVED] == forged[RESOLVED]
    assert processor.process_inputs(forged).sampling_params.extra_args is None
    assert processor.process_inputs({"other": 1}).sampling_params.extra_args == {"other": 1}
    assert request.cache_salt is None
    vllm.config.kv_transfer_config = object()
    assert processor.process_inputs({"steer": "mood"}).cache_salt is not None
    assert processor.process_inputs(None, cache_salt="mine").cache_salt == "mine"


def test_wrong_requests_are_the_clients_errors(vllm):
    processor = vllm.input_processor.InputProcessor(
        vllm.arg_utils.EngineArgs().create_engine_config()
    )
    with pytest.raises(Refused, match="registered are: mood, tone"):
        processor.process_inputs({"steer": "nobody"})
    with pytest.raises(Refused, match="cannot be steered"):
        processor.process_inputs({"steer": "mood"}, resumable=True)
    early = vllm.sampling_params.SamplingParams.from_optional
    with pytest.raises(Refused, match="not a finite number"):
        early(extra_args={"steer": "mood:x"}, n=1)
    assert early(extra_args={"steer": "mood:1"}, n=1)["n"] == 1
    for module, name in plugin._REQUESTS:
        asking = getattr(sys.modules[module], name)()
        asking.vllm_xargs = None
        assert asking.to_beam_search_params() == "beams"
        asking.vllm_xargs = {"steer": "mood"}
        with pytest.raises(Refused, match="beam search"):
            asking.to_beam_search_params()


def test_the_prefix_caches_hash_gets_the_key_of_a_steered_block(vllm):
    keys = vllm.kv_cache_utils.generate_block_hash_extra_keys
    found = [term(0, 2.0, "generated")]
    params = SimpleNamespace(extra_args={RESOLVED: pack(found)})
    request = SimpleNamespace(sampling_params=params, num_prompt_tokens=10)
    assert keys(request, 0, 8, 3) == (None, 3)
    assert keys(request, 8, 16, 3) == ((("trimtab", block_key(found, 8, 16, 10)),), 3)
    assert keys(SimpleNamespace(sampling_params=None), 0, 8, 0) == (None, 0)


def test_a_worker_fills_its_weights_before_each_step(vllm, lm, registry):
    config = vllm.arg_utils.EngineArgs().create_engine_config()
    utils = ModuleType("vllm.model_executor.models.utils")
    vars(utils)["PPMissingLayer"] = nn.Identity
    sys.modules[utils.__name__] = utils
    decoder, prepared = Decoder(lm.n_layers), []
    params = SimpleNamespace(extra_args={RESOLVED: pack([term(1, 2.0, "generated")])})
    batch = SimpleNamespace(
        req_ids=["one"],
        num_computed_tokens_cpu=np.array([2]),
        num_prompt_tokens=np.array([4]),
    )
    runner = SimpleNamespace(
        max_num_tokens=16,
        device=CPU,
        get_model=lambda: decoder,
        requests={"one": SimpleNamespace(sampling_params=params)},
        input_batch=batch,
        _prepare_inputs=lambda *given: prepared.append(given) or "prepared",
    )
    worker = SimpleNamespace(load_model=lambda: None, model_runner=runner)
    wrapper = vllm.worker_base.WorkerWrapperBase()
    wrapper.worker, wrapper.vllm_config = worker, config
    wrapper.init_device()
    worker.load_model()
    del sys.modules[utils.__name__]
    output = SimpleNamespace(scheduled_new_reqs=["one"])
    assert runner._prepare_inputs(output, np.array([4])) == "prepared" and len(prepared) == 1
    values: Any = decoder.layers[2].trimtab_leaving_values
    assert torch.equal(values[:4, 1], torch.tensor([0.0, 0.0, 2.0, 2.0]))
