"""The inputs of `make demo`: checkpoints in the released format, and a photograph.

python -m agln_fast.bench.demo FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from agln_fast.bench.weights import random_network, released_state_dict
from agln_fast.models.checkpoint import save_checkpoint

__all__ = ["main"]


def main(folder: Path) -> None:
    """Write `agln.pth` and `fpn.pth` as released, `agln_lite.safetensors`, and `photograph.png` into `folder`."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.coffee()).save(folder / "photograph.png")
    for name, preset in (("agln", "agln_release_resnet50"), ("fpn", "fpn_resnet50")):
        released = released_state_dict(random_network(preset, num_classes=59))
        torch.save({"state_dict": released, "epoch": 0}, folder / f"{name}.pth")
    save_checkpoint(random_network("agln_lite_resnet50", num_classes=59), folder / "agln_lite.safetensors")
    print(f"{folder}: three ResNet-50 checkpoints and a photograph.")
    print("The weights are random and deterministic, not trained: the masks show that the path works, no more.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
