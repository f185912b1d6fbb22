from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny
from trimtab import load
from trimtab.cli.app import app
from trimtab.errors import TrimtabError
from trimtab.prompt_steering import prompt
from trimtab.scope import Scope
from trimtab.serve import SCOPES, Registry, Served, Term, plugin, terms
from trimtab.serve.blocks import find_blocks, install
from trimtab.serve.engine import FINGERPRINT
from trimtab.serve.prefix import block_key, salt
from trimtab.serve.registry import EMBEDDED
from trimtab.serve.request import RESOLVED, pack, unpack
from trimtab.serve.step import StepWeights
from trimtab.steering import VectorSteering

CPU = torch.device("cpu")
Lengths = np.ndarray[Any, np.dtype[np.int64]]


def served(lm: Any) -> Served:
    return Served("tiny", lm.n_layers, lm.d_model, lm.fingerprint)


def direction(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)


def vector(lm: Any, layers: Sequence[int] = (1,), seed: int = 0, **more: Any) -> VectorSteering:
    given = {layer: direction(lm.d_model, seed + layer) for layer in layers}
    return VectorSteering.from_directions(lm, given, alpha=2.0, **more)


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny.language_model("llama")


@pytest.fixture
def folder(lm, tmp_path: Path) -> Path:
    vector(lm, (1, 2)).at(1.5).save(tmp_path / "mood.safetensors")
    vector(lm, (0, 3), seed=5, site="resid_pre", scope="last").save(tmp_path / "tone.safetensors")
    return tmp_path


@pytest.fixture
def registry(lm, folder: Path) -> Registry:
    return Registry.read(folder, served(lm))


# --- the registry


def test_files_become_entries_in_the_order_of_their_names(registry):
    assert list(registry.entries) == ["mood", "tone"] and not registry.refused
    assert [entry.column for entry in registry.entries.values()] == [0, 1]
    # What enters block 3 leaves block 2; before block 0 there is none.
    assert list(registry.entries["tone"].steps) == [EMBEDDED, 2]
    assert registry.layers == [EMBEDDED, 1, 2]


def test_a_layers_vectors_are_what_strength_one_adds(lm, registry):
    behind = registry.vectors(2)
    torch.testing.assert_close(behind[0], 2.0 * direction(lm.d_model, 2))
    torch.testing.assert_close(behind[1], 2.0 * direction(lm.d_model, 8))
    assert not registry.vectors(1)[1].any()


def test_what_does_not_fit_is_refused_by_name_and_the_rest_is_served(lm, folder):
    wide = tiny.language_model("gpt2")
    mood = vector(lm)
    files = {
        "ablate": (mood.select(operation="ablate"), "the operation ablate"),
        "mlp": (mood.select(site="mlp_out"), "the site mlp_out"),
        "window": (mood.select(scope="[0,4)"), r"the scope \[0,4\)"),
        "instructed": (mood.select(scope="post_instruction"), "the scope post_instruction"),
        "foreign": (VectorSteering(**{**vars(mood), "fingerprint": "0" * 64}), "fingerprint"),
        "other": (vector(wide), "fingerprint"),
        "words": (prompt("Be kind."), "a prompt"),
        "a b": (mood, "the name 'a b'"),
    }
    for name, (lever, _) in files.items():
        lever.save(folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    found = Registry.read(folder, served(lm))
    assert list(found.entries) == ["mood", "tone"]
    assert set(found.refused) == {*files, "broken"}
    for name, (_, reason) in files.items():
        with pytest.raises(TrimtabError, match=reason):
            terms({"steer": [name]}, found)
    with pytest.raises(TrimtabError, match="registered are: mood, tone"):
        found.entry("nobody")


def test_another_width_is_refused(lm, folder):
    narrow = Served("tiny", lm.n_layers, lm.d_model // 2)
    with pytest.raises(TrimtabError, match=f"width {lm.d_model // 2} instead of {lm.d_model}"):
        Registry.read(folder, narrow)


def test_an_unchecked_fingerprint_lets_the_shape_decide(lm, folder):
    assert list(Registry.read(folder, Served("copy", lm.n_layers, lm.d_model)).entries)


def test_an_empty_folder_is_refused(lm, tmp_path):
    for where in (tmp_path, tmp_path / "none"):
        with pytest.raises(TrimtabError, match="no steering file there"):
            Registry.read(where, served(lm))


def test_another_process_reads_the_same_or_refuses(lm, registry, folder):
    again = Registry.from_record(registry.record())
    assert again.digest == registry.digest and again.layers == registry.layers
    vector(lm, (2,), seed=9).save(folder / "mood.safetensors")
    with pytest.raises(TrimtabError, match="other files in this process"):
        Registry.from_record(registry.record())


# --- requests


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("mood", [("mood", 1.5, "all")]),
        ("tone", [("tone", 1.0, "last")]),
        ("mood:-2", [("mood", -2.0, "all")]),
        ("mood:1e-1@generated", [("mood", 0.1, "generated")]),
        ("mood@prompt", [("mood", 1.5, "prompt")]),
        (["mood:1", "tone:2@all"], [("mood", 1.0, "all"), ("tone", 2.0, "all")]),
        (["mood:1", "mood:2@last"], [("mood", 1.0, "all"), ("mood", 2.0, "last")]),
        ({"mood": 3, "tone@prompt": -1.0}, [("mood", 3.0, "all"), ("tone", -1.0, "prompt")]),
        ("mood:0", []),
        ([], []),
        (None, []),
    ],
)
def test_what_a_request_writes(registry, written, expected):
    found = terms({"steer": written, "session_id": "x"}, registry)
    names = {entry.column: name for name, entry in registry.entries.items()}
    assert [(names[term.column], term.strength, term.scope) for term in found] == expected
    assert unpack({RESOLVED: pack(found)}) == found


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"steer": "nobody"}, "no vector of that name"),
        ({"steer": "mood:much"}, "not a finite number"),
        ({"steer": "mood:"}, "not a finite number"),
        ({"steer": "mood:inf"}, "not a finite number"),
        ({"steer": {"mood": True}}, "not a finite number"),
        ({"steer": {"mood": None, "tone": [1]}}, "not a finite number"),
        ({"steer": {"mood:1": 2.0}}, "names no vector"),
        ({"steer": "mood:1e38"}, "more than the model's numbers hold"),
        ({"steer": "mood:1@[2,5)"}, "by what a token is"),
        ({"steer": "mood:1@post_instruction"}, "where the user's text ends"),
        ({"steer": "mood:1@some"}, "no such scope"),
        ({"steer": ["mood", 3]}, "names no vector"),
        ({"steer": 3}, "names no vector"),
        ({"steer": ""}, "names no vector"),
        ({"steering": "mood"}, "no such key"),
        ({"Steer_strength": 2}, "no such key"),
    ],
)
def test_what_cannot_be_served_is_refused(lm, folder, extra, reason):
    limits = Served("tiny", lm.n_layers, lm.d_model, largest=1e30)
    with pytest.raises(TrimtabError, match=reason):
        terms(extra, Registry.read(folder, limits))


# --- tokens of a step


def term(column: int, strength: float, scope: str) -> Term:
    return Term(column, strength, scope, f"digest{column}")


def by_scope(found: Sequence[Term], positions: Tensor, length: int, vectors: int) -> Tensor:
    """The weights of one request's tokens from `Scope.mask`, `[tokens, vectors]`."""
    table = torch.zeros(len(positions), vectors)
    for each in found:
        rows = positions[None], torch.ones(1, len(positions), dtype=torch.bool)
        mask = Scope.parse(each.scope).mask(*rows, prompt_length=torch.tensor([length]))
        table[:, each.column] += mask[0].float() * each.strength
    return table


REQUESTS: dict[str, list[Term]] = {
    "plain": [],
    **{scope: [term(n % 3, n + 1.0, scope)] for n, scope in enumerate(SCOPES)},
    "both": [term(0, 2.0, "prompt"), term(0, -0.5, "all"), term(2, 1.5, "generated")],
}


def step_of(
    step: StepWeights, names: list[str], computed, scheduled, lengths, fresh=True
) -> Tensor:
    arrays = [np.array(numbers) for numbers in (computed, scheduled, lengths)]
    step.fill(names, lambda name: REQUESTS[name], *arrays, fresh=fresh)
    return step.values[: sum(scheduled)].clone()


def test_a_step_in_chunks_is_weighted_as_the_scopes_say():
    step = StepWeights(200, 3, CPU)
    names = list(REQUESTS)
    lengths = [7, 1, 12, 5, 9, 20]
    generator = np.random.default_rng(0)
    computed = np.zeros(len(names), dtype=int)
    for _ in range(12):
        scheduled = generator.integers(1, 6, len(names))
        found = step_of(step, names, computed, scheduled, lengths, fresh=False)
        spans = zip(names, computed, computed + scheduled, lengths, strict=True)
        expected = [by_scope(REQUESTS[n], torch.arange(a, b), p, 3) for n, a, b, p in spans]
        torch.testing.assert_close(found, torch.cat(expected))
        computed = computed + scheduled
    assert (computed > lengths).all()


def test_an_unsteered_step_after_steered_ones_is_zero_at_every_row():
    step = StepWeights(50, 3, CPU)
    assert step_of(step, ["all"], [0], [40], [40]).any()
    assert step_of(step, ["all"], [40], [1], [40], fresh=False).any()
    assert not step_of(step, ["plain"], [0], [50], [50]).any()


def test_requests_that_change_places_keep_their_own_weights():
    step = StepWeights(50, 3, CPU)
    first = step_of(step, ["all", "plain"], [0, 0], [2, 3], [9, 9], fresh=False)
    second = step_of(step, ["plain", "all"], [2, 3], [3, 2], [9, 9], fresh=False)
    assert torch.equal(first[:2], second[3:]) and not second[:3].any()


def test_an_id_that_is_taken_again_is_looked_up_again():
    step, meant = StepWeights(50, 3, CPU), {"id": REQUESTS["all"]}
    ask = ["id"], lambda name: meant[name], *(np.array([n]) for n in (0, 4, 4))
    step.fill(*ask, fresh=True)
    meant["id"] = []
    step.fill(*ask, fresh=True)
    assert not step.values.any()


# --- the prefix cache


def test_a_blocks_key_says_which_of_its_tokens_are_steered_how():
    """Two blocks have one key exactly if their tokens have equal weights."""
    seen: dict[str | None, Tensor] = {}
    chosen = itertools.product(SCOPES, (2.0, -1.0), (3, 8, 11, 30))
    for (scope, strength, length), start in itertools.product(chosen, (0, 8, 16)):
        found = [term(0, strength, scope)]
        key = block_key(found, start, start + 8, length)
        mine = by_scope(found, torch.arange(start, start + 8), length, 1)
        assert (key is None) == (not mine.any())
        assert torch.equal(seen.setdefault(key, mine), mine)
        for other, theirs in seen.items():
            assert (other == key) == torch.equal(theirs, mine)


def test_a_key_tells_vectors_apart_and_does_not_ask_for_their_order():
    one, other = term(0, 1.0, "all"), term(1, 1.0, "all")
    assert block_key([one], 0, 8, 4) != block_key([other], 0, 8, 4)
    assert block_key([one, other], 0, 8, 4) == block_key([other, one], 0, 8, 4)
    assert block_key([one], 0, 8, 4) != block_key([one, one], 0, 8, 4)


def test_no_salt_of_a_user_is_a_salt_of_a_steering():
    steered = salt(None, [term(0, 1.0, "all")], 9)
    assert steered and steered != salt(None, [term(0, 1.0, "all")], 10)
    assert salt("mine", [term(0, 1.0, "all")], 9) not in (steered, "mine")
    assert salt(steered, [], 9) != steered
    assert salt("mine", [], 9) == "mine" and salt(None, [], 9) is None


# --- blocks


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_hooks_add_what_the_steering_adds(name, tmp_path):
    lm = tiny.language_model(name)
    behind, before = vector(lm, (0, 2)), vector(lm, (0, 3), seed=4, site="resid_pre")
    behind.save(tmp_path / "behind.safetensors")
    before.save(tmp_path / "before.safetensors")
    registry = Registry.read(tmp_path, served(lm))
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
    values: Any = decoder.layers[2].trimtab_values
    assert torch.equal(values[:4, 1], torch.tensor([0.0, 0.0, 2.0, 2.0]))


# --- the command


def test_the_command_starts_stock_vllm_with_the_folder(tmp_path):
    lm = load("harbor")
    vector(lm).save(tmp_path / "mood.safetensors")
    arguments = [
        "serve",
        "harbor",
        "--steer",
        str(tmp_path),
        "--dry-run",
        "--port",
        "8123",
        "-tp",
        "2",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "vllm.entrypoints" in done.stdout and "harbor/model" in done.stdout
    assert done.stdout.strip().endswith("--port 8123 -tp 2")
    assert "mood: m=1, scope all" in done.stderr


def test_the_command_refuses_a_folder_without_vectors(tmp_path):
    done = CliRunner().invoke(app, ["serve", "harbor", "--steer", str(tmp_path), "--dry-run"])
    assert isinstance(done.exception, TrimtabError)
