"""For a server under test, by PYTHONPATH: the first pixel of a picture says what goes wrong in the engine."""

import os
import time

from colours import BREAK, DIE, RAISE, SLOW

from agln_fast.runtime.segmenter import Segmenter

_whole = Segmenter._whole
broken = []


def _faulty(self, batch):
    for each in batch:
        first = tuple(int(value) for value in each.image[0, 0])
        broken.extend([first] if first == BREAK else [])
        if first == RAISE or broken:
            raise RuntimeError("the engine has a bad day")
        if first == DIE:
            os._exit(3)
        if first == SLOW:
            time.sleep(0.7)
    return _whole(self, batch)


Segmenter._whole = _faulty
