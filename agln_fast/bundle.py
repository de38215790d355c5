"""The bundle: a folder NAME.agln with weights, engines and the manifest that describes them.

`SHA256SUMS` lists every file of the bundle (`sha256sum -c` reads it), so a change of any byte is noticed on opening.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from agln_fast.contract import IOContract
from agln_fast.errors import AglnError, BundleError, ConfigError, did_you_mean
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
    "open_bundle",
    "read_manifest",
    "seal",
    "sha256",
]

SCHEMA_VERSION = 2
_MANIFEST = "manifest.json"
_SUMS = "SHA256SUMS"
_REBUILD = "build it again with `agln-fast build`"


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


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; docs/bundle.md describes every field.

    left_out: engines that precision "auto" tried and did not keep -> why.
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
            BundleError: another schema version, or it breaks the schema (the message names the place).
        """
        found = check_schema(values)
        if found != SCHEMA_VERSION:
            raise BundleError(
                f"manifest has the older schema {found}, this agln-fast reads {SCHEMA_VERSION}; "
                f"rebuild it from its own weights: agln-fast rebuild {shlex.quote(os.fspath(path))}"
            )
        # Imported here: networks in memory are run without it, on machines that have not got it.
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match

        schema = json.loads(resources.files("agln_fast.data").joinpath("manifest.schema.json").read_text())
        error = best_match(Draft202012Validator(schema).iter_errors(values))
        if error is not None:
            raise BundleError(f"manifest breaks its schema at {error.json_path}: {error.message[:200]}; {_REBUILD}")
        names = [engine["name"] for engine in values["engines"]]
        if len(set(names)) != len(names) or len(set(values["classes"])) != len(values["classes"]):
            raise BundleError(f"manifest names an engine or a class twice; {_REBUILD}")
        if not len(values["classes"]) == len(values["palette"]) == values["model"]["num_classes"]:
            raise BundleError(f"manifest has not one class name and one colour for each output; {_REBUILD}")
        engines = tuple(
            EngineRecord(
                **{
                    **engine,
                    "compute_capabilities": tuple(engine["compute_capabilities"]),
                    "verification": engine["verification"] and Verification(**engine["verification"]),
                    "plan": _plan(engine),
                }
            )
            for engine in values["engines"]
        )
        return cls(
            model=ModelConfig.from_dict(values["model"]),
            classes=tuple(values["classes"]),
            palette=tuple((r, g, b) for r, g, b in values["palette"]),
            contract=IOContract.from_dict(values["contract"]),
            engines=engines,
            left_out=values["left_out"],
            created_with=values["created_with"],
            files=values["files"],
        )


def _plan(engine: dict[str, Any]) -> Plan:
    try:
        return Plan.from_dict(engine["plan"])
    except ConfigError as error:
        raise BundleError(f"manifest: engine {engine['name']}: {error}; {_REBUILD}") from None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, and its manifest. Every file's hash has been checked."""

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


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json`, with the sha256 of every file of `folder` in it, and `SHA256SUMS`; return the manifest."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = replace(manifest, files=files)
    (folder / _MANIFEST).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n")
    (folder / _SUMS).write_text(_sums({**files, _MANIFEST: sha256(folder / _MANIFEST)}))
    return manifest


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle and check every byte of it against its hashes.

    Raises:
        BundleError: no such folder, not a bundle, a missing or changed file, another schema version.
    """
    try:
        return _open(Path(path))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error}); check its permissions") from None


def _open(path: Path) -> Bundle:
    values = read_manifest(path)
    _require(path, _SUMS)
    try:
        manifest = Manifest.from_dict(values, path)
    except AglnError as error:
        raise BundleError(f"{path}: {error}") from None

    unlisted = [engine.file for engine in manifest.engines if engine.file not in manifest.files]
    if unlisted:
        raise BundleError(f"{path}: the manifest gives no hash for {unlisted[0]}; {_REBUILD}")
    actual = {_MANIFEST: sha256(path / _MANIFEST)}
    for name, expected in manifest.files.items():
        if not (path / name).is_file():
            raise BundleError(f"{path}: {name} is missing; copy the bundle again or {_REBUILD}")
        actual[name] = sha256(path / name)
        if actual[name] != expected:
            raise BundleError(f"{path}: {name} was changed after the build; copy the bundle again or {_REBUILD}")
    if (path / _SUMS).read_bytes() != _sums(actual).encode():
        raise BundleError(f"{path}: manifest.json or {_SUMS} was changed after the build; copy it again or {_REBUILD}")
    return Bundle(path, manifest)


def read_manifest(path: Path) -> Any:
    """What `manifest.json` of the bundle at `path` holds, of whatever schema.

    Raises:
        BundleError: not a bundle, or no JSON.
        OSError: it cannot be read.
    """
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such bundle"
        raise BundleError(f"{path}: {what}; a bundle is the folder NAME.agln that `agln-fast build` writes")
    _require(path, _MANIFEST)
    try:
        return json.loads((path / _MANIFEST).read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: manifest.json is damaged ({error}); {_REBUILD}") from None


def _require(path: Path, name: str) -> None:
    if not (path / name).is_file():
        raise BundleError(f"{path}: not a bundle, or a damaged one: there is no {name}; {_REBUILD}")


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


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
