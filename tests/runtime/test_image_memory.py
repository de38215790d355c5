"""The largest image that is admitted fits: at most 6 bytes a pixel are needed beside the 3 of the decoded image."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deep_images import GREY, RGB, png, pnm, tiff
from PIL import Image

HEIGHT, WIDTH = 2000, 3000
BESIDE = 6  # bytes a pixel
STRIPS = 8 << 20  # bytes: what strips, decoders and thread pools take, whatever the size of the image

# Each case runs in a child of its own, whose peak starts at what it holds when it is forked.
SCRIPT = """
import json, os, resource, sys
import numpy as np, torch
from PIL import Image
from agln_fast.contract import IOContract
from agln_fast.data.classes import default_class_set
from agln_fast.runtime.images import fit, load_image
from agln_fast.runtime.result import Result, Timing

def peak(function, source):
    own, other = os.pipe()
    if not os.fork():
        argument = source()
        with open("/proc/self/statm") as statm:
            before = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        kept = function(argument)
        os.write(other, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before).encode())
        os._exit(0)
    os.close(other)
    with open(own) as answer:
        text = answer.read()
    os.wait()
    return int(text)

height, width = json.loads(sys.argv[2])
shape = (height, width)
image = lambda: np.full((*shape, 3), 7, np.uint8)
result = lambda: Result(np.full(shape, 2, np.uint8), image(), default_class_set(21), Timing(0, 0, 0))
cases = {name: (load_image, lambda name=name: name) for name in json.loads(sys.argv[1])}
cases |= {
    "float64 array": (load_image, lambda: np.full((*shape, 3), 0.5)),
    "uint16 array": (load_image, lambda: np.full(shape, 60000, np.uint16)),
    "RGBA array": (load_image, lambda: np.full((*shape, 4), 7, np.uint8)),
    "float32 tensor": (load_image, lambda: torch.full((3, *shape), 0.5)),
    "bfloat16 tensor": (load_image, lambda: torch.full((3, *shape), 0.5, dtype=torch.bfloat16)),
    "RGB in Pillow": (load_image, lambda: Image.new("RGB", shape[::-1], "red")),
    "fit": (lambda array: fit(array, IOContract(512, 512)), image),
    "overlay": (lambda result: result.save(sys.argv[3] + "/x.png"), result),
    "labels": (lambda result: result.save(sys.argv[3] + "/x.png", kind="labels"), result),
}
for suffix in (".png", ".jpg", ".tif", ".ppm"):  # what Pillow and the legend need once
    Image.new("RGB", (64, 64)).save(sys.argv[3] + "/once" + suffix)
    load_image(sys.argv[3] + "/once" + suffix)
Result(np.zeros((64, 64), np.uint8), load_image(sys.argv[3] + "/once.png"), default_class_set(21), None).overlay()
print(json.dumps({name: peak(*case) / height / width for name, case in cases.items()}))
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Bytes a pixel that each case takes at most, without its source where that is in memory."""
    folder = tmp_path_factory.mktemp("large")
    for name, write in FILES.items():
        write(folder / name)
    names = [str(folder / name) for name in FILES]
    arguments = [json.dumps(names), json.dumps([HEIGHT, WIDTH]), str(folder)]
    answer = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, capture_output=True, text=True)
    return {Path(name).name: peak for name, peak in json.loads(answer.stdout).items()}


def ramp(depth: int, channels: int = 1) -> np.ndarray[Any, Any]:
    values = np.linspace(0, 2**depth - 1, HEIGHT).round().astype(np.uint16)[:, None, None]
    return np.ascontiguousarray(np.broadcast_to(values, (HEIGHT, WIDTH, channels)))


def turned(mode: str) -> Callable[[Path], None]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return lambda path: Image.new(mode, (WIDTH, HEIGHT), "red").save(path, exif=exif)


FILES: dict[str, Callable[[Path], Any]] = {
    "16-bit-grey.png": lambda path: path.write_bytes(png(ramp(16), GREY)),
    "12-bit-rgb.png": lambda path: path.write_bytes(png(ramp(12, 3), RGB, (12, 12, 12))),
    "10-bit.ppm": lambda path: path.write_bytes(pnm(ramp(10, 3), 1023)),
    "32-bit.tif": lambda path: path.write_bytes(tiff(ramp(8), 32)),
    "turned.jpg": turned("RGB"),
    "turned.png": turned("RGBA"),
    "turned.tif": turned("RGB"),
    "palette.png": lambda path: Image.new("P", (WIDTH, HEIGHT)).save(path, transparency=bytes([100] * 256)),
    "cmyk.jpg": lambda path: Image.new("CMYK", (WIDTH, HEIGHT)).save(path),
    "float.tif": lambda path: Image.new("F", (WIDTH, HEIGHT), 0.5).save(path),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_memory_beside_the_decoded_image(peaks: dict[str, float]) -> None:
    returned = dict.fromkeys(FILES, 3)
    returned |= dict.fromkeys([name for name in peaks if name.endswith(("array", "tensor", "Pillow"))], 3)
    over = {name: round(peak - returned.get(name, 0) - STRIPS / HEIGHT / WIDTH, 2) for name, peak in peaks.items()}
    assert len(over) == len(FILES) + 9
    assert max(over.values()) <= BESIDE, over
