"""The report: figures reach the page, no text breaks out of it, and nothing is fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trimtab.errors import TrimtabError
from trimtab.report import write_report, write_svg
from trimtab.report.figures import lever_bars, null_band, strength_curve
from trimtab.report.page import render
from trimtab.report.words import answer, warnings

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SVG = "{http://www.w3.org/2000/svg}"


def row(score: float, **more: Any) -> dict[str, Any]:
    kl = {"damage": 0.12, "damage_p95": 0.4, "spill": 0.3, "spill_p95": 0.9}
    edges = {"low": max(0.0, score - 0.1), "high": min(1.0, score + 0.1)}
    return {"score": score, **edges, "n": 32, "coherence": 0.98, **kl, **more}


def entry(**more: Any) -> dict[str, Any]:
    strengths = [-3.0, -1.5, 0.0, 1.5, 3.0]
    base = {
        "description": "Declines a request.",
        "baseline": row(0.03),
        "prompt": row(0.6),
        "vector": row(0.97),
        "baked": row(0.96),
        "null": row(0.04),
        "strength": 1.5,
        "layers": [2],
        "alpha": {"2": 3.21},
        "method": "next_token",
        "scope": "all",
        "window": [1.0, 2.0],
        "curve": [{"strength": m, **row(0.97 if m else 0.03)} for m in strengths],
        "null_curve": [{"strength": m, **row(0.04)} for m in (-3.0, 3.0)],
        "methods": [{"method": "pca", "scope": "all", "chosen": False, "refused": "no gain"}],
        "samples": [{"prompt": "Where is it?", "before": "At the pier.", "after": "I cannot say."}],
        "baked_matches_hook": {"max_logit_difference": 2e-6, "equal_text": True},
    }
    return {**base, **more}


def data(**behaviors: Any) -> dict[str, Any]:
    return {
        "model": "harbor",
        "fingerprint": "9f8e7d",
        "versions": {"torch": "2.13.0"},
        "seconds": 71.2,
        "behaviors": behaviors or {"refusal": entry()},
    }


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
    index = write_report(tmp_path / "report", data())
    assert {p.name for p in index.parent.iterdir()} == {"index.html", "plotly.min.js"}
    assert (index.parent / "plotly.min.js").stat().st_size > 1_000_000
    page = Page(index.read_text())
    sources = [a["src"] for _, a in page.tags if a.get("src")]
    assert sources == ["plotly.min.js"]
    links = [a["href"] or "" for tag, a in page.tags if tag in ("a", "link")]
    ids = {a.get("id") for _, a in page.tags}
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert "http" not in re.sub(r"<script.*?</script>", "", index.read_text(), flags=re.S)


@pytest.mark.parametrize("place", ["prompt", "before", "after", "model", "name", "description"])
def test_text_of_models_and_users_is_escaped_everywhere(place: str) -> None:
    sample = {"prompt": "p", "before": "b", "after": "a"} | {place: EVIL}
    told = entry(samples=[sample], description=EVIL if place == "description" else "")
    name = EVIL if place == "name" else "refusal"
    given = data(**{name: told}) | ({"model": EVIL} if place == "model" else {})
    before = Page(render(data()))
    page = Page(render(given))
    assert [t for t, _ in page.tags if t == "script"] == [
        t for t, _ in before.tags if t == "script"
    ]
    assert not [t for t, _ in page.tags if t == "img"]
    assert "alert(1)" in "".join(page.shown)  # the text itself is there, harmless


def test_a_conversation_is_shown_with_its_roles() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    sample = {"prompt": prompt, "before": "b", "after": "a"}
    text = "".join(Page(render(data(refusal=entry(samples=[sample])))).shown)
    assert "system: Be brief." in text and "user: Where?" in text


def test_figures_are_described_for_those_who_do_not_see_them() -> None:
    page = Page(render(data()))
    labels = [a["aria-label"] or "" for _, a in page.tags if a.get("role") == "img"]
    assert len(labels) == 2
    assert "vector 97 %" in labels[0] and "random vector 4 %" in labels[0]
    assert "Window: 1 to 2" in labels[1]
    headings = [int(t[1]) for t, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(
        b - a <= 1 for a, b in zip(headings, headings[1:], strict=False)
    )  # no level left out
    assert [a for t, a in page.tags if t == "html"] == [{"lang": "en"}]


def test_the_figures_in_the_page_are_the_data() -> None:
    html = render(data())
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', html, re.S)
    figures = {name: json.loads(text) for name, text in found}
    bars = figures["behavior-refusal-bars"]["data"][0]
    assert bars["x"] == [0.04, 0.96, 0.97, 0.6, 0.03]
    assert bars["error_x"]["array"] == pytest.approx([0.1, 0.04, 0.03, 0.1, 0.1])
    assert bars["error_x"]["arrayminus"] == pytest.approx([0.04, 0.1, 0.1, 0.1, 0.03])
    lines = {line.get("name"): line for line in figures["behavior-refusal-curve"]["data"]}
    assert lines["behavior"]["y"] == [0.97, 0.97, 0.03, 0.97, 0.97]
    assert lines["damage"]["y"] == [0.12] * 5 and lines["damage"]["yaxis"] == "y2"


def test_every_color_of_a_figure_is_one_of_the_page_in_both_modes() -> None:
    html = render(data())
    light, dark = html.split("@media (prefers-color-scheme: dark)", 1)
    dark = dark.split("* { box-sizing", 1)[0]
    used = set(re.findall(r"var\((--[a-z-]+)\)", html))
    assert {"--vector", "--null-band", "--window"} <= used
    for name in used:
        assert f"{name}:" in light and f"{name}:" in dark, name


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_colors_have_enough_contrast(mode: str) -> None:
    html = render(data())
    blocks = re.findall(r":root \{(.*?)\}", html, re.S)
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
    text = answer("refusal", entry())
    for part in ("layer 2", "1.50", "3 %", "97 %", "32", "87 %", "60 %", "4 %", "96 %"):
        assert part in text


def test_no_warning_for_a_good_vector_and_one_for_each_fault() -> None:
    assert warnings("refusal", entry()) == []
    (collapse,) = warnings("refusal", entry(vector=row(0.97, coherence=0.2)))
    assert "Collapse" in collapse and "20 %" in collapse
    (chance,) = warnings("refusal", entry(null=row(0.9)))
    assert "No evidence" in chance
    (plain,) = warnings("refusal", entry(prompt=row(0.99)))
    assert "plain prompt does as well" in plain
    (baked,) = warnings("refusal", entry(baked_matches_hook={"equal_text": False}))
    assert "same text" in baked


def test_what_was_refused_is_said() -> None:
    html = render(data(mood={"description": "", "refused": "No strength passes. pca: no gain"}))
    assert "No strength passes. pca: no gain" in html


def test_a_behavior_with_only_its_levers_is_enough() -> None:
    bare = {lever: {"score": 0.5, "n": 4} for lever in ("baseline", "vector")}
    html = render({"model": "m", "behaviors": {"mood": bare}})
    assert "50 %" in html and "–" in html


def test_data_without_behaviors_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="behaviors"):
        write_report(tmp_path / "report", {"model": "harbor", "behaviors": {}})
    assert not (tmp_path / "report").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(TrimtabError):
        write_report(tmp_path / "report", data())
    assert (tmp_path / "report").read_text() == "mine"


def test_the_band_spans_all_random_directions() -> None:
    rows = [
        {"strength": 1.0, "score": 0.1, "low": 0.0, "high": 0.2},
        {"strength": 1.0, "score": 0.3, "low": 0.2, "high": 0.5},
        {"strength": -1.0, "score": 0.1},
    ]
    assert null_band(rows) == ([-1.0, 1.0], [0.1, 0.0], [0.1, 0.5])


def test_the_window_and_the_chosen_strength_are_marked() -> None:
    shapes = strength_curve("refusal", entry())["layout"]["shapes"]
    assert [(s["x0"], s["x1"]) for s in shapes] == [(1.0, 2.0), (1.5, 1.5)]
    assert not strength_curve("refusal", entry(window=None, strength=None))["layout"]["shapes"]


def test_bars_leave_out_what_was_not_measured() -> None:
    figure = lever_bars("refusal", entry(baked=None, prompt=None))
    assert figure["data"][0]["y"] == ["random vector", "vector", "unsteered"]


def test_the_picture_is_drawn_to_scale(tmp_path: Path) -> None:
    path = write_svg(tmp_path / "images" / "demo.svg", data(refusal=entry(), mood=entry()))
    root = ElementTree.fromstring(path.read_text())
    assert [t.text for t in root.iter(f"{SVG}text") if t.get("font-size") == "15"] == [
        "refusal",
        "mood",
    ]
    curves = [p.get("points", "").split() for p in root.iter(f"{SVG}polyline")]
    assert len(curves) == 4 and all(len(points) == 5 for points in curves)
    points = [tuple(map(float, point.split(","))) for point in curves[1]]
    assert points == sorted(points)  # by rising strength
    assert points[2][1] - points[1][1] == pytest.approx(0.94 * 150, abs=0.2)
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("rx") == "1.5"]
    widths = [float(bar.get("width", "0")) for bar in bars[:5]]
    assert [w / widths[2] for w in widths] == pytest.approx(
        [s / 0.97 for s in (0.03, 0.6, 0.97, 0.96, 0.04)], abs=0.01
    )


def test_the_picture_escapes_names(tmp_path: Path) -> None:
    path = write_svg(tmp_path / "demo.svg", data(**{EVIL: entry()}))
    root = ElementTree.fromstring(path.read_text())  # well formed, so nothing broke out
    assert not list(root.iter(f"{SVG}script")) and not list(root.iter("script"))


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError):
        write_svg(tmp_path / "demo.svg", data(mood={"refused": "no"}))
    assert not (tmp_path / "demo.svg").exists()
