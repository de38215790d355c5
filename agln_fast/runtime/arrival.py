"""Verified on arrival: an engine that could not run where it was built is compared with the reference where it can.

The outcome is remembered in the cache folder, by the bundle's content, the engine, the device, its driver, and the
versions of the library and of this package.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from agln_fast import memory
from agln_fast.artefact import Artefact
from agln_fast.bundle import Bundle
from agln_fast.cuda import device_identity
from agln_fast.engines import KINDS, obstacle_to
from agln_fast.errors import BackendError, VerificationError, printable
from agln_fast.machine import gpus
from agln_fast.manifest import DRAWN, EngineRecord, Verification
from agln_fast.runtime.reference_file import REFERENCE_FILE, read_reference
from agln_fast.runtime.verify import Reference, verify_engine

__all__ = ["Arrivals", "device_kind", "least_agreement"]

_log = logging.getLogger("agln_fast.runtime")
_LONGEST_REASON = 1000  # characters
_GROSS = 0.5  # of pixels


def device_kind(engine: EngineRecord, device: str | None) -> str:
    """Where `engine` would run: "cpu" or "cuda". `device` is the one that is asked for, None for the engine's own."""
    return (device or KINDS[engine.backend].default_device()).partition(":")[0]


class Arrivals:
    """The engines of a bundle as this machine knows them.

    Args:
        device: where they shall run, None for each engine's own.
        threads: CPU threads.
    """

    def __init__(self, bundle: Bundle, device: str | None = None, threads: int | None = None) -> None:
        self._bundle, self._device, self._threads = bundle, device, threads

    @cached_property
    def reference(self) -> tuple[Sequence[Reference], float | None] | None:
        """What the bundle's reference made of two images, and the agreement that its build asked for; None in a bundle
        of before there was such a file.

        Raises:
            BundleError: it is damaged, or was changed since the bundle was opened.
        """
        manifest = self._bundle.manifest
        if REFERENCE_FILE not in manifest.files:
            _log.info(
                "%s: has no %s: engines run unchecked where they were not verified at the build; "
                "`agln-fast rebuild` makes a bundle that has one",
                self._bundle.path,
                REFERENCE_FILE,
            )
            return None
        return read_reference(self._bundle.read(REFERENCE_FILE), manifest.contract, manifest.model.num_classes)

    def look_up(self, engine: EngineRecord, *, check: bool = False) -> EngineRecord:
        """`engine` with what is remembered of it here, if it has not been verified on a device of this kind before.

        A check that could not be made, because memory was short or the device was lost, is not remembered.

        Args:
            check: whether to check it now, if nothing is.

        Raises:
            BundleError: the bundle's reference is damaged, or was changed since the bundle was opened.
        """
        artefact = self._bundle.artefact(engine.name)
        if not self._is_due(engine) or obstacle_to(artefact, self._device):
            return engine
        known = _recall(self._file(engine))
        if known is None and check:
            known = self._check(engine, artefact)
        return engine if known is None else replace(engine, verification=known)

    def remember(self, engine: EngineRecord, outcome: Verification | VerificationError) -> None:
        """Remember what `verify_engine` returned or raised for the bundle's own reference, if `look_up` would ask."""
        if isinstance(outcome, VerificationError):
            if isinstance(outcome.__cause__, BackendError | MemoryError):
                return
            outcome = _failed(outcome)
        if self._is_due(engine) and outcome.status != "not verified on this machine":
            memory.remember(self._file(engine), asdict(outcome))

    def _is_due(self, engine: EngineRecord) -> bool:
        check = engine.verification
        if engine.backend not in KINDS:
            return False
        if check is None or check.status != "passed":
            return True
        return (check.device or "cpu").partition(":")[0] != device_kind(engine, self._device)

    def _check(self, engine: EngineRecord, artefact: Artefact) -> Verification | None:
        if self.reference is None:
            return None
        references, minimum = self.reference
        _log.info(
            "%s: engine %s has not run on such a device before: checking it, once", self._bundle.path, engine.name
        )
        outcome: Verification | VerificationError
        began = time.perf_counter()
        try:
            least = least_agreement(engine, minimum)
            outcome = verify_engine(artefact, references, minimum=least, device=self._device, threads=self._threads)
        except VerificationError as error:
            outcome = error
        took = time.perf_counter() - began
        self.remember(engine, outcome)
        if isinstance(outcome, VerificationError):
            _log.warning("%s: refused after a check of %.1f s: %s", self._bundle.path, took, outcome)
            return _failed(outcome)
        _log.info("%s: engine %s passed, after %.1f s", self._bundle.path, engine.name, took)
        return outcome

    def _file(self, engine: EngineRecord) -> Path:
        kind = KINDS[engine.backend]
        facts = {
            "bundle": self._bundle.manifest.to_dict(),
            "engine": engine.name,
            "device": self._identity(engine),
            "library": kind.versions(engine.precision),
        }
        return memory.place("arrival", facts, ("agln-fast",))

    def _identity(self, engine: EngineRecord) -> str:
        """Of the device: its name and its driver's version."""
        if device_kind(engine, self._device) == "cpu":
            return "cpu"
        try:
            return device_identity(int((self._device or "").partition(":")[2] or 0))
        except BackendError:  # without cuda-bindings, which PyTorch does not need
            return str(gpus())


def least_agreement(engine: EngineRecord, minimum: float | None) -> float | None:
    """The minimum of `verify_engine` on pictures that are none of the user's; `minimum` is the one that was asked for.

    What was kept by what it loses on data of the user's own may do worse on others: only gross faults count.
    """
    on_own = engine.accuracy is not None and engine.accuracy.dataset != DRAWN
    return _GROSS if minimum is None and on_own else minimum


def _failed(error: VerificationError) -> Verification:
    return Verification("failed", printable(error, _LONGEST_REASON))


def _recall(file: Path) -> Verification | None:
    values = memory.recall(file)
    try:
        known = Verification(**values)
    except TypeError:
        return None
    numbers = known.agreement, known.weighted_agreement, known.max_logit_error, known.latency_ms
    sound = (
        known.status in ("passed", "failed")
        and isinstance(known.reason, str)
        and type(known.images) is int
        and all(map(_is_number, numbers))
        and (known.device is None or isinstance(known.device, str))
    )
    return replace(known, reason=printable(known.reason, _LONGEST_REASON)) if sound else None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isfinite(value))
