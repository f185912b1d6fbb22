"""The demo's page: figures reach it, no text breaks out of it, and nothing is fetched."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trimtab.evaluation.evaluate import Sample
from trimtab.evaluation.measurement import Measurement, Row
from trimtab.report.demo_page import Steered, answer, steered_section, warnings
from trimtab.report.page import render, write_page
from trimtab.steering.units import LayerStrength, StrengthTable
from trimtab.strength.sweep import SweepRow
from trimtab.strength.tune import TuneReport
from trimtab.weights.plan import BakeReport

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SCORES = {"baseline": 0.03, "prompt": 0.6, "vector": 0.97, "checkpoint": 0.96, "null": 0.04}


def figures(score: float, coherence: float = 0.98) -> dict[str, Any]:
    given = {"score": score, "n": 32, "coherence": coherence, "damage": 0.12, "damage_p95": 0.4}
    kl = {"spill": 0.3, "spill_p95": 0.9, "low": max(0.0, score - 0.1), "high": min(1, score + 0.1)}
    edges = {
        f"{what}_{end}": 0.0 for what in ("coherence", "damage", "spill") for end in ("low", "high")
    }
    return {"sign": 1, **given, **kl, **edges}


def steered(
    name: str = "refusal",
    description: str = "Declines a request.",
    sample: dict[str, Any] | None = None,
    baked: Any = None,
    without: tuple[str, ...] = (),
    **changed: dict[str, Any],
) -> Steered:
    told = {"prompt": "Where is it?", "before": "At the pier.", "after": "I cannot say."}
    samples = (Sample(**{**told, **(sample or {})}),)
    rows = tuple(
        Row(**{**figures(score), **changed.get(kind, {}), "name": kind, "kind": kind},
            strength=None, alphas={}, samples=samples)
        for kind, score in SCORES.items()
        if kind not in without
    )  # fmt: skip
    strengths = {0.75: 0.4, 1.0: 0.9, 1.5: 0.97, 2.0: 1.0, 3.0: 0.2}
    curve = tuple(SweepRow(**figures(y), strength=m, alphas={}) for m, y in strengths.items())
    report = TuneReport(
        behavior=name, data_hash="d", model="harbor", fingerprint="9f8e7d", method="next_token",
        sign=1, budget=0.5, spill_budget=None, coherence_floor=0.9, target=0.9, seed=0, layers=(2,),
        scope="all", strength=1.5, alpha={2: 3.21}, window=(1.0, 2.0), score=0.97, low=0.87,
        high=1.0, n=32, baseline=0.03, gain=0.94, gain_low=0.8, gain_high=1.0, null=0.04,
        null_damage_p95=0.1, coherence=0.98, coherence_low=0.9, coherence_high=1.0, damage=0.12,
        damage_p95=0.4, damage_low=0.1, damage_high=0.2, spill=0.3, spill_p95=0.9, spill_low=0.2,
        spill_high=0.4,
        validation=curve[2], curve=curve, damage_coherence=-0.5, candidates=(), tried=(),
        adaptive=None, model_calls=10, seconds=1.0,
    )  # fmt: skip
    measured = Measurement(
        behavior=name, data_hash="d", split="test", model="harbor", fingerprint="9f8e7d", judge="j",
        seed=0, max_new_tokens=40, rows=rows, notes=("intervals 95 %",),
    )  # fmt: skip
    units = StrengthTable((LayerStrength(2, 1.5, 3.21, 0.1, None, None),))
    good = BakeReport("bias", Path("baked"), 2e-6, True)
    return Steered(description, report, units, measured, baked or good)


def page(model: str = "harbor", **more: Any) -> str:
    return render([steered_section(steered(**more))], title="t", lead=f"Steering {model}")


class Page(HTMLParser):
    """Tags with their attributes, and the text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open not in ("script", "style"):
            self.shown.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_a_folder_opens_offline(tmp_path: Path) -> None:
    index = write_page(tmp_path / "report", [steered_section(steered())])
    assert {p.name for p in index.parent.iterdir()} == {"index.html", "plotly.min.js"}
    assert (index.parent / "plotly.min.js").stat().st_size > 1_000_000
    found = Page(index.read_text())
    sources = [a["src"] for _, a in found.tags if a.get("src")]
    assert sources == ["plotly.min.js"]
    links = [a["href"] or "" for tag, a in found.tags if tag in ("a", "link")]
    ids = {a.get("id") for _, a in found.tags}
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert "http" not in re.sub(r"<script.*?</script>", "", index.read_text(), flags=re.S)


@pytest.mark.parametrize("place", ["prompt", "before", "after", "model", "name", "description"])
def test_text_of_models_and_users_is_escaped_everywhere(place: str) -> None:
    sample = place in ("prompt", "before", "after")
    before = Page(page())
    given: dict[str, Any] = {"sample": {place: EVIL}} if sample else {place: EVIL}
    found = Page(page(**given))
    assert [t for t, _ in found.tags if t == "script"] == [
        t for t, _ in before.tags if t == "script"
    ]
    assert not [t for t, _ in found.tags if t == "img"]
    assert "alert(1)" in "".join(found.shown)  # the text itself is there, harmless


def test_a_conversation_is_shown_with_its_roles() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    text = "".join(Page(page(sample={"prompt": prompt})).shown)
    assert "system: Be brief." in text and "user: Where?" in text


def test_figures_are_described_for_those_who_do_not_see_them() -> None:
    found = Page(page())
    labels = [a["aria-label"] or "" for _, a in found.tags if a.get("role") == "img"]
    assert len(labels) == 3
    assert "vector 0.97 [0.87, 1.00]" in labels[0] and "random control 0.04" in labels[0]
    assert "behavior: from 0.40 at 0.75" in labels[1]
    assert "random control, test: 0.04 at 1.50" in labels[1]
    headings = [int(t[1]) for t, _ in found.tags if re.fullmatch(r"h[1-6]", t)]
    assert headings == [1, 2]
    assert [a for t, a in found.tags if t == "html"] == [{"lang": "en"}]


def test_the_figures_in_the_page_are_the_data() -> None:
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page(), re.S)
    drawn = {name: json.loads(text) for name, text in found}
    bars = drawn["section-1-refusal-figure-1"]["data"][0]
    assert bars["y"] == [
        "unsteered",
        "plain prompt",
        "vector",
        "baked checkpoint",
        "random control",
    ]
    assert bars["x"] == list(SCORES.values())
    assert bars["error_x"]["array"] == pytest.approx([0.1, 0.1, 0.03, 0.04, 0.1])
    assert bars["error_x"]["arrayminus"] == pytest.approx([0.03, 0.1, 0.1, 0.1, 0.04])
    assert bars["marker"]["color"][3:] == ["var(--baked)", "var(--null)"]
    lines = {line.get("name"): line for line in drawn["section-1-refusal-figure-2"]["data"]}
    assert lines["behavior"]["y"] == [0.4, 0.9, 0.97, 1.0, 0.2]
    assert lines["behavior, 95 %"]["y"] == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.3])
    assert lines["behavior, test, n = 32"]["y"] == [0.03, 0.97]
    control = lines["random control, test"]
    assert (control["x"], control["y"]) == ([1.5], [0.04])
    (shade,) = drawn["section-1-refusal-figure-2"]["layout"]["shapes"]
    assert (shade["x0"], shade["x1"]) == (1.0, 2.0)
    lines = {line["name"]: line for line in drawn["section-1-refusal-figure-3"]["data"]}
    assert lines["damage (on-target KL)"]["y"] == [0.4] * 5
    assert lines["spill (off-target KL)"]["y"] == [0.9] * 5 and lines["budget"]["y"] == [0.5] * 5


def test_every_figure_says_its_split_and_how_many_prompts() -> None:
    for figure in steered_section(steered()).figures:
        assert re.search("[Tt]est split|Validation split", figure["caption"])
        assert "n = 32" in figure["caption"]


def test_every_color_of_a_figure_is_one_of_the_page_in_both_modes() -> None:
    text = page()
    light, dark = text.split("@media (prefers-color-scheme: dark)", 1)
    dark = dark.split("* { box-sizing", 1)[0]
    used = set(re.findall(r"var\((--[a-z-]+)\)", text))
    assert {"--vector", "--null-band", "--window"} <= used
    for name in used:
        assert f"{name}:" in light and f"{name}:" in dark, name


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_colors_have_enough_contrast(mode: str) -> None:
    text = page()
    blocks = re.findall(r":root \{(.*?)\}", text, re.S)
    colors = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", blocks[mode == "dark"]))

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(colors[a]), luminance(colors[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for text in ("--ink", "--soft", "--vector"):
        for ground in ("--paper", "--card"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("--warn-ink", "--warn") >= 4.5
    for line in (
        "--baseline",
        "--prompt",
        "--baked",
        "--null",
        "--coherence",
        "--damage",
        "--spill",
    ):
        assert contrast(line, "--card") >= 3, line


def test_the_answer_names_every_lever_and_its_figure() -> None:
    text = answer(steered())
    assert "at layer 2, m = +1.5 (alpha 3.21, 10 % of the norm), takes" in text
    for part in ("3 %", "97 %", "32", "87 %", "60 %", "random control 4 %", "96 %"):
        assert part in text
    bare = answer(steered(without=("prompt", "checkpoint", "null")))
    assert bare.endswith("with coherence 98 %.")


def test_no_warning_for_a_good_vector_and_one_for_each_fault() -> None:
    assert warnings(steered()) == []
    (collapse,) = warnings(steered(vector=figures(0.97, coherence=0.2)))
    assert "Collapse" in collapse and "20 %" in collapse
    (chance,) = warnings(steered(null=figures(0.9)))
    assert "No evidence" in chance
    (plain,) = warnings(steered(prompt=figures(0.99)))
    assert "plain prompt does as well" in plain
    (baked,) = warnings(steered(baked=BakeReport("bias", Path("baked"), 1.0, False)))
    assert "same text" in baked
    good = steered()
    (missed,) = warnings(replace(good, tuned=replace(good.tuned, window=None)))
    assert "No window: 90 %" in missed
    (refused,) = warnings(steered(baked="no exact route", without=("checkpoint",)))
    assert "no exact route" in refused


def test_bars_leave_out_what_was_not_measured() -> None:
    figure = steered_section(steered(without=("checkpoint", "prompt"))).figures[0]
    assert figure["data"][0]["y"] == ["unsteered", "vector", "random control"]
