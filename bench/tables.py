"""The tables behind the findings on mechanism and geometry, written from the kept results.

`python bench/tables.py` renders `bench/results/{circuits,freeze,sparsity,geometry}.json` into
`docs/measured.md`; nothing is measured here, and a test holds the page against the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "measured.md"
SHARES = ("0.5", "0.3", "0.2", "0.1", "0.05", "0.01")
SIDE = {1: "toward", -1: "away"}
FROZEN = ("qk", "ov", "svv", "mlp_direct", "mlp", "ov+mlp")
Row = Sequence[str]


def results(name: str) -> list[dict[str, Any]]:
    """One bench's kept results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def table(head: Row, rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def span(found: dict[str, float] | None, digits: int = 2) -> str:
    """A figure with its interval."""
    if found is None:
        return ""
    # Adding nothing turns -0.0 into 0.0.
    value, low, high = (round(found[key], digits) + 0.0 for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def code(token: str) -> str:
    """A token as code within a table."""
    shown = token.replace("|", "\\|")
    return f"`` {shown} ``" if "`" in token else f"`{shown}`"


def name(method: str) -> str:
    """A method as it is written."""
    return method.replace("_", " ")


def circuits() -> str:
    """Sizes with their nulls, the exchange of circuits, and what methods share."""
    sizes, exchange, shared, into, exact = [], [], [], [], []
    for one in (row for row in results("circuits") if "behavior" in row):
        behavior, swap = one["behavior"], one["interchange"]
        nulls: list[dict[str, Any]] = []
        for row in one["methods"]:
            circuit, heads = row["circuit"], row["attribution"]["into"]
            sizes.append(
                (
                    f"{behavior}, {name(row['method'])}",
                    f"{circuit['size']} ({100 * circuit['share']:.1f} %)",
                    span(circuit["held_out"]),
                    span(circuit["complement"]),
                    span(max(circuit["random"], key=lambda found: found["value"])),
                )
            )
            into.append(
                (
                    f"{behavior}, {name(row['method'])}",
                    *(f"{100 * heads[key]:.0f}" for key in heads),
                )
            )
            nulls += row.get("random_vectors", [])
            for against in row.get("against_exact", []):
                found = against["correlation"]
                exact.append(
                    (
                        f"{behavior}, {against['set']}",
                        *(f"{found[key]:.3f}" for key in ("all", "highest", "random")),
                        f"{against['rank_correlation']:.3f}",
                    )
                )
        for i, method in enumerate(swap["names"]):
            kept = [span(cell) for cell in swap["faithfulness"][i]]
            exchange.append((f"{behavior}, {name(method)}", *kept))
            shared += [
                (
                    f"{behavior}, {name(method)} and {name(other)}",
                    f"{swap['cosines'][i][j]:.2f}",
                    f"{swap['overlap'][i][j]:.2f}",
                    f"{swap['chance'][i][j]:.2f}",
                )
                for j, other in enumerate(swap["names"])
                if j > i
            ]
        for null in nulls:
            kept = span(null["its_circuit_under_the_vector"])
            exchange.append((f"{behavior}, a random vector", "", kept, ""))
    cost = [
        (
            *(str(found[key]) for key in ("layers", "tokens", "edges")),
            f"{found['seconds']:.1f}",
            f"{found['forward_passes']:.0f}",
        )
        for row in results("circuits")
        for found in row.get("cost", ())
    ]
    methods = [name(method) for method in ("mean_difference", "next_token", "preference")]
    keys = ["query", "key", "value", "mlp", "logits"]
    parts = (
        "## Circuits: size, complement, random edges\n",
        table(("vector", "edges for 0.85", "held out", "the others", "random, best"), sizes),
        "## Circuits exchanged: faithfulness of a row's circuit under a column's vector\n",
        table(("circuit of", *(f"under {method}" for method in methods)), exchange),
        "## What two methods share\n",
        table(("methods", "cosine of vectors", "shared edges", "chance"), shared),
        "## Where edges lead, % of magnitude\n",
        table(("vector", *keys), into),
        "## Attribution against exact patching: correlation\n",
        table(("set", "400 edges", "200 highest", "200 random", "rank correlation"), exact),
        "## Cost of attributing every edge, random models, one thread\n",
        table(("layers", "tokens", "edges", "seconds", "plain forward passes"), cost),
    )
    return "\n".join(parts)


def frozen() -> str:
    """Points lost per case, and what vectors say."""
    lost, said = [], []
    for case in (row for row in results("freeze") if "method" in row):
        label = f"{case['behavior']}, {name(case['method'])}, {SIDE[case['sign']]}"
        if "rows" in case:
            rows = {row["name"]: row for row in case["rows"]}
            gained = [f"{rows[key]['score']['value']:.0f}" for key in ("unsteered", "steered")]
            cells = [span(rows[key]["lost"], 0) if key in rows else "" for key in FROZEN]
            lost.append((label, " to ".join(gained), *cells))
        elif case["sign"] == 1:
            for one in case["sums"]:
                tokens = " ".join(code(token) for token in one["promoted"][:6])
                p = "" if one["p"] is None else f"{one['p']:.3f}"
                said.append((label, one["name"], f"{one['score']:.2f}", p, tokens))
    return "\n".join(
        (
            "## Frozen: points lost, case by case\n",
            table(("case", "score, %", *FROZEN), lost),
            "## What vectors say\n",
            "Score: standard deviations by which the behavior's words lead; p: random vectors that "
            "score as well.\n",
            table(("case", "read", "score", "p", "promoted tokens"), said),
        )
    )


def sparse() -> str:
    """Score by the share of dimensions kept, and what methods' dimensions have in common."""
    kept, overlaps = [], []
    for row in results("sparsity"):
        if row["kind"] == "curve":
            for key, found in row["points"].items():
                label = f"{row['behavior']}, {name(row['method'])}"
                scores = [f"{100 * found[s][0]:.0f}" if s in found else "" for s in SHARES]
                kept.append((label, key, *scores))
        elif row["kind"] == "overlap" and row["share"] == 0.2:
            label = f"{row['behavior']}, {name(row['first'])} and {name(row['second'])}"
            figures = (f"{row[key]:.2f}" for key in ("iou", "expected", "high"))
            overlaps.append((label, row["order"], *figures, f"{row['p']:.4f}"))
    return "\n".join(
        (
            "## Sparsity curves: score in % by the share of dimensions kept\n",
            table(("vector", "order, direction, norm", *(f"{float(s):.0%}" for s in SHARES)), kept),
            "## Dimensions in common at a fifth kept (intersection over union)\n",
            table(("methods", "order", "found", "chance", "95 % of chance", "p"), overlaps),
        )
    )


def _site(depths: dict[str, Any], pick: Callable[[list[str]], str]) -> list[str]:
    """|J - I| / |I| with its error, random gain and cosine, backward cosine and gain, of one site."""
    site = pick([key for key in depths if key.startswith("resid")])
    one = depths[site]
    error, (gain, cosine, _) = one["frobenius_se"], one["random"]["same"]
    backward = f"{one['backward_cosine'][0]:.2f}, {one['backward_gain'][0]:.2f}"
    return [f"{error[0]:.2f} ± {error[1]:.2f}", f"{gain:.2f} / {cosine:.2f}", backward]


def geometry() -> str:
    """The propagator of every model: first block, middle, last but one."""
    picks: tuple[Callable[[list[str]], str], ...] = (
        lambda sites: sites[0],
        lambda sites: sites[(len(sites) - 1) // 2],
        lambda sites: sites[-1],
    )
    rows = [
        (
            row["name"].removeprefix("propagator: ").replace(", random vector", ""),
            *(cell for pick in picks for cell in _site(row["depths"], pick)),
        )
        for row in results("geometry")
        if "depths" in row
    ]
    figures = ("\\|J-I\\|/\\|I\\|", "random gain / cos", "cos(g, g_L), \\|g\\|/\\|g_L\\|")
    head = [f"{where}: {what}" for where in ("first", "middle", "last but one") for what in figures]
    note = (
        "From the output of the first, the middle and the last but one block to the final stream, "
        "last prompt position; random models have four blocks, Harbor has eight.\n"
    )
    return "\n".join(
        ("## The propagator of Harbor and of random models\n", note, table(("model", *head), rows))
    )


def page() -> str:
    """The whole page."""
    lead = (
        "# Measured: the tables behind the findings\n",
        "Written by `bench/tables.py` from `bench/results`; what follows from the figures is said in "
        "[findings](findings.md). Intervals are 95 %.\n",
    )
    return "\n".join((*lead, circuits(), frozen(), sparse(), geometry()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
