"""What Triton's Python backend runs: a bundle behind `agln_fast.serving.protocol`.

Triton makes a batch of the requests that wait. Their pictures are decoded side by side, go through the engine in as few
batches as its contract allows, and are encoded side by side; each request gets an answer of its own.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from agln_fast.errors import AglnError, BackendError
from agln_fast.machine import threads_of
from agln_fast.runtime.images import ImageSource
from agln_fast.runtime.result import Result
from agln_fast.runtime.segmenter import load
from agln_fast.runtime.stages import Steps
from agln_fast.serving.protocol import Array, sources_of, write_outputs

S = TypeVar("S")
T = TypeVar("T")

__all__ = ["Request", "TritonPythonModel", "answer"]

Request: TypeAlias = tuple[Mapping[str, Array | Sequence[bytes]], Iterable[str]]
"""Inputs by name, and the names of the outputs that are asked for."""


class TritonPythonModel:
    """An instance of the model, in a process of its own; Triton calls it in one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside `model.py`, on a GPU of its own if Triton gives it one.

        Raises:
            BundleError, BackendError: as `agln_fast.load`.
        """
        [bundle] = Path(args["model_repository"], args["model_version"]).glob("*.agln")
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else None
        self._segment = load(bundle, device=device)
        self._steps = self._segment.steps()
        self._pool = ThreadPoolExecutor(threads_of(None), "agln-fast pictures")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request, in their order."""
        asked = [
            ({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, request.requested_output_names())
            for request in requests
        ]
        return [_response(each) for each in answer(self._steps, self._pool, asked)]

    def finalize(self) -> None:
        """Release the engine."""
        self._pool.shutdown()
        self._segment.close()


def _response(outputs: dict[str, Array] | Exception) -> Any:
    backend = import_module("triton_python_backend_utils")  # only in its processes
    if not isinstance(outputs, Exception):
        return backend.InferenceResponse([backend.Tensor(name, array) for name, array in outputs.items()])
    if not isinstance(outputs, AglnError):
        traceback.print_exception(outputs, file=sys.stderr)
        message = f"{type(outputs).__name__}: see the server's log"
    else:
        message = str(outputs)
    refused = isinstance(outputs, AglnError) and not isinstance(outputs, BackendError)
    code = backend.TritonError.INVALID_ARG if refused else backend.TritonError.INTERNAL
    return backend.InferenceResponse(error=backend.TritonError(message, code))


def answer(
    steps: Steps[ImageSource, Any, Any, Result], pool: ThreadPoolExecutor, requests: Sequence[Request]
) -> list[dict[str, Array] | Exception]:
    """The outputs of each request, or why there are none."""
    failed: dict[int, Exception] = {}

    def attempt(work: Callable[[S], T], number: int, value: S) -> T | None:
        try:
            return work(value)
        except Exception as error:
            failed.setdefault(number, error)
            return None

    found = [attempt(sources_of, number, inputs) or () for number, (inputs, _) in enumerate(requests)]
    owners = [number for number, sources in enumerate(found) for _ in sources]
    sources = [source for sources in found for source in sources]
    prepared = list(pool.map(lambda number, source: attempt(steps.prepare, number, source), owners, sources))
    ready = [(number, each) for number, each in zip(owners, prepared, strict=True) if number not in failed]
    done: list[tuple[int, Any]] = []
    for start in range(0, len(ready), steps.most):
        numbers, batch = zip(*ready[start : start + steps.most], strict=True)
        outputs = attempt(lambda each: list(steps.run(each)), numbers[0], list(batch))
        if outputs is None:
            failed |= dict.fromkeys(numbers, failed[numbers[0]])
        else:
            done += zip(numbers, outputs, strict=True)
    finished = list(pool.map(lambda pair: attempt(steps.finish, *pair), done))
    results: list[list[Result]] = [[] for _ in requests]
    for (number, _), result in zip(done, finished, strict=True):
        if result is not None:
            results[number].append(result)

    def written(number: int) -> dict[str, Array] | Exception:
        if number not in failed:
            attempt_outputs = attempt(lambda each: write_outputs(each, requests[number][1]), number, results[number])
            if attempt_outputs is not None:
                return attempt_outputs
        return failed[number]

    return list(pool.map(written, range(len(requests))))
