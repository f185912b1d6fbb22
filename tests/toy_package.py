"""A package as the index holds one, in small: a wheel with a GGUF file of a tiny Llama."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np

from trimtab.models.fetch import Packaged

WIDTH, INNER, LAYERS, HEADS, WORDS = 64, 96, 2, 2, 97


def write_gguf(path: Path) -> None:
    """A Llama of random weights whose embedding is Q8_0 and whose other matrices are Q4_1."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(code) for code in range(ord("!"), 127)] + ["ab"]
    writer.add_token_list(["<end>", "<start>", *letters])
    writer.add_token_types([3, 3, *[1] * len(letters)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)

    def add(name: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType) -> None:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    q4, q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    add("token_embd.weight", WORDS, WIDTH, q8)
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", WIDTH, WIDTH, q4)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{i}.{name}.weight", INNER, WIDTH, q4)
        add(f"blk.{i}.ffn_down.weight", WIDTH, INNER, q4)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(folder: Path) -> Packaged:
    """Write the wheel `toy_model-1.0` into a folder, and return what fetching it needs to know."""
    file = folder / "toy.gguf"
    write_gguf(file)
    wheel = folder / "toy_model-1.0-py3-none-any.whl"
    about = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "toy_model/toy.gguf")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return Packaged(
        requirement="toy-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="toy_model/toy.gguf",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        nbytes=file.stat().st_size,
        digits_alone=True,
        max_length=128,
        about="a toy",
    )
