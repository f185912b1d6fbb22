"""Sites: the places in a network that can be read and written, found from its module tree.

Names differ between architectures, so names only propose; what a block adds to its stream is
followed through the tensors of one tiny probe forward and then checked by numbers:
`resid_mid = resid_pre + attn_out` and `resid_post = resid_mid + mlp_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from trimtab.errors import TrimtabError
from trimtab.models.hooking import Tap
from trimtab.models.probe import probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_ATTENTION_WRITERS = ("o_proj", "c_proj", "dense", "out_proj", "wo")
_MLP_WRITERS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")


@dataclass(frozen=True)
class Site:
    """A place in the network: `str(Site("resid_post", 3)) == "resid_post.3"`.

    `embed` is the stream that enters block 0, after any embedding scale and position embeddings;
    `attn_out` and `mlp_out` are the vectors that are added to the stream (after a post-norm and a
    residual multiplier).
    """

    kind: str
    layer: int

    def __post_init__(self) -> None:
        """Refuse a kind that does not exist."""
        if self.kind not in KINDS or not isinstance(self.layer, int) or self.layer < 0:
            raise TrimtabError(
                f"site {self.kind}.{self.layer}",
                "no such site",
                f"use one of {', '.join(KINDS)} with a layer from 0, such as resid_post.3",
            )
        if self.kind == "embed" and self.layer != 0:
            raise TrimtabError(
                f"site embed.{self.layer}", "embeddings enter at layer 0", "use embed.0"
            )

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return f"{self.kind}.{self.layer}"

    @staticmethod
    def parse(text: str | Site) -> Site:
        """Read "resid_post.3" (or "embed").

        Raises:
            TrimtabError: The text names no site.
        """
        if isinstance(text, Site):
            return text
        kind, _, layer = str(text).partition(".")
        if kind == "embed" and not layer:
            layer = "0"
        if not layer.isascii() or not layer.isdigit():
            raise TrimtabError(
                f"site {text!r}",
                "no such site",
                f"use one of {', '.join(KINDS)} and a layer: resid_post.3",
            )
        return Site(kind, int(layer))


@dataclass(frozen=True, eq=False)
class Sites:
    """The modules of a causal language model by their role.

    Attributes:
        trunk: The module that owns the blocks and is called with the tokens.
        blocks: The decoder blocks.
        embedding: Token embedding.
        final_norm: The norm after the last block, or None.
        unembedding: The output projection.
        attention: Attention module of each block.
        mlp: MLP (or mixture of experts) module of each block.
        attention_writer: Output projection of each attention module, or None.
        mlp_writer: Output projection of each MLP, or None (a mixture of experts has many).
        residual_multiplier: Factor on what a sublayer adds (Granite), else 1.
        post_norm: Whether a sublayer's output passes a norm before it is added (Gemma 2/3, OLMo 2).
        parallel: Whether attention and MLP read the same stream, so that there is no `resid_mid`.
        refused: Kinds of site that this model lacks, with the reason.
    """

    trunk: nn.Module
    blocks: nn.ModuleList
    embedding: nn.Module
    final_norm: nn.Module | None
    unembedding: nn.Module
    attention: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]
    attention_writer: tuple[nn.Module | None, ...]
    mlp_writer: tuple[nn.Module | None, ...]
    residual_multiplier: float
    post_norm: bool
    parallel: bool
    refused: dict[str, str]
    # The module whose output (times the multiplier) is added, and the one whose input is resid_mid.
    attention_added: tuple[nn.Module, ...] = field(repr=False)
    mlp_added: tuple[nn.Module, ...] = field(repr=False)
    middle: tuple[nn.Module, ...] = field(repr=False)

    def check(self, site: Site) -> None:
        """Refuse a site that this model does not have."""
        if site.layer >= len(self.blocks):
            raise TrimtabError(
                f"site {site}",
                f"a model of {len(self.blocks)} layers",
                f"use 0 to {len(self.blocks) - 1}",
            )
        if site.kind in self.refused:
            choices = [kind for kind in KINDS if kind not in self.refused]
            raise TrimtabError(
                f"site {site}", self.refused[site.kind], f"use one of {', '.join(choices)}"
            )

    def reading(self, site: Site) -> Tap:
        """Where the site's value is seen; refuses a site that the model does not have."""
        if site.kind != "resid_mid":
            return self.writing(site)
        self.check(site)
        return Tap(self.middle[site.layer], on_input=True)

    def writing(self, site: Site) -> Tap:
        """Where a change of the site's value takes effect on everything downstream.

        The middle of a block is no module's output, so it is changed through what the attention
        adds. Refuses a site that the model does not have.
        """
        self.check(site)
        if site.kind in ("embed", "resid_pre"):
            return Tap(self.blocks[site.layer], on_input=True)
        if site.kind == "resid_post":
            return Tap(self.blocks[site.layer], on_input=False)
        added = self.mlp_added if site.kind == "mlp_out" else self.attention_added
        return Tap(added[site.layer], on_input=False, scale=self.residual_multiplier)


def find_sites(model: PreTrainedModel) -> Sites:
    """Find a causal language model's sites and verify them with one tiny forward of three tokens.

    Args:
        model: A Hugging Face causal language model; left exactly as it was.

    Raises:
        TrimtabError: No stack of decoder blocks, or no output projection, is found.
    """
    found = probe(model)
    parts = found.parts
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise TrimtabError(
            f"the sites of {type(model).__name__}",
            "no output projection to the vocabulary",
            "load it as a causal language model",
        )
    return Sites(
        trunk=found.trunk,
        blocks=found.blocks,
        embedding=model.get_input_embeddings(),
        final_norm=found.final_norm,
        unembedding=unembedding,
        attention=tuple(part.attention for part in parts),
        mlp=tuple(part.mlp for part in parts),
        attention_writer=tuple(_writer(part.attention, _ATTENTION_WRITERS) for part in parts),
        mlp_writer=tuple(_writer(part.mlp, _MLP_WRITERS) for part in parts),
        residual_multiplier=found.residual_multiplier,
        post_norm=any(part.post_norm for part in parts),
        parallel=any(part.parallel for part in parts),
        refused=found.refused,
        attention_added=tuple(part.attention_added for part in parts),
        mlp_added=tuple(part.mlp_added for part in parts),
        middle=tuple(part.middle for part in parts),
    )


def _writer(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """A sublayer's output projection."""
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)
