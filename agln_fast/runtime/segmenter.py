"""`load` a bundle and call it: preprocessing, one engine, postprocessing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

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
from agln_fast.runtime.bit_depth import check_bit_depth
from agln_fast.runtime.images import ImageArray, ImageSource, Placement, as_image_list, fit, load_image, pack
from agln_fast.runtime.multiscale import multiscale
from agln_fast.runtime.result import Labels, Result, Timing
from agln_fast.runtime.scores import Scores, classes_of, lead, on_host, resized, strips
from agln_fast.runtime.sliding import slide
from agln_fast.runtime.stages import Steps, side_by_side

__all__ = ["Segmenter", "load", "runnable_engines"]

_Read: TypeAlias = Callable[[ImageSource], ImageArray]

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
        augmentation = self._augmentation(tta)
        self._gate.check()  # and not only when the images have been read
        read = partial(load_image, bit_depth=bit_depth)
        if augmentation or self.contract.resize == "slide":
            results = [self._slide(_timed(read, source), augmentation, margin) for source in sources]
        else:
            results = []
            for start in range(0, len(sources), self.contract.max_batch):
                chunk = sources[start : start + self.contract.max_batch]
                done = self._whole([self._prepare(read, source) for source in chunk])
                results += [self._finish(each, margin) for each in done]
        return results[0] if single else results

    def stream(
        self,
        images: Iterable[ImageSource],
        tta: bool | TestTimeAugmentation = False,
        *,
        margin: bool = False,
        bit_depth: int | None = None,
        in_flight: int | None = None,
    ) -> Generator[Result, None, None]:
        """Segment images as they come, endlessly if they do: the next ones are read while the engine runs.

        Images are taken in one thread and the engine runs in another, up to `contract.max_batch` images at once: those
        that are ready. Close the generator to end early: it waits for both threads, so for the image that `images` is
        asked for.

        Args:
            images: single images, each as in a call; any iterable, used in another thread, which does not close it. An
                array is not copied, and must not change afterwards.
            tta, margin, bit_depth: as in a call.
            in_flight: the most images that have been taken from `images` and whose results you have not done with,
                which is when you ask for the next; None for `3 * contract.max_batch + 1`: a batch that is read, one in
                the engine, one that is labelled, and the result in your hands.

        Returns:
            A generator of `Result`, in the order of the images.

        Raises:
            ConfigError: as a call, or `in_flight` is below 1.
            BackendError: as a call.
            ImageError: in the place of an image that cannot be used, which ends the stream; what `images` raises, too.
        """
        most = self.contract.max_batch
        in_flight = 3 * most + 1 if in_flight is None else in_flight
        if in_flight < 1:
            raise ConfigError(f"in_flight {in_flight}: must be at least 1")
        steps = self.steps(tta, margin=margin, bit_depth=bit_depth)
        self._gate.check()
        return side_by_side(iter(images), steps, in_flight=in_flight)

    def steps(
        self, tta: bool | TestTimeAugmentation = False, *, margin: bool = False, bit_depth: int | None = None
    ) -> Steps[ImageSource, Any, Any, Result]:
        """What a call does, as three steps, for who has threads of their own; `stream` runs them in two.

        Each may be called in any thread. What goes from one to the next is the segmenter's own.

        Args:
            tta, margin, bit_depth: as in a call.

        Raises:
            ConfigError: as a call.
        """
        check_bit_depth(bit_depth)
        augmentation = self._augmentation(tta)
        read = partial(load_image, bit_depth=bit_depth)
        if augmentation or self.contract.resize == "slide":
            return Steps(
                partial(_timed, read),
                lambda batch: [self._slide(each, augmentation, margin) for each in batch],
                lambda result: result,
                most=1,
            )
        prepare, finish = partial(self._prepare, read), partial(self._finish, margin=margin)
        return Steps(prepare, self._whole, finish, most=self.contract.max_batch)

    def close(self) -> None:
        """Release the engine, after the run that goes on in it; calls of other threads end with an error.

        Closing twice is allowed. In a forked process nothing is released.
        """
        self._gate.close(self._backend.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _augmentation(self, tta: bool | TestTimeAugmentation) -> TestTimeAugmentation | None:
        """None for none, and nothing that this engine cannot do."""
        if tta and self.contract.output != "logits":
            raise ConfigError(
                f"engine {self.engine.name} returns labels, and test-time augmentation averages scores: "
                "build the bundle with --output logits"
            )
        return (TestTimeAugmentation() if tta is True else tta) or None

    def _prepare(self, read: _Read, source: ImageSource) -> _Prepared:
        """Policies stretch and pad: the whole image goes through the engine once."""
        began = time.perf_counter()
        image = read(source)
        frame, placement = fit(image, self.contract)
        return _Prepared(image, pack([frame], self.contract), placement, time.perf_counter() - began)

    def _whole(self, batch: Sequence[_Prepared]) -> list[tuple[_Prepared, npt.NDArray[Any], Timing]]:
        """Each with what the engine gives for it. Short batches are filled up with the last frame."""
        began = time.perf_counter()
        inputs = [each.input for each in batch]
        inputs += inputs[-1:] * (self.contract.min_batch - len(inputs))
        joined = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        joining = time.perf_counter() - began
        outputs = self._run(joined, clock := _Clock(), self._backend.run)
        parts = 1e3 / len(batch)
        return [
            (each, output, Timing(1e3 * each.seconds + joining * parts, clock.engine * parts, 0))
            for each, output in zip(batch, outputs, strict=False)
        ]

    def _finish(self, done: tuple[_Prepared, npt.NDArray[Any], Timing], margin: bool) -> Result:
        prepared, output, timing = done
        began = time.perf_counter()
        size, placement = prepared.image.shape[:2], prepared.placement
        rows = slice(placement.top, placement.top + placement.height)
        columns = slice(placement.left, placement.left + placement.width)
        output = output[..., rows, columns]
        labels = cast(Labels, decode(output, size, align_corners=self._align_corners))
        ahead = None
        if margin and self.contract.output == "logits":
            scores = resized(output, size, align_corners=self._align_corners)
            ahead = np.concatenate([lead(strip) for strip in scores])
        timing = replace(timing, postprocess=1e3 * (time.perf_counter() - began))
        return Result(labels, prepared.image, self.class_set, timing, ahead)

    def _batch(self, frames: Sequence[ImageArray]) -> npt.NDArray[Any]:
        """Frames (H, W, 3) -> the engine's input; short batches are filled up with the last frame."""
        missing = self.contract.min_batch - len(frames)
        return pack([*frames, *[frames[-1]] * missing], self.contract)

    def _slide(self, prepared: tuple[ImageArray, float], tta: TestTimeAugmentation | None, margin: bool) -> Result:
        """Policy slide and test-time augmentation: one image, its windows and flips in batches."""
        image, reading = prepared
        began, run = time.perf_counter(), partial(self._run_frames, clock := _Clock())
        if tta:
            whole = multiscale(run, image, self.contract, tta, align_corners=self._align_corners)
            bands: Iterable[Scores] = [whole]
        else:
            bands = (logits[0] for logits in slide(run, image, self.contract))
        parts = [
            (classes_of(scores), on_host(lead(scores)) if margin else None) for band in bands for scores in strips(band)
        ]
        labels = np.concatenate([labels for labels, _ in parts])
        ahead = np.concatenate([first for _, first in parts if first is not None]) if margin else None
        post = time.perf_counter() - began - clock.engine - clock.waiting
        timing = Timing(1e3 * reading, 1e3 * clock.engine, 1e3 * post)
        return Result(labels, image, self.class_set, timing, ahead)

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


@dataclass(frozen=True)
class _Prepared:
    """An image, the engine's input (1, …) for it, where it lies there, and the seconds that this took."""

    image: ImageArray
    input: npt.NDArray[Any]
    placement: Placement
    seconds: float


@dataclass
class _Clock:
    """Seconds in the engine, and those of waiting for other threads to leave it."""

    engine: float = 0.0
    waiting: float = 0.0


def _timed(read: _Read, source: ImageSource) -> tuple[ImageArray, float]:
    began = time.perf_counter()
    return read(source), time.perf_counter() - began
