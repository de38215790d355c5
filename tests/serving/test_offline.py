"""`agln-fast run --ray`: masks are the segmenter's, nothing is done twice, and all is done whatever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server import DIE, FAULTS, RAISE, SLOW

import agln_fast
from agln_fast.bundle import SEALS, seal
from agln_fast.errors import AglnError, BackendError, BundleError
from agln_fast.serving import offline
from agln_fast.serving.cluster import cluster
from agln_fast.serving.offline import INDEX, Job, Report, Worker, content_of, read_note, rows_of
from agln_fast.serving.stores import Output, find_pictures

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")

LIMIT_S = 300.0  # for what takes 20 s on an idle machine
ENGINE = {"backend": "onnxruntime", "threads": 1}


def draw(path: Path, seed: int, first: tuple[int, int, int] = (0, 0, 0), size: tuple[int, int] = (60, 90)) -> Path:
    """A picture whose first pixel says what goes wrong in an engine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    picture[0, 0] = first
    Image.fromarray(picture).save(path)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """Five pictures in two folders."""
    for index in range(5):
        draw(tmp_path / "in" / ("day" if index % 2 else "night") / f"{index}.png", index)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def expected(bundle) -> Iterator[Callable[[Path], np.ndarray]]:
    """The labels of a picture."""
    with agln_fast.load(bundle, **ENGINE) as segment:
        yield lambda path: segment(path).labels


def work(bundle, images: Path | str, place: Path | str, files: Any = None, /, **changes: Any) -> list[dict[str, Any]]:
    """What one worker answers, asked for all of them at once. `changes` are the job's."""
    with Output(str(place)).with_parts() as output:
        job = replace(Job.of(bundle, output, **ENGINE), **changes)
        rows = rows_of(find_pictures([str(images)], recursive=True)[0], output, overlays=job.overlays)
        answer = Worker(job, files or {})(pa.Table.from_pylist(rows))
    return [json.loads(record) for record in answer["record"].to_pylist()]


def segmented(records: list[dict[str, Any]]) -> list[str]:
    """Of which images a mask was made."""
    return sorted(Path(record["image"]).stem for record in records if record["segmented"])


def mask_of(image: Path, images: Path, place: Path) -> Path:
    return (place / image.relative_to(images)).with_suffix(".labels.png")


def assert_all_right(images: Path, place: Path, expected: Callable[[Path], np.ndarray]) -> None:
    """Every mask is there and right, and nothing else but the index."""
    masks = {mask_of(image, images, place): image for image in images.rglob("*.png")}
    assert {path for path in place.rglob("*") if path.is_file()} - {place / INDEX} == set(masks)
    for mask, image in masks.items():
        np.testing.assert_array_equal(np.asarray(Image.open(mask)), expected(image))


def test_a_mask_has_the_labels_of_the_segmenter_and_says_what_made_it(bundle, images, tmp_path, expected):
    records = work(bundle, images, tmp_path / "out")
    assert_all_right(images, tmp_path / "out", expected)
    for record in records:
        image = Path(record["image"])
        note = read_note(Path(record["labels"]).read_bytes())
        assert Path(record["labels"]) == mask_of(image, images, tmp_path / "out")
        assert vars(note).items() <= record.items()
        assert (note.bytes, note.height, note.width) == (image.stat().st_size, 60, 90)
        assert (note.bundle, note.engine, note.device) == (content_of(bundle), "onnxruntime-fp32", "cpu")
        assert sum(note.shares.values()) == pytest.approx(1, abs=1e-5)
        assert len(record["spent"]) == 5


def test_a_mask_is_known_as_an_output(bundle, images, tmp_path):
    """So a folder that is segmented again does not take it for an image."""
    work(bundle, images, images)
    assert len(find_pictures([str(images)], recursive=True)[0]) == 5


def test_what_is_there_is_not_done_again(bundle, images, tmp_path):
    first = work(bundle, images, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    again = work(bundle, images, tmp_path / "out")
    assert (segmented(first), segmented(again)) == ([*"01234"], [])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for one, other in zip(first, again, strict=True):
        del one["spent"], one["process"]
        assert other == {**one, "segmented": False}


def test_nothing_to_do_opens_no_engine(bundle, images, tmp_path, monkeypatch):
    work(bundle, images, tmp_path / "out")
    monkeypatch.setattr(offline, "load", None)
    assert segmented(work(bundle, images, tmp_path / "out")) == []


def change_image(images: Path, out: Path) -> None:
    """Of the same size and time."""
    changed = images / "day" / "1.png"
    before, size = changed.stat(), changed.stat().st_size
    draw(changed, 99)
    assert changed.stat().st_size == size
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))


def move_image(images: Path, out: Path) -> None:
    (images / "day" / "1.png").rename(images / "day" / "3.png")


def cut_mask(images: Path, out: Path) -> None:
    mask = out / "day" / "1.labels.png"
    mask.write_bytes(mask.read_bytes()[:-20])


def empty_mask(images: Path, out: Path) -> None:
    (out / "day" / "1.labels.png").write_bytes(b"")


def flip_bit(images: Path, out: Path) -> None:
    mask = out / "day" / "1.labels.png"
    data = bytearray(mask.read_bytes())
    data[-100] ^= 1
    mask.write_bytes(data)


def remove_mask(images: Path, out: Path) -> None:
    (out / "day" / "1.labels.png").unlink()


def plain_mask(images: Path, out: Path) -> None:
    """As `agln-fast run` without Ray writes it, and says nothing of what made it."""
    Image.open(mask := out / "day" / "1.labels.png").load()
    with agln_fast.load(out.parent / "small.agln", **ENGINE) as segment:
        segment(images / "day" / "1.png").save(mask, kind="labels")


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (change_image, ["1"]),
        (move_image, ["3"]),
        (cut_mask, ["1"]),
        (empty_mask, ["1"]),
        (flip_bit, ["1"]),
        (remove_mask, ["1"]),
        (plain_mask, ["1"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_only_what_has_changed_is_done_again(change, again, bundle, images, tmp_path, expected):
    (tmp_path / "small.agln").symlink_to(bundle.path)
    work(bundle, images, out := tmp_path / "out")
    change(images, out)
    assert segmented(work(bundle, images, out)) == again
    assert segmented(work(bundle, images, out)) == []
    (out / "day" / "1.labels.png").unlink(missing_ok=change is not move_image)
    work(bundle, images, out)
    assert_all_right(images, out, expected)


@pytest.mark.parametrize(
    ("changes", "again", "then"),
    [
        ({"engines": ("openvino-fp32",)}, 5, 5),
        ({"engines": ("openvino-fp32", "onnxruntime-fp32")}, 0, 0),
        ({"bit_depth": 12}, 5, 0),
        ({"overlays": True}, 5, 0),
        ({"threads": 2}, 0, 0),
    ],
    ids=["engine", "one of several engines", "bit depth", "overlays", "threads"],
)
def test_what_another_engine_or_reading_made_is_done_again(changes, again, then, bundle, images, tmp_path):
    """`then`: a third time, by the same."""
    work(bundle, images, tmp_path / "out")
    assert [len(segmented(work(bundle, images, tmp_path / "out", **changes))) for _ in range(2)] == [again, then]


def test_a_bundle_is_its_content_wherever_it_lies(bundle, images, tmp_path):
    work(bundle, images, tmp_path / "out")
    shutil.copytree(bundle.path, tmp_path / "copy.agln")
    copy = agln_fast.open_bundle(tmp_path / "copy.agln")
    assert segmented(work(copy, images, tmp_path / "out")) == []
    for name in SEALS:
        (copy.path / name).unlink()
    seal(copy.path, replace(copy.manifest, classes=(*copy.manifest.classes[:-1], "another name")))
    other = agln_fast.open_bundle(copy.path)
    assert len(segmented(work(other, images, tmp_path / "out"))) == 5


def test_overlays_are_written_before_the_masks_that_say_it_is_done(bundle, images, tmp_path, monkeypatch):
    written, write = [], Output.write
    monkeypatch.setattr(Output, "write", lambda output, name, data: (written.append(name), write(output, name, data)))
    records = work(bundle, images, tmp_path / "out", overlays=True)
    assert written[::2] == [name.replace("labels", "overlay") for name in written[1::2]]
    for record in records:
        assert Image.open(record["overlay"]).size > (90, 60)


@pytest.mark.parametrize("kind", ["labels", "overlay"])
def test_a_file_of_somebody_else_is_not_replaced(kind, bundle, images, tmp_path):
    """Ground truth, say, in the folder of the images."""
    theirs = draw(images / "day" / f"1.{kind}.png", 7)
    before = theirs.read_bytes()
    failed = [record for record in work(bundle, images, images, overlays=True) if "error" in record]
    assert [record["error"] for record in failed] == [
        f"{theirs}: is there, and agln-fast did not write it; give another place for masks"
    ]
    assert theirs.read_bytes() == before


def test_bad_images_are_told_and_the_others_segmented(bundle, images, tmp_path):
    (images / "day" / "1.png").write_bytes(b"no image")
    (images / "night" / "0.png").write_bytes((images / "night" / "2.png").read_bytes()[:90])
    (images / "night" / "gone.png").symlink_to(tmp_path / "nowhere")
    draw(images / "night" / f"{'x' * 245}.png", 1)
    records = work(bundle, images, tmp_path / "out")
    failed = {Path(record["image"]).stem[:4]: record["error"] for record in records if "error" in record}
    assert [*failed] == ["1", "0", "xxxx"]
    assert f"{images}/day/1.png: is not an image of a known format" in failed["1"]
    assert f"{images}/night/0.png: cannot be decoded" in failed["0"]
    assert "cannot be written (File name too long)" in failed["xxxx"]
    assert segmented([record for record in records if "error" not in record]) == ["2", "3", "4"]


def test_what_is_no_images_fault_ends_the_run(bundle, images, tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise BackendError("no engine today")

    monkeypatch.setattr(offline, "load", fail)
    assert work(bundle, images, tmp_path / "out") == [{"fatal": "no engine today", "kind": "BackendError"}]
    monkeypatch.setattr(offline, "load", None)
    [record] = work(bundle, images, tmp_path / "out")
    assert record == {"fatal": "TypeError: 'NoneType' object is not callable", "kind": "TypeError"}


def test_a_full_disk_ends_the_run(bundle, images, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agln_fast.serving.stores.shutil.copyfileobj", fail)
    [record] = work(bundle, images, tmp_path / "out")
    assert record["kind"] == "BuildError"
    assert "cannot be written (No space left on device)" in record["fatal"]


def test_a_machine_without_the_bundle_gets_its_files(bundle, images, tmp_path, monkeypatch, expected):
    files = {name: (bundle.path / name).read_bytes() for name in (*SEALS, *bundle.manifest.files)}
    monkeypatch.setattr(ray, "get", lambda data: data)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    records = work(bundle, images, tmp_path / "out", files, bundle=tmp_path / "nowhere.agln")
    assert segmented(records) == [*"01234"]
    assert_all_right(images, tmp_path / "out", expected)
    assert os.listdir(tmp_path / "temporary") == []


def test_a_bundle_that_was_replaced_meanwhile_ends_the_run(bundle, images, tmp_path):
    [record] = work(bundle, images, tmp_path / "out", content="that of before")
    assert record["kind"] == "BundleError"
    assert "is not the bundle any more that the run began with" in record["fatal"]


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"fatal": "x", "kind": "BundleError"}, BundleError, "x"),
        ({"fatal": 'package "y" is not installed', "kind": "MissingPackageError"}, BackendError, 'package "y" is not'),
        ({"fatal": "TypeError: z", "kind": "TypeError"}, AglnError, "TypeError: z"),
    ],
    ids=["a kind of ours", "one that needs more than a message", "one of others"],
)
def test_errors_of_workers_are_those_of_here(record, kind, message):
    error = offline._fatal(record)
    assert type(error) is kind
    assert message in str(error)


@pytest.mark.parametrize(
    ("has", "devices", "workers", "threads", "pool"),
    [
        ({"CPU": 8}, None, None, None, (8, 1, 1, 0)),
        ({"CPU": 8}, None, 2, None, (2, 4, 4, 0)),
        ({"CPU": 8}, None, None, 4, (2, 4, 4, 0)),
        ({"CPU": 2}, None, 4, None, (4, 1, 0.5, 0)),
        ({"CPU": 8, "GPU": 2}, None, None, None, (2, None, 1, 1)),
        ({"CPU": 8, "GPU": 2}, "cpu", None, None, (8, 1, 1, 0)),
        ({"CPU": 8, "GPU": 2}, "cuda:1", 1, None, (1, None, 1, 0)),
        ({"CPU": 1, "GPU": 4}, None, None, 2, (4, 2, 0.25, 1)),
    ],
    ids=["a CPU each", "workers", "threads", "more than CPUs", "a GPU each", "no GPU", "one GPU", "few CPUs"],
)
def test_workers_fit_into_the_cluster(has, devices, workers, threads, pool, bundle, tmp_path, monkeypatch):
    """All of them can be placed, or those without a place would be waited for."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: has)
    job = Job.of(bundle, Output(str(tmp_path)), device=devices, threads=threads)
    chosen = offline._pool(bundle, job, workers)
    assert (chosen.workers, chosen.threads, chosen.cpus, chosen.gpus) == pool
    assert chosen.workers * chosen.cpus <= has["CPU"]


def test_a_report_counts_and_gives_the_lines_of_the_index():
    report = Report(2)
    done = {"number": 0, "image": "a", "segmented": True, "engine": "e", "device": "cpu"}
    lines = [
        report.add({**done, "spent": [1, 2, 3, 4, 5], "process": "p"}),
        report.add({**done, "number": 1, "image": "b", "spent": [3, 2, 1, 0, 1], "process": "q"}),
        report.add({**done, "number": 2, "image": "c", "segmented": False}),
        report.add({"number": 3, "image": "d", "error": "d: no image"}),
    ]
    assert (report.segmented, report.skipped, report.failed) == (2, 1, {"d": "d: no image"})
    assert report.milliseconds == {"read": 2, "prepare": 2, "engine": 2, "labels": 2, "write": 3}
    assert (report.engines, report.processes) == ({"e on cpu": 2}, {"p", "q"})
    assert [set(line) - {"engine", "device"} for line in lines] == [{"image", "segmented"}] * 3 + [{"image", "error"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", 2], "--workers is for Ray"),
        (["--overlays"], "--overlays is for Ray"),
        (["s3://bucket/x"], "s3://bucket/x: give --ray"),
        (["-o", "s3://bucket/x"], "s3://bucket/x: give --ray"),
    ],
    ids=["workers", "overlays", "images in a store", "masks in a store"],
)
def test_what_is_for_ray_says_so(arguments, message, cli, bundle, images, tmp_path):
    code, _, err = cli("run", bundle.path, images, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err


def test_a_place_for_masks_is_asked_for(cli, bundle, images):
    code, _, err = cli("run", bundle.path, images, "--ray")
    assert code == 2
    assert "missing option -o" in err


def test_ray_that_is_missing_says_so(cli, bundle, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = cli("run", bundle.path, images, "-r", "-o", tmp_path / "out", "--ray")
    assert code == 6
    assert 'package "ray" is not installed: pip install "agln-fast[ray]"' in err


# With Ray


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    """A Ray in this process, which runs share; an image can make its engines fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAULTS))
        with cluster(store_bytes=100 << 20):
            yield


@pytest.fixture
def run(here, cli, bundle):
    """`run(images, output, *options)` by two workers: exit code, the report, standard error."""

    def call(images: Path | str, output: Path | str, *options: Any) -> tuple[int, Any, str]:
        engine = "--backend", "onnxruntime", "--workers", 2, "--ray", "--json"
        code, out, err = cli("run", bundle.path, images, "-r", "-o", output, *engine, *options)
        return code, json.loads(out) if out else None, err

    return call


def index_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / INDEX).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_folder_to_masks_and_again(run, images, tmp_path, expected):
    for index in range(5, 40):
        draw(images / "dusk" / f"{index}.png", index)
    code, report, err = run(images, out := tmp_path / "out")
    assert (code, err) == (0, "")
    assert (report["segmented"], report["skipped"], report["failed"]) == (40, 0, {})
    assert report["engines"] == {"onnxruntime-fp32 on cpu": 40}
    assert report["images_per_second"] == pytest.approx(40 / report["seconds"], rel=1e-3)
    assert 0 < report["seconds_until_the_first"] <= report["seconds"]
    assert all(milliseconds > 0 for milliseconds in report["milliseconds"].values())
    assert_all_right(images, out, expected)
    lines = index_of(out)
    assert sorted(line["image"] for line in lines) == sorted(map(str, images.rglob("*.png")))
    assert all(line["segmented"] and Path(line["labels"]).is_file() for line in lines)

    (images / "dusk" / "39.png").write_bytes(b"no image")
    draw(images / "dusk" / "38.png", 99)
    code, report, err = run(images, out)
    assert (code, report["segmented"], report["skipped"]) == (1, 1, 38)
    assert [*report["failed"]] == [str(images / "dusk" / "39.png")]
    assert "39.png: is not an image of a known format" in err.replace("\n", " ")
    assert len(index_of(out)) == 40


@pytest.mark.slow
@pytest.mark.cluster
def test_images_that_are_all_bad(run, tmp_path):
    for index in range(25):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    code, report, err = run(tmp_path, tmp_path / "out")
    assert (code, report["segmented"], len(report["failed"])) == (4, 0, 25)
    assert err.count("failed:") == 20
    assert "5 more" in err


@pytest.mark.slow
@pytest.mark.cluster
def test_from_a_store_to_a_store(run, images, tmp_path, expected):
    code, report, _ = run(f"file://{images}", f"file://{tmp_path}/out")
    assert (code, report["segmented"]) == (0, 5)
    assert report["index"] == f"file://{tmp_path}/out/{INDEX}"
    assert_all_right(images, tmp_path / "out", expected)
    assert run(f"file://{images}/*/*.png", tmp_path / "out")[1]["skipped"] == 5


@pytest.mark.slow
@pytest.mark.cluster
def test_an_image_that_kills_is_told_and_the_others_segmented(run, images, tmp_path, expected):
    killer = draw(images / "day" / "killer.png", 7, DIE)
    code, report, _ = run(images, out := tmp_path / "out")
    assert (code, report["segmented"]) == (1, 5)
    assert report["failed"] == {str(killer): f"{killer}: {offline._DEADLY}"}
    killer.unlink()
    assert_all_right(images, out, expected)


@pytest.mark.slow
@pytest.mark.cluster
def test_workers_that_die_of_everything_end_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "_ALONE", 2)
    for index in range(4):
        draw(tmp_path / "in" / f"{index}.png", index, DIE)
    code, _, err = run(tmp_path / "in", tmp_path / "out")
    assert code == 6
    assert "workers died at each of 4 images" in err.replace("\n", " ")
    assert not any((tmp_path / "out").rglob("*"))


@pytest.mark.slow
@pytest.mark.cluster
def test_an_engine_that_fails_ends_the_run(run, images, tmp_path):
    draw(images / "day" / "1.png", 1, RAISE)
    code, _, err = run(images, tmp_path / "out")
    assert code == 1
    assert "RuntimeError: the engine has a bad day" in err
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_machines_without_the_bundle_get_it_by_ray(run, bundle, images, tmp_path, expected, monkeypatch):
    """Here it is moved away once it has been shipped."""
    (path := tmp_path / "moving.agln").symlink_to(bundle.path)
    nodes, ship = ray.nodes, offline._ship

    def ship_and_move(opened: agln_fast.Bundle) -> dict[str, Any]:
        monkeypatch.setattr(ray, "nodes", lambda: 2 * nodes())
        files = ship(opened)
        path.unlink()
        return files

    monkeypatch.setattr(offline, "_ship", ship_and_move)
    opened, (pictures, _) = agln_fast.open_bundle(path), find_pictures([str(images)], recursive=True)
    with Output(str(tmp_path / "out")).with_parts() as output:
        report = offline.segment_pictures(opened, pictures, output, workers=2, **ENGINE)
    assert report.segmented == 5
    assert_all_right(images, tmp_path / "out", expected)


class Running:
    """The command line with a Ray of its own, in a process group of its own, as a terminal starts it."""

    def __init__(self, *arguments: object) -> None:
        self.folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # pytest's own are too long for sockets
        environment = os.environ | {"PYTHONPATH": str(FAULTS), "TMPDIR": self.folder}
        command = [sys.executable, "-m", "agln_fast.cli", "run", *map(str, arguments), "--ray", "--workers", "2"]
        self.process = subprocess.Popen(
            [*command, "--backend", "onnxruntime", "--json"],
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.processes(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.communicate()
        shutil.rmtree(self.folder)

    def processes(self, title: str = "") -> list[int]:
        """The processes of its Ray: they know the folder. `title`: what their name begins with."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if self.folder in (folder / "environ").read_bytes().decode() and name.startswith(title):
                    found.append(int(folder.name))
        return sorted(set(found) - {self.process.pid})

    def wait_for_masks(self, place: Path, count: int) -> list[Path]:
        """Those that are there when there are so many."""
        limit = time.monotonic() + LIMIT_S
        while len(masks := [*place.rglob("*.labels.png")]) < count:
            assert time.monotonic() < limit
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)
        return masks

    def end(self) -> tuple[int, Any, str]:
        """Exit code, the report, standard error."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, json.loads(out) if out else None, err


@pytest.fixture
def slow_images(tmp_path) -> Path:
    """Each takes 0.7 s in the engine."""
    for index in range(16):
        draw(tmp_path / "in" / f"{index:02}.png", index, SLOW)
    return tmp_path / "in"


@pytest.mark.slow
@pytest.mark.cluster
def test_a_worker_that_is_killed_is_replaced_and_all_masks_are_right(bundle, slow_images, tmp_path, expected):
    with Running(bundle.path, slow_images, "-o", out := tmp_path / "out") as running:
        running.wait_for_masks(out, 3)
        workers = running.processes("ray::MapWorker")
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        killed_at = len(running.wait_for_masks(out, 3))
        code, report, err = running.end()
        assert running.processes() == []
        assert os.listdir(running.folder) == []
    assert killed_at < 16
    assert (code, err) == (0, "")
    assert (report["segmented"], report["workers"]) == (16, 2)
    assert report["processes"] in (2, 3)  # the other one may be through before there is another
    assert_all_right(slow_images, out, expected)
    assert sorted(line["image"] for line in index_of(out)) == sorted(map(str, slow_images.iterdir()))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_goes_on_where_it_was(number, bundle, slow_images, tmp_path, expected):
    """Ctrl-C reaches the whole group, and a supervisor's SIGTERM the process alone."""
    with Running(bundle.path, slow_images, "-o", out := tmp_path / "out") as running:
        running.wait_for_masks(out, 3)
        (os.killpg if number == signal.SIGINT else os.kill)(running.process.pid, number)
        code, report, err = running.end()
        assert running.processes() == []
        assert os.listdir(running.folder) == []
    assert (code, report) == (128 + number, None)
    assert err == f"interrupted by {number.name}\n"
    done = {mask: mask.stat().st_mtime_ns for mask in out.iterdir()}
    assert 3 <= len(done) < 16
    assert all(read_note(mask.read_bytes()) for mask in done)
    with Running(bundle.path, slow_images, "-o", out) as running:
        code, report, _ = running.end()
    assert (code, report["skipped"], report["segmented"]) == (0, len(done), 16 - len(done))
    assert {mask: mask.stat().st_mtime_ns for mask in done} == done
    assert_all_right(slow_images, out, expected)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_ray_of_its_own_is_heard_on_the_loopback_alone(bundle, slow_images, tmp_path):
    """Whoever reaches its ports can run code."""
    with Running(bundle.path, slow_images, "-o", out := tmp_path / "out") as running:
        running.wait_for_masks(out, 1)
        heard = {address for process in [running.process.pid, *running.processes()] for address in listening(process)}
    assert heard == {"127.0.0.1"}


def listening(process: int) -> set[str]:
    """The addresses at which a process takes connections."""
    inodes = set()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(file).removeprefix("socket:[").rstrip("]"))
    found = set()
    for table, form in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.add(socket.inet_ntop(form, packed).removeprefix("::ffff:"))
    return found


def test_a_folder_with_too_long_a_name_for_sockets_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder := tmp_path / ("x" * 40)))
    folder.mkdir()
    with pytest.raises(BackendError, match=r"too long a name for Ray's sockets.*set TMPDIR=/tmp"), cluster():
        pass


@pytest.mark.slow
@pytest.mark.cluster  # others may have one on this machine
def test_a_cluster_that_is_not_there_says_so(monkeypatch):
    with pytest.raises(BackendError, match="Ray auto: cannot be reached or started"), cluster("auto"):
        pass
