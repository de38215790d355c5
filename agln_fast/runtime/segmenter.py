"""`load` a bundle and call it: preprocessing, one engine, postprocessing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from agln_fast.bundle import Bundle, open_bundle
from agln_fast.contract import IOContract
from agln_fast.data.classes import ClassSet
from agln_fast.decode import decode
from agln_fast.engines import (
    KINDS,
    Engine,
    kind_of,
    obstacle_to,
    open_engine,
)
from agln_fast.engines.gate import Gate
from agln_fast.errors import BackendError, BundleChangedError, ConfigError
from agln_fast.manifest import EngineRecord
from agln_fast.precision import check_precision
from agln_fast.runtime.arrival import Arrivals, device_kind
from agln_fast.runtime.augmentation import TestTimeAugmentation
from agln_fast.runtime.images import ImageArray, ImageSource, as_image_list, fit, load_image, pack
from agln_fast.runtime.multiscale import multiscale
from agln_fast.runtime.result import Labels, Result, Timing
from agln_fast.runtime.scores import Scores, classes_of, lead, on_host, resized, strips
from agln_fast.runtime.sliding import slide

__all__ = ["Segmenter", "load", "runnable_engines"]

_ATTEMPTS = 50  # to load a bundle that is replaced in the midst of it


def load(
    bundle: str | os.PathLike[str] | Bundle,
    backend: str = "auto",
    *,
    precision: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Segmenter:
    """Open a bundle for segmentation.

    Args:
        bundle: the folder, or an opened bundle.
        backend: a backend's name, or "auto": GPU engines first, then by the latency measured at the build. What has
            never run on such a device is checked against the reference first, and timed, once on each machine.
        precision: "fp32", "fp16", "bf16", "int8"; None for any.
        device: "cpu", "cuda", "cuda:1"; None for each engine's own.
        threads: CPU threads; None for `AGLN_FAST_THREADS`, and without it the library's own choice.

    A bundle that is replaced meanwhile is the old one or the new one, whole; an opened bundle must be on the disk as it
    was when it was opened.

    Raises:
        BundleError: it is damaged, or has no such engine.
        BundleChangedError: an opened bundle is not the one any more that lies there.
        BackendError: no engine that fits can run here, or agreed with the reference; the message says why, for each.
        ConfigError: an unknown backend or precision.
    """
    if backend != "auto":
        kind_of(backend)
    if precision is not None:
        check_precision(precision)
    if isinstance(bundle, Bundle):
        return _open(bundle, backend, precision, device, threads)
    for _ in range(_ATTEMPTS - 1):
        with suppress(BundleChangedError):
            return _open(open_bundle(bundle), backend, precision, device, threads)
    return _open(open_bundle(bundle), backend, precision, device, threads)


def _open(bundle: Bundle, backend: str, precision: str | None, device: str | None, threads: int | None) -> Segmenter:
    """The preferred engine of those that fit and can run."""
    arrivals, preference = Arrivals(bundle, device, threads), partial(_preference, device=device)
    engines = sorted(bundle.matching(backend, precision), key=preference)
    reasons = []
    # Where a GPU serves, nothing is checked on the CPU.
    for _, alike in groupby(engines, key=lambda engine: preference(engine)[0]):
        known = [arrivals.look_up(engine, check=backend == "auto") for engine in alike]
        for engine in sorted(known, key=preference):
            try:
                if refusal := _refusal(engine):
                    raise BackendError(f"engine {engine.name} is refused here: {refusal}")
                opened = open_engine(bundle.artefact(engine.name), device=device, threads=threads)
                manifest = bundle.manifest
                names = ClassSet("bundle", bundle.path.stem, manifest.classes, manifest.palette)
                aligned = manifest.model.align_corners
                return Segmenter(engine, opened, manifest.contract, names, align_corners=aligned)
            except BackendError as error:
                reasons.append(str(error))
    raise BackendError(f"{bundle.path}: {'; '.join(reasons)}")


def _refusal(engine: EngineRecord) -> str | None:
    """How it disagreed with the reference on this machine, if it did."""
    check = engine.verification
    return check.reason if check is not None and check.status == "failed" else None


def runnable_engines(bundle: Bundle) -> list[tuple[EngineRecord, str | None]]:
    """Every engine of the bundle, the preferred ones first, with why it cannot run here (None if it can)."""
    arrivals = Arrivals(bundle)
    engines = sorted(map(arrivals.look_up, bundle.manifest.engines), key=_preference)
    return [(engine, _refusal(engine) or obstacle_to(bundle.artefact(engine.name))) for engine in engines]


def _preference(engine: EngineRecord, device: str | None = None) -> tuple[bool, float, int]:
    """Sorts GPUs first, then by latency where it was measured on such a device, then as KINDS does.

    `device` is where the engine shall run, None for its own.
    """
    if engine.backend not in KINDS:
        return True, float("inf"), len(KINDS)
    where = device_kind(engine, device)
    check, latency = engine.verification, float("inf")
    if check and check.latency_ms is not None and (check.device or "cpu").partition(":")[0] == where:
        latency = check.latency_ms
    return where == "cpu", latency, list(KINDS).index(engine.backend)


class Segmenter:
    """A callable that segments images with one engine. Close it, or use it in a `with` statement.

    engine: what runs; contract: what goes into it and comes out; class_set: what the labels mean.

    Threads may share one: images are read, resized and labelled side by side, and wait for each other at the engine.
    It belongs to the process that opened it, also after a fork.
    """

    def __init__(
        self,
        engine: EngineRecord,
        backend: Engine,
        contract: IOContract,
        class_set: ClassSet,
        *,
        align_corners: bool | None = True,
    ) -> None:
        """`backend` is `engine` opened; the segmenter closes it. `align_corners`: the model's, for the resize of logits
        to an image's own size."""
        self.engine = engine
        self.contract = contract
        self.class_set = class_set
        self._align_corners = bool(align_corners)
        self._backend = backend
        self._gate = Gate("this segmenter", "load the bundle again")

    @property
    def device(self) -> str:
        """The device that really runs, e.g. "cpu"."""
        return self._backend.device

    @property
    def precision(self) -> str:
        """The precision that really runs, e.g. "fp32"."""
        return self._backend.precision

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        tta: bool | TestTimeAugmentation = False,
        *,
        margin: bool = False,
        bit_depth: int | None = None,
    ) -> Any:
        """Segment one image or several.

        Args:
            images: a path, bytes, an open binary file, a PIL image, numpy (H, W[, 1 | 3 | 4]) or torch (C, H, W) of
                uint8, uint16 or float in 0..1, a batch of these (B, ...), or a list. Colours are RGB.
            tta: test-time augmentation: several scales and mirror images, each under sliding windows whatever the
                contract's resize policy; True for the paper's settings. Needs an engine that returns logits.
            margin: whether to fill `Result.margin`, if the engine returns logits.
            bit_depth: of samples that are stored in 16 or 32 bits, 1 to 16; None to go by the file, as in `load_image`.

        Returns:
            A `Result` with labels at the image's own size; for a list or a batch, a list of them.

        Raises:
            ImageError: an image that cannot be used.
            ConfigError: `tta` with an engine that returns labels, or `bit_depth` is not from 1 to 16.
            BackendError: the engine failed, or the segmenter is closed, perhaps meanwhile, or was opened before a fork.
        """
        sources, single = as_image_list(images)
        tta = TestTimeAugmentation() if tta is True else tta
        if tta and self.contract.output != "logits":
            raise ConfigError(
                f"engine {self.engine.name} returns labels, and test-time augmentation averages scores: "
                "build the bundle with --output logits"
            )
        self._gate.check()  # and not only when the images have been read
        slides = tta or self.contract.resize == "slide"
        read = partial(load_image, bit_depth=bit_depth)
        results = list(self._slide(read, sources, tta, margin) if slides else self._whole(read, sources, margin))
        return results[0] if single else results

    def close(self) -> None:
        """Release the engine, after the run that goes on in it; calls of other threads end with an error.

        Closing twice is allowed. In a forked process nothing is released.
        """
        self._gate.close(self._backend.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _whole(
        self, read: Callable[[ImageSource], ImageArray], sources: Sequence[ImageSource], margin: bool
    ) -> Iterator[Result]:
        """Policies stretch and pad: the whole image goes through the engine once."""
        for start in range(0, len(sources), self.contract.max_batch):
            began = time.perf_counter()
            images = [read(source) for source in sources[start : start + self.contract.max_batch]]
            frames, placements = zip(*(fit(image, self.contract) for image in images), strict=True)
            batch = self._batch(frames)
            ready = time.perf_counter()
            outputs = self._run(batch, clock := _Clock(), self._backend.run)
            n = len(images)
            for image, output, placement in zip(images, outputs, placements, strict=False):
                last = time.perf_counter()
                size = image.shape[:2]
                rows = slice(placement.top, placement.top + placement.height)
                columns = slice(placement.left, placement.left + placement.width)
                output = output[..., rows, columns]
                labels = cast(Labels, decode(output, size, align_corners=self._align_corners))
                ahead = None
                if margin and self.contract.output == "logits":
                    scores = resized(output, size, align_corners=self._align_corners)
                    ahead = np.concatenate([lead(strip) for strip in scores])
                post = time.perf_counter() - last
                timing = Timing(1e3 * (ready - began) / n, 1e3 * clock.engine / n, 1e3 * post)
                yield Result(labels, image, self.class_set, timing, ahead)

    def _batch(self, frames: Sequence[ImageArray]) -> npt.NDArray[Any]:
        """Frames (H, W, 3) -> the engine's input; short batches are filled up with the last frame."""
        missing = self.contract.min_batch - len(frames)
        return pack([*frames, *[frames[-1]] * missing], self.contract)

    def _slide(
        self,
        read: Callable[[ImageSource], ImageArray],
        sources: Sequence[ImageSource],
        tta: TestTimeAugmentation | Literal[False],
        margin: bool,
    ) -> Iterator[Result]:
        """Policy slide and test-time augmentation: one image after the other, its windows and flips in batches."""
        for source in sources:
            began = time.perf_counter()
            image = read(source)
            ready = time.perf_counter()
            run = partial(self._run_frames, clock := _Clock())
            if tta:
                whole = multiscale(run, image, self.contract, tta, align_corners=self._align_corners)
                bands: Iterable[Scores] = [whole]
            else:
                bands = (logits[0] for logits in slide(run, image, self.contract))
            parts = [
                (classes_of(scores), on_host(lead(scores)) if margin else None)
                for band in bands
                for scores in strips(band)
            ]
            labels = np.concatenate([labels for labels, _ in parts])
            ahead = np.concatenate([first for _, first in parts if first is not None]) if margin else None
            post = time.perf_counter() - ready - clock.engine - clock.waiting
            timing = Timing(1e3 * (ready - began), 1e3 * clock.engine, 1e3 * post)
            yield Result(labels, image, self.class_set, timing, ahead)

    def _run_frames(self, clock: _Clock, frames: Sequence[ImageArray]) -> Scores:
        """Frames (H, W, 3), at most max_batch, through an engine that returns logits, which stay where it has them."""
        return self._run(self._batch(frames), clock, self._backend.run_in_place)

    def _run(self, batch: npt.NDArray[Any], clock: _Clock, run: Callable[[npt.NDArray[Any]], Any]) -> Any:
        """`batch` through the engine, by one of its methods, when it is this thread's turn."""
        asked = time.perf_counter()
        with self._gate.turn():
            began = time.perf_counter()
            outputs = run(batch)
            clock.engine += time.perf_counter() - began
        clock.waiting += began - asked
        return outputs


@dataclass
class _Clock:
    """Seconds in the engine, and those of waiting for other threads to leave it."""

    engine: float = 0.0
    waiting: float = 0.0
