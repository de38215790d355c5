"""A bundle again from its own weights: for one of an older schema, or of other versions of the libraries."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agln_fast.builder.options import BuildOptions
from agln_fast.bundle import Bundle, read_manifest, unreadable
from agln_fast.contract import IOContract
from agln_fast.data.classes import ClassSet
from agln_fast.engines import KINDS, targets
from agln_fast.errors import AglnError, BundleError, printable
from agln_fast.manifest import DRAWN, check_schema, schema_error
from agln_fast.models.config import ModelConfig
from agln_fast.models.shipped import WEIGHTS_FILE
from agln_fast.precision import PRECISIONS

if TYPE_CHECKING:
    from rich.progress import Progress

    from agln_fast.data.dataset import SegmentationDataset

__all__ = ["Recipe", "read_recipe", "rebuild"]

_FROM_CHECKPOINT = "build it from the checkpoint with `agln-fast build`"
_log = logging.getLogger("agln_fast.rebuild")


@dataclass(frozen=True)
class Recipe:
    """What a bundle was made from and for.

    model, weights: the network; its weights as safetensors. options: those of `build`, by name.
    left_out: a line for each engine that this agln-fast cannot build. data: what engines were judged by, but scenes.
    """

    model: ModelConfig
    weights: bytes
    options: dict[str, Any]
    left_out: tuple[str, ...]
    data: tuple[str, ...]


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read what is needed of a bundle of this schema or an older one, and check that its weights are what they were.

    Raises:
        BundleError: no bundle, one of a newer schema, or one whose weights are missing or changed.
    """
    folder = Path(path)
    try:
        values = read_manifest(folder)
        check_schema(values)
        _check_parts(values)
        weights = _weights(folder, values)
        model = ModelConfig.from_dict(values["model"])
        contract = IOContract.from_dict(values["contract"])
        palette = tuple((red, green, blue) for red, green, blue in values["palette"])
        classes = ClassSet(folder.stem, folder.stem, tuple(values["classes"]), palette)
    except BundleError as error:
        raise BundleError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from None
    except AglnError as error:
        raise BundleError(f"{folder}: manifest.json: {printable(error)}") from None
    except OSError as error:
        raise unreadable(folder, error) from None
    precisions, capabilities, left_out = _engines(values["engines"])
    variants = {bool(_plan_of(engine).get("kernels")) for engine in values["engines"] if _may_have_kernels(engine)}
    options = {
        "size": (contract.height, contract.width),
        "batch": (contract.min_batch, contract.max_batch),
        "layout": contract.layout,
        "output": contract.output,
        "resize": contract.resize,
        "mean": contract.mean,
        "std": contract.std,
        "classes": classes,
        "targets": tuple(precisions),
        "precision": precisions,
        "compute_capabilities": capabilities,
        "kernels": "both" if len(variants) > 1 else "only" if True in variants else "none",
    }
    return Recipe(model, weights, options, left_out, _judged_by(values["engines"]))


def rebuild(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | SegmentationDataset | None = None,
    data_root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    calibration: int | None = None,
    max_miou_loss: float = 0.5,
    samples: str | os.PathLike[str] | None = None,
    min_agreement: float | None = None,
    tune_s: float | None = None,
    threads: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build a bundle again from its own weights: the same network, classes, colours, input, output and engines.

    Args:
        path: a bundle of this schema or an older one; only its manifest and weights are read.
        output: the folder to write; None for `path` itself with `overwrite`, else for its sibling NAME.rebuilt.agln.
        data, data_root, split, calibration, max_miou_loss, samples, min_agreement, tune_s, threads, strict, overwrite,
            progress: as for `agln_fast.build`, which is called.

    Raises:
        BundleError: as `read_recipe`.
        ConfigError, BuildError, VerificationError, MissingPackageError: as `agln_fast.build`.
    """
    recipe = read_recipe(path)
    destination = _destination(Path(path), output, overwrite=overwrite)
    options = BuildOptions(
        Path(path) / WEIGHTS_FILE,
        destination,
        **recipe.options,
        data=data,
        data_root=data_root,
        split=split,
        calibration=calibration,
        max_miou_loss=max_miou_loss,
        samples=samples,
        min_agreement=min_agreement,
        tune_s=tune_s,
        threads=threads,
        strict=strict,
        overwrite=overwrite,
        progress=progress,
    )
    if data is None and recipe.data:
        names = ", ".join(recipe.data)
        _log.warning("%s: its engines were judged on %s, and now are by scenes: name it with --data", path, names)
    for line in recipe.left_out:
        _log.warning("%s: left out: %s", path, line)

    # Imported here: what is wrong with a bundle is told before PyTorch is loaded.
    from agln_fast.builder.build import make_bundle
    from agln_fast.models.checkpoint import load_weights

    network = load_weights(recipe.weights, str(Path(path) / WEIGHTS_FILE))
    if network.config != recipe.model:
        raise BundleError(f"{path}: {WEIGHTS_FILE} holds another network than the manifest says; {_FROM_CHECKPOINT}")
    return make_bundle(replace(options, checkpoint=network))


def _destination(path: Path, output: str | os.PathLike[str] | None, *, overwrite: bool) -> Path:
    """Where the bundle at `path` is built again; see `rebuild`."""
    if output is not None:
        return Path(output)
    return path if overwrite else path.with_name(f"{path.stem}.rebuilt.agln")


def _check_parts(values: dict[str, Any]) -> None:
    """Hold the parts that have not changed since schema 1 against this schema.

    Raises:
        BundleError: one is missing, or breaks it.
    """
    where = schema_error(values, _parts_of)
    if where is not None:
        raise BundleError(f"manifest.json cannot be understood, at {where}")


def _parts_of(schema: dict[str, Any]) -> dict[str, Any]:
    parts = ("model", "classes", "palette", "contract", "files")
    properties = schema["properties"]
    engine = properties["engines"]["items"]["properties"]
    return {
        "type": "object",
        "required": [*parts, "engines"],
        "properties": {
            **{part: properties[part] for part in parts},
            "engines": {
                "type": "array",
                "maxItems": properties["engines"]["maxItems"],
                "items": {
                    "type": "object",
                    "properties": {key: engine[key] for key in ("name", "compute_capabilities")},
                },
            },
        },
        "$defs": schema["$defs"],
    }


def _weights(folder: Path, values: dict[str, Any]) -> bytes:
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise BundleError(
            f"there is no {WEIGHTS_FILE} to rebuild it from; copy the bundle again, or {_FROM_CHECKPOINT}"
        )
    expected = values["files"].get(WEIGHTS_FILE)
    if expected is None:
        raise BundleError(f"manifest.json gives no hash for {WEIGHTS_FILE}; {_FROM_CHECKPOINT}")
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise BundleError(f"{WEIGHTS_FILE} was changed after the build; copy the bundle again, or {_FROM_CHECKPOINT}")
    return data


def _plan_of(engine: dict[str, Any]) -> dict[str, Any]:
    plan = engine.get("plan")
    return plan if isinstance(plan, dict) else {}


def _may_have_kernels(engine: dict[str, Any]) -> bool:
    return str(engine.get("backend")) in [name for name, kind in KINDS.items() if kind.takes_kernels]


def _judged_by(engines: list[dict[str, Any]]) -> tuple[str, ...]:
    """Names of the data, but scenes, that engines were kept by."""
    judged = [engine["accuracy"] for engine in engines if isinstance(engine.get("accuracy"), dict)]
    names = [printable(str(accuracy.get("dataset"))) for accuracy in judged]
    return tuple(dict.fromkeys(name for name in names if name != DRAWN))


def _engines(
    engines: list[dict[str, Any]],
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...], tuple[str, ...]]:
    """Precisions by target, compute capabilities of tensorrt-rtx, and why some engines are left out."""
    precisions: dict[str, list[str]] = {}
    capabilities: list[str] = []
    left_out = []
    for engine in engines:
        name, backend, target, precision = (str(engine.get(key)) for key in ("name", "backend", "target", "precision"))
        if backend in KINDS and KINDS[backend].graph_type("fp32") is None and target == "cpu":
            continue  # every bundle has these
        known: tuple[tuple[str, str, Collection[str]], ...] = (
            ("backend", backend, KINDS),
            ("target", target, targets()),
            ("precision", precision, PRECISIONS),
        )
        for what, value, names in known:
            if value not in names:
                left_out.append(f"{name}: this agln-fast has no {what} {value!r}")
                break
        else:
            precisions.setdefault(target, []).append(precision)
            if any(kind.chooses_capabilities for kind in KINDS.values() if kind.target == target):
                capabilities += map(str, engine.get("compute_capabilities", ()))
    # Without any of them, what every bundle has.
    asked = {target: tuple(dict.fromkeys(kinds)) for target, kinds in precisions.items()} or {"cuda": ("fp32",)}
    return asked, tuple(dict.fromkeys(capabilities)), tuple(left_out)
