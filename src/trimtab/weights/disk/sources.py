"""Where the bytes of a tensor to be written come from: copied, computed piece by piece, or small.

No source ever holds more than one small piece of a large tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from trimtab.weights.disk.checkpoint import DTYPES, NAMES, TensorFact

PIECE = 16 << 20
Bytes = bytes | bytearray | memoryview


class TensorSource(Protocol):
    """What can be written as one tensor of a safetensors file.

    `home` is the file of the base checkpoint that the tensor belongs to, or None for a new one.
    """

    @property
    def dtype(self) -> str:
        """Dtype, in the words of the safetensors format."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def home(self) -> Path | None: ...

    def pieces(self) -> Iterator[Bytes]:
        """Its bytes, a piece at a time."""
        ...


def nbytes(source: TensorSource) -> int:
    """Return the bytes of a source."""
    return math.prod(source.shape) * DTYPES[source.dtype].itemsize


@dataclass(frozen=True)
class ByteSpan:
    """Bytes of a file of the base checkpoint."""

    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class Copy:
    """Bytes of the base, one span or several in a row: whole tensors, rows of them, stacks."""

    spans: tuple[ByteSpan, ...]
    dtype: str
    shape: tuple[int, ...]

    @property
    def home(self) -> Path | None:
        return self.spans[0].file if self.spans else None

    def rows(self, first: int, last: int) -> Copy:
        """Return rows `[first, last)` of a tensor of one span."""
        (span,) = self.spans
        width = span.nbytes // self.shape[0]
        part = ByteSpan(span.file, span.start + first * width, (last - first) * width)
        return Copy((part,), self.dtype, (last - first, *self.shape[1:]))

    def pieces(self) -> Iterator[Bytes]:
        for span in self.spans:
            with open(span.file, "rb", buffering=0) as stream:
                stream.seek(span.start)
                for at in range(0, span.nbytes, PIECE):
                    yield _exactly(stream, min(PIECE, span.nbytes - at))

    def read(self, first: int, last: int) -> Tensor:
        """Return rows `[first, last)` of the tensor seen as a table of its last dimension."""
        width = self.shape[-1] * DTYPES[self.dtype].itemsize
        start, stop = first * width, last * width
        block, at = bytearray(), 0
        for span in self.spans:
            low, high = max(start, at), min(stop, at + span.nbytes)
            if low < high:
                with open(span.file, "rb", buffering=0) as stream:
                    stream.seek(span.start + low - at)
                    more = _exactly(stream, high - low)
                block = more if not block else block + more
            at += span.nbytes
        flat = torch.frombuffer(block, dtype=DTYPES[self.dtype])
        return flat.view(last - first, self.shape[-1])


def copied(fact: TensorFact) -> Copy:
    """Return a whole tensor of the base."""
    return Copy((ByteSpan(fact.file, fact.start, fact.nbytes),), fact.dtype, fact.shape)


def stacked(parts: list[Copy], shape: tuple[int, ...]) -> Copy:
    """Return copies one after the other as one tensor of `shape`."""
    return Copy(tuple(span for part in parts for span in part.spans), parts[0].dtype, shape)


def value_of(source: TensorSource) -> Tensor:
    """Return a small source as a tensor."""
    block = bytearray(b"".join(bytes(piece) for piece in source.pieces()))
    return torch.frombuffer(block, dtype=DTYPES[source.dtype]).view(source.shape)


@dataclass(frozen=True, eq=False)
class Value:
    """A small tensor that is at hand, already in the dtype of the checkpoint."""

    tensor: Tensor
    home: Path | None = None

    @property
    def dtype(self) -> str:
        return NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def pieces(self) -> Iterator[Bytes]:
        yield raw_bytes(self.tensor)


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros."""

    dtype: str
    shape: tuple[int, ...]
    home: Path | None = None

    def pieces(self) -> Iterator[Bytes]:
        for at in range(0, nbytes(self), PIECE):
            yield bytes(min(PIECE, nbytes(self) - at))


@dataclass(eq=False)
class ProjectedSource:
    """W seen through an affine map of the residual stream: every vector w it writes is A w + b.

    A low-rank term `plus` = (B, C) is added to what comes out: A W + B C.

    A = I - U V^T has the rank of the number of directions. With rows as the stream's dimension
    (a Linear's `[d_model, in]`), A W = W - U (V^T W); with columns (an embedding's `[tokens,
    d_model]`, a Conv1D's `[in, d_model]`), the same for every row: w - (w V) U^T + b.

    Attributes:
        base: the tensor, `[..., rows, columns]`; leading dimensions are matrices of their own.
        left: U, float64 `[d_model, rank]`.
        right: V, float64 `[d_model, rank]`.
        by_rows: whether the rows are the stream's dimension.
        shift: b, float64 `[d_model]`, only with columns.
        plus: B `[d_model, k]` and C `[k, inner]`, float64; one matrix only.
    """

    base: Copy
    left: Tensor
    right: Tensor
    by_rows: bool
    shift: Tensor | None = None
    plus: tuple[Tensor, Tensor] | None = None
    error: float = field(default=0.0, init=False)
    change: float = field(default=0.0, init=False)

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def home(self) -> Path | None:
        return self.base.home

    @property
    def rounding(self) -> float:
        """||stored - meant|| / ||meant - base|| of what was written so far."""
        return math.sqrt(self.error / self.change) if self.change else 0.0

    def pieces(self) -> Iterator[Bytes]:
        """Compute a few rows at a time in a wider dtype, and round once."""
        self.error = self.change = 0.0
        stored_as = DTYPES[self.dtype]
        # float32 has twice the digits of half precision, and is much faster than float64.
        wide = torch.float32 if stored_as.itemsize == 2 else torch.float64
        left, right = self.left.to(wide), self.right.to(wide)
        shift = None if self.shift is None else self.shift.to(wide)
        plus = None if self.plus is None else tuple(part.to(wide) for part in self.plus)
        if plus is not None and not self.by_rows:
            plus = (plus[1].T, plus[0].T)
        *leading, rows, columns = self.base.shape
        height = max(1, PIECE // (16 * columns))
        strips = [(first, min(rows, first + height)) for first in range(0, rows, height)]
        for matrix in range(math.prod(leading)):
            at = matrix * rows
            seen = torch.zeros(right.shape[1], columns, dtype=wide)
            if self.by_rows:  # V^T W, summed over the rows
                for first, last in strips:
                    part = self.base.read(at + first, at + last).to(wide)
                    seen += right[first:last].T @ part
            for first, last in strips:
                before = self.base.read(at + first, at + last).to(wide)
                if self.by_rows:
                    meant = torch.addmm(before, left[first:last], seen, alpha=-1.0)
                else:
                    meant = torch.addmm(before, before @ right, left.T, alpha=-1.0)
                    if shift is not None:
                        meant += shift
                if plus is not None:
                    meant += plus[0][first:last] @ plus[1]
                stored = meant.to(stored_as)
                self.change += float(torch.linalg.vector_norm(before.sub_(meant))) ** 2
                self.error += float(torch.linalg.vector_norm(meant.sub_(stored))) ** 2
                yield raw_bytes(stored)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row-major and little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def copy_bytes(span: ByteSpan, out: BinaryIO) -> None:
    """Append a span to an open file, in the kernel where the system can."""
    with open(span.file, "rb", buffering=0) as stream:
        start, left = span.start, span.nbytes
        out.flush()
        while left and hasattr(os, "copy_file_range"):
            try:
                done = os.copy_file_range(stream.fileno(), out.fileno(), left, start)
            except OSError:  # another file system, or one that cannot
                break
            if not done:
                break
            start, left = start + done, left - done
        out.seek(0, os.SEEK_END)
        stream.seek(start)
        while left:
            block = _exactly(stream, min(left, PIECE))
            out.write(block)
            left -= len(block)


def _exactly(stream: RawIOBase, count: int) -> bytearray:
    block = bytearray(count)
    rest = memoryview(block)
    while rest:
        done = stream.readinto(rest)
        if not done:
            raise OSError("a file of the base checkpoint became shorter while it was read")
        rest = rest[done:]
    return block
