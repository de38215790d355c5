"""What runs the engines on a Ray cluster: one replica, which holds some bundles."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias
from weakref import WeakSet

import ray
from ray import serve

from agln_fast.errors import AglnError, BackendError, choose
from agln_fast.runtime.images import ImageArray, ImageSource, load_image
from agln_fast.runtime.result import Result
from agln_fast.runtime.segmenter import Segmenter
from agln_fast.serving.line import Answer, Failure, Times
from agln_fast.serving.protocol import Array, sources_of, write_outputs
from agln_fast.serving.worker import Description, Engine, canary

__all__ = ["BATCHES", "OPTIONS", "PIXELS", "Bundles", "Image", "Model", "places"]

Inputs: TypeAlias = Mapping[str, Array | Sequence[bytes]]

BATCHES: Final = 2
"""Of a replica at once: one is in the engine, the other is resized or labelled."""

PIXELS: Final = 1 << 20
"""Of a picture that takes one place of a batch; a larger one takes as many places as it has of them."""

OPTIONS: Final = tuple(field.name for field in fields(Engine) if field.name != "bundle")
"""The keys of `user_config`: those of `agln_fast.serving.worker.Engine`."""

log = logging.getLogger("ray.serve")


class Model:
    """A bundle as a replica holds it. most: images of a batch; answered: when its engine last did, `time.monotonic`."""

    def __init__(self, name: str, segmenter: Segmenter) -> None:
        self.name, self.segmenter = name, segmenter
        self.answered = time.monotonic()

    @property
    def most(self) -> int:
        return self.segmenter.contract.max_batch

    def run(self, images: list[ImageArray]) -> list[Result]:
        """As a segmenter's call."""
        results: list[Result] = self.segmenter(images)
        self.answered = time.monotonic()
        return results


@dataclass(frozen=True)
class Image:
    """Of a request, decoded."""

    model: Model
    pixels: ImageArray


def places(batch: Sequence[Image]) -> int:
    """How many places of a batch these take: a picture of several `PIXELS` as many, up to the whole batch.

    A picture is brought to the engine's size and its labels back to its own, and the batch is done when its last one
    is: small ones would wait for large ones.
    """
    return sum(min(each.model.most, _places(each)) for each in batch)


def _places(image: Image) -> int:
    contract = image.model.segmenter.contract
    height, width = image.pixels.shape[:2]
    return math.ceil(int(height * width) / max(PIXELS, contract.height * contract.width))


class Bundles:
    """A replica: the engines of some bundles, of which the least recently used makes room for another.

    A method gives None for a bundle that this replica does not know: it is of another version of the application.
    """

    def __init__(self, bundles: Mapping[str, str], models_per_replica: int) -> None:
        self._paths, self._at_once = bundles, models_per_replica
        self._options: dict[str, Any] = {}
        self._models: WeakSet[Model] = WeakSet()
        self._in_batches: Any = serve.batch(
            self._run, batch_wait_timeout_s=0.0, max_concurrent_batches=BATCHES, batch_size_fn=places
        )
        self._running, self._free = 0, asyncio.Event()
        self._checked = time.monotonic()

        async def load(name: str) -> Model:
            model = Model(name, await asyncio.to_thread(self._open, name))
            self._models.add(model)
            self._fit_batches()
            return model

        multiplexed: Any = serve.multiplexed(load, max_num_models_per_replica=models_per_replica)
        self._load: Callable[[str], Coroutine[Any, Any, Model]] = multiplexed

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Open the engines as it says: at first as many as there is room for, later those that are open.

        Raises:
            ConfigError: an unknown key.
            BundleError, BackendError: as `agln_fast.load`.
        """
        for option in user_config:
            choose("key of user_config", option, OPTIONS)
        self._options = dict(user_config)
        self._in_batches.set_batch_wait_timeout_s(1e-3 * self._options.get("wait_ms", 0.0))
        for model in list(self._models):
            model.segmenter = await asyncio.to_thread(self._open, model.name)  # calls go on with the old one
        self._fit_batches()
        for name in list(self._paths)[: self._at_once]:
            await self._load(name)

    async def segment(self, name: str, inputs: Inputs, outputs: Sequence[str] = ()) -> Answer | None:
        """The protocol's outputs of a request for the bundle `name`, or why there are none. `queue_ms` is left open."""
        if name not in self._paths:
            return None
        try:
            model = await self._load(name)
        except AglnError as error:
            return _failed(500, str(error))
        try:
            sources = sources_of(inputs)
            read = await asyncio.gather(*(asyncio.to_thread(_read, source) for source in sources))
            done = await asyncio.gather(*(self._through_engine(Image(model, pixels)) for pixels, _ in read))
            began = time.perf_counter()
            written = await asyncio.to_thread(write_outputs, [each.result for each in done], outputs)
            encoding = time.perf_counter() - began
        except AglnError as error:
            return _failed(500 if isinstance(error, BackendError) else 400, str(error))
        timings = [each.result.timing for each in done]
        times = Times(
            decode_ms=sum(1e3 * seconds for _, seconds in read) + sum(timing.preprocess for timing in timings),
            engine_ms=sum(each.batch * each.result.timing.engine for each in done),
            encode_ms=sum(timing.postprocess for timing in timings) + 1e3 * encoding,
            batch_size=max(each.batch for each in done),
        )
        return Answer(0, written, times)

    async def describe(self, name: str) -> Description | Failure | None:
        """Its engine."""
        if name not in self._paths:
            return None
        try:
            return Description.of((await self._load(name)).segmenter)
        except AglnError as error:
            return Failure(500, str(error))

    async def alive(self) -> bool:
        """A replica answers."""
        return True

    async def check_health(self) -> None:
        """Run a picture through each engine that has run nothing since the last time. Ray replaces what fails thrice.

        Raises:
            BackendError: an engine failed.
        """
        since, self._checked = self._checked, time.monotonic()
        for model in list(self._models):
            if model.answered < since:
                await asyncio.to_thread(model.run, [canary(model.segmenter.contract)])

    def _fit_batches(self) -> None:
        self._in_batches.set_max_batch_size(max((model.most for model in self._models), default=1))

    def _open(self, name: str) -> Segmenter:
        options = {**self._options, "threads": self._options.get("threads") or _cpus()}
        return Engine(self._paths[name], **options).open()

    async def _through_engine(self, image: Image) -> _Done:
        """
        Raises:
            BackendError: the engine failed.
        """
        while self._running >= BATCHES:  # Ray would make a batch of each picture that comes meanwhile
            self._free.clear()
            await self._free.wait()
        done: _Done | str = await self._in_batches(image)
        if isinstance(done, str):
            raise BackendError(done)
        return done

    async def _run(self, batch: list[Image]) -> list[_Done | str]:
        """Pictures for one model, since Ray splits batches by models; or why there are no labels."""
        model = batch[0].model
        self._running += 1
        try:
            results = await asyncio.to_thread(model.run, [each.pixels for each in batch])
            return [_Done(result, min(len(batch), model.most)) for result in results]
        except BackendError as error:
            return [str(error)] * len(batch)
        except Exception as error:
            log.exception("the engine of %s failed", model.name)
            return [f"{type(error).__name__}: see the replica's log"] * len(batch)
        finally:
            self._running -= 1
            self._free.set()


@dataclass(frozen=True)
class _Done:
    """What came of an image; batch: images in the engine's run."""

    result: Result
    batch: int


def _read(source: ImageSource) -> tuple[ImageArray, float]:
    """And the seconds that it took."""
    began = time.perf_counter()
    return load_image(source), time.perf_counter() - began


def _failed(status: int, message: str) -> Answer:
    return Answer(0, Failure(status, message))


def _cpus() -> int:
    """Those that Ray has reserved for this replica, at least one."""
    context: Any = ray.get_runtime_context()
    return max(1, int(context.get_assigned_resources().get("CPU", 1)))
