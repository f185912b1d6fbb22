"""Verification: a real reload, and the reloaded model against the hooked one.

Tensors are compared bit by bit with what was meant, always. Models that fit into memory are loaded
as a user would load them and compared in logits and greedy text; of a larger one, a slice of two
blocks is, one of them steered, cut out of the base and out of the result.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from trimtab.errors import TrimtabError
from trimtab.models.chat import Prompt
from trimtab.models.checked_weights import read_weights
from trimtab.models.model import LanguageModel
from trimtab.steering.weights import Scaled
from trimtab.weights.disk.checkpoint import open_checkpoint
from trimtab.weights.disk.draft import Draft, stray_tensors
from trimtab.weights.disk.layout import layout_of
from trimtab.weights.disk.sources import Copy, copied
from trimtab.weights.plan import BakeReport

ANSWER_TOKENS = 24
WHOLE = "logits and greedy text of the whole model, every tensor bit by bit"
SLICE = "every tensor bit by bit, logits of a slice of two blocks"


@dataclass(frozen=True, eq=False)
class Base:
    """The unsteered model: at hand, or a folder it can be loaded from.

    `target` is where the result will be, as errors call it; `attention` the implementation that
    transformers uses; `routed` says that it is a mixture of experts.
    """

    folder: Path
    target: Path
    name: str = ""
    lm: LanguageModel | None = None
    dtype: torch.dtype = torch.float32
    attention: str | None = None
    routed: bool = False

    @property
    def half(self) -> bool:
        return self.dtype not in (torch.float32, torch.float64)

    @property
    def tolerance(self) -> float:
        """The difference allowed, as a share of the largest logit (at least of 1)."""
        return 8 * torch.finfo(self.dtype).eps if self.half else 1e-5

    def unequal(self, found: str) -> TrimtabError:
        """Make the error of a checkpoint that is not what it was meant to be."""
        return TrimtabError(
            asked=f"a checkpoint at {self.target} equal to the hooked model",
            found=f"after saving and reloading: {found}",
            advice="nothing was left there; steer with the hook: `with vector.on(lm):`",
        )


def fits_memory(nbytes: int) -> bool:
    """Whether a model of so many bytes can be loaded beside what it needs to run."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            found = next(line for line in stream if line.startswith("MemAvailable:"))
        available = int(found.split()[1]) << 10
    except (OSError, StopIteration, ValueError):
        return True
    return 1.3 * nbytes + (1 << 30) < available


def compare_tensors(base: Base, draft: Draft, folder: Path) -> int:
    """Compare every tensor on disk with what was meant, bit by bit; return how many.

    Raises:
        TrimtabError: a tensor on one side only, of another shape, or with other values; names that
            the architecture does not know.
    """
    written, meant = open_checkpoint(folder), draft.tensors()
    layout = layout_of(written.config, written.dtype)
    stray, missing, wrong = stray_tensors(written, layout)
    if stray:
        raise base.unequal(f"tensors that {layout.short} does not know and drops: {stray[:4]}")
    if missing or wrong:
        raise base.unequal(f"tensors missing or of another shape: {(missing + wrong)[:4]}")
    for name in sorted(meant.keys() | written.tensors.keys()):
        if name not in meant or name not in written.tensors:
            raise base.unequal(f"the tensor {name} on one side only")
        fact, source = written.tensors[name], meant[name]
        if isinstance(source, Copy) and _same_place(source, copied(fact)):
            continue  # a file that the two share
        if fact.dtype != source.dtype or fact.shape != source.shape:
            raise base.unequal(f"{name} as {fact.dtype} {list(fact.shape)}")
        with open(fact.file, "rb") as stream:
            stream.seek(fact.start)
            for piece in source.pieces():
                if stream.read(len(piece)) != piece:
                    raise base.unequal(f"other values in {name}")
    return len(meant)


def compare_models(
    report: BakeReport,
    base: Base,
    folder: Path,
    vectors: Sequence[Scaled],
    prompts: Sequence[Prompt],
    decide: bool = True,
) -> BakeReport:
    """Compare the reloaded checkpoint with the hooked base model in logits and greedy text.

    With `decide` off, another comparison has judged the logits and these are only reported.

    Raises:
        TrimtabError: keys that the reload did not know, find or match; a tokenizer that encodes
            otherwise; logits or (in full precision) text that differ.
    """
    lm = base.lm if base.lm is not None else load_folder(base, base.folder)
    for vector in vectors:
        vector.check(lm)
    fingerprint, device = lm.fingerprint, lm.device
    plain = _logits(lm, prompts)
    with _all_on(vectors, lm):
        hooked, meant = _logits(lm, prompts), lm.generate(list(prompts), ANSWER_TOKENS)
    ids = [lm.encode(p).ids for p in prompts]
    del lm  # two large models need not be there at once
    baked = load_folder(base, folder)
    torch.nn.Module.to(baked.model, device)
    if [baked.encode(p).ids for p in prompts] != ids:
        raise base.unequal("a tokenizer that encodes the check prompts differently")
    seen, said = _logits(baked, prompts), baked.generate(list(prompts), ANSWER_TOKENS)
    report = _judge(report, base, hooked, seen, plain, decide)
    # In half precision the hook rounds in another order, so near-ties may break differently; there
    # float32 arithmetic judges, where memory allows, and the text is reported.
    if not base.half and said != meant:
        raise base.unequal("other greedy answers than the hooked model gives")
    return replace(report, verified=WHOLE, equal_text=said == meant, base_fingerprint=fingerprint)


def compare_wide(
    report: BakeReport,
    base: Base,
    folder: Path,
    vectors: Sequence[Scaled],
    prompts: Sequence[Prompt],
) -> float | None:
    """Return the largest logit difference when weights of half precision are used in float32.

    What is left is the rounding of the weights alone. In half precision itself, two orders of
    rounding may send a token to other experts, or break other near-ties.

    Raises:
        TrimtabError: more than the rounding of the stored weights explains.
    """
    wide = replace(base, lm=None, dtype=torch.float32)
    lm = load_folder(wide, base.folder)
    plain = _logits(lm, prompts)
    with _all_on([replace(v, fingerprint="") for v in vectors], lm):
        hooked = _logits(lm, prompts)
    del lm
    baked = _logits(load_folder(wide, folder), prompts)
    return _judge(report, base, hooked, baked, plain).max_logit_difference


def compare_slices(
    report: BakeReport, base: Base, folders: tuple[Path, Path], vectors: Sequence[Scaled]
) -> BakeReport:
    """Compare two slices (of the base with the hook, of the result) on fixed token ids.

    In float32, so that only the rounding of the stored weights is left.
    """
    wide = replace(base, dtype=torch.promote_types(base.dtype, torch.float32))
    models = [load_model(wide, folder) for folder in folders]
    tokenizer: Any = AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    lm, baked = (LanguageModel(model, tokenizer, base.name) for model in models)
    rows = int(models[0].get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, rows, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, after = lm.model(ids).logits.float(), baked.model(ids).logits.float()
        with _all_on(vectors, lm):
            hooked = lm.model(ids).logits.float()
    return replace(_judge(report, base, hooked, after, plain), verified=SLICE)


def _judge(
    report: BakeReport,
    base: Base,
    hooked: Tensor,
    baked: Tensor,
    plain: Tensor,
    decide: bool = True,
) -> BakeReport:
    """Put the differences of logits `[..., vocab]` into the report; refuse what is too much."""
    apart = (baked - hooked).abs().flatten(0, -2).amax(dim=-1)
    difference = float(apart.max())
    # Rounding can send single tokens of a mixture to other experts; a wrong checkpoint is wrong at
    # every token.
    decisive = float(apart.median()) if base.routed and base.half else difference
    allowed = base.tolerance * max(1.0, float(hooked.abs().max()))
    if decide and not decisive <= allowed:
        raise base.unequal(f"logits that differ by {decisive:.3g}, {allowed:.3g} allowed")
    return replace(
        report,
        max_logit_difference=difference,
        tolerance=allowed,
        steering_effect=float((hooked - plain).abs().max()),
    )


@contextmanager
def _all_on(vectors: Sequence[Scaled], lm: LanguageModel):
    """Switch several steerings on, the first outermost."""
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.on(lm))
        yield


def load_folder(base: Base, folder: Path) -> LanguageModel:
    """Load a checkpoint with its tokenizer as a user would."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    name = base.name if folder == base.folder else str(base.target)
    return LanguageModel(load_model(base, folder), tokenizer, name=name)


def load_model(base: Base, folder: Path) -> Any:
    """Load weights; every key must be known, found and of the right shape."""
    options = {} if base.attention is None else {"attn_implementation": base.attention}
    try:
        model, faults = read_weights(folder, dtype=base.dtype, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise base.unequal(f"it cannot be loaded: {str(error).splitlines()[0]}") from error
    if faults:
        raise base.unequal(f"loading faults: {faults}")
    return model.eval()


def _logits(lm: LanguageModel, prompts: Sequence[Prompt]) -> Tensor:
    """Return the logits of every real token, float32 `[tokens, vocab]`."""
    parts = []
    with torch.no_grad():
        for batch in lm.batches([lm.encode(p) for p in prompts]):
            parts.append(lm.forward(batch)[batch.attention_mask.bool()].float().cpu())
    return torch.cat(parts)


def _same_place(meant: Copy, written: Copy) -> bool:
    if len(meant.spans) != 1:
        return False
    (a,), (b,) = meant.spans, written.spans
    here = (a.start, a.nbytes, meant.dtype, meant.shape)
    there = (b.start, b.nbytes, written.dtype, written.shape)
    return here == there and os.path.samefile(a.file, b.file)
