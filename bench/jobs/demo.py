"""The two ends of `make demo`: pictures to segment, and what the engines made of them side by side, as in Fig. 6.

python -m agln_fast.bench.jobs.demo pictures FOLDER
python -m agln_fast.bench.jobs.demo compare FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from agln_fast.data.scenes import Scenes, write_scenes
from agln_fast.figures.comparison import Example, draw_comparison
from agln_fast.figures.saving import save_figure
from agln_fast.runtime.images import load_image
from agln_fast.runtime.segmenter import load

__all__ = ["compare", "pictures"]

NETWORKS = {"FPN": "fpn.agln", "AGLN": "agln.agln"}
TITLE = "Small networks, trained on drawn scenes only, as in the first rows: do not expect sense on photographs."
SCENES = (1, 5, 9)
"""Numbers in the test split; chosen for what is in them before any network had seen them."""


def pictures(folder: Path) -> None:
    """Write scenes with their ground truth into `folder`/scenes, and a photograph."""
    from skimage import data

    scenes = Scenes("test")
    write_scenes((scenes[number] for number in SCENES), folder / "scenes")
    Image.fromarray(data.camera()).save(folder / "photograph.png")
    print(f"{folder}: {len(SCENES)} scenes with their labels, and a photograph (Lav Varshney, CC0)")


def compare(folder: Path) -> None:
    """Segment them with the engines of both bundles, and write `folder`/comparison.png."""
    images = [*sorted((folder / "scenes" / "images").iterdir()), folder / "photograph.png"]
    predictions = []
    for file in NETWORKS.values():
        with load(folder / file) as segment:
            predictions.append([segment(path).labels for path in images])
    examples = []
    for path, *labels in zip(images, *predictions, strict=True):
        truth = folder / "scenes" / "labels" / path.name
        known = np.array(Image.open(truth)) if truth.exists() else None
        examples.append(Example(load_image(path), known, labels, path.stem))
    figure = draw_comparison(examples, list(NETWORKS), Scenes("test").class_set, title=TITLE)
    save_figure(figure, folder / "comparison.png")
    print(f"{folder / 'comparison.png'}: input, ground truth, {', '.join(NETWORKS)}")


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("pictures", "compare"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"pictures": pictures, "compare": compare}[arguments.step](arguments.folder)


if __name__ == "__main__":
    main()
