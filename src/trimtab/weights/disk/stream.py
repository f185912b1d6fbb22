"""Writing a checkpoint out of core: only files that change are written, a piece at a time.

Files whose tensors all stay are shared with the base (a hard link) or copied. New tensors go to a
file of their own when the base has several, so that a steered 70B checkpoint may take kilobytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.results import Progress
from trimtab.results.tables import write_json
from trimtab.weights.disk.checkpoint import INDEX, SINGLE, Checkpoint
from trimtab.weights.disk.draft import Draft
from trimtab.weights.disk.sources import (
    Copy,
    ProjectedSource,
    TensorSource,
    copied,
    copy_bytes,
    nbytes,
)

# Alignment of the tensors' first byte, as the safetensors library writes it.
_ALIGN = 8
_NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
_OWN = ("config.json", INDEX, "README.md", "trimtab_bake.json")


@dataclass(frozen=True)
class OutFile:
    """One safetensors file of the result; `shared` is the base's file that holds exactly this."""

    name: str
    tensors: tuple[tuple[str, TensorSource], ...]
    shared: Path | None

    @property
    def nbytes(self) -> int:
        return sum(nbytes(source) for _, source in self.tensors)


def arrange(draft: Draft) -> list[OutFile]:
    """Distribute the tensors over files: those of the base where they were, new ones apart."""
    base, tensors = draft.base, draft.tensors()
    groups: dict[Path | None, dict[str, TensorSource]] = {file: {} for file in base.files}
    for name, source in tensors.items():
        home = source.home
        if home is None and len(base.files) == 1:
            home = base.files[0]
        groups.setdefault(home, {})[name] = source
    used = [(home, group) for home, group in groups.items() if group]
    known = {file.name for file in base.files}
    keep = all(home is not None for home, _ in used) and (len(used) > 1 or known == {SINGLE})
    found = []
    for number, (home, group) in enumerate(used, start=1):
        if keep and home is not None:
            name = home.name
        elif len(used) == 1:
            name = SINGLE
        else:
            name = f"model-{number:05d}-of-{len(used):05d}.safetensors"
        found.append(OutFile(name, tuple(group.items()), home if _same(base, home, group) else None))  # fmt: skip
    return found


def _same(base: Checkpoint, home: Path | None, group: Mapping[str, TensorSource]) -> bool:
    """Whether a file of the base holds exactly these tensors, under these names."""
    there = {name: copied(fact) for name, fact in base.tensors.items() if fact.file == home}
    return there == {n: s for n, s in group.items() if isinstance(s, Copy)} and len(there) == len(group)  # fmt: skip


def write(draft: Draft, folder: Path, link: bool = True, progress: Progress | None = None) -> None:
    """Write weights, index, configuration and everything that belongs to them into a folder.

    The draft knows the rounding of computed tensors afterwards.

    Raises:
        OSError: the disk is full, or the base changed under our hands.
    """
    files = arrange(draft)
    total, done = sum(file.nbytes for file in files), 0
    weight_map: dict[str, str] = {}
    for file in files:
        target = folder / file.name
        if file.shared is None:
            _write_file(file, target)
        else:
            _share(file.shared, target, link)
        weight_map |= {name: file.name for name, _ in file.tensors}
        done += file.nbytes
        if progress is not None:
            progress(done, total)
    computed = [s.rounding for s in draft.tensors().values() if isinstance(s, ProjectedSource)]
    if computed:
        draft.rounding["tensors updated"] = max(computed)
    if [file.name for file in files] != [SINGLE]:
        kept = {k: v for k, v in draft.base.metadata.items() if k != "total_parameters"}
        index = {"metadata": {**kept, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}  # fmt: skip
        write_json(folder / INDEX, index)
    write_json(folder / "config.json", draft.raw)
    _carry(draft.base.folder, folder)


def _write_file(file: OutFile, target: Path) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, source in file.tensors:
        header[name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [at, at + nbytes(source)],
        }
        at += nbytes(source)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, source in file.tensors:
            if isinstance(source, Copy):
                for span in source.spans:
                    copy_bytes(span, out)
            else:
                out.writelines(source.pieces())
        out.flush()
        os.fsync(out.fileno())
        if out.tell() != 8 + len(text) + at:
            raise OSError(f"{target.name} came out {out.tell()} bytes long, {8 + len(text) + at} meant")  # fmt: skip


def _share(source: Path, target: Path, link: bool) -> None:
    real = Path(os.path.realpath(source))  # a link to a symbolic link would break with it
    if link:
        try:
            os.link(real, target)
            return
        except OSError:  # another file system, or one without links
            pass
    _copy_file(real, target)


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb") as out:
        os.fsync(out.fileno())


def _carry(base: Path, folder: Path) -> None:
    """Take along tokenizer, generation configuration, chat templates, licenses."""
    for path in sorted(base.iterdir()):
        skip = path.name in _OWN or path.name.startswith(".") or path.suffix in _NOT_CARRIED
        if path.is_file() and not skip and not path.name.endswith(".index.json"):
            _copy_file(path, folder / path.name)
    templates = base / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def check_space(draft: Draft, target: Path, link: bool) -> None:
    """Refuse, before anything is written, what does not fit on the disk.

    Raises:
        TrimtabError: names what is needed and what is free.
    """
    parent = next(p for p in target.absolute().parents if p.exists())
    same = os.stat(parent).st_dev == os.stat(os.path.realpath(draft.base.files[0])).st_dev
    written = [file for file in arrange(draft) if file.shared is None or not (link and same)]
    # A little more for the small files and the file system's own needs.
    needed = sum(file.nbytes for file in written) + (64 << 20)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise TrimtabError(
            asked=f"to write a checkpoint to {target}",
            found=f"{free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed",
            advice="free some space, or choose a folder on another disk",
        )
