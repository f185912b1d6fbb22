"""The graph of a steered model, circuits run in it, and edges patched one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patching import patch_edges
from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.attribution import Attribution, attribute
from trimtab.mechanism.circuits.faithful import Samples, minimal_circuit, random_edges
from trimtab.mechanism.circuits.graph import Graph, Node, build_graph, layout
from trimtab.mechanism.circuits.interchange import interchange
from trimtab.mechanism.circuits.record import record
from trimtab.mechanism.circuits.run import run_circuit
from trimtab.mechanism.circuits.teacher_forced import TokenRuns, token_runs
from trimtab.models.model import LanguageModel
from trimtab.steering.vector import VectorSteering

PROMPTS = ["Hello there cats", "the ferry leaves the harbor at noon and the cats sleep"]
PLACES = (
    ("resid_post", (0,), "all"),
    ("resid_pre", (1, 2), "last"),
    ("attn_out", (1,), "all"),
    ("resid_mid", (1,), "prompt"),
)


def steering(
    lm: LanguageModel, site: str = "resid_post", layers: tuple[int, ...] = (0,), scope: str = "all"
) -> VectorSteering:
    generator = torch.Generator().manual_seed(0)
    directions = {k: torch.randn(lm.d_model, generator=generator) for k in layers}
    return VectorSteering.from_directions(lm, directions, alpha=1.5, site=site, scope=scope)


def runs_of(lm: LanguageModel, vector: VectorSteering, tokens: int = 6) -> TokenRuns:
    return token_runs(lm, vector, PROMPTS, "steered", tokens)


def test_edges_are_as_many_as_published() -> None:
    """Gemma 2 2B steered at layer 15 and Llama 3.2 3B at 12: counts of arXiv 2604.08524."""
    assert layout([(8, 4)] * 26, [("resid_pre", 15)]).n_edges == 8790
    assert layout([(24, 8)] * 28, [("resid_pre", 12)]).n_edges == 124441


def test_nothing_feeds_what_came_before_it() -> None:
    graph = layout([(2, 1)] * 3, [("resid_post", 0), ("resid_mid", 1)])

    def edge(source: Node, target: Node) -> bool:
        return bool(graph.edges[graph.target_at[target], graph.source_at[source]])

    head, late = Node("head", 1, 0), Node("steer", 1)
    assert edge(head, Node("mlp", 1)) and not edge(head, Node("value", 1, 0))
    assert edge(late, Node("mlp", 1)) and not edge(late, Node("query", 1, 0))
    assert edge(Node("steer", 0), Node("query", 1, 1)) and edge(late, Node("logits", 3))
    assert Node("mlp", 0) not in graph.source_at
    side = layout([(2, 1)] * 3, [("resid_post", 0)], parallel=True)
    assert not side.edges[side.target_at[Node("mlp", 1)], side.source_at[head]]


def test_pruning_keeps_whole_paths_only() -> None:
    graph = layout([(2, 2)] * 2, [("resid_pre", 0)])
    steer, end = graph.source_at[Node("steer", 0)], graph.target_at[Node("logits", 2)]
    chosen = torch.zeros_like(graph.edges)
    chosen[graph.target_at[Node("value", 0, 1)], steer] = True  # into a head that nobody reads
    chosen[end, graph.source_at[Node("mlp", 1)]] = True  # from an MLP that nothing feeds
    assert not graph.pruned(chosen).any()
    chosen[graph.target_at[Node("mlp", 1)], graph.source_at[Node("head", 0, 1)]] = True
    assert torch.equal(graph.pruned(chosen), chosen)


@pytest.mark.parametrize(("site", "layers", "scope"), PLACES)
def test_all_edges_are_the_steered_run_and_none_the_unsteered(
    lm: LanguageModel, site: str, layers: tuple[int, ...], scope: str
) -> None:
    if site in lm.sites.refused:
        with pytest.raises(TrimtabError):
            runs_of(lm, steering(lm, site, layers, scope))
        return
    vector = steering(lm, site, layers, scope)
    runs, graph = runs_of(lm, vector), build_graph(lm, vector)
    for batch, targets in runs.batches(lm):
        recorded = record(lm, graph, vector, batch, targets)
        with torch.no_grad():
            base = lm.forward(batch, targets.keep)
            with vector.on(lm):
                steered = lm.forward(batch, targets.keep)
        every = run_circuit(lm, graph, graph.edges, recorded, batch, targets.keep)
        none = torch.zeros_like(graph.edges)
        nothing = run_circuit(lm, graph, none, recorded, batch, targets.keep)
        assert (steered - base).abs().max() > 0.1
        torch.testing.assert_close(every, steered, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(nothing, base, atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            assert torch.equal(lm.forward(batch, targets.keep), base)


@pytest.mark.parametrize(("site", "layers", "scope"), PLACES[:2])
def test_the_integral_is_complete(
    lm: LanguageModel, site: str, layers: tuple[int, ...], scope: str
) -> None:
    """The steering's own edges sum to what the steering does; where experts switch, nearly."""
    found = attribute(lm, runs_of(lm, steering(lm, site, layers, scope)), steps=20)
    allowed = 0.15 if "mixtral" in lm.name else 0.02
    assert found.completeness == pytest.approx(1, abs=allowed)
    assert found.effect > 1


def test_a_score_is_the_derivative_of_patching(lm: LanguageModel) -> None:
    """For a weak steering an edge's score is what patching it does, whatever the architecture."""
    vector = steering(lm)
    runs = runs_of(lm, vector)
    weak = vector.at(1e-3)
    runs = TokenRuns("weak", weak, runs.encoded, runs.steered_next, runs.base_next)
    found = attribute(lm, runs, steps=1)
    edges = found.order()[:24].tolist()
    patched = patch_edges(lm, found.graph, runs, edges)
    scores = found.edges.flatten()[edges]
    size = scores.abs().max()
    assert ((patched.effect - scores).abs() / size).max() < 0.02


def test_patching_one_edge_is_a_circuit_run_by_other_means(llama: LanguageModel) -> None:
    """An edge into the logits: nothing follows it, so that a circuit of it alone is patching it in."""
    vector = steering(llama)
    runs, graph = runs_of(llama, vector), build_graph(llama, vector)
    samples = Samples(llama, graph, {"one": runs})
    width = len(graph.sources)
    last = graph.target_at[Node("logits", llama.n_layers)]
    edge = last * width + graph.source_at[Node("steer", 0)]
    chosen = torch.zeros_like(graph.edges)
    chosen.flatten()[edge] = True
    whole = sum(
        float((kept.steered_metric - kept.base_metric).sum()) for _, _, kept in samples.parts
    )
    alone = samples.faithfulness(chosen).value * whole / len(runs.encoded)
    assert patch_edges(llama, graph, runs, [edge]).into.item() == pytest.approx(alone, rel=1e-4)


def test_a_smaller_circuit_carries_less_and_a_random_one_little(llama: LanguageModel) -> None:
    vector = steering(llama)
    runs = runs_of(llama, vector)
    found = attribute(llama, runs)
    samples = Samples(llama, found.graph, {"one": runs})
    assert samples.faithfulness(found.graph.edges).value == pytest.approx(1, abs=1e-4)
    assert samples.faithfulness(torch.zeros_like(found.graph.edges)).value == pytest.approx(0)
    circuit = minimal_circuit(found, samples, samples, threshold=0.8)
    assert circuit.chosen.value >= 0.8
    assert circuit.size < found.graph.n_edges
    assert all(one.value < circuit.held_out.value for one in circuit.random)
    assert "highest by attribution" in str(circuit.table())


def test_random_circuits_have_the_size_asked_for() -> None:
    graph = layout([(2, 1)] * 3, [("resid_post", 0)])
    drawn = random_edges(graph, 9, torch.Generator().manual_seed(0))
    assert int(drawn.sum()) == 9 and not (drawn & ~graph.edges).any()


def test_circuits_are_exchanged_between_vectors_of_one_place(llama: LanguageModel) -> None:
    first = steering(llama)
    generator = torch.Generator().manual_seed(5)
    other = VectorSteering.from_directions(
        llama, {0: torch.randn(llama.d_model, generator=generator)}, alpha=1.5
    )
    vectors = {"a": first, "b": other}
    found: dict[str, Attribution] = {}
    samples: dict[str, Samples] = {}
    for name, vector in vectors.items():
        runs = runs_of(llama, vector)
        found[name] = attribute(llama, runs, steps=4)
        samples[name] = Samples(llama, found[name].graph, {name: runs})
    circuits = {name: one.top(60) for name, one in found.items()}
    table = interchange(vectors, circuits, samples)
    assert table.overlap[0][0] == 1 and 0 <= table.overlap[0][1] < 1
    assert table.overlap[0][1] == table.overlap[1][0]
    assert table.cosines[0][0] == pytest.approx(1)
    own = samples["b"].faithfulness(circuits["a"])
    assert table.faithfulness[0][1] == own
    moved = {"a": first, "b": steering(llama, layers=(1,))}
    with pytest.raises(TrimtabError, match="different places"):
        interchange(moved, circuits, samples)


def test_a_steering_that_changes_nothing_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(TrimtabError, match="no greedy token"):
        token_runs(llama, steering(llama).at(1e-6), PROMPTS)


def test_the_metric_reads_only_where_the_runs_differ(llama: LanguageModel) -> None:
    runs = runs_of(llama, steering(llama))
    agreed = [
        torch.cat([base[:1], own[1:]])
        for base, own in zip(runs.base_next, runs.steered_next, strict=True)
    ]
    runs = replace(runs, steered_next=tuple(agreed))
    for batch, targets in runs.batches(llama):
        logits = llama.forward(batch, targets.keep)
        by_hand = torch.zeros(len(batch.rows))
        for row, i in enumerate(batch.rows.tolist()):
            n = len(runs.base_next[i])
            for place in range(1, n):
                values = logits[row, targets.keep - 1 - n + place]
                steered, base = runs.steered_next[i][place], runs.base_next[i][place]
                by_hand[row] += values[steered] - values[base]
        torch.testing.assert_close(targets.metric(logits), by_hand, atol=1e-4, rtol=1e-5)


def test_every_target_and_every_source_has_an_edge() -> None:
    graph: Graph = layout([(4, 2)] * 4, [("resid_post", 1)])
    assert graph.edges.any(1).all() and graph.edges.any(0).all()
