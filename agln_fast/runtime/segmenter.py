"""`load` a bundle and call it: preprocessing, one engine, postprocessing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np
import numpy.typing as npt
import torch

from agln_fast.backends import BACKENDS, Backend, backend_class, open_engine
from agln_fast.bundle import Bundle, EngineRecord, open_bundle
from agln_fast.contract import Precision
from agln_fast.data.classes import ClassSet
from agln_fast.errors import BackendError, BundleError, ConfigError, did_you_mean
from agln_fast.kernels.label_upsample import label_upsample
from agln_fast.runtime.images import ImageArray, ImageSource, Placement, as_image_list, fit, load_image, pack, windows
from agln_fast.runtime.result import Labels, Result, Timing

__all__ = ["Segmenter", "load", "runnable_engines"]


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
        backend: a backend's name, or "auto": GPU engines first, then by the latency measured at the build.
        precision: "fp32", "fp16", "bf16"; None for any.
        device: "cpu", "cuda", "cuda:1"; None for each engine's own.
        threads: CPU threads; None for `AGLN_FAST_THREADS`, and without it the library's own choice.

    Raises:
        BundleError: it is damaged, or has no such engine.
        BackendError: no engine that fits can run here; the message says why, for each.
        ConfigError: an unknown backend or precision.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    if backend != "auto":
        backend_class(backend)
    if precision not in (None, *get_args(Precision)):
        raise ConfigError(f"unknown precision {precision!r}; known: {', '.join(get_args(Precision))}")
    engines = [
        engine
        for engine in bundle.manifest.engines
        if backend in ("auto", engine.backend) and precision in (None, engine.precision)
    ]
    if not engines:
        known = ", ".join(engine.name for engine in bundle.manifest.engines)
        wanted = f"{backend} engine" + (f" in {precision}" if precision else "")
        raise BundleError(f"{bundle.path}: no {wanted}{did_you_mean(backend, known.split(', '))}; it has {known}")
    engines = sorted(engines, key=_preference)
    reasons = []
    for engine in engines:
        try:
            return Segmenter(bundle, engine, open_engine(bundle, engine, device=device, threads=threads))
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError(f"{bundle.path}: {'; '.join(reasons)}")


def runnable_engines(bundle: Bundle) -> list[tuple[EngineRecord, str | None]]:
    """Every engine of the bundle, the preferred ones first, with why it cannot run here (None if it can)."""
    engines = sorted(bundle.manifest.engines, key=_preference)
    return [(engine, backend_class(engine.backend).obstacle(engine)) for engine in engines]


def _preference(engine: EngineRecord) -> tuple[bool, float, int]:
    latency = engine.verification.latency_ms if engine.verification else None
    return engine.target == "cpu", float("inf") if latency is None else latency, list(BACKENDS).index(engine.backend)


class Segmenter:
    """A callable that segments images with one engine of a bundle. Close it, or use it in a `with` statement.

    One call runs at a time; threads that share a segmenter wait for each other.
    """

    def __init__(self, bundle: Bundle, engine: EngineRecord, backend: Backend) -> None:
        """`backend` is `engine` opened; the segmenter closes it."""
        self.bundle = bundle
        self.engine = engine
        self.class_set = ClassSet("bundle", bundle.path.stem, bundle.manifest.classes, bundle.manifest.palette)
        self._backend = backend
        self._contract = bundle.manifest.contract
        self._lock = threading.Lock()
        self._closed = False

    @property
    def device(self) -> str:
        """The device that really runs, e.g. "cpu"."""
        return self._backend.device

    @property
    def precision(self) -> str:
        """The precision that really runs, e.g. "fp32"."""
        return self._backend.precision

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Any:
        """Segment one image or several.

        Args:
            images: a path, PIL image, numpy (H, W[, 1 | 3 | 4]) uint8, torch (C, H, W) uint8 or float in 0..1, a
                torch batch (B, C, H, W), or a list of these. Colours are RGB.

        Returns:
            A `Result` with labels at the image's own size; for a list or a batch, a list of them.

        Raises:
            ImageError: an image that cannot be used.
            BackendError: the engine failed, or the segmenter is closed.
        """
        sources, single = as_image_list(images)
        if self._closed:
            raise BackendError("this segmenter is closed; load the bundle again")
        with self._lock:
            results = list(self._slide(sources) if self._contract.resize == "slide" else self._whole(sources))
        return results[0] if single else results

    def close(self) -> None:
        """Release the engine. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _whole(self, sources: Sequence[ImageSource]) -> Iterator[Result]:
        """Policies stretch and pad: the whole image goes through the engine once."""
        for start in range(0, len(sources), self._contract.max_batch):
            began = time.perf_counter()
            images = [load_image(source) for source in sources[start : start + self._contract.max_batch]]
            frames, placements = zip(*(fit(image, self._contract) for image in images), strict=True)
            batch = self._batch(frames)
            ready = time.perf_counter()
            outputs = self._backend.run(batch)
            done = time.perf_counter()
            n = len(images)
            for image, output, placement in zip(images, outputs, placements, strict=False):
                last = time.perf_counter()
                labels = self._to_own_size(output, placement, image.shape[:2])
                post = time.perf_counter() - last
                timing = Timing(1e3 * (ready - began) / n, 1e3 * (done - ready) / n, 1e3 * post)
                yield Result(labels, image, self.class_set, timing)

    def _batch(self, frames: Sequence[ImageArray]) -> npt.NDArray[Any]:
        """Frames (H, W, 3) -> the engine's input; short batches are filled up with the last frame."""
        missing = self._contract.min_batch - len(frames)
        return pack([*frames, *[frames[-1]] * missing], self._contract)

    def _to_own_size(self, output: npt.NDArray[Any], placement: Placement, size: tuple[int, int]) -> Labels:
        """The engine's labels (h, w) or logits (K, h, w) of one frame -> labels (H, W), resampled once."""
        rows = slice(placement.top, placement.top + placement.height)
        columns = slice(placement.left, placement.left + placement.width)
        output = output[..., rows, columns]
        if self._contract.output == "logits":
            labels = label_upsample(torch.from_numpy(output)[None], size)[0].numpy()
            return labels if labels.dtype == np.uint8 else labels.astype(np.int32)
        if output.shape == size:
            return np.ascontiguousarray(output)
        nearest = [((np.arange(n) + 0.5) * m / n).astype(np.intp) for n, m in zip(size, output.shape, strict=True)]
        return output[np.ix_(*nearest)]

    def _slide(self, sources: Sequence[ImageSource]) -> Iterator[Result]:
        """Policy slide: overlapping windows at the image's own resolution, logits averaged."""
        for source in sources:
            began = time.perf_counter()
            image = load_image(source)
            ready = time.perf_counter()
            labels, engine_seconds = self._slide_one(image)
            post = time.perf_counter() - ready - engine_seconds
            yield Result(labels, image, self.class_set, Timing(1e3 * (ready - began), 1e3 * engine_seconds, 1e3 * post))

    def _slide_one(self, image: ImageArray) -> tuple[Labels, float]:
        height, width = image.shape[:2]
        window_h, window_w = self._contract.height, self._contract.width
        padded, _ = fit(image, self._contract)
        places = windows(padded.shape[0], padded.shape[1], window_h, window_w)

        # The sum has the same argmax as the mean: at a pixel, all classes were seen by the same number of windows.
        # Only the rows under the current band of windows are held: (K, window_h, W) instead of (K, H, W).
        num_classes = self.bundle.manifest.model.num_classes
        total = np.zeros((num_classes, window_h, padded.shape[1]), np.float32)
        labels = np.empty(padded.shape[:2], np.uint8 if num_classes <= 256 else np.int32)
        band, engine_seconds = 0, 0.0
        for start in range(0, len(places), self._contract.max_batch):
            chunk = places[start : start + self._contract.max_batch]
            batch = self._batch([padded[top : top + window_h, left : left + window_w] for top, left in chunk])
            before = time.perf_counter()
            outputs = self._backend.run(batch)
            engine_seconds += time.perf_counter() - before
            for (top, left), logits in zip(chunk, outputs, strict=False):
                if top > band:
                    step = top - band
                    labels[band:top] = total[:, :step].argmax(0)
                    total[:, :-step] = total[:, step:].copy()
                    total[:, -step:] = 0
                    band = top
                total[:, :, left : left + window_w] += logits
        labels[band:] = total.argmax(0)
        return np.ascontiguousarray(labels[:height, :width]), engine_seconds
