"""Engines that could not run where they were built are compared with the reference where they can; and its file."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_stand_in import Driver

import agln_fast
from agln_fast import cuda
from agln_fast.artefact import Artefact
from agln_fast.bundle import Bundle, seal
from agln_fast.contract import IOContract
from agln_fast.data.classes import default_class_set
from agln_fast.engines import KINDS, Engine
from agln_fast.engines.base import Array
from agln_fast.engines.echo import Echo, EchoEngine, colours
from agln_fast.errors import BackendError, BundleError
from agln_fast.manifest import Accuracy, EngineRecord, Manifest, Verification
from agln_fast.models.config import preset
from agln_fast.precision import Precision
from agln_fast.runtime.reference_file import REFERENCE_FILE, _pixels, read_reference, write_reference
from agln_fast.runtime.references import sample_images
from agln_fast.runtime.segmenter import runnable_engines
from agln_fast.runtime.verify import Reference

SIZE = (40, 56)
CLASSES = 3
Fault = Callable[[Array, int], Array]


class Gpu(Echo):
    """Runs on a GPU that the driver's stand-in has. Everything may be changed under an engine that is open.

    fault: what becomes of the output of its engines' n-th run, which is right. seconds: that a run takes.
    """

    devices = ("cuda",)
    precisions = ("fp32", "fp16")

    def __init__(self, clock: list[float], fault: Fault = lambda output, run: output, seconds: float = 0.01) -> None:
        super().__init__()
        self.clock, self.fault, self.seconds, self.version = clock, fault, seconds, "1"

    def versions(self, precision: Precision) -> dict[str, str]:
        return {"library": self.version}

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        self.opened.append(GpuEngine(artefact.contract, self))
        return self.opened[-1]


class GpuEngine(EchoEngine):
    device = "cuda:0"

    def __init__(self, contract: IOContract, kind: Gpu) -> None:
        super().__init__(contract)
        self._kind = kind

    def _run(self, image: Array) -> Array:
        output = self._kind.fault(super()._run(image), len(self.batches))
        self._kind.clock[0] += self._kind.seconds
        return output


def wrong_region(output: Array, run: int) -> Array:
    """The left quarter is that of other channels: a convolution that read a strided view as if it were dense."""
    output = output.copy()
    output[..., : SIZE[1] // 4] = np.roll(output[..., : SIZE[1] // 4], 5, axis=-2)
    return output


def wrong_once_recorded(output: Array, run: int) -> Array:
    """What a CUDA graph gave that was recorded with other addresses: the first runs, of two images and of the largest
    batch, are plain, and right."""
    return output if run <= 3 else wrong_region(output, run)


def wrong_now_and_then(output: Array, run: int) -> Array:
    return wrong_region(output, run) if 3 < run <= 6 else output


def device_lost(output: Array, run: int) -> Array:
    raise BackendError("cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED")


@pytest.fixture
def driver(monkeypatch):
    driver = Driver((8, 9))
    monkeypatch.setattr(cuda, "_initialised", lambda process: (driver, ""))
    return driver


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kinds(monkeypatch, driver, cache) -> SimpleNamespace:
    """Two kinds for a GPU, in the order in which they would be tried if nothing were known."""
    clock = [0.0]
    monkeypatch.setattr("agln_fast.runtime.verify.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    kinds = SimpleNamespace(first=Gpu(clock), second=Gpu(clock))
    monkeypatch.setitem(KINDS, "first", kinds.first)
    monkeypatch.setitem(KINDS, "second", kinds.second)
    return kinds


def made_reference(contract: IOContract) -> tuple[list[Array], list[Reference]]:
    """By hand: the network's logits are the channels of colour."""
    frames = [np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8) for seed in range(2)]
    references = []
    for frame in frames:
        logits = colours(frame)
        ranked = np.sort(logits, axis=0)
        kept = logits[None] if contract.output == "logits" else None
        references.append(Reference(frame[None], kept, logits.argmax(0)[None], (ranked[-1] - ranked[-2])[None]))
    return frames, references


def made_bundle(
    folder: Path,
    output: str = "labels",
    *,
    reference: bool = True,
    minimum: float | None = None,
    judged_on: str | None = None,
) -> Bundle:
    """What a machine without a GPU builds: engines of both kinds that it could not run."""
    folder.mkdir()
    contract = IOContract(*SIZE, output=output, max_batch=3)
    if reference:
        write_reference(folder / REFERENCE_FILE, *made_reference(contract), contract, CLASSES, minimum)
    (folder / "engine").write_bytes(b"")
    check = Verification("not verified on this machine", "no GPU")
    accuracy = judged_on and Accuracy("mIoU", judged_on, "val", 9, 0.5, 0.5, 0.0, -0.1, 0.1, "openvino")
    engines = tuple(
        EngineRecord(f"{kind}-fp16", kind, "fp16", "engine", kind, verification=check, accuracy=accuracy or None)
        for kind in ("first", "second")
    )
    colour_set = default_class_set(CLASSES)
    model = preset("fpn_resnet18", CLASSES)
    return Bundle(folder, seal(folder, Manifest(model, colour_set.classes, colour_set.palette, contract, engines)))


@pytest.fixture(params=["labels", "logits"])
def bundle_of_gpus(kinds, tmp_path, request) -> Bundle:
    return made_bundle(tmp_path / "gpu.agln", request.param)


def chosen(bundle: Bundle, backend: str = "auto") -> EngineRecord:
    with agln_fast.load(bundle.path, backend) as segment:
        return segment.engine


def test_an_engine_is_checked_once_and_remembered(bundle_of_gpus, kinds, caplog):
    caplog.set_level(logging.INFO, "agln_fast.runtime")
    engine = chosen(bundle_of_gpus)
    check = engine.verification
    assert (check.status, check.agreement, check.device) == ("passed", 1.0, "cuda:0")
    assert check.images == 5  # two, and a batch of the largest size
    assert check.latency_ms == pytest.approx(10)
    assert check.max_logit_error == (0 if bundle_of_gpus.manifest.contract.output == "logits" else None)
    words = [record.message for record in caplog.records]
    assert sum("has not run on such a device before: checking it, once" in line for line in words) == 2
    assert sum("passed, after" in line for line in words) == 2
    assert all(record.levelno == logging.INFO for record in caplog.records)
    caplog.clear()
    assert len(kinds.first.opened) + len(kinds.second.opened) == 3
    assert chosen(bundle_of_gpus) == engine
    assert len(kinds.first.opened) + len(kinds.second.opened) == 4
    assert not caplog.records


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 3), (0.01, 11)], ids=["slow", "quick"])
def test_each_image_is_run_several_times_in_turn(seconds, rounds, bundle_of_gpus, kinds):
    """One round is not timed; then 0.2 s are, in two runs a round."""
    kinds.first.seconds = seconds
    chosen(bundle_of_gpus)
    assert kinds.first.opened[0].batches == [1, 1, 3] * rounds


@pytest.mark.parametrize("fault", [wrong_region, wrong_once_recorded, wrong_now_and_then])
def test_a_wrong_engine_is_refused_with_its_numbers(fault, bundle_of_gpus, kinds, caplog):
    """NVIDIA/TensorRT issue 4854, and triton-inference-server/server issue 8550."""
    kinds.first.fault = fault
    kinds.first.seconds = 0.001  # wrong is fast
    assert chosen(bundle_of_gpus).backend == "second"
    (warning,) = caplog.records
    assert "first-fp16: agrees with the fp32 reference on" in warning.message
    assert ("gives different labels for the same image" in warning.message) == (fault is not wrong_region)
    checked = len(kinds.first.opened)
    message = r"first-fp16 is refused here: .*agrees with the fp32 reference on \d\d\.\d{4}% of the pixels weighted"
    with pytest.raises(BackendError, match=message):
        agln_fast.load(bundle_of_gpus.path, "first")
    assert chosen(bundle_of_gpus).backend == "second"
    assert len(kinds.first.opened) == checked
    reasons = {engine.name: obstacle for engine, obstacle in runnable_engines(bundle_of_gpus)}
    assert reasons["second-fp16"] is None
    assert "agrees with the fp32 reference on" in reasons["first-fp16"]


def test_if_none_is_right_each_says_so(bundle_of_gpus, kinds):
    kinds.first.fault = kinds.second.fault = wrong_region
    with pytest.raises(BackendError, match=r"first-fp16 is refused here: .*; engine second-fp16 is refused here: "):
        agln_fast.load(bundle_of_gpus.path)


@pytest.mark.parametrize("slow", ["first", "second"])
def test_the_fastest_is_taken_by_measured_latency(slow, bundle_of_gpus, kinds):
    """NVIDIA/TensorRT issue 4838: grouped convolutions in half precision that fall back are slow, and right."""
    getattr(kinds, slow).seconds = 0.02
    assert chosen(bundle_of_gpus).backend != slow
    assert chosen(bundle_of_gpus).backend != slow


def test_a_passing_fault_of_the_machine_is_not_remembered(bundle_of_gpus, kinds, caplog):
    kinds.first.fault = device_lost
    assert chosen(bundle_of_gpus).backend == "second"
    assert "CUDA_ERROR_LAUNCH_FAILED" in caplog.text
    kinds.first.fault, kinds.first.seconds = (lambda output, run: output), 0.001
    assert chosen(bundle_of_gpus).backend == "first"


def test_asked_for_by_name_it_runs_unchecked_until_it_is_known(bundle_of_gpus, kinds):
    assert chosen(bundle_of_gpus, "first").verification.status == "not verified on this machine"
    assert [len(engine.batches) for engine in kinds.first.opened] == [0]


CHANGES = {
    "another driver": lambda driver, kinds: setattr(driver, "version", 13010),
    "another GPU": lambda driver, kinds: setattr(driver, "devices", ((12, 0),)),
    "another library": lambda driver, kinds: setattr(kinds.first, "version", "2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_holds_for_what_it_was_made_with(change, kinds, driver, tmp_path):
    bundle = made_bundle(tmp_path / "x.agln")
    kinds.first.fault = wrong_region
    chosen(bundle)
    kinds.first.fault, kinds.first.seconds = (lambda output, run: output), 0.001
    assert chosen(bundle).backend == "second"
    CHANGES[change](driver, kinds)
    assert chosen(bundle).backend == "first"


def test_a_record_holds_for_the_content_of_the_bundle(kinds, tmp_path):
    bundle = made_bundle(tmp_path / "x.agln")
    kinds.first.fault = wrong_region
    chosen(bundle)
    kinds.first.fault, kinds.first.seconds = (lambda output, run: output), 0.001
    bundle.path.rename(tmp_path / "y.agln")
    assert chosen(replace(bundle, path=tmp_path / "y.agln")).backend == "second"
    (tmp_path / "y.agln" / "engine").write_bytes(b"built again")
    rebuilt = Bundle(tmp_path / "y.agln", seal_again(tmp_path / "y.agln", bundle.manifest))
    assert chosen(rebuilt).backend == "first"


def seal_again(folder: Path, manifest: Manifest) -> Manifest:
    for name in ("manifest.json", "SHA256SUMS"):
        (folder / name).unlink()
    return seal(folder, replace(manifest, files={}))


@pytest.mark.parametrize("text", ["", "[]", '{"status": "passed", "latency_ms": "1"}', '{"status": "odd"}', '{"x": 1}'])
def test_a_record_that_is_none_is_made_anew(text, kinds, cache, tmp_path):
    bundle = made_bundle(tmp_path / "x.agln")
    expected = chosen(bundle)
    records = list((cache / "arrival").iterdir())
    assert len(records) == 2
    for record in records:
        record.write_text(text)
    assert chosen(bundle) == expected
    assert len(kinds.second.opened) == 2


def test_the_minimum_is_that_of_the_build(kinds, tmp_path):
    kinds.first.fault, kinds.first.seconds = wrong_region, 0.001
    assert chosen(made_bundle(tmp_path / "x.agln", minimum=0.5)).backend == "first"


@pytest.mark.parametrize(
    ("judged_on", "fault", "taken"),
    [("street", wrong_region, "first"), ("scenes", wrong_region, "second"), ("street", lambda x, _: x * 0, "second")],
    ids=["other than the users", "drawn, as the check's", "nothing is right"],
)
def test_what_was_kept_by_the_users_own_data_is_refused_for_gross_faults(judged_on, fault, taken, kinds, tmp_path):
    """A quarter of the labels is wrong, or nearly all."""
    kinds.first.fault, kinds.first.seconds = fault, 0.001
    assert chosen(made_bundle(tmp_path / "x.agln", judged_on=judged_on)).backend == taken


def test_a_bundle_of_before_runs_unchecked_and_says_so_once(kinds, cache, tmp_path, caplog):
    caplog.set_level(logging.INFO, "agln_fast.runtime")
    bundle = made_bundle(tmp_path / "x.agln", reference=False)
    kinds.first.fault = wrong_region
    assert chosen(bundle).backend == "first"
    (record,) = caplog.records
    assert "has no reference.npz: engines run unchecked" in record.message
    assert not cache.exists()


def test_nothing_is_done_where_nothing_is_to_be_checked(bundle, cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "agln_fast.runtime")
    monkeypatch.setattr("agln_fast.runtime.arrival.verify_engine", None)
    monkeypatch.setattr("agln_fast.runtime.arrival.read_reference", None)
    with agln_fast.load(bundle.path) as segment:
        assert segment.device == "cpu"
    assert not caplog.records
    assert not cache.exists()


def test_verify_remembers_what_it_finds_and_replaces_what_was_known(kinds, tmp_path, cli):
    bundle = made_bundle(tmp_path / "x.agln")
    kinds.first.fault, kinds.first.seconds = wrong_region, 0.001
    code, _, err = cli("verify", bundle.path, "--json")
    assert code == 8
    assert "first-fp16: agrees with the fp32 reference on" in err
    with pytest.raises(BackendError, match="first-fp16 is refused here"):
        agln_fast.load(bundle.path, "first")
    kinds.first.fault = lambda output, run: output
    assert cli("verify", bundle.path, "--min-agreement", "1")[0] == 0  # of another minimum: not remembered
    assert chosen(bundle).backend == "second"
    assert cli("verify", bundle.path)[0] == 0
    assert chosen(bundle).backend == "first"


@pytest.mark.parametrize("output", ["labels", "logits"])
@pytest.mark.parametrize("batch", [(1, 1), (1, 3), (3, 3)], ids=str)
def test_the_file_gives_back_what_was_written(output, batch, tmp_path):
    contract = IOContract(*SIZE, *batch, output=output)
    frames, single = made_reference(contract)
    ahead = single
    if batch[0] > 1:  # one batch, filled up from the beginning
        rows = [0, 1, 0]
        parts = {
            name: None if getattr(single[0], name) is None else np.concatenate([getattr(single[i], name) for i in rows])
            for name in ("image", "logits", "labels", "margin")
        }
        ahead = [Reference(**parts)]
    write_reference(tmp_path / "x", frames, ahead, contract, CLASSES, None)
    assert read_reference((tmp_path / "x.npz").read_bytes(), contract, CLASSES)[1] is None
    references, _ = read_reference((tmp_path / "x.npz").read_bytes(), contract, CLASSES)
    sizes = {(1, 1): [1, 1], (1, 3): [1, 1, 3], (3, 3): [3]}[batch]
    assert [len(reference.image) for reference in references] == sizes
    seen = 0
    for reference in references:
        for row in range(len(reference.image)):
            expected = single[seen % 2]
            seen += 1
            assert np.array_equal(reference.image[row], expected.image[0])
            assert np.array_equal(reference.labels[row], expected.labels[0])
            assert np.array_equal(reference.margin[row], expected.margin[0])  # whole numbers below 2^11
            if output == "logits":
                kept = expected.logits[0].reshape(CLASSES, -1)[:, reference.pixels]
                assert np.array_equal(reference.logits[row], kept)


def test_a_build_keeps_what_its_reference_makes_of_scenes(bundle):
    data = bundle.read(REFERENCE_FILE)
    references, minimum = read_reference(data, bundle.manifest.contract, 5)
    assert minimum is None
    for frame, reference in zip(sample_images(2, 64, 96), references, strict=True):
        assert np.array_equal(reference.image[0], frame)
    with agln_fast.load(bundle, "torch") as segment:
        for reference in references:
            assert np.array_equal(segment(reference.image[0]).labels, reference.labels[0])


def archive(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


BROKEN = {
    "a pickle": ({"margin": np.array([{}] * 2, object)}, "margin has another size"),
    "another shape": ({"frames": np.zeros((2, *SIZE[::-1], 3), np.uint8)}, "frames has another shape or type"),
    "another type": ({"labels": np.zeros((2, *SIZE), np.int8)}, "labels has another shape or type"),
    "a larger one": ({"margin": np.zeros((64, *SIZE), np.float16)}, "margin has another size"),
    "one too many": ({"more": np.zeros(1)}, "other arrays"),
    "no such class": ({"labels": np.full((2, *SIZE), CLASSES, np.uint8)}, "none of the network's"),
    "negative": ({"margin": np.full((2, *SIZE), -1, np.float16)}, "negative"),
    "no number": ({"margin": np.full((2, *SIZE), np.nan, np.float16)}, "not finite"),
    "minimum": ({"minimum": np.float64(2)}, "the minimum is 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(case, tmp_path):
    contract = IOContract(*SIZE)
    write_reference(tmp_path / REFERENCE_FILE, *made_reference(contract), contract, CLASSES, None)
    with np.load(tmp_path / REFERENCE_FILE) as whole:
        arrays = dict(whole)
    assert read_reference(archive(arrays), contract, CLASSES)
    change, message = BROKEN[case]
    with pytest.raises(BundleError, match=rf"reference\.npz is damaged \(.*{message}"):
        read_reference(archive({**arrays, **change}), contract, CLASSES)


def test_a_cut_or_foreign_file_is_refused(tmp_path):
    contract = IOContract(*SIZE)
    write_reference(tmp_path / REFERENCE_FILE, *made_reference(contract), contract, CLASSES, None)
    whole = (tmp_path / REFERENCE_FILE).read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    foreign = io.BytesIO()
    with zipfile.ZipFile(foreign, "w") as zipped:
        for name in ("frames", "labels", "margin", "minimum"):
            zipped.writestr(f"{name}.npy", b"x" * 5000)
    for data in (b"", whole[:-1], whole[: len(whole) // 2], bytes(flipped), foreign.getvalue()):
        with pytest.raises(BundleError, match=r"reference\.npz is damaged"):
            read_reference(data, contract, CLASSES)


@pytest.mark.parametrize(("size", "classes"), [((512, 512), 21), ((512, 512), 150), ((1024, 2048), 19)], ids=str)
def test_pixels_of_logits_are_spread_over_the_image(size, classes):
    """Each of 8 x 8 parts has at least half of its share."""
    pixels = _pixels(IOContract(*size, output="logits"), classes)
    assert 2 * 4 * classes * len(pixels) <= 2**21  # bytes
    rows, columns = pixels * 8 // (size[0] * size[1]), pixels % size[1] * 8 // size[1]
    shares = np.bincount(rows * 8 + columns, minlength=64)
    assert shares.min() >= len(pixels) / 128
