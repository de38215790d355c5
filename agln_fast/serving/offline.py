"""Pictures of any number to masks on Ray Data: an actor for each engine, and nothing twice.

What has been done stands in the masks themselves: a text in each PNG file names the content of the image and of the
bundle. So no list of it can disagree with the files, whoever copies or deletes some. Ray carries names to the workers,
and a line about each image back; pixels stay where they are read.

Ray Data's own checkpoints go by a column, such as a name: they would pass over an image that has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from agln_fast import errors, interruption
from agln_fast.bundle import SEALS, Bundle, open_bundle
from agln_fast.engines import KINDS
from agln_fast.errors import AglnError, BackendError, BundleError, ImageError, MissingPackageError, printable
from agln_fast.files import scratch_folder
from agln_fast.manifest import format_manifest
from agln_fast.runtime.images import ImageSource, is_output
from agln_fast.runtime.result import Result
from agln_fast.runtime.segmenter import Segmenter, load
from agln_fast.runtime.stages import Steps, side_by_side
from agln_fast.serving.stores import Output, Picture, is_uri

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["INDEX", "Job", "Note", "Report", "Worker", "content_of", "read_note", "rows_of", "segment_pictures"]

INDEX = "index.jsonl"
"""The file beside the masks that has a line for each image of the last run that came to its end."""

Record: TypeAlias = dict[str, Any]

_KEYWORD = "agln-fast"
_STAGES = ("read", "prepare", "engine", "labels", "write")
_LARGEST_PART = 64  # images that a worker is given at once, and does again if it dies
_CALLS, _CALLS_FAR = 3, 16  # that a worker serves side by side: a store far away answers in 50 ms rather than in 0.1
_RETRIES = 2  # of a part
_ALONE = 8  # images for each worker, one by one, when parts were lost
_DEADLY = "each worker died with it: it crashes what decodes it, or needs more memory than there is"
_LOST_SHARE = 0.05  # of the parts; when more are lost with their workers, it is not the images' fault
_LOST_LEAST = 16


@dataclass(frozen=True)
class Note:
    """What a mask says of itself.

    sha256, bytes: of the image's file. bundle: `content_of` it. bit_depth: the one that was asked for. shares: of the
    classes that are present, the largest first.
    """

    sha256: str
    bytes: int
    height: int
    width: int
    bundle: str
    engine: str
    device: str
    precision: str
    bit_depth: int | None
    shares: dict[str, float]


def read_note(mask: bytes) -> Note | None:
    """What the file of a mask says of itself; None where it is cut off or damaged, or is none of this module."""
    with suppress(Exception):  # Pillow raises whatever it stumbles over in damaged bytes
        with Image.open(io.BytesIO(mask), formats=["PNG"]) as image:
            note = Note(**json.loads(image.info[_KEYWORD]))
            image.verify()
        return note
    return None


def content_of(bundle: Bundle) -> str:
    """A hash of all that is in a bundle, wherever it lies: the manifest has those of its files."""
    return hashlib.sha256(format_manifest(bundle.manifest.to_dict())).hexdigest()


@dataclass(frozen=True)
class Job:
    """What every worker is told.

    bundle: the folder, where a machine has it. content: `content_of` it. engines: the names of those that may run, all
    alike. backend, precision, device, threads: of `load`. place, parts: of `Output`. most: images in the engine's run.
    """

    bundle: Path
    content: str
    engines: tuple[str, ...]
    backend: str
    precision: str | None
    device: str | None
    threads: int | None
    bit_depth: int | None
    place: str
    parts: str
    overlays: bool
    most: int

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        output: Output,
        *,
        backend: str = "auto",
        precision: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        bit_depth: int | None = None,
        overlays: bool = False,
    ) -> Job:
        """One with that bundle and that place for masks.

        Raises:
            BundleError: the bundle has no such engine.
        """
        names = tuple(engine.name for engine in bundle.matching(backend, precision))
        contract, path = bundle.manifest.contract, bundle.path.absolute()
        asked = backend, precision, device, threads, bit_depth
        return cls(path, content_of(bundle), names, *asked, output.place, output.parts, overlays, contract.max_batch)


@dataclass(frozen=True)
class _Prepared:
    """An image on its way to the engine. milliseconds: that its bytes took."""

    row: Record
    sha256: str
    bytes: int
    prepared: Any
    milliseconds: float


class Worker:
    """What an actor does: reads images, leaves out what is done, and writes a mask of each other.

    The engine is opened for the first image that needs it, in the bundle that lies at the job's path on this machine,
    or in `files`, its files as objects of Ray. Several threads call one worker.
    """

    def __init__(self, job: Job, files: Mapping[str, Any]) -> None:
        self._job, self._files = job, files
        self._output = Output(job.place, job.parts)
        self._lock = threading.Lock()
        self._segmenter: Segmenter | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """`rows` of `rows_of` -> the column `record`: JSON, of each image, or of the one error that ends the run."""
        import pyarrow as pa

        steps = Steps(self._look, self._run, self._finish, self._job.most)
        try:
            with closing(side_by_side(iter(rows.to_pylist()), steps, in_flight=2 * steps.most + 1)) as stream:
                records = list(stream)
        except Exception as error:
            known = isinstance(error, AglnError)
            records = [
                {"fatal": str(error) if known else f"{type(error).__name__}: {error}", "kind": type(error).__name__}
            ]
        return pa.table({"record": [json.dumps(record) for record in records]})

    def _look(self, row: Record) -> _Prepared | Record:
        picture = Picture(row["store"], row["path"], row["name"])
        began = time.perf_counter()
        try:
            data = picture.read()
            digest = hashlib.sha256(data).hexdigest()
            note = self._check_place(row, digest)
            if note is not None:
                return self._record(row, note, segmented=False)
            milliseconds = 1e3 * (time.perf_counter() - began)
            prepared = self._steps().prepare(_Named(data, str(picture)))
        except ImageError as error:
            return _failure(row, error)
        return _Prepared(row, digest, len(data), prepared, milliseconds)

    def _check_place(self, row: Record, digest: str) -> Note | None:
        """What the mask says that is there, if it is the one that would be made.

        Raises:
            ImageError: a file is there that is none of ours.
        """
        job = self._job
        note = read_note(self._check_ours(_mask(row))) if row["mask_there"] else None
        if row["overlay_there"]:
            self._check_ours(_overlay(row))
        if note is None or (job.overlays and not row["overlay_there"]):
            return None
        same = (note.sha256, note.bundle, note.bit_depth) == (digest, job.content, job.bit_depth)
        return note if same and note.engine in job.engines else None

    def _check_ours(self, name: str) -> bytes:
        there = self._output.read(name)
        if there and not is_output(io.BytesIO(there)):
            shown = self._output.shown(name)
            raise ImageError(f"{shown}: is there, and agln-fast did not write it; give another place for masks")
        return there

    def _run(self, batch: Sequence[_Prepared | Record]) -> Iterator[tuple[_Prepared, Any] | Record]:
        waiting = [each.prepared for each in batch if isinstance(each, _Prepared)]
        outputs = iter(self._steps().run(waiting) if waiting else ())
        for each in batch:
            yield (each, next(outputs)) if isinstance(each, _Prepared) else each

    def _finish(self, done: tuple[_Prepared, Any] | Record) -> Record:
        if isinstance(done, dict):
            return done
        image, output = done
        result, segmenter = self._steps().finish(output), self._opened()
        height, width = result.labels.shape
        note = Note(
            image.sha256,
            image.bytes,
            height,
            width,
            self._job.content,
            segmenter.engine.name,
            segmenter.device,
            segmenter.precision,
            self._job.bit_depth,
            {name: round(share, 6) for name, share in result.shares.items()},
        )
        began = time.perf_counter()
        try:
            if self._job.overlays:
                self._output.write(_overlay(image.row), result.png())
            self._output.write(_mask(image.row), result.png("labels", {_KEYWORD: json.dumps(asdict(note))}))
        except ImageError as error:
            return _failure(image.row, error)
        timing, writing = result.timing, 1e3 * (time.perf_counter() - began)
        spent = image.milliseconds, timing.preprocess, timing.engine, timing.postprocess, writing
        return {
            **self._record(image.row, note, segmented=True),
            "spent": [round(each, 3) for each in spent],
            "process": f"{platform.node()}:{os.getpid()}",
        }

    def _record(self, row: Record, note: Note, *, segmented: bool) -> Record:
        files = {"labels": self._output.shown(_mask(row))}
        if self._job.overlays:
            files["overlay"] = self._output.shown(_overlay(row))
        return {"number": row["number"], "image": _image(row), **files, "segmented": segmented, **asdict(note)}

    def _steps(self) -> Steps[ImageSource, Any, Any, Result]:
        return self._opened().steps(bit_depth=self._job.bit_depth)

    def _opened(self) -> Segmenter:
        with self._lock:
            if self._segmenter is None:
                self._segmenter = self._open()
            return self._segmenter

    def _open(self) -> Segmenter:
        """
        Raises:
            BundleError: the bundle is neither on this machine nor in Ray.
            BackendError: no engine of it can run here.
        """
        job, here = self._job, None
        with suppress(BundleError):
            here = open_bundle(job.bundle)
        if here is not None and content_of(here) == job.content:
            return self._load(here)
        if not self._files:
            raise BundleError(f"{job.bundle}: is not the bundle any more that the run began with; run it again")
        import ray

        with scratch_folder() as folder:
            for name, file in self._files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(ray.get(file))
            return self._load(open_bundle(folder))

    def _load(self, bundle: Bundle) -> Segmenter:
        job = self._job
        return load(bundle, job.backend, precision=job.precision, device=job.device, threads=job.threads)


class _Named(io.BytesIO):
    """Bytes that errors call by a name."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def _mask(row: Record) -> str:
    return f"{row['name']}.labels.png"


def _overlay(row: Record) -> str:
    return f"{row['name']}.overlay.png"


def _image(row: Record) -> str:
    return str(Picture(row["store"], row["path"], row["name"]))


def _failure(row: Record, error: ImageError) -> Record:
    return {"number": row["number"], "image": _image(row), "error": str(error)}


def rows_of(pictures: Sequence[Picture], output: Output, *, overlays: bool) -> list[Record]:
    """What workers are told of each image: also which of its files are there already.

    Raises:
        ImageError: the place for masks cannot be listed.
    """
    known = output.names()
    rows: list[Record] = [{"number": number, **vars(picture)} for number, picture in enumerate(pictures)]
    for row in rows:
        row["mask_there"], row["overlay_there"] = _mask(row) in known, overlays and _overlay(row) in known
    return rows


@dataclass
class Report:
    """What a run did.

    workers: that were asked for; processes: that segmented, more where some died. segmented, skipped: images; failed:
    why, by the image. waited, seconds: until the first answer, for which engines are opened, and until the last one.
    milliseconds: of each stage, the mean of the images that were segmented. engines: images by "NAME on DEVICE".
    index: where `INDEX` is.
    """

    workers: int
    segmented: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    waited: float = 0.0
    seconds: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_STAGES, 0.0))
    engines: Counter[str] = field(default_factory=Counter)
    processes: set[str] = field(default_factory=set)
    index: str = ""

    def add(self, record: Record) -> Record:
        """Count an image in; what is returned is its line of the index."""
        line = {key: value for key, value in record.items() if key not in ("number", "spent", "process")}
        if "error" in record:
            self.failed[record["image"]] = record["error"]
        elif record["segmented"]:
            self.segmented += 1
            for stage, spent in zip(_STAGES, record["spent"], strict=True):
                self.milliseconds[stage] += (spent - self.milliseconds[stage]) / self.segmented
            self.engines[f"{record['engine']} on {record['device']}"] += 1
            self.processes.add(record["process"])
        else:
            self.skipped += 1
        return line


@dataclass(frozen=True)
class _Pool:
    """Actors: how many, and what each takes of a machine. threads: of an engine."""

    workers: int
    threads: int | None
    cpus: float
    gpus: int


def _pool(bundle: Bundle, job: Job, workers: int | None) -> _Pool:
    """A worker for each GPU, and where there is none, or none is to be used, as many as have CPUs."""
    import ray

    has = ray.cluster_resources()
    cpus, gpus = max(1.0, has.get("CPU", 1.0)), int(has.get("GPU", 0))
    engines = [
        KINDS[engine.backend] for engine in bundle.matching(job.backend, job.precision) if engine.backend in KINDS
    ]
    if job.device == "cpu" or not any("cuda" in kind.devices for kind in engines):
        gpus = 0
    if gpus:
        workers = workers or gpus
        return _Pool(workers, job.threads, min(1.0, cpus / workers), 1 if job.device in (None, "cuda") else 0)
    workers = workers or max(1, int(cpus // (job.threads or 1)))
    threads = job.threads or max(1, int(cpus // workers))
    return _Pool(workers, threads, min(float(threads), cpus / workers), 0)


def segment_pictures(
    bundle: Bundle,
    pictures: Sequence[Picture],
    output: Output,
    *,
    workers: int | None = None,
    advance: Callable[[], None] = lambda: None,
    **options: Any,
) -> Report:
    """Write a mask of each picture, on the Ray that this process has started or joined (`serving.cluster`).

    A picture whose mask is there, made by this bundle from the same bytes, is passed over. A worker that dies is
    replaced, and what it had begun is done again; an image with which each worker dies fails.

    Args:
        bundle: whose engine segments. Machines of the cluster that have it at the same path read it there.
        output: where NAME.labels.png goes, and `INDEX` in the end; from `Output.with_parts`.
        workers: actors; None for one for each GPU, and without GPUs for each CPU.
        advance: called for each image that is done with.
        options: of `Job.of`.

    Raises:
        ImageError: the place for masks cannot be listed.
        BuildError: it cannot be written.
        BundleError, BackendError: no engine can be opened or run; workers die whatever the image is.
    """
    job = Job.of(bundle, output, **options)
    rows = rows_of(pictures, output, overlays=job.overlays)
    pool = _pool(bundle, job, workers)
    job = replace(job, threads=pool.threads)
    report, waiting = Report(pool.workers), {row["number"]: row for row in rows}
    began, files = time.perf_counter(), _ship(bundle)
    with scratch_folder() as scratch, (scratch / INDEX).open("w+b") as index:

        def count(records: Iterable[Record]) -> None:
            for record in records:
                interruption.check()
                if "fatal" in record:
                    raise _fatal(record)
                report.waited = report.waited or time.perf_counter() - began
                if waiting.pop(record["number"], None):  # a part that is done again may have come before
                    index.write(json.dumps(report.add(record)).encode() + b"\n")
                    advance()

        count(_segmented(job, files, rows, pool))
        while waiting:
            lost = list(waiting.values())[: _ALONE * pool.workers]
            count(_segmented_alone(job, files, lost, pool))
            dead = [row for row in lost if row["number"] in waiting]
            if len(dead) == len(lost) >= _ALONE:
                raise BackendError(
                    f"workers died at each of {len(dead)} images, of which each had one to itself, first "
                    f"{_image(dead[0])}: look whether they have the memory that they need"
                )
            count(_failure(row, ImageError(f"{_image(row)}: {_DEADLY}")) for row in dead)
        report.seconds = time.perf_counter() - began
        index.seek(0)
        with interruption.held():  # a stream to a store that is cut short would be closed, and the half of it be there
            output.write(INDEX, index)
    report.index = output.shown(INDEX)
    return report


def _ship(bundle: Bundle) -> dict[str, Any]:
    """The files of the bundle as objects of Ray, if there are other machines that could want them."""
    import ray

    if len([node for node in ray.nodes() if node["Alive"]]) < 2:
        return {}
    sealed = {name: (bundle.path / name).read_bytes() for name in SEALS}
    return {name: ray.put(data) for name, data in sealed.items()} | {
        name: ray.put(bundle.read(name)) for name in bundle.manifest.files
    }


def _segmented(job: Job, files: Mapping[str, Any], rows: list[Record], pool: _Pool) -> Iterator[Record]:
    """Records of the rows, in the order in which they come; those of parts that were lost with their workers do not."""
    calls = _CALLS_FAR if is_uri(job.place) or any(row["store"] for row in rows) else _CALLS
    part = max(1, min(_LARGEST_PART, len(rows) // (4 * calls * pool.workers)))
    parts = math.ceil(len(rows) / part)
    most_lost = max(_LOST_LEAST, math.ceil(_LOST_SHARE * parts))
    return _mapped(job, files, rows, pool, parts, most_lost, retries=_RETRIES, calls=calls)


def _segmented_alone(job: Job, files: Mapping[str, Any], rows: list[Record], pool: _Pool) -> Iterator[Record]:
    """Each by itself, and nothing beside it in the worker, so that it is known which of them a worker dies of."""
    return _mapped(job, files, rows, pool, len(rows), len(rows), retries=1, calls=1)


def _mapped(
    job: Job,
    files: Mapping[str, Any],
    rows: list[Record],
    pool: _Pool,
    parts: int,
    most_lost: int,
    *,
    retries: int,
    calls: int,
) -> Iterator[Record]:
    import ray

    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = most_lost
    actors = ray.data.ActorPoolStrategy(
        size=pool.workers,
        max_tasks_in_flight_per_actor=2 * calls if calls > 1 else 1,
        enable_true_multi_threading=True,
    )
    records = ray.data.from_items(rows, override_num_blocks=parts).map_batches(
        Worker,
        fn_constructor_args=(job, files),
        batch_size=None,
        batch_format="pyarrow",
        compute=actors,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        max_concurrency=calls,
        max_restarts=-1,
        max_task_retries=retries,
    )
    try:
        for table in records.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(json.loads, table["record"].to_pylist())
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"more than {most_lost} of {parts} parts were lost with their workers: {printable(error)}"
        ) from None


def _fatal(record: Record) -> AglnError:
    """An error of a worker, as one of here: those that need more than a message are of the kind above."""
    kind = getattr(errors, record["kind"], AglnError)
    return (BackendError if kind is MissingPackageError else kind)(record["fatal"])
