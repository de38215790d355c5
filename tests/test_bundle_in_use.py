"""Bundles that change while they are used: the bytes that were checked are the bytes that run, or it is said."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from hand_made import constant_network, hand_made_bundle

import agln_fast
from agln_fast import bundle as bundle_module
from agln_fast.artefact import from_disk
from agln_fast.bundle import is_bundle, open_bundle
from agln_fast.engines import open_engine
from agln_fast.errors import BundleChangedError, BundleError
from agln_fast.files import whole_folder

IMAGE = np.zeros((32, 64, 3), np.uint8)
LOADS, VERSIONS = 40, ("old", "new")


@pytest.fixture
def made(tmp_path):
    return hand_made_bundle(tmp_path / "made.agln", label=1)


@pytest.mark.parametrize("engine", ["torch-fp32", "fused-fp32", "onnxruntime-fp32", "openvino-fp32"])
def test_files_that_were_changed_after_opening_do_not_run(engine, bundle, tmp_path):
    """They are whole and run well: only the hash tells that they are others."""
    if engine.startswith("openvino"):
        pytest.importorskip("openvino")
    opened = open_bundle(shutil.copytree(bundle.path, tmp_path / "copy.agln"))
    file = opened.path / opened.engine(engine).file
    if file.suffix == ".safetensors":
        network = agln_fast.load_checkpoint(file)
        network.classifier[4].bias.data += 1
        agln_fast.save_checkpoint(network, file)
    else:
        file.write_bytes(file.read_bytes() + b"\x1a\x00")  # metadata: an empty field, so the same graph
    with pytest.raises(BundleChangedError, match=rf"{file.name} was changed since the bundle was opened; open it"):
        open_engine(opened.artefact(engine))
    with pytest.raises(BundleError, match=f"{file.name} was changed after the build"):
        open_bundle(opened.path)


def test_files_that_vanish_after_opening_are_named(made):
    (made.path / "weights.safetensors").unlink()
    with pytest.raises(BundleChangedError, match=r"weights\.safetensors: cannot be read any more .*; open it again"):
        agln_fast.load(made)


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.EMFILE, "ulimit -n"), (errno.EACCES, "check its permissions"), (errno.EIO, "copy the bundle again")],
    ids=["too many files", "no permission", "a broken disk"],
)
def test_what_cannot_be_read_now_is_no_change_and_is_tried_once(code, hint, made, monkeypatch):
    tried, opened = [], bundle_module._regular

    def fail_after_opening(name, folder=None):
        if folder is not None:
            return opened(name, folder)
        tried.append(name)
        raise OSError(code, os.strerror(code), str(name))

    monkeypatch.setattr(bundle_module, "_regular", fail_after_opening)
    with pytest.raises(BundleError, match=rf"{os.strerror(code)}.*; .*{hint}") as caught:
        agln_fast.load(made.path, "torch")
    assert not isinstance(caught.value, BundleChangedError)
    assert len(tried) == 1


def test_a_folder_in_a_bundle_that_cannot_be_looked_into_is_named(made, monkeypatch):
    (made.path / "inner").mkdir()
    opened = os.open

    def refuse(path, *rest, **options):
        if path == "inner":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return opened(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BundleError, match=r"Too many open files.*ulimit"):
        open_bundle(made.path)


def test_an_opened_bundle_that_was_replaced_is_not_loaded(made):
    with whole_folder(made.path, is_bundle) as folder:
        hand_made_bundle(folder, label=2)
    with pytest.raises(BundleChangedError, match="open it again"):
        agln_fast.load(made)
    with agln_fast.load(made.path) as segment:
        assert segment(IMAGE).names == ["class 2"]


def test_what_is_loaded_needs_its_files_no_more(made):
    """Neither cut nor gone do they harm: nothing of the network is mapped to them."""
    with agln_fast.load(made, "torch") as segment:
        os.truncate(made.path / "weights.safetensors", 0)
        shutil.rmtree(made.path)
        assert segment(IMAGE).names == ["class 1"]


def test_a_file_without_a_hash_is_taken_as_it_is(made):
    """What a build is still writing has none yet."""
    draft = replace(made.artefact("torch-fp32"), read=from_disk)
    agln_fast.save_checkpoint(constant_network(3), made.path / "weights.safetensors")
    with open_engine(draft) as backend:
        assert (backend.run(IMAGE[None]) == 3).all()


def test_files_that_nobody_listed_are_refused(made):
    with pytest.raises(BundleError, match=r"gives no hash for report\.md"):
        made.read("report.md")
    (made.path / "inner").mkdir()
    for name in ("extra.bin", "inner/extra.bin"):
        (made.path / name).touch()
        with pytest.raises(BundleError, match=rf"{name} is not in the manifest; move it out"):
            open_bundle(made.path)
        (made.path / name).unlink()
    # File managers and network file systems leave such behind.
    (made.path / ".hidden").touch()
    (made.path / "inner" / ".hidden").touch()
    assert open_bundle(made.path).manifest == made.manifest


def test_a_pipe_in_the_place_of_a_file_blocks_nobody(made):
    (made.path / "weights.safetensors").unlink()
    os.mkfifo(made.path / "weights.safetensors")
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(made.path)
    with pytest.raises(BundleChangedError, match="not a regular file"):
        made.read("weights.safetensors")


@pytest.mark.parametrize("swap", [True, False], ids=["one step", "two steps, where the kernel has none"])
def test_a_bundle_that_is_replaced_in_a_loop_is_always_one_of_them(swap, tmp_path, monkeypatch):
    """Names of classes come from the manifest, labels from the weights: they must be of one version."""
    if not swap:
        monkeypatch.setattr("agln_fast.files._renamed", lambda one, other, flag: False)
    templates = {name: hand_made_bundle(tmp_path / name, i + 1, name).path for i, name in enumerate(VERSIONS)}
    path = tmp_path / "x.agln"
    shutil.copytree(templates["old"], path)
    done, replaced = threading.Event(), []

    def replace_it():
        while not done.is_set():
            with whole_folder(path, is_bundle) as folder:
                shutil.copytree(templates[VERSIONS[len(replaced) % 2]], folder, dirs_exist_ok=True)
            replaced.append(True)

    thread = threading.Thread(target=replace_it)
    thread.start()
    try:
        seen = set()
        for _ in range(LOADS):
            with agln_fast.load(path, "torch") as segment:
                seen |= {(*segment.class_set.classes[:1], *segment(IMAGE).names)}
    finally:
        done.set()
        thread.join()
    assert seen <= {("old 0", "old 1"), ("new 0", "new 2")}
    assert len(replaced) > 2
    assert sorted(os.listdir(tmp_path)) == ["new", "old", "x.agln"]


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_again(made, monkeypatch):
    check, opened = bundle_module._check, []

    def replaced_meanwhile(folder, path):
        if not opened:
            opened.append(folder)
            with whole_folder(made.path, is_bundle) as new:
                hand_made_bundle(new, label=2, prefix="new")
        return check(folder, path)

    monkeypatch.setattr(bundle_module, "_check", replaced_meanwhile)
    assert open_bundle(made.path).manifest.classes[0] == "new 0"


def test_a_bundle_that_is_back_before_it_is_missed_is_opened(made, monkeypatch):
    """As a replacement in two steps that ends between two looks."""
    path, away, opened, open_it = made.path, made.path.with_name("away"), [], os.open

    def away_for_a_moment(name, *rest, **options):
        if name != path or opened:
            return open_it(name, *rest, **options)
        opened.append(name)
        path.rename(away)
        try:
            return open_it(name, *rest, **options)
        finally:
            away.rename(path)

    monkeypatch.setattr(os, "open", away_for_a_moment)
    assert open_bundle(path).manifest == made.manifest
    assert opened


def test_giving_up_is_said(made, monkeypatch):
    monkeypatch.setattr(bundle_module, "_open", lambda path: None)
    with pytest.raises(BundleError, match="is replaced again and again while it is opened"):
        open_bundle(made.path)


def test_a_damaged_file_is_named_at_once(made, monkeypatch):
    """Nothing is tried again that will not change."""
    opened = []
    check = bundle_module._check
    monkeypatch.setattr(bundle_module, "_check", lambda *at: opened.append(at) or check(*at))
    (made.path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="was changed after the build"):
        agln_fast.load(made.path)
    assert len(opened) == 1


def test_the_old_bundle_comes_back_where_a_replacement_in_two_steps_was_killed(made):
    """As after a kill between the two renames: the lock is there, and free."""
    made.path.rename(made.path.with_name(".made.agln.0123abcd.old"))
    (made.path.parent / ".made.agln.0123abcd.lock").touch()
    (made.path.parent / ".made.agln.0123abcd").mkdir()
    assert open_bundle(made.path).manifest == made.manifest
    assert os.listdir(made.path.parent) == ["made.agln"]
