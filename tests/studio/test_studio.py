"""The browser app without a browser: the lever, the stream, the colors, the page's text, the events."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import planted
import tiny
from trimtab.errors import TrimtabError
from trimtab.evaluation.evaluate import Evaluator, Sample
from trimtab.models.capture import capture
from trimtab.models.load import load
from trimtab.models.model import LanguageModel
from trimtab.passes import fan
from trimtab.steering.load import load_steering
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import Bounds, SweepRow, inside
from trimtab.studio import app as studio_app
from trimtab.studio import views
from trimtab.studio.app import Actions, application
from trimtab.studio.coloring import Scale, projections
from trimtab.studio.desk import Desk, clear, new_desk
from trimtab.studio.lever import GRID, Lever, measure_lever, nice
from trimtab.studio.streaming import stream
from trimtab.studio.workshop import Limits, Workbench, Workshop, written_behavior

FREE = contextlib.nullcontext()
BOUNDS = Bounds(budget=1e6, coherence=0.0, target=0.9)
HOSTILE = "<script>alert(1)</script>${alert(2)}{{alert(3)}}`\"'"
LIMITS = Limits(
    answer_tokens=planted.TOKENS,
    gauge_prompts=2,
    tune_prompts=2,
    lever_prompts=2,
    explain_prompts=2,
)


def reading(m: float, score: float = 1.0, coherence: float = 1.0, p95: float = 0.1) -> SweepRow:
    bare = dict.fromkeys((field.name for field in fields(SweepRow)), 0.0)
    given = {"strength": m, "sign": 1 if m >= 0 else -1, "score": score, "samples": ()}
    return SweepRow(**{**bare, **given, "coherence": coherence, "damage_p95": p95})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return planted.language_model()


@pytest.fixture(scope="module")
def workshop(model: LanguageModel) -> Workshop:
    return Workshop(model, LIMITS)


@pytest.fixture(scope="module")
def bench(workshop: Workshop) -> Workbench:
    return workshop.take(planted.behavior(), planted.push(workshop.lm), BOUNDS)


def test_nice_rounds_upwards_to_two_digits() -> None:
    assert [nice(x) for x in (19.876, 2.0, 0.0123, 99.5, 20.0)] == [20.0, 2.0, 0.013, 100.0, 20.0]


def test_warnings_name_what_is_broken(model: LanguageModel) -> None:
    vector = planted.push(model).at(2.0)
    lever = Lever(vector, Evaluator(model, planted.behavior()), Bounds(), FREE, 4.0)
    for r in (reading(0, 0.0), reading(1, 0.5), reading(2), reading(3), reading(4, 1.0, 0.4, 2.0)):
        lever.readings[1, r.strength] = r
    lever.readings[-1, -1.0] = reading(-1, 0.0)
    assert lever.window(1) == (2.0, 3.0)
    assert lever.warnings(0) == lever.warnings(2.0) == lever.warnings(3.0) == []
    assert ["weaker" in line for line in lever.warnings(1.0)] == [True]
    stronger, text, damage = lever.warnings(4.0)
    assert "stronger" in stronger and "coherence 40%" in text
    assert "Damage (on-target KL) of 2.00 nats" in damage
    assert "No strength measured away" in lever.warnings(-1.0)[0]
    # A window that more prompts confirmed while tuning stands where a few find none.
    assert replace(lever, tuned=(1.0, 3.0), bounds=Bounds(target=1.1)).window(1) == (1.0, 3.0)
    assert inside(3.0 + 1e-9, (2.0, 3.0)) and not inside(3.1, (2.0, 3.0))


def test_readings_are_those_of_the_evaluator(model: LanguageModel, bench: Workbench) -> None:
    lever = bench.lever
    m = round(0.37 * lever.reach, 6)
    assert not lever.known(m)
    read = lever.read(m)
    assert lever.known(m) and lever.read(m) is read
    plain = lever.evaluator.run(lever.vector.at(m), 1)
    assert read.score == sum(plain.scores) / len(plain.scores)
    assert read.damage_p95 == pytest.approx(plain.damage(0).p95, rel=1e-3)
    assert [s.after for s in read.samples] == [s.after for s in plain.samples]
    for side in (-1, 1):
        strengths = [r.strength for r in lever.curve(side)]
        assert len(strengths) >= GRID + 1 and 0.0 in strengths
        assert lever.read(side * lever.reach).sign == side


def test_the_range_grows_while_the_text_holds(model: LanguageModel) -> None:
    evaluator = Evaluator(model, planted.behavior(4), max_new_tokens=2, max_prompts=1)
    told: list[tuple[int, int]] = []
    held = threading.Lock()
    lever = measure_lever(
        evaluator, planted.push(model).at(0.01), BOUNDS, held, lambda *at: told.append(at)
    )
    assert lever.reach > 0.02 and not held.locked()
    assert told[-1] == (2 * GRID, 2 * GRID)
    tight = measure_lever(evaluator, planted.push(model).at(0.01), Bounds(budget=1e-9), FREE)
    assert tight.reach == 0.02


def test_stream_grows_to_what_generate_writes(lm: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(1)
    direction = {lm.n_layers - 1: torch.randn(lm.d_model, generator=generator)}
    vector = VectorSteering.from_directions(lm, direction, alpha=2.0)
    prompt, strengths = "How do I find the ferry?", [0.0, 1.0, -2.0]
    seen = list(stream(lm, vector, prompt, strengths, 6, FREE))
    for place, m in enumerate(strengths):
        with vector.at(m).on(lm):
            assert seen[-1][place] == lm.generate(prompt, max_new_tokens=6)
    assert len(seen) > 1
    for earlier, later in zip(seen, seen[1:], strict=False):
        assert all(len(b) >= len(a) for a, b in zip(earlier, later, strict=True))


def test_stream_without_shared_passes(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = planted.push(model)
    shared = list(stream(model, vector, "the pier", [0.0, 1.0], 10, FREE))[-1]
    monkeypatch.setattr(fan.Fan, "shares", lambda self, strengths: False)
    seen = list(stream(model, vector, "the pier", [0.0, 1.0], 10, FREE))
    assert seen[-1] == shared and len(seen) >= 2


def test_an_abandoned_stream_leaves_no_hook_and_no_lock(model: LanguageModel) -> None:
    lock, before = threading.Lock(), model.next_logits("the pier")
    running = stream(model, planted.push(model), "the pier", [0.0, 5.0], 20, lock)
    next(running)
    assert not lock.locked()
    assert torch.equal(model.next_logits("the pier"), before)


def test_projections_are_those_of_a_plain_forward(lm: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(2)
    c = torch.randn(lm.d_model, generator=generator)
    vector = VectorSteering.from_directions(lm, {1: c})
    found = projections(lm, vector, "the ferry", "a boat at noon")
    encoded = lm.encode("the ferry", completion="a boat at noon")
    end = encoded.completion_end or 0
    assert "".join(text for text, _ in found).strip() == "a boat at noon"
    assert len(found) == end - encoded.prompt_length
    for k, (_, value) in enumerate(found):
        cut = encoded.prompt_length + k + 1
        alone = replace(encoded, ids=encoded.ids[:cut], prompt_length=cut, completion_end=None)
        values = capture(lm, [alone], [1], positions="last")
        assert value == pytest.approx(float(values[0, 0, 0] @ c / c.norm()), abs=1e-3)
    assert projections(lm, vector, "the ferry", "") == []


def test_scale_maps_projections_to_shades() -> None:
    scale = Scale(center=2.0, width=4.0)
    assert [scale.shade(x) for x in (2.0, 4.0, 0.0, 100.0, -100.0)] == [0.0, 0.5, -0.5, 1.0, -1.0]


def test_answers_unsteered_are_kept(workshop: Workshop, bench: Workbench) -> None:
    first = list(workshop.answers(bench, "the sea", 5.0))
    again = list(workshop.answers(bench, "the sea", -5.0))
    plain = workshop.lm.generate("the sea", max_new_tokens=LIMITS.answer_tokens)
    assert first[-1][0] == plain and {before for before, _ in again} == {plain}
    with bench.lever.vector.at(-5.0).on(workshop.lm):
        steered = workshop.lm.generate("the sea", max_new_tokens=LIMITS.answer_tokens)
    assert again[-1][1] == steered
    assert list(workshop.answers(bench, "the sea", 0.0)) == [(plain, plain)]
    with pytest.raises(TrimtabError, match="empty prompt"):
        list(workshop.answers(bench, "  ", 1.0))


def test_nothing_in_the_page_is_markup(bench: Workbench) -> None:
    hostile = replace(bench.lever.read(0.0), samples=(Sample(HOSTILE, HOSTILE, HOSTILE),))
    named = planted.behavior(name=HOSTILE)
    pages = (
        views.answers_view(HOSTILE, HOSTILE, 1.0, True),
        views.tokens_view([(HOSTILE, 0.5)], [(HOSTILE, -0.5)], bench.lever.vector),
        views.samples_view(hostile),
        views.lever_view(named, bench.lever, HOSTILE),
        views.refusal_view(TrimtabError(HOSTILE, HOSTILE, HOSTILE)),
        views.link_view(HOSTILE, HOSTILE, 1),
        views.page_view(HOSTILE),
        views.gauges_view(bench.lever, bench.lever.read(bench.lever.reach)),
        views.warnings_view(bench.lever, bench.lever.reach),
    )
    for page in pages:
        assert "<script" not in page and "${" not in page and "{{" not in page and "`" not in page
    assert "&lt;script&gt;" in pages[0]


def test_gauges_show_the_reading_and_shade_the_window(bench: Workbench) -> None:
    lever = bench.lever
    window = lever.window(1)
    assert window is not None
    page = views.gauges_view(lever, lever.read(window[0]))
    read = lever.read(window[0])
    assert f'data-score="{read.score:.3f}"' in page and f'data-kl="{read.damage_p95:.4f}"' in page
    shaded = re.search(r'tt-window" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', page)
    assert shaded and float(shaded[2]) > 0
    assert "damage (on-target KL)" in page and ">damage / budget<" in page
    vector = lever.vector.at(window[0])
    assert f"m = {window[0]:+.3g} (alpha {vector.alphas[vector.layers[0]]:.2f}" in page
    assert "tt-marker tt-out" not in page
    assert "tt-marker tt-out" in views.gauges_view(lever, lever.read(0.0))


def test_a_form_makes_a_behavior() -> None:
    made = written_behavior("calm", "a b\n\n c d \n", "e\nf", "peace\nquiet", "", "n")
    assert [e.prompt for e in made.toward] == ["a b", "c d"]
    assert made.judge is not None and made.judge.options == {"toward": ["peace", "quiet"]}
    with pytest.raises(TrimtabError, match="no phrases"):
        written_behavior("calm", "a", "b", "", "")


def test_bake_zips_a_checkpoint_that_steers_itself(workshop: Workshop, tmp_path: Path) -> None:
    vector = planted.push(workshop.lm, scope="all")
    bench = workshop.take(planted.behavior(), vector, BOUNDS)
    made = workshop.bake(bench, 0.5, tmp_path / "desk")
    assert [p.name for p in (tmp_path / "desk").iterdir()] == ["checkpoint.zip"]
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "out")
    with vector.at(0.5).on(workshop.lm):
        hooked = workshop.lm.next_logits("the pier")
    baked = load(str(tmp_path / "out")).next_logits("the pier")
    assert torch.allclose(baked, hooked, atol=1e-4)
    assert not torch.allclose(baked, workshop.lm.next_logits("the pier"), atol=1e-2)
    with pytest.raises(TrimtabError, match="strength 0"):
        workshop.bake(bench, 0.0, tmp_path / "desk")
    saved = load_steering(workshop.save(bench, -0.25, tmp_path / "desk"))
    assert saved.strength == -0.25


def test_a_vector_that_cannot_be_tuned_is_kept(model: LanguageModel) -> None:
    workshop = Workshop(model, Limits(answer_tokens=2, gauge_prompts=1, tune_prompts=1))
    stages: list[str] = []

    def report(stage: str) -> Any:
        stages.append(stage)
        return lambda done, total: None

    impossible = Bounds(budget=1e-9, target=0.9)
    bench = workshop.find(planted.behavior(4), "mean_difference", -1, impossible, report)
    assert "not tuned" in bench.note and bench.lever.vector.strength < 0
    assert stages[:2] == ["finding", "tuning"]
    with workshop.lock:  # free again: this would wait for ever
        pass


class TestActions:
    """What events do to one visitor's desk, and to no other's."""

    @pytest.fixture
    def act(self, workshop: Workshop, tmp_path: Path) -> Actions:
        return Actions(workshop, tmp_path)

    def put(self, act: Actions, desk: Desk | None, bench: Workbench) -> tuple[Any, ...]:
        return act._put(desk, lambda: bench)

    def test_a_move_shows_warning_answers_gauges_colors(self, act: Actions, bench: Workbench) -> None:
        desk, status, _, slider, _, prompt = self.put(act, None, bench)
        assert "opening" in status and slider["maximum"] == bench.lever.reach
        assert slider["value"] == pytest.approx(bench.lever.vector.strength, abs=bench.lever.step)
        steps = list(act.show(desk, prompt, bench.lever.reach, 1.0))
        text = "".join(part for step in steps for part in step if isinstance(part, str))
        for wanted in ("tt-gauges", 'data-done="1"', "tt-tokens", "<table>", "window"):
            assert wanted in text

    def test_a_move_falls_silent_when_a_later_one_is_made(self, act: Actions, bench: Workbench) -> None:
        desk, _, _, _, _, prompt = self.put(act, None, bench)
        first = act.show(desk, prompt, bench.lever.reach, 1.0)
        next(first)
        later = act.show(desk, prompt, 0.0, 2.0)
        next(later)
        assert list(first) == [] and list(later) != []
        assert list(act.show(desk, prompt, 0.0, 1.5)) == []  # made earlier, arrived later

    def test_an_idle_page_lets_go_of_its_stream(
        self, act: Actions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(studio_app, "STAY_SECONDS", 0.2)
        desk, looks = act.arrive(None), 0

        async def stay() -> None:
            nonlocal looks
            async for _ in act.stay(desk):
                looks += 1
                if looks < 4:
                    desk.turns.take(float(looks))  # at work: a while more

        asyncio.run(asyncio.wait_for(stay(), 60))
        assert 4 <= looks < 8  # a sleep may end a little early

    def test_desks_are_apart(self, act: Actions, bench: Workbench, workshop: Workshop) -> None:
        one = self.put(act, None, bench)[0]
        two = act.arrive(None)
        assert one.folder != two.folder and two.bench is None
        (refused,) = act.show(two, "the pier", 1.0, 1.0)
        assert "no vector yet" in refused[0]
        other = workshop.take(planted.behavior(6, name="other"), planted.push(workshop.lm), BOUNDS)
        moved = self.put(act, two, other)[0]
        assert moved.folder == two.folder and moved.bench is other
        assert one.bench is bench and two.bench is None
        clear(moved)
        assert not moved.folder.exists() and one.folder.exists()

    def test_an_error_is_shown_where_the_result_would_be(self, act: Actions) -> None:
        assert "no vector yet" in act.save(None, 1.0)
        desk, status, *_ = act.find(None, "nonsense", None, *[""] * 6, "pca", "toward", 0.5)
        assert "no such name" in status and desk.bench is None

    def test_a_steering_file_of_another_model_is_refused(
        self, act: Actions, bench: Workbench, tmp_path: Path
    ) -> None:
        other = tiny.language_model("gpt2")
        vector = VectorSteering.from_directions(other, {1: torch.ones(other.d_model)})
        path = vector.save(tmp_path / "other.safetensors")
        chosen = ("refusal", None, *[""] * 6, "pca", "toward", 0.5)
        desk, status, *_ = act.open(str(path), new_desk(tmp_path), *chosen)
        assert "tt-warning" in status and desk.bench is None


@pytest.fixture
def client(workshop: Workshop, tmp_path: Path) -> Iterator[tuple[TestClient, Path]]:
    with TestClient(application(workshop, tmp_path), base_url="http://127.0.0.1") as client:
        yield client, tmp_path


def test_only_loopback_names_are_answered(client: tuple[TestClient, Path]) -> None:
    web, root = client
    assert web.get("/").status_code == 200
    assert web.get("/", headers={"host": "elsewhere.example"}).status_code == 400
    desk = new_desk(root)
    (desk.folder / "made.txt").write_text("mine")
    assert web.get(desk.url(desk.folder / "made.txt")).text == "mine"
    assert web.get("/made/").status_code == 404  # desks are not listed
    assert web.get("/made/%2e%2e/%2e%2e/etc/passwd").status_code == 404
