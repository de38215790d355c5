"""Run by test_layers.py on a stand-in for the CUDA driver: one layer, attached, told its shapes and run.

    python attached.py HARNESS LIBRARY NAME RECORD BATCH THREADS

prints a JSON object: "created", "attached", "shape" and "enqueue" (what these returned), "messages", and "launches" of
all threads.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from pathlib import Path
from tempfile import mkdtemp


def main(harness: str, library: str, name: str, record: str, batch: str, threads: str) -> None:
    log = Path(mkdtemp()) / "launches.txt"
    os.environ["FAKE_CUDA_LOG"] = str(log)
    native = ctypes.CDLL(harness)
    native.create.restype = native.attach.restype = ctypes.c_void_p
    native.messages.restype = ctypes.c_char_p
    data = Path(record).read_bytes()
    layer = native.create(library.encode(), name.encode(), data, len(data), 0)
    # Without threads the layer itself runs, as where an engine is built.
    attached = [native.attach(ctypes.c_void_p(layer)) for _ in range(int(threads))] or [layer] if layer else [None]
    answer = {"created": layer is not None, "attached": all(attached)}
    if all(attached):
        shapes = (ctypes.c_int * 6)(2, int(batch), 4, 2, int(batch), 4)  # an input (B, 4) and an output (B, 4)
        places = [(ctypes.c_void_p * 1)(place) for place in (int(os.environ.get("INPUT_AT", "0x1000"), 0), 0x2000)]
        answer["shape"] = native.shape(ctypes.c_void_p(attached[0]), shapes, 1, 1)
        statuses = []

        def run(each: int) -> None:
            for _ in range(50 if len(attached) > 1 else 1):
                status = native.enqueue(ctypes.c_void_p(each), shapes, 1, 1, *places, ctypes.c_void_p(0x3000))
                statuses.append(status)

        workers = [threading.Thread(target=run, args=(each,)) for each in attached]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        answer["enqueue"] = sorted(set(statuses))
        for each in attached:
            native.destroy(ctypes.c_void_p(each))
    answer["messages"] = native.messages().decode()
    driver = ctypes.CDLL("libcuda.so.1")
    answer["modules"] = [driver.fake_loaded(), driver.fake_unloaded()]
    answer["launches"] = log.read_text().splitlines() if log.exists() else []
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
