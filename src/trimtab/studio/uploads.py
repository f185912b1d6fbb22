"""A page whose events get no file of the server but those that were uploaded to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import gradio as gr

from trimtab.errors import TrimtabError
from trimtab.studio.views import refusal_view


class Page(gr.Blocks):
    """A browser names what it uploaded by the path on the server, so a client may name any path."""

    def __init__(self, **options: Any) -> None:
        """Begin a page; options as of `gr.Blocks`."""
        super().__init__(**options)
        # Gradio's own check of paths is off for a page that is mounted and never launched.
        self.has_launched = True

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any
    ) -> list[Any]:
        """Refuse other paths and addresses before Gradio copies or fetches what they name.

        Gradio's own check accepts addresses, and whatever lies in the folder where all Gradio apps
        of a machine keep their uploads.

        Raises:
            gr.Error: a path that was not uploaded; the page shows the text in a corner.
        """
        for path in _paths(inputs):
            if path not in self.upload_file_set and not self._gone(path):
                error = TrimtabError(
                    f"the file {PurePath(path).name!r}",
                    "not uploaded to this app",
                    "choose the file again",
                )
                raise gr.Error(refusal_view(error), print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *rest, **named)

    def _gone(self, path: str) -> bool:
        """Whether it may be an upload that was removed, which a page names until another is chosen."""
        inside = PurePath(os.path.normpath(path)).is_relative_to(self.GRADIO_CACHE)
        return inside and not os.path.lexists(path)


def _paths(data: Any) -> Iterator[str]:
    """Whatever Gradio may take for the path of a file, at any depth."""
    if isinstance(data, dict):
        if isinstance(path := data.get("path"), str):
            yield path
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _paths(item)
