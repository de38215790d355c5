"""Pictures are found, and masks written whole, in folders and in stores that need no network."""

from __future__ import annotations

import os
import pickle
import platform
from pathlib import Path

import pytest

from agln_fast.errors import BuildError, ConfigError, ImageError
from agln_fast.serving import stores
from agln_fast.serving.stores import Output, find_pictures

pytest.importorskip("pyarrow")
fsspec = pytest.importorskip("fsspec")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def memory():
    """A URI of fsspec's, of a file system of this process."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


KINDS = ("disk", "file://", "memory://")


@pytest.fixture(params=KINDS)
def place(request, tmp_path, memory):
    """`place(names...)`: the address of a place with these files, and one to look at what lies at it."""

    def make(*names: str) -> str:
        if request.param == "memory://":
            for name in names:
                memory.pipe(f"/in/{name}", name.encode())
            return "memory://in"
        fill(tmp_path / "in", *names)
        return str(tmp_path / "in") if request.param == "disk" else f"file://{tmp_path}/in"

    return make


NAMES = ("day/a.png", "day/deep/b.JPG", "c.tif", "day/notes.txt", ".hidden/d.png", "day/.e.png")


def test_pictures_are_found_and_read_and_their_masks_keep_the_folders(place):
    where = place(*NAMES)
    pictures, failed = find_pictures([where], recursive=True)
    assert not failed
    assert {picture.name for picture in pictures} == {"c", "day/a", "day/deep/b"}
    for picture in pictures:
        copied = pickle.loads(pickle.dumps(picture))
        assert copied.read().decode().startswith(f"{picture.name}.")
        assert str(picture) == f"{where}/{copied.read().decode()}"


def test_a_folder_in_a_folder_is_searched_only_when_asked_for(place):
    where = place(*NAMES)
    assert [picture.name for picture in find_pictures([where], recursive=False)[0]] == ["c"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*/a.png", ["day/a"]), ("day/*", ["a"]), ("**/*.JPG", ["day/deep/b"]), ("*.tif", ["c"])],
    ids=["folders", "files", "any depth", "beside none"],
)
def test_patterns(pattern, names, place):
    """Names begin below the folder that the pattern itself names."""
    pictures, _ = find_pictures([f"{place(*NAMES)}/{pattern}"], recursive=False)
    assert [picture.name for picture in pictures] == names


def test_a_file_by_itself(place):
    pictures, _ = find_pictures([f"{place(*NAMES)}/day/a.png"], recursive=False)
    assert [picture.name for picture in pictures] == ["a"]


def test_several_places_keep_the_folders_below_what_holds_them_all(place):
    where = place(*NAMES, "night/a.png")
    pictures, failed = find_pictures([f"{where}/day", f"{where}/night", f"{where}/dawn"], recursive=False)
    assert [picture.name for picture in pictures] == ["day/a", "night/a"]
    assert [*failed] == [f"{where}/dawn"]
    assert "no such file" in failed[f"{where}/dawn"]


def test_pictures_that_differ_in_their_format_alone_have_two_names(place):
    pictures, _ = find_pictures([place("x.png", "x.jpg")], recursive=False)
    assert {picture.name for picture in pictures} == {"x_png", "x_jpg"}


def test_nothing_to_find_says_why(place):
    where = place("notes.txt", "day/a.png")
    with pytest.raises(ImageError, match=r"none of its 1 files is an image.*--recursive"):
        find_pictures([where], recursive=False)


def test_a_name_that_leads_out_of_its_folder_is_no_picture(monkeypatch, memory):
    """Keys of an object store may be any text; masks would be written elsewhere."""
    memory.pipe("/in/a.png", b"a")
    memory.store["/in/../../out.png"] = memory.store["/in/a.png"]
    find = type(memory).find
    monkeypatch.setattr(type(memory), "find", lambda *arguments, **options: {
        **find(*arguments, **options),
        "/in/../../out.png": {"name": "/in/../../out.png", "size": 1, "type": "file"},
    })  # fmt: skip
    assert [picture.name for picture in find_pictures(["memory://in"], recursive=True)[0]] == ["a"]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nothing://key:secret@bucket/x", "nothing://bucket: no store that is known here"),
        ("oci://bucket/x", "oci://bucket: .*ocifs"),
    ],
    ids=["unknown scheme", "package is missing"],
)
def test_a_store_that_cannot_be_opened_says_so(uri, reason):
    with pytest.raises(ConfigError, match=reason):
        find_pictures([uri], recursive=False)


def test_passwords_are_not_shown():
    for uri, shown in (
        ("s3://key:secret@bucket/a/b?region=x&endpoint_override=localhost:1&scheme=http", "s3://bucket/a/b"),
        ("s3://bucket/a%20b ?region=x&endpoint_override=localhost:1", "s3://bucket/a%20b "),
    ):
        assert Output(uri).shown("c.png") == f"{shown}/c.png"


def test_a_picture_that_is_gone_or_too_large_says_so(place, monkeypatch):
    where = place("a.png")
    [picture], _ = find_pictures([where], recursive=False)
    monkeypatch.setenv("AGLN_FAST_MAX_PIXELS", "1")
    monkeypatch.setattr("agln_fast.runtime.images._HEADERS", -4)
    with pytest.raises(ImageError, match=r"a\.png: more than 4 bytes"):
        picture.read()
    with pytest.raises(ImageError, match=r"b\.png: cannot be read \(No such file or directory\)"):
        stores.Picture(picture.store, picture.path.replace("a.png", "b.png"), "b").read()


def test_files_are_written_whole_and_listed_and_replaced(place):
    output = Output(f"{place('old.txt')}/out")
    assert output.names() == set()
    with output.with_parts() as out:
        for text in (b"one", b"two"):
            out.write("day/a.labels.png", text)
            assert output.read("day/a.labels.png") == text
        assert {name for name in out.names() if not name.startswith(".")} == {"day/a.labels.png"}
    assert output.names() == {"day/a.labels.png"}
    assert output.shown("x") == f"{output.place}/x"


def test_a_writing_that_fails_leaves_what_was_there_and_nothing_else(place):
    class Torn:
        """A file that breaks off in its midst."""

        def __init__(self):
            self.parts = [b"half"]

        def read(self, _):
            if self.parts:
                return self.parts.pop()
            raise OSError(28, "No space left on device")

    output = Output(f"{place('old.txt')}/out")
    with output.with_parts() as out:
        out.write("a.png", b"before")
        with pytest.raises(BuildError, match=r"a\.png: cannot be written \(No space left on device\)"):
            out.write("a.png", Torn())
        assert out.read("a.png") == b"before"
    assert output.names() == {"a.png"}


def test_a_name_that_cannot_be_one_is_the_images_fault(tmp_path):
    with Output(str(tmp_path)).with_parts() as out:
        with pytest.raises(ImageError, match="File name too long"):
            out.write("x" * 300, b"")
        out.write("x", b"")
        with pytest.raises(ImageError, match="File exists"):
            out.write("x/y", b"")


def test_what_dead_processes_left_is_removed_and_what_others_write_stays(tmp_path):
    output = Output(str(tmp_path / "out"))
    with output.with_parts() as first:
        child = os.fork()
        if child == 0:
            with output.with_parts() as dying:
                Path(dying.parts, "half").write_bytes(b"half")
                os._exit(0)
        os.waitpid(child, 0)
        assert len([name for name in os.listdir(output.place) if not name.endswith(".lock")]) == 2
        with output.with_parts():
            assert Path(first.parts).is_dir()
            assert len([name for name in os.listdir(output.place) if not name.endswith(".lock")]) == 2
    assert os.listdir(output.place) == []


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path):
    out = Output(str(tmp_path / "out"), str(tmp_path / "out" / "parts of another machine"))
    with pytest.raises(BuildError, match=rf"{platform.node()} does not see the folder"):
        out.write("day/a.png", b"")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "out").write_text("")
    for place in (f"{tmp_path}/out/x", f"file://{tmp_path}/out/x"):
        with pytest.raises(ImageError, match="cannot be made"), Output(place).with_parts():
            pass


def test_objects_are_put_where_they_belong(monkeypatch, memory):
    """On an object store there is nothing to rename."""
    monkeypatch.setattr(stores, "_WHOLE", ("memory",))
    with Output("memory://out").with_parts() as out:
        out.write("day/a.png", b"a")
        assert memory.find("/out") == ["/out/day/a.png"]
