"""The README's picture: drawn to scale from demo.json, and well formed whatever the names are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from report.test_report import EVIL
from tools import readme_picture
from trimtab.errors import TrimtabError

SVG = "{http://www.w3.org/2000/svg}"


def row(score: float) -> dict[str, Any]:
    return {"score": score, "low": max(0.0, score - 0.1), "high": min(1.0, score + 0.1), "n": 32}


def entry() -> dict[str, Any]:
    levers = {"baseline": 0.03, "prompt": 0.6, "vector": 0.97, "baked": 0.96, "null": 0.04}
    curve = [{"strength": m, "coherence": 1.0, **row(m / 4)} for m in (4.0, 1.0, 2.0)]
    measured = {lever: row(score) for lever, score in levers.items()}
    return {**measured, "strength": 4.0, "window": [2.0, 4.0], "curve": curve}


def data(**behaviors: Any) -> dict[str, Any]:
    return {"model": "harbor", "behaviors": behaviors}


def test_the_picture_is_drawn_to_scale(tmp_path: Path) -> None:
    source, target = tmp_path / "demo.json", tmp_path / "images" / "demo.svg"
    source.write_text(json.dumps(data(refusal=entry(), mood=entry())))
    subprocess.run([sys.executable, readme_picture.__file__, source, target], check=True)
    root = ElementTree.fromstring(target.read_text())
    assert [t.text for t in root.iter(f"{SVG}text") if t.get("font-size") == "15"] == [
        "refusal",
        "mood",
    ]
    curves = [p.get("points", "").split() for p in root.iter(f"{SVG}polyline")]
    assert len(curves) == 4 and all(len(points) == 3 for points in curves)
    points = [tuple(map(float, point.split(","))) for point in curves[1]]
    assert points == sorted(points)  # by rising strength
    assert points[0][1] - points[2][1] == pytest.approx(0.75 * 150, abs=0.2)
    rings = [c for c in root.iter(f"{SVG}circle") if c.get("r") == "4" and c.get("cy") != "24"]
    assert len(rings) == 6  # of each behavior's test split: unsteered, random, vector
    heights = [float(ring.get("cy", "0")) for ring in rings[:3]]
    assert heights[0] - heights[2] == pytest.approx(0.94 * 150, abs=0.2)
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("rx") == "1.5"]
    widths = [float(bar.get("width", "0")) for bar in bars[:5]]
    assert [w / widths[2] for w in widths] == pytest.approx(
        [s / 0.97 for s in (0.03, 0.6, 0.97, 0.96, 0.04)], abs=0.01
    )


def test_the_picture_escapes_names() -> None:
    # Well formed, so nothing broke out.
    root = ElementTree.fromstring(readme_picture.draw(data(**{EVIL: entry()})))
    assert not list(root.iter(f"{SVG}script")) and not list(root.iter("script"))


def test_a_picture_of_nothing_is_refused() -> None:
    with pytest.raises(TrimtabError):
        readme_picture.draw(data(mood={"refused": "no"}))
