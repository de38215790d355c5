"""A source, segmented, into files: frames are decoded, segmented and encoded side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from agln_fast import interruption
from agln_fast.errors import ImageError
from agln_fast.runtime.images import ImageArray
from agln_fast.runtime.result import Result
from agln_fast.runtime.segmenter import Segmenter
from agln_fast.video.encoding import Encoding, lossless
from agln_fast.video.pictures import numbered
from agln_fast.video.selection import Selection
from agln_fast.video.source import Frame, Source
from agln_fast.video.video_file import open_video_file

__all__ = ["LABELS", "Outputs", "Report", "convert"]

LABELS = ".mkv"  # the container of FFV1


@dataclass(frozen=True)
class Outputs:
    """What is written.

    video: the overlay, without a legend, whose width would change with the classes; encoded as `encoding`. mask: the
    labels, exact: in a file .mkv, or as PNG files, `folder/%05d.png`, by the frame's index in the source.
    alpha: of the overlay, from 0, the image alone, to 1, the colours alone.
    """

    video: Path | None = None
    encoding: Encoding | None = None
    mask: Path | None = None
    alpha: float = 0.5


@dataclass
class Report:
    """What has been done so far. frames: how many are written. height, width: of the source. seconds: wall clock.

    left_out: streams of sound that the container does not take, and why.
    """

    frames: int = 0
    height: int = 0
    width: int = 0
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list)


def convert(
    segment: Segmenter,
    source: Source,
    selection: Selection,
    outputs: Outputs,
    report: Report,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write what is wanted of `source`; a video appears at its name when it is whole.

    A signal, or Ctrl-C, ends the source: what has been taken from it is still written, and the video is finished as it
    would be otherwise, before it is raised. After any other exception there is no video; label pictures stay.

    Args:
        report: filled as the work goes on.
        progress: called after each frame.

    Raises:
        ImageError: no frame could be decoded, or something cannot be written.
        ConfigError: container, codec and size do not go together.
        BackendError: the engine failed.
        KeyboardInterrupt: as above.
    """
    began, taken = perf_counter(), deque[Frame]()

    def images() -> Iterator[ImageArray]:
        for frame in source.frames(selection):
            taken.append(frame)
            yield frame.image

    with interruption.deferred(source.stop), ExitStack() as stack:
        writers = list(_writers(segment, source, outputs, report, stack))
        results = stack.enter_context(closing(segment.stream(images())))
        stack.callback(source.stop)  # before that is closed: it waits for the source
        for result in results:
            frame = taken.popleft()
            for write in writers:
                write(result, frame)
            report.frames += 1
            report.height, report.width = result.labels.shape
            report.seconds = perf_counter() - began
            progress()
        if not report.frames:
            raise ImageError(f"{source.name}: {_why_nothing(source)}")


def _writers(
    segment: Segmenter, source: Source, outputs: Outputs, report: Report, stack: ExitStack
) -> Iterator[Callable[[Result, Frame], None]]:
    if outputs.video is not None and outputs.encoding is not None:
        video = stack.enter_context(open_video_file(outputs.video, outputs.encoding, source, sound=True))
        report.left_out = video.left_out
        yield lambda result, frame: video.write(np.asarray(result.overlay(outputs.alpha, legend=False)), frame)
    if outputs.mask is not None and outputs.mask.suffix.lower() == LABELS:
        classes = len(segment.class_set.classes)
        labels = stack.enter_context(open_video_file(outputs.mask, lossless(classes), source))
        yield lambda result, frame: labels.write(result.labels.astype(np.uint8 if classes <= 256 else np.uint16), frame)
    elif (mask := outputs.mask) is not None:
        try:
            mask.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"{mask.parent}: cannot be created ({error.strerror}); choose another folder") from None
        yield lambda result, frame: result.save(numbered(mask, frame.index), "labels")


def _why_nothing(source: Source) -> str:
    if source.damaged:
        return f"none of its frames can be used; the first: {source.damage}"
    return f"cannot be read ({source.broken})" if source.broken else "has no such frames"
