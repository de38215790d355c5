"""What `manifest.json` of a bundle says: its parts, its text, and what must hold for every value before it is used."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Literal, NoReturn

from agln_fast.artefact import Artefact, parts
from agln_fast.contract import IOContract
from agln_fast.data.classes import ClassSet
from agln_fast.errors import BundleError, ConfigError, printable
from agln_fast.models.config import ModelConfig
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.precision import Precision

__all__ = [
    "DRAWN",
    "LARGEST",
    "REBUILD",
    "SCHEMA_VERSION",
    "Accuracy",
    "EngineRecord",
    "Manifest",
    "PlanChosenBy",
    "Verification",
    "check_plain",
    "check_schema",
    "format_manifest",
    "parse_manifest",
    "schema_error",
]

SCHEMA_VERSION = 2
LARGEST = 2**23
"""Bytes of a manifest: 32,767 classes with names of 190 letters."""
REBUILD = "build it again with `agln-fast build`"
"""What to do about a bundle that is of no use."""

_DEEPEST = 8  # lists and objects in each other
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


@dataclass(frozen=True)
class Accuracy:
    """What an engine loses against the fp32 reference network on a dataset; `agln_fast.evaluation.loss` defines it.

    measure: "mIoU" against masks, or "agreement" with the reference, weighted by its margin, where there are none.
    dataset, split, images: what it was measured on, and how many images.
    reference, score: of the two, 0..1; the reference agrees with itself.
    loss: reference minus score, percentage points. low, high: its 95 % bootstrap interval over the images.
    backend: what ran: of an engine that cannot run where it is built, another backend with the same int8 graph.
    """

    measure: Literal["mIoU", "agreement"]
    dataset: str
    split: str
    images: int
    reference: float
    score: float
    loss: float
    low: float
    high: float
    backend: str


DRAWN = "scenes"
"""The dataset of an `Accuracy` that is none of the user's."""

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
    floating: blocks of the network that an int8 engine computes in floating point, because they cost most.
    accuracy: what it loses on a dataset; None where nobody measured it.
    """

    name: str
    backend: str
    precision: Precision
    file: str
    target: str
    versions: dict[str, str] = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] = ()
    verification: Verification | None = None
    plan: Plan = NO_PLAN
    plan_chosen_by: PlanChosenBy = "fixed"
    floating: tuple[str, ...] = ()
    accuracy: Accuracy | None = None

    @classmethod
    def of(cls, artefact: Artefact, target: str, plan_chosen_by: PlanChosenBy = "fixed") -> EngineRecord:
        """The record of an artefact whose files lie in the bundle's folder itself."""
        return cls(
            name=artefact.name,
            backend=artefact.kind,
            precision=artefact.precision,
            file=artefact.file.name,
            target=target,
            versions=dict(artefact.versions),
            compute_capabilities=artefact.compute_capabilities,
            plan=artefact.plan,
            plan_chosen_by=plan_chosen_by,
            floating=artefact.floating,
        )

    @property
    def files(self) -> tuple[str, ...]:
        """All that it is opened from, `file` first."""
        return tuple(map(str, parts(PurePosixPath(self.file), self.plan)))


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
        check_plain(values)
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
            raise BundleError(f"manifest: {printable(error)}; {REBUILD}") from None
        outputs = manifest.model.num_classes
        if len(manifest.classes) != outputs:
            raise BundleError(f"manifest names {len(manifest.classes)} classes for {outputs} outputs; {REBUILD}")
        names = [engine.name for engine in manifest.engines]
        if len(set(names)) != len(names):
            raise BundleError(f"manifest names an engine twice; {REBUILD}")
        return manifest


def _check_schema(values: dict[str, Any]) -> None:
    where = schema_error(values)
    if where is not None:
        raise BundleError(f"manifest breaks its schema at {where}; {REBUILD}")


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
    accuracy = values.get("accuracy")
    return EngineRecord(
        **{
            **values,
            "compute_capabilities": tuple(values["compute_capabilities"]),
            "verification": values["verification"] and Verification(**values["verification"]),
            "plan": plan,
            "floating": tuple(values.get("floating", ())),
            "accuracy": accuracy and Accuracy(**accuracy),
        }
    )


def check_plain(values: Any) -> None:
    """Whether all text can be shown, and nothing is so deep that looking at it needs much of the stack.

    Raises:
        BundleError: no.
    """
    level = [values]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _parts(value)]
        for text in level:
            if isinstance(text, str) and _UNSHOWABLE.search(text):
                raise BundleError(f"manifest holds the text '{printable(text)}', which cannot be shown; {REBUILD}")
    if level:
        raise BundleError(f"manifest has lists and objects too deep in each other; {REBUILD}")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def parse_manifest(text: bytes) -> Any:
    """The inverse of `_json`.

    Raises:
        BundleError: it is no such text.
    """
    try:
        if len(text) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is damaged ({printable(error)}); {REBUILD}") from None


def format_manifest(values: dict[str, Any]) -> bytes:
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


def check_schema(values: Any) -> int:
    """The schema version of a manifest, which this agln-fast reads, or rebuilds from.

    Raises:
        BundleError: it is newer, or none.
    """
    found = values.get("schema_version") if isinstance(values, dict) else None
    if type(found) is not int or found < 1:
        raise BundleError(f"manifest has schema version {str(found)[:40]!r}: it is not of agln-fast; {REBUILD}")
    if found > SCHEMA_VERSION:
        raise BundleError(
            f"written by a newer agln-fast (schema {str(found)[:40]}, this one reads {SCHEMA_VERSION}); upgrade: "
            "pip install --upgrade agln-fast"
        )
    return found
