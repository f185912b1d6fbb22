"""The page itself, in Gradio: what is where, and which function answers to what."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial, wraps
from itertools import takewhile
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.themes import Default
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles

from trimtab.behaviors import built_in_names
from trimtab.behaviors.behavior import Behavior
from trimtab.behaviors.file import load_behavior
from trimtab.errors import TrimtabError
from trimtab.methods import METHODS
from trimtab.models.model import LanguageModel
from trimtab.results import Progress
from trimtab.results.tables import clean
from trimtab.steering.load import load_steering
from trimtab.steering.vector import VectorSteering
from trimtab.strength.core import Bounds
from trimtab.studio import views
from trimtab.studio.desk import Desk, Turns, clear, new_desk
from trimtab.studio.lever import Lever
from trimtab.studio.uploads import Page
from trimtab.studio.workshop import Workbench, Workshop, written_behavior

LOOPBACK = ("127.0.0.1", "localhost")
WRITE, FILE = "write my own", "from a file"
# What a behavior of one's own is written in, and lines of each field: see `written_behavior`.
FIELDS = {
    "Name": 1,
    "Prompts whose answers show it, one a line": 5,
    "Prompts whose answers do not": 5,
    "Phrases of answers that show it, one a line": 3,
    "Phrases of the opposite (optional)": 3,
    "Neutral prompts (optional)": 3,
}
CSS = Path(__file__).with_name("studio.css")
# A stream of answers is drawn at most so often, in seconds.
FRAME = 0.08
# A visitor's files go an hour after the visitor.
KEEP_SECONDS = 3600
# An idle page lets go of its connection after so long, in seconds: a phone that falls asleep
# with an open one loses its page.
STAY_SECONDS = 600
# What is being answered when the app is ended has so long to finish, in seconds.
LEAVE_SECONDS = 2
EMPTY = '<div class="tt-fine">Find a vector, or open a steering file, to move the slider.</div>'
# Two moves may be under way at once; the page says when each was made.
STAMPED = "(desk, prompt, m, _) => [desk, prompt, m, performance.now()]"
SHOWN = ("warning", "answers", "gauges", "tokens", "samples")  # what a move of the slider changes
BAR = gr.Progress()  # a default argument of this type is how Gradio hands one out


def serve(lm: LanguageModel, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the app until it is interrupted; `ready` is called with its address when it listens.

    Other machines reach it only if the host is not loopback; port 0 takes any free one.
    """
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise TrimtabError(
            f"to listen on {host}, port {port}", str(error), "choose another --port or --host"
        ) from error
    with listening, tempfile.TemporaryDirectory(prefix="trimtab-studio-") as root:
        app = application(Workshop(lm), Path(root), host)
        # Open pages keep a connection for as long as they stand: they do not keep the app alive.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LEAVE_SECONDS)
        server = uvicorn.Server(config)
        ready(f"http://{host}:{listening.getsockname()[1]}")
        server.run(sockets=[listening])


def application(workshop: Workshop, root: Path, host: str = "127.0.0.1") -> FastAPI:
    """Return the web application; visitors' files are made in folders of `root`."""
    app = FastAPI(openapi_url=None)
    if host in LOOPBACK:
        # A page elsewhere whose name is made to point here must not reach the app.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    app.mount("/made", StaticFiles(directory=root))
    return gr.mount_gradio_app(
        app,
        build(workshop, root),
        path="/",
        theme=Default(
            primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        css_paths=CSS,
        footer_links=[],
        show_error=False,
        max_file_size="64mb",
        ssr_mode=False,
        # Its addresses would use the token of whoever runs the app for whoever asks.
        run_history=False,
    )


def build(workshop: Workshop, root: Path) -> gr.Blocks:
    """Lay the page out and connect it."""
    act = Actions(workshop, root)
    with Page(
        title="Trimtab Studio", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)
    ) as page:
        desk = gr.State(None, time_to_live=None, delete_callback=clear)
        name = views.inert(str(workshop.lm.name))
        gr.HTML(
            f"<h1>Trimtab Studio</h1><p>Steer <b>{name}</b>: find a lever, set how hard to pull, "
            "see what moves and what breaks.</p>",
            elem_id="tt-title",
        )
        with gr.Accordion("1  Behavior and vector", open=True) as setup:
            with gr.Row():
                source = gr.Dropdown(
                    [*built_in_names(), WRITE, FILE], value="refusal", label="Behavior",
                    elem_id="tt-behavior",
                )  # fmt: skip
                method = gr.Dropdown(
                    list(METHODS), value="mean_difference", label="Method", elem_id="tt-method"
                )
                side = gr.Radio(["toward", "away"], value="toward", label="Steer")
                budget = gr.Slider(
                    0.1, 2.0, value=0.5, step=0.1, label="Budget of damage (on-target KL), nats"
                )
            with gr.Group(visible=False) as form, gr.Row():
                fields = [gr.Textbox(label=at, lines=n, min_width=240) for at, n in FIELDS.items()]
            file = gr.File(
                label="Behavior file", file_types=[".yaml", ".yml", ".jsonl"], visible=False
            )
            with gr.Row():
                find = gr.Button("Find and tune", variant="primary", elem_id="tt-find")
                upload = gr.UploadButton(
                    "Open a steering file", file_types=[".safetensors"], elem_id="tt-open"
                )
        status = gr.HTML("", elem_id="tt-status")
        with gr.Row():
            prompt = gr.Textbox(
                "How do I borrow the harbor ledger?", label="Prompt", elem_id="tt-prompt",
                lines=1, max_lines=6, submit_btn="Answer", scale=3, min_width=300,
            )  # fmt: skip
            held_out = gr.Dropdown(
                [], label="or a held-out prompt", elem_id="tt-heldout", scale=2, min_width=300
            )
        strength = gr.Slider(
            -2, 2, value=0, step=0.05, label="Strength m", elem_id="tt-strength", buttons=[]
        )
        warning = gr.HTML(EMPTY, elem_id="tt-warning")
        answers = gr.HTML(views.answers_view("", "", 0, False), elem_id="tt-answers")
        gauges = gr.HTML("", elem_id="tt-gauges")
        with gr.Accordion("Tokens by projection on the direction", open=True):
            tokens = gr.HTML("", elem_id="tt-tokens")
        with gr.Accordion("The answers behind the gauges", open=False):
            samples = gr.HTML("", elem_id="tt-samples")
        with gr.Accordion("2  Levers side by side", open=False, elem_id="tt-compare-box"):
            words = gr.Textbox(label="A prompt lever to measure beside it (optional)", lines=1)
            compare = gr.Button("Measure at this strength", elem_id="tt-compare")
            levers = gr.HTML("")
        with gr.Accordion("3  Why it works", open=False, elem_id="tt-explain-box"):
            why = gr.Button("Explain at this strength", elem_id="tt-explain")
            explained = gr.HTML("")
        with gr.Accordion("4  Take it away", open=False, elem_id="tt-take-box"):
            with gr.Row():
                bake = gr.Button("Bake a checkpoint", elem_id="tt-bake")
                save = gr.Button("Steering file", elem_id="tt-save")
            baked, saved = gr.HTML("", elem_id="tt-baked"), gr.HTML("", elem_id="tt-saved")

        made = [desk, status, setup, strength, held_out, prompt]
        shown = [warning, answers, gauges, tokens, samples]
        at = [desk, prompt, strength, gr.Number(visible=False)]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        long: dict[str, Any] = {"show_progress": "full", "api_visibility": "private"}
        move: dict[str, Any] = {
            "fn": act.show, "inputs": at, "outputs": shown, "js": STAMPED, **quiet
        }  # fmt: skip
        page.load(act.arrive, desk, desk, **quiet)
        gr.on(
            [page.load, find.click, upload.upload, strength.input, prompt.submit, held_out.input],
            act.stay, desk, None, trigger_mode="once", concurrency_limit=None, **quiet,
        )  # fmt: skip
        source.change(act.forms, source, [form, file], **quiet)
        chosen = [desk, source, file, *fields, method, side, budget]
        find.click(act.find, chosen, made, show_progress_on=status, **long).then(**move)
        opened = [upload, *chosen]
        upload.upload(act.open, opened, made, show_progress_on=status, **long).then(**move)
        # While one move is answered, of all further ones only the last is.
        strength.input(**move, trigger_mode="always_last")
        prompt.submit(**move, trigger_mode="always_last")
        held_out.input(lambda text: text, held_out, prompt, **quiet).then(**move)
        compare.click(act.compare, [desk, strength, words], levers, **long)
        why.click(act.explain, [desk, strength], explained, **long)
        bake.click(act.bake, [desk, strength], baked, **long)
        save.click(act.save, [desk, strength], saved, **quiet)
    page.queue(default_concurrency_limit=8, api_open=False)
    return page


def _said(function: Callable[..., str]) -> Callable[..., str]:
    """Show what a user asked wrongly where the result would have been."""

    @wraps(function)
    def run(*args: Any) -> str:
        try:
            return function(*args)
        except TrimtabError as error:
            return views.refusal_view(error)

    return run


class Actions:
    """What the page's events do; everything that belongs to a visitor is in the desk."""

    def __init__(self, workshop: Workshop, root: Path) -> None:
        self.workshop, self.root = workshop, root

    def arrive(self, desk: Desk | None) -> Desk:
        """Give a visitor a desk, once."""
        return desk or new_desk(self.root)

    async def stay(self, desk: Desk | None) -> AsyncIterator[None]:
        """Keep a page's stream of results open while its visitor is at work.

        Gradio closes the stream when nothing is under way, and what is asked while it closes is
        never answered: the page takes the closing stream for an open one.
        """
        turns = desk.turns if desk else Turns()
        while (idle := turns.idle()) < STAY_SECONDS:
            await asyncio.sleep(STAY_SECONDS - idle)
            yield

    def forms(self, source: str) -> tuple[Any, Any]:
        """Show the fields that a behavior of this source needs."""
        return gr.update(visible=source == WRITE), gr.update(visible=source == FILE)

    def find(self, desk: Desk | None, *chosen: Any, progress: Any = BAR) -> tuple[Any, ...]:
        *source, method, side, budget = chosen
        sign, bounds = 1 if side == "toward" else -1, Bounds(budget=budget)
        bars = partial(_report, progress)
        return self._put(
            desk, lambda: self.workshop.find(_behavior(*source), method, sign, bounds, bars)
        )

    def open(
        self, path: str, desk: Desk | None, *chosen: Any, progress: Any = BAR
    ) -> tuple[Any, ...]:
        *source, _, _, budget = chosen
        bounds, bar = Bounds(budget=budget), _report(progress, "measuring the slider's range")
        return self._put(
            desk, lambda: self.workshop.take(_behavior(*source), _vector(path), bounds, bar)
        )

    def show(
        self, desk: Desk | None, prompt: str, m: float, at: float
    ) -> Iterator[tuple[Any, ...]]:
        """Answer a move of the slider: gauges as soon as they are known, answers as they grow.

        A move that is no longer the last one falls silent: what it shows would be out of date.
        """
        desk = self.arrive(desk)
        last = desk.turns.take(at)
        try:
            yield from takewhile(lambda _: last(), self._shown(desk.ready, prompt, float(m)))
        except TrimtabError as error:
            yield _changed(warning=views.refusal_view(error))

    @_said
    def compare(self, desk: Desk | None, m: float, words: str, progress: Any = BAR) -> str:
        bench, bar = self._at(desk).ready, _report(progress, "measuring")
        return views.measurement_view(self.workshop.compare(bench, m, words, bar))

    @_said
    def explain(self, desk: Desk | None, m: float, progress: Any = BAR) -> str:
        desk = self._at(desk)
        folder = desk.folder / f"why-{time.time_ns():x}"
        page = self.workshop.explain(desk.ready, m, folder, _report(progress, "explaining"))
        return views.page_view(desk.url(page))

    @_said
    def bake(self, desk: Desk | None, m: float, progress: Any = BAR) -> str:
        desk = self._at(desk)
        made = self.workshop.bake(desk.ready, m, desk.folder, _report(progress, "baking"))
        return views.link_view(desk.url(made), made.name, made.stat().st_size)

    @_said
    def save(self, desk: Desk | None, m: float) -> str:
        desk = self._at(desk)
        made = self.workshop.save(desk.ready, m, desk.folder)
        return views.link_view(desk.url(made), made.name, made.stat().st_size)

    def _at(self, desk: Desk | None) -> Desk:
        # A desk that holds nothing yet needs no folder to say so.
        return desk or Desk(self.root)

    def _shown(self, bench: Workbench, prompt: str, m: float) -> Iterator[tuple[Any, ...]]:
        lever, before, after, drawn = bench.lever, "", "", 0.0
        if lever.known(m):
            yield _changed(**_gauges(lever, m))
        for before, after in self.workshop.answers(bench, prompt, m):
            if time.monotonic() - drawn >= FRAME:
                drawn = time.monotonic()
                yield _changed(answers=views.answers_view(before, after, m, False))
        answers = views.answers_view(before, after, m, True)
        samples = views.samples_view(lever.read(m))
        yield _changed(**_gauges(lever, m), answers=answers, samples=samples)
        shades = [self.workshop.tokens(bench, prompt, text) for text in (before, after)]
        yield _changed(tokens=views.tokens_view(shades[0], shades[1], lever.vector))

    def _put(self, desk: Desk | None, make: Callable[[], Workbench]) -> tuple[Any, ...]:
        """Put a new bench on a desk, or say why there is none."""
        desk = self.arrive(desk)
        try:
            bench = make()
        except TrimtabError as error:
            return desk, views.refusal_view(error), *[gr.skip()] * 4
        lever, prompts = bench.lever, bench.prompts()
        # The slider's stops are multiples of its step, counted from its lower end.
        m = round(lever.vector.strength / lever.step) * lever.step
        return (
            replace(desk, bench=bench),
            views.lever_view(bench.behavior, lever, bench.note),
            gr.update(open=False),
            gr.update(minimum=-lever.reach, maximum=lever.reach, step=lever.step, value=m),
            gr.update(choices=[clean(p) for p in prompts], value=None),
            clean(prompts[0]),
        )


def _changed(**shown: str) -> tuple[Any, ...]:
    """What a move shows; everything else stays as it is."""
    return tuple(shown.get(name, gr.skip()) for name in SHOWN)


def _gauges(lever: Lever, m: float) -> dict[str, str]:
    gauges = views.gauges_view(lever, lever.read(m))
    return {"warning": views.warnings_view(lever, m), "gauges": gauges}


def _vector(path: str) -> VectorSteering:
    vector = load_steering(path)
    if not isinstance(vector, VectorSteering):
        raise TrimtabError(
            "to put this file on the slider",
            "a prompt, which has no strength",
            "open a file with a vector",
        )
    return vector


def _behavior(source: str, file: str | None, *fields: str) -> Behavior:
    if source == WRITE:
        return written_behavior(*fields)
    if source == FILE:
        if not file:
            raise TrimtabError(
                "a behavior from a file", "no file", "choose a .yaml or .jsonl file first"
            )
        return load_behavior(file)
    if source not in built_in_names():
        raise TrimtabError(f"the behavior {source!r}", "no such name", "choose one of the list")
    return load_behavior(source)


def _report(progress: Any, stage: str) -> Progress:
    return lambda done, total: progress((done, total), desc=stage)
