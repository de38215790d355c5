"""The ends of `make demo`: pictures to segment, what the engines made of them side by side, as in Fig. 6, and a server.

python -m agln_fast.bench.jobs.demo pictures FOLDER
python -m agln_fast.bench.jobs.demo compare FOLDER
python -m agln_fast.bench.jobs.demo serve FOLDER
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from agln_fast.data.scenes import Scenes, write_scenes
from agln_fast.figures.comparison import Example, draw_comparison
from agln_fast.figures.saving import save_figure
from agln_fast.runtime.images import load_image
from agln_fast.runtime.segmenter import load

__all__ = ["compare", "pictures", "serve"]

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


def serve(folder: Path) -> None:
    """Start `agln-fast serve`, send the photograph through `tritonclient`, write `folder`/served.png, and stop it."""
    import tritonclient.grpc as client

    arguments = ["serve", str(folder / "agln.agln"), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    print(f"\n$ agln-fast {' '.join(arguments)}", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "agln_fast.cli", *arguments, "--json"], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        if not (text := server.stdout.readline()):
            raise SystemExit(f"the server has ended with {server.wait()}")
        addresses = json.loads(text)
        print(f"ready: {addresses['http']} and gRPC {addresses['grpc']}")
        image = client.InferInput("image", [1], "BYTES")
        image.set_data_from_numpy(np.array([(folder / "photograph.png").read_bytes()], object))
        outputs = [client.InferRequestedOutput(name) for name in ("overlay_png", "labels")]
        answer = client.InferenceServerClient(addresses["grpc"]).infer("agln", [image], outputs=outputs)
        overlay, labels = answer.as_numpy("overlay_png")[0], answer.as_numpy("labels")
        Image.open(io.BytesIO(overlay)).save(folder / "served.png")
        print(f"{folder / 'served.png'}: through tritonclient, labels {labels.shape} {labels.dtype}")
        server.send_signal(signal.SIGTERM)
        if code := server.wait(60):
            raise SystemExit(code)
        print("SIGTERM: the server has ended")
    finally:
        server.kill()


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("pictures", "compare", "serve"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"pictures": pictures, "compare": compare, "serve": serve}[arguments.step](arguments.folder)


if __name__ == "__main__":
    main()
