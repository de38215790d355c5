"""The bundle: a folder NAME.agln with weights, engines and the manifest that describes them.

`SHA256SUMS` lists every file of the bundle (`sha256sum -c` reads it), so a change of any byte is noticed on opening.
Afterwards files are read by `Bundle.read` alone, which gives no bytes but those that the manifest in memory describes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shlex
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib import resources
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

from agln_fast.contract import IOContract
from agln_fast.data.classes import ClassSet
from agln_fast.errors import BundleChangedError, BundleError, ConfigError, did_you_mean, printable
from agln_fast.files import is_returning
from agln_fast.models.config import ModelConfig
from agln_fast.plan.plan import NO_PLAN, Plan

__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "EngineRecord",
    "Manifest",
    "PlanChosenBy",
    "Verification",
    "check_schema",
    "is_bundle",
    "open_bundle",
    "read_manifest",
    "schema_error",
    "seal",
    "unreadable",
]

SCHEMA_VERSION = 2
_MANIFEST = "manifest.json"
_SUMS = "SHA256SUMS"
_REBUILD = "build it again with `agln-fast build`"
_LARGEST_MANIFEST = 2**23  # bytes; 32,767 classes with names of 190 letters
_DEEPEST = 8  # lists and objects in each other
_LONGEST = 1200  # characters of a message
# Gone, on a server that has another now, or no regular file, which `_regular` says.
_ANOTHER = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.ENXIO, errno.EINVAL)
_ATTEMPTS, _PAUSE_S = 50, 0.01
# Control characters, which terminals obey; line separators; halves of surrogate pairs, which no encoding can write.
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Verification:
    """How an engine's labels compare with the fp32 reference network on sample images.

    status: "passed" (run here, at or above the threshold), "not verified on this machine", or "failed" (`reason` says
        why; a bundle with a failed engine is never written).
    agreement: share of pixels with the reference's label, 0..1.
    weighted_agreement: the same, each pixel weighted by the reference's top-1 minus top-2 logit, 0..1.
    max_logit_error: largest absolute difference of logits; None where the engine gives labels only.
    latency_ms: median engine time of one batch on the machine that built it, milliseconds.
    device: where it ran, e.g. "cpu" or "cuda".
    """

    status: Literal["passed", "not verified on this machine", "failed"]
    reason: str = ""
    images: int = 0
    agreement: float | None = None
    weighted_agreement: float | None = None
    max_logit_error: float | None = None
    latency_ms: float | None = None
    device: str | None = None


PlanChosenBy = Literal["timing", "cost model", "user", "fixed"]


@dataclass(frozen=True)
class EngineRecord:
    """One way to run the bundle's network.

    name: unique in the bundle, e.g. "openvino-fp32".
    file: relative to the bundle's folder; several engines may share one.
    precision: as read back from the artefact or library.
    versions: package name -> version it was built with.
    compute_capabilities: e.g. ("sm80", "sm86"), empty for CPU engines.
    plan: the rewrites that were applied before it was compiled.
    plan_chosen_by: "timing" on the machine that built it, "cost model", "user", or "fixed" where there is no choice.
    """

    name: str
    backend: str
    precision: str
    file: str
    target: str
    versions: dict[str, str] = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] = ()
    verification: Verification | None = None
    plan: Plan = NO_PLAN
    plan_chosen_by: PlanChosenBy = "fixed"

    @property
    def files(self) -> tuple[str, ...]:
        """All that it is opened from: `file`, and the weights beside it if that is a graph of OpenVINO's."""
        graph = PurePosixPath(self.file)
        return (self.file, graph.with_suffix(".bin").as_posix()) if graph.suffix == ".xml" else (self.file,)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; docs/bundle.md describes every field.

    left_out: engines that were asked for and disagree with the reference -> how.
    """

    model: ModelConfig
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    contract: IOContract
    engines: tuple[EngineRecord, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    created_with: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as the JSON schema wants them."""
        values = {
            "schema_version": SCHEMA_VERSION,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "model": asdict(self.model),
            "contract": self.contract.to_dict(),
            "engines": [asdict(engine) for engine in self.engines],
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: str | os.PathLike[str] = "OLD.agln") -> Manifest:
        """The inverse of `to_dict`. `path` is that of the bundle, for messages.

        Raises:
            BundleError: another schema version, a value that breaks the schema (the message names the place), or values
                that do not go together.
        """
        _check_plain(values)
        found = check_schema(values)
        if found != SCHEMA_VERSION:
            raise BundleError(
                f"manifest has the older schema {found}, this agln-fast reads {SCHEMA_VERSION}; "
                f"rebuild it from its own weights: agln-fast rebuild {shlex.quote(os.fspath(path))}"
            )
        _check_schema(values)
        try:
            manifest = cls(
                model=ModelConfig.from_dict(values["model"]),
                classes=tuple(values["classes"]),
                palette=tuple((r, g, b) for r, g, b in values["palette"]),
                contract=IOContract.from_dict(values["contract"]),
                engines=tuple(_engine(engine) for engine in values["engines"]),
                left_out=values["left_out"],
                created_with=values["created_with"],
                files=values["files"],
            )
            ClassSet("bundle", "", manifest.classes, manifest.palette)
        except ConfigError as error:
            raise BundleError(f"manifest: {printable(error)}; {_REBUILD}") from None
        outputs = manifest.model.num_classes
        if len(manifest.classes) != outputs:
            raise BundleError(f"manifest names {len(manifest.classes)} classes for {outputs} outputs; {_REBUILD}")
        names = [engine.name for engine in manifest.engines]
        if len(set(names)) != len(names):
            raise BundleError(f"manifest names an engine twice; {_REBUILD}")
        return manifest


def _check_schema(values: dict[str, Any]) -> None:
    where = schema_error(values)
    if where is not None:
        raise BundleError(f"manifest breaks its schema at {where}; {_REBUILD}")


def schema_error(values: Any, adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> str | None:
    """Where and how a manifest breaks its schema, which is about each value by itself; None where it keeps it.

    adapt: makes another schema of the one in the package, of whose parts it may use any.
    """
    # Imported here: networks in memory are run without it, on machines that have not got it.
    from jsonschema.exceptions import best_match

    schema = _schema()
    error = best_match(_validator()(adapt(schema) if adapt else schema).iter_errors(values))
    return None if error is None else f"{printable(error.json_path)}: {printable(error.message)}"


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(
        resources.files("agln_fast.data").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    )
    return schema


@cache
def _validator() -> Any:
    """The class of validators that take what JSON means by its types, and as long as a glance at the values."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # By themselves schemas take 128.0 for an integer, and NaN for a number within any range.
    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: type(value) is int,
            "number": lambda _, value: type(value) is int or (type(value) is float and math.isfinite(value)),
        }
    )
    keywords = {
        "items": _items,
        **{
            name: _unless_too_many(Draft202012Validator.VALIDATORS[name])
            for name in ("additionalProperties", "propertyNames")
        },
    }
    return extend(Draft202012Validator, keywords, type_checker=types)  # type: ignore[no-untyped-call]


def _items(validator: Any, items: Any, instance: Any, schema: dict[str, Any]) -> Iterator[Any]:
    """The keyword `items`, which tells the first error alone, and passes over classes and colours that are surely
    right: there may be 32,767, and jsonschema takes 0.2 ms for each."""
    if not isinstance(instance, list) or len(instance) > schema.get("maxItems", math.inf):
        return
    surely_right = _SURELY_RIGHT.get(items.get("$ref"), _never)
    for index, item in enumerate(instance):
        if not surely_right(item):
            errors = list(validator.descend(item, items, path=index))
            if errors:
                yield from errors
                return


def _unless_too_many(keyword: Callable[..., Iterable[Any] | None]) -> Callable[..., Iterable[Any] | None]:
    """A keyword about the properties of an object that says nothing where `maxProperties` does."""

    def checked(validator: Any, value: Any, instance: Any, schema: dict[str, Any]) -> Iterable[Any] | None:
        too_many = isinstance(instance, dict) and len(instance) > schema.get("maxProperties", math.inf)
        return None if too_many else keyword(validator, value, instance, schema)

    return checked


def _never(item: Any) -> bool:
    return False


def _is_line(item: Any) -> bool:
    return type(item) is str and 1 <= len(item) <= 200


def _is_rgb(item: Any) -> bool:
    return type(item) is list and len(item) == 3 and all(type(value) is int and 0 <= value <= 255 for value in item)


_SURELY_RIGHT: dict[str | None, Callable[[Any], bool]] = {"#/$defs/line": _is_line, "#/$defs/rgb": _is_rgb}


def _engine(values: dict[str, Any]) -> EngineRecord:
    try:
        plan = Plan.from_dict(values["plan"])
    except ConfigError as error:
        raise ConfigError(f"engine {values['name']}: {error}") from None
    return EngineRecord(
        **{
            **values,
            "compute_capabilities": tuple(values["compute_capabilities"]),
            "verification": values["verification"] and Verification(**values["verification"]),
            "plan": plan,
        }
    )


def _check_plain(values: Any) -> None:
    """Whether all text can be shown, and nothing is so deep that looking at it needs much of the stack.

    Raises:
        BundleError: no.
    """
    level = [values]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _parts(value)]
        for text in level:
            if isinstance(text, str) and _UNSHOWABLE.search(text):
                raise BundleError(f"manifest holds the text '{printable(text)}', which cannot be shown; {_REBUILD}")
    if level:
        raise BundleError(f"manifest has lists and objects too deep in each other; {_REBUILD}")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, and its manifest. Every file's hash was checked when it was opened.

    A manifest without hashes makes it a draft, which a build is still writing: its files are taken as they are.
    """

    path: Path
    manifest: Manifest

    def engine(self, name: str) -> EngineRecord:
        """The engine called `name`.

        Raises:
            BundleError: there is none; the message lists those that there are.
        """
        for engine in self.manifest.engines:
            if engine.name == name:
                return engine
        known = [engine.name for engine in self.manifest.engines]
        raise BundleError(f"{self.path}: no engine {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")

    def matching(self, backend: str = "auto", precision: str | None = None) -> tuple[EngineRecord, ...]:
        """The engines of `backend` ("auto" for any) in `precision` (None for any); at least one.

        Raises:
            BundleError: there is none; the message lists those that there are.
        """
        engines = tuple(
            engine
            for engine in self.manifest.engines
            if backend in ("auto", engine.backend) and precision in (None, engine.precision)
        )
        if not engines:
            known = [engine.name for engine in self.manifest.engines]
            wanted = f"{backend} engine" + (f" in {precision}" if precision else "")
            raise BundleError(f"{self.path}: no {wanted}{did_you_mean(backend, known)}; it has {', '.join(known)}")
        return engines

    def read(self, name: str) -> bytes:
        """The file `name`, read once: the bytes returned are those whose hash was compared with the manifest's.

        Raises:
            BundleError: the manifest does not list it, or it cannot be read.
            BundleChangedError: it is not there any more, or not what it was when the bundle was opened.
        """
        hashes = self.manifest.files
        if hashes and name not in hashes:
            raise BundleError(f"{self.path}: the manifest gives no hash for {name}; {_REBUILD}")
        try:
            with _regular(self.path / name) as file:
                data = file.read()
        except OSError as error:
            if error.errno not in _ANOTHER:
                raise unreadable(self.path / name, error) from None
            raise BundleChangedError(f"{self.path / name}: cannot be read any more ({error}); open it again") from None
        if hashes and hashlib.sha256(data).hexdigest() != hashes[name]:
            raise BundleChangedError(f"{self.path}: {name} was changed since the bundle was opened; open it again")
        return data


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json`, with the sha256 of every file of `folder` in it, and `SHA256SUMS`; return the manifest.

    Raises:
        BundleError: it would not open again, and nothing is written.
    """
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    values = replace(manifest, files=files).to_dict()
    manifest = Manifest.from_dict(_values(_json(values)))
    (folder / _MANIFEST).write_bytes(_json(values))
    (folder / _SUMS).write_text(_sums({**files, _MANIFEST: _sha256(folder / _MANIFEST)}))
    return manifest


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle and check every byte of it against its hashes.

    Where it is replaced meanwhile, it is the old one or the new one, never a part of each.

    Raises:
        BundleError: no such folder, not a bundle, a missing, changed or unlisted file, another schema version, or a
            value in the manifest that makes no sense.
    """
    path = Path(path)
    for _ in range(_ATTEMPTS):
        try:
            bundle = _open(path)
        except OSError as error:
            raise unreadable(path, error) from None
        if bundle is not None:
            return bundle
    raise BundleError(f"{path}: is replaced again and again while it is opened; wait for the builds to end")


def _open(path: Path) -> Bundle | None:
    """None where it is worth to try again, because the folder was replaced in the meantime."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if path.is_dir() or (not path.exists() and is_returning(path)):
            time.sleep(_PAUSE_S)
            return None
        what = "not a folder" if path.exists() else "no such bundle"
        raise BundleError(f"{path}: {what}; a bundle is the folder NAME.agln that `agln-fast build` writes") from None
    try:
        return Bundle(path, _check(folder, path))
    except (BundleError, OSError) as error:
        if not _is_at(path, folder):
            return None
        if isinstance(error, BundleError):
            raise BundleError(f"{path}: {printable(error, _LONGEST)}") from None
        raise
    finally:
        os.close(folder)


def _is_at(path: Path, folder: int) -> bool:
    """Whether `path` is the name of the folder that was opened."""
    try:
        return os.path.samestat(os.fstat(folder), path.stat())
    except OSError:
        return False


def _check(folder: int, path: Path) -> Manifest:
    """The manifest of the bundle in a folder's descriptor, through which all is read: its name may be another's by now.

    `path` is only named in messages.

    Raises:
        BundleError: the message does not name the folder.
    """
    names = set(_walk(folder))
    for name in (_MANIFEST, _SUMS):
        if name not in names:
            raise BundleError(f"not a bundle, or a damaged one: there is no {name}; {_REBUILD}")
    with _regular(_MANIFEST, folder) as file:
        text = file.read(_LARGEST_MANIFEST + 1)
    manifest = Manifest.from_dict(_values(text), path)
    needed = [name for engine in manifest.engines for name in engine.files if name not in manifest.files]
    if needed:
        raise BundleError(f"the manifest gives no hash for {needed[0]}; {_REBUILD}")
    actual = {_MANIFEST: hashlib.sha256(text).hexdigest()}
    for name, expected in manifest.files.items():
        try:
            actual[name] = _sha256(name, folder)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"{name} is missing; copy the bundle again or {_REBUILD}") from None
        if actual[name] != expected:
            raise BundleError(f"{name} was changed after the build; copy the bundle again or {_REBUILD}")
    sums = _sums(actual).encode()
    with _regular(_SUMS, folder) as file:
        if file.read(len(sums) + 1) != sums:
            raise BundleError(f"manifest.json or {_SUMS} was changed after the build; copy it again or {_REBUILD}")
    unlisted = sorted(names - {*manifest.files, _MANIFEST, _SUMS})
    if unlisted:
        raise BundleError(f"{printable(unlisted[0])} is not in the manifest; move it out of the bundle's folder")
    return manifest


def _values(text: bytes) -> Any:
    """The inverse of `_json`.

    Raises:
        BundleError: it is no such text.
    """
    try:
        if len(text) > _LARGEST_MANIFEST:
            raise ValueError(f"more than {_LARGEST_MANIFEST} bytes")
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{_MANIFEST} is damaged ({printable(error)}); {_REBUILD}") from None


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return values


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:80])


def _walk(folder: int) -> Iterator[str]:
    """Every file in the folder and those in it. What has a hidden name is not ours, and read by nobody: file managers
    and network file systems put such there."""
    for where, folders, files, _ in os.fwalk(dir_fd=folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (PurePosixPath(where, name).as_posix() for name in files if not name.startswith("."))


def _raise(error: OSError) -> NoReturn:
    raise error


def _regular(name: str | Path, folder: int | None = None) -> BufferedReader:
    """Open a file to read it, in the folder of that descriptor; pipes and devices, which may block, are not opened."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(name))
    return open(descriptor, "rb")


def unreadable(path: Path, error: OSError) -> BundleError:
    """What to raise where a bundle, or a file of it, is there and cannot be read."""
    hint = {
        errno.EMFILE: "raise the limit of open files (`ulimit -n`), or close some",
        errno.ENFILE: "close some files: the system has too many open",
        errno.EIO: "copy the bundle again",
        errno.ENOMEM: "free some memory",
    }.get(error.errno or 0, "check its permissions")
    return BundleError(f"{path}: cannot be read ({printable(error)}); {hint}")


def is_bundle(path: Path) -> bool:
    """Whether a bundle is at `path`, sound or not."""
    return (path / _MANIFEST).is_file()


def read_manifest(path: Path) -> Any:
    """What `manifest.json` of the bundle at `path` holds, of whatever schema.

    Raises:
        BundleError: not a bundle, or no JSON.
        OSError: it cannot be read.
    """
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such bundle"
        raise BundleError(f"{path}: {what}; a bundle is the folder NAME.agln that `agln-fast build` writes")
    try:
        with _regular(path / _MANIFEST) as file:
            values = _values(file.read(_LARGEST_MANIFEST + 1))
        _check_plain(values)
        return values
    except FileNotFoundError:
        raise BundleError(f"{path}: not a bundle, or a damaged one: there is no {_MANIFEST}; {_REBUILD}") from None
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None


def check_schema(values: Any) -> int:
    """The schema version of a manifest, which this agln-fast reads, or rebuilds from.

    Raises:
        BundleError: it is newer, or none.
    """
    found = values.get("schema_version") if isinstance(values, dict) else None
    if type(found) is not int or found < 1:
        raise BundleError(f"manifest has schema version {str(found)[:40]!r}: it is not of agln-fast; {_REBUILD}")
    if found > SCHEMA_VERSION:
        raise BundleError(
            f"written by a newer agln-fast (schema {str(found)[:40]}, this one reads {SCHEMA_VERSION}); upgrade: "
            "pip install --upgrade agln-fast"
        )
    return found


def _sums(hashes: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def _sha256(name: str | Path, folder: int | None = None) -> str:
    """Of a file's bytes, in hexadecimal digits; in the folder of that descriptor."""
    with _regular(name, folder) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
