"""Pages of sections: what is drawn is what was given, and no text breaks out of the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from report.test_report import EVIL, Page
from trimtab.errors import TrimtabError
from trimtab.report.figures import (
    COLORS,
    Band,
    Bars,
    Series,
    bar_figure,
    described,
    heat_figure,
    line_figure,
)
from trimtab.report.page import Section, render, write_page
from trimtab.results.tables import Table


def line(**more: Any) -> dict[str, Any]:
    series = [Series("kl", [0, 1, 2], [0.0, 0.5, 2.0], "--damage")]
    return line_figure("alpha", "nats", series, **{"description": "It rises.", **more})


def section(**more: Any) -> Section:
    parts: dict[str, Any] = {
        "title": "Divergence",
        "paragraphs": ("It is quadratic.",),
        "figures": (line(caption="KL"),),
        "tables": (Table("figures", ("m", "kl"), (("1", "0.5"),), ("in nats",)),),
        "warnings": ("Not far.",),
    }
    return Section(**(parts | more))


def test_a_page_opens_offline(tmp_path: Path) -> None:
    index = write_page(tmp_path / "laws", [section(), section(title="More")], lead="Of harbor.")
    assert {p.name for p in index.parent.iterdir()} == {"index.html", "plotly.min.js"}
    page = Page(index.read_text())
    assert [a["src"] for _, a in page.tags if a.get("src")] == ["plotly.min.js"]
    links = [a["href"] or "" for tag, a in page.tags if tag in ("a", "link")]
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert len(links) == 3 and all(x.startswith("#") and x[1:] in ids for x in links)
    assert "http" not in re.sub(r"<script.*?</script>", "", index.read_text(), flags=re.S)
    shown = "".join(page.shown)
    for part in ("Divergence", "It is quadratic.", "KL", "figures", "0.5", "in nats", "Not far."):
        assert part in shown
    assert "Of harbor." in shown and "It rises." in shown


def test_figures_reach_the_page_unchanged_and_described() -> None:
    html = render([section()], title="t")
    page = Page(html)
    (plot,) = [a for _, a in page.tags if a.get("role") == "img"]
    assert plot["aria-label"] == "It rises."
    (data,) = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', html, re.S)
    assert data[0] == plot["data-figure"]
    assert json.loads(data[1])["data"][0]["y"] == [0.0, 0.5, 2.0]
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings == [1, 2]


@pytest.mark.parametrize("place", ["title", "paragraphs", "figures", "tables", "warnings", "page"])
def test_text_is_escaped_everywhere(place: str) -> None:
    evil: dict[str, Any] = {
        "title": EVIL,
        "paragraphs": (EVIL,),
        "warnings": (EVIL,),
        "tables": (Table(EVIL, (EVIL,), ((EVIL,),), (EVIL,)),),
        "figures": (
            line_figure(EVIL, EVIL, [Series(EVIL, [1], [1])], description=EVIL, caption=EVIL),
            bar_figure([EVIL], EVIL, [Bars(EVIL, [1.0])], caption=EVIL),
            heat_figure(
                [EVIL],
                [EVIL],
                [[1.0]],
                x_label=EVIL,
                y_label=EVIL,
                value_label=EVIL,
                description=EVIL,
            ),
        ),
    }
    given = section(**({place: evil[place]} if place in evil else {}))
    heading = EVIL if place == "page" else "t"
    html = render([given], title=heading, lead=heading)
    page = Page(html)
    figures = len(given.figures)
    assert len([t for t, _ in page.tags if t == "script"]) == figures + 2
    assert not [t for t, _ in page.tags if t == "img"]
    assert "alert(1)" in "".join(page.shown)
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.S):
        names = json.dumps([json.loads(data)["data"], json.loads(data)["layout"]])
        # Plotly reads tags in names and ticks; <extra> is its own.
        assert "<" not in re.sub("</?extra>", "", names)


def test_every_color_is_one_of_the_page_in_both_modes() -> None:
    html = render([section()], title="t")
    light, dark = html.split("@media (prefers-color-scheme: dark)", 1)
    dark = dark.split("* { box-sizing", 1)[0]
    for name in (*COLORS, "--null-band", "--window", "--card", "--ink"):
        assert f"{name}:" in light and f"{name}:" in dark, name


def test_text_columns_are_left_and_numbers_right() -> None:
    table = Table("", ("m", "verdict", "error"), (("1", "holds", "1e-3"), ("2", "fails", "–")))
    html = render([section(tables=(table,))], title="t")
    assert '<td class="text">holds</td>' in html and "<td>1e-3</td>" in html
    assert '<th scope="col" class="text">verdict</th>' in html


def test_a_page_of_nothing_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no sections"):
        write_page(tmp_path / "laws", [])
    assert not (tmp_path / "laws").exists()
    (tmp_path / "laws").write_text("mine")
    with pytest.raises(TrimtabError):
        write_page(tmp_path / "laws", [section()])
    assert (tmp_path / "laws").read_text() == "mine"


def test_lines_bands_and_window() -> None:
    figure = line_figure(
        "alpha",
        "nats",
        [
            Series("predicted", torch.tensor([1.0, 2.0]), [0.5, math.nan], "--vector", "dash"),
            Series("measured", [1, 2], [None, 2.0], "--damage", "markers"),
            Series("measured", [1, 2], [1.0, math.inf], "--damage", "markers"),
        ],
        log_x=True,
        log_y=True,
        bands=[Band("random control", [1, 2], [0.1, 0.2], [0.3, 0.4])],
        window=(2.0, 0.5),
    )
    low, high, predicted, measured, again = figure["data"]
    assert (low["y"], high["y"], high["fill"]) == ([0.1, 0.2], [0.3, 0.4], "tonexty")
    assert predicted["y"] == [0.5, None] and predicted["line"]["dash"] == "dash"
    assert (measured["mode"], measured["showlegend"], again["showlegend"]) == (
        "markers",
        True,
        False,
    )
    assert again["y"] == [1.0, None]
    assert figure["layout"]["xaxis"]["type"] == figure["layout"]["yaxis"]["type"] == "log"
    (shade,) = figure["layout"]["shapes"]
    assert (shade["x0"], shade["x1"]) == (0.5, 2.0)
    assert figure["label"].startswith("nats, by alpha. predicted: 0.50 at 1.00; measured: 2.00 at")
    json.dumps(figure, allow_nan=False)


@pytest.mark.parametrize("window", [None, (math.nan, 1.0), (0.0, math.inf)])
def test_a_window_without_ends_is_not_drawn(window: tuple[float, float] | None) -> None:
    assert "shapes" not in line(window=window)["layout"]
    assert len(line(window=(0.0, 1.0))["layout"]["shapes"]) == 1


def test_bars_with_intervals() -> None:
    measured = Bars("measured", [(0.5, 0.4, 0.7), (0.9, 0.8, math.nan)])
    bars = [measured, Bars("random control", [0, None])]
    figure = bar_figure(["1", "2024-01-01"], "share", bars)
    assert figure["label"] == (
        "share. measured: 1 0.50 [0.40, 0.70], 2024-01-01 0.90; random control: 1 0.00, 2024-01-01 –"
    )
    first, second = figure["data"]
    assert first["y"] == ["1", "2024-01-01"] and figure["layout"]["yaxis"]["type"] == "category"
    assert first["error_x"]["array"] == pytest.approx([0.2, 0.0])
    assert first["error_x"]["arrayminus"] == pytest.approx([0.1, 0.1])
    assert "error_x" not in second and second["x"] == [0, None]


def test_equal_labels_keep_a_place_each() -> None:
    figure = bar_figure([" a", " a"], "share", [Bars("p", [0.1, 0.2])])
    assert len(set(figure["data"][0]["y"])) == 2


def test_heat_has_holes_and_a_scale() -> None:
    options: dict[str, Any] = {
        "x_label": "x",
        "y_label": "y",
        "value_label": "v",
        "description": "d",
    }
    grid = torch.tensor([[1.0, math.nan], [-3.0, 2.0]])
    (heat,) = heat_figure(["a", "b"], ["c", "d"], grid, **options)["data"]
    assert heat["z"] == [[1.0, None], [-3.0, 2.0]] and "zmin" not in heat and "zmid" not in heat
    (heat,) = heat_figure(["a", "b"], ["c", "d"], grid, diverging=True, **options)["data"]
    assert heat["zmid"] == 0 and heat["colorscale"][1] == [0.5, "var(--card)"]
    (heat,) = heat_figure(["a", "b"], ["c", "d"], grid, ends=(0.0, 1.0), **options)["data"]
    assert (heat["zmin"], heat["zmax"]) == (0.0, 1.0)
    (heat,) = heat_figure([], [], [], **options)["data"]
    assert heat["z"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: line_figure("x", "y", [Series("a", [1, 2], [1])]),
        lambda: line_figure("x", "y", [Series("a", [1], [1], "red")]),
        lambda: line_figure("x", "y", [Series("a", [1], [1], "--vector", "wavy")]),
        lambda: bar_figure(["a"], "v", [Bars("p", [1, 2])]),
        lambda: heat_figure(
            ["a"], ["b"], [[1, 2]], x_label="x", y_label="y", value_label="v", description="d"
        ),
    ],
)
def test_figures_that_do_not_fit_are_refused(wrong: Any) -> None:
    with pytest.raises((AssertionError, ValueError)):
        wrong()


def test_lines_in_words() -> None:
    said = described("kl", [0, 1, 2, 3], [0.5, 3.0, math.nan, 1.0])
    assert (
        said == "kl: from 0.50 at 0.00 to 1.00 at 3.00, highest 3.00 at 1.00, lowest 0.50 at 0.00"
    )
    assert described("kl", [0, 1, 2], [None, 0.5, 3.0]) == "kl: 0.50 at 1.00, 3.00 at 2.00"
    assert "nothing" in described("kl", [1], [None])
