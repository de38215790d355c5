"""One server for the tests of a file, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
from server import Server

from agln_fast.data.scenes import Scenes


@pytest.fixture(scope="module")
def server(bundle) -> Iterator[Server]:
    """Of the small bundle by ONNX Runtime, with canaries every half second."""
    if find_spec("mlserver") is None:  # not imported here: its messages and those of tritonclient have one name
        pytest.skip("needs the package mlserver")
    running = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, "--canary-s", 0.5)
    yield running
    assert running.end() == 0


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return Scenes("val", size=(80, 112))[0].image
