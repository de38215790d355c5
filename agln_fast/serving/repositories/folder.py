"""What the folders for all servers are made of: bundles with names, their files, and what is told of them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agln_fast.bundle import Bundle, open_bundle
from agln_fast.errors import BundleChangedError, ConfigError
from agln_fast.manifest import EngineRecord

__all__ = [
    "PICTURES",
    "Model",
    "Named",
    "Repository",
    "engine_facts",
    "facts",
    "new_model",
    "open_named",
    "place",
    "place_bundle",
]

PICTURES = "pictures", "labels and more"
"""What a model takes and gives that keeps to `agln_fast.serving.protocol`, in words."""


_WEIGHTS = "weights.safetensors"
_BESIDE = "manifest.json", "SHA256SUMS"  # in a bundle, and in no manifest


@dataclass(frozen=True)
class Named:
    """A network under the name by which clients ask for it.

    bundles: of the same weights, behind the same contract. Of several, each was built on another GPU; the first one
    serves wherever one is enough.
    """

    name: str
    bundles: tuple[Bundle, ...]

    @property
    def bundle(self) -> Bundle:
        """The first one."""
        return self.bundles[0]

    def engines(self) -> list[tuple[EngineRecord, Bundle]]:
        """Every engine of every bundle, with its bundle; those of the first one first."""
        return [(engine, bundle) for bundle in self.bundles for engine in bundle.manifest.engines]


@dataclass(frozen=True)
class Model:
    """A model as a server lists it. backend: what of the server runs it. takes, gives: its tensors, in words."""

    name: str
    backend: str
    takes: str
    gives: str


@dataclass(frozen=True)
class Repository:
    """What was written for a server.

    left_out: models that there would be if the server could run their engines, and why it cannot.
    start: the words of the command that starts it; `{repository}` in them stands for the folder.
    notes: what to know before that.
    """

    models: tuple[Model, ...]
    start: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_named(bundles: Iterable[tuple[str, Path]]) -> list[Named]:
    """Open each, and put those of one name together.

    Raises:
        ConfigError: bundles under one name are not of one network.
        BundleError: a bundle that cannot be opened.
    """
    found: dict[str, list[Bundle]] = {}
    for name, path in bundles:
        found.setdefault(name, []).append(open_bundle(path))
    for name, (first, *others) in found.items():
        for other in others:
            if _identity(other) != _identity(first):
                raise ConfigError(
                    f"{name}: {first.path} and {other.path} differ in weights, classes or contract; give another "
                    "name to one of them"
                )
    return [Named(name, tuple(opened)) for name, opened in found.items()]


def _identity(bundle: Bundle) -> tuple[Any, ...]:
    manifest = bundle.manifest
    return manifest.files.get(_WEIGHTS), manifest.model, manifest.classes, manifest.contract


def new_model(repository: Path, name: str) -> Path:
    """The folder of a model, made now.

    Raises:
        ConfigError: there is one of that name.
    """
    folder = repository / name
    try:
        folder.mkdir()
    except FileExistsError:
        raise ConfigError(f"two models would be called {name}; give another name to one of the bundles") from None
    return folder


def place(bundle: Bundle, name: str, target: Path) -> None:
    """The bundle's file `name` as `target`: the same file under another name, or a copy on another disk.

    A link takes neither time nor space, and a bundle's files are never written to again: a build that replaces a bundle
    writes others.

    Raises:
        BundleChangedError: it is not what it was when the bundle was opened.
    """
    _link(bundle, name, target)
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != bundle.manifest.files[name]:
            raise BundleChangedError(f"{bundle.path}: {name} was changed since the bundle was opened; open it again")


def place_bundle(bundle: Bundle, target: Path) -> None:
    """The whole bundle as the folder `target`, file by file as `place`.

    Raises:
        BundleChangedError: it is not what it was when it was opened.
    """
    for name in (*bundle.manifest.files, *_BESIDE):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(bundle, name, target / name)
    if open_bundle(target).manifest != bundle.manifest:
        raise BundleChangedError(f"{bundle.path}: was changed since it was opened; open it again")


def _link(bundle: Bundle, name: str, target: Path) -> None:
    source = os.path.realpath(bundle.path / name)
    try:
        with suppress(OSError):  # another disk, a file system without links, or the file of another user
            os.link(source, target)
            return
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise BundleChangedError(f"{bundle.path}: {name} is not there any more; open the bundle again") from None


def facts(bundle: Bundle) -> dict[str, str]:
    """What the manifest says of the network and of what goes in and comes out, for people who look at a server."""
    manifest = bundle.manifest
    contract = manifest.contract
    return {
        "agln_fast": manifest.created_with.get("agln-fast", "unknown"),
        "model": f"{manifest.model.architecture} {manifest.model.encoder}",
        "weights_sha256": manifest.files.get(_WEIGHTS, "unknown"),
        "size": f"{contract.height}x{contract.width}",
        "batch": f"{contract.min_batch}..{contract.max_batch}",
        "layout": contract.layout,
        "resize": contract.resize,
        "mean": _numbers(contract.mean),
        "std": _numbers(contract.std),
    }


def engine_facts(engine: EngineRecord) -> dict[str, str]:
    """What the manifest says of an engine: what it is, and how far its labels agree with the fp32 network's."""
    told = {
        "engine": engine.name,
        "precision": engine.precision,
        "plan": str(engine.plan),
        "built_with": ", ".join(f"{package} {version}" for package, version in engine.versions.items()),
        "compute_capabilities": ", ".join(engine.compute_capabilities),
    }
    if (check := engine.verification) is not None:
        told["verification"] = f"{check.status}{check.reason and f': {check.reason}'}"
        for name, value in (("agreement", check.agreement), ("weighted_agreement", check.weighted_agreement)):
            told[name] = "" if value is None else f"{value:.6f}"
    if (accuracy := engine.accuracy) is not None:
        told[accuracy.measure] = f"{accuracy.score:.4f}"
        told["loss"] = f"{accuracy.loss:.2f} points of {accuracy.measure} on {accuracy.images} of {accuracy.dataset}"
    return {name: value for name, value in told.items() if value}


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
