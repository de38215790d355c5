"""What requests are sent to: a server by gRPC or HTTP, or a bundle in this process."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD
from agln_fast.data.scenes import Scenes
from agln_fast.errors import BackendError, ConfigError, MissingPackageError
from agln_fast.runtime.images import ImageArray, list_images, load_image

__all__ = ["Answer", "Asking", "Target", "open_target"]

_PICTURES = 8  # that requests take in turn
_DEFAULT_SIZE = 128, 128
_NO_LIMIT = -1  # bytes of a message of gRPC


@dataclass(frozen=True)
class Answer:
    """status: "ok", or what the server said, e.g. "UNAVAILABLE" or "503"; "lost" where nothing came in time.

    batch: images in the engine's run, stages: milliseconds by name; as far as the server says.
    """

    status: str = "ok"
    batch: int | None = None
    stages: dict[str, float] = field(default_factory=dict)


class Target(Protocol):
    """name: as it was given. images: of each request."""

    name: str

    async def ask(self, number: int) -> Answer:
        """Send the request of that number, and wait for what comes."""

    async def close(self) -> None:
        """Release what it holds."""


@dataclass(frozen=True)
class Asking:
    """What a request brings and asks.

    model: None for the only one. kind: the protocol's input, "pixels" or "image". folder: of pictures, None for drawn
    scenes of the engine's size. limit_s: after which an answer counts as lost. timeout_ms: the deadline that the server
    is told, None for none.
    """

    model: str | None = None
    kind: str = "pixels"
    outputs: Sequence[str] = ()
    folder: Path | None = None
    limit_s: float = 30.0
    timeout_ms: float | None = None


async def open_target(place: str, asking: Asking, **engine: Any) -> Target:
    """The target at `place`: grpc://HOST:PORT, http://HOST:PORT, or a bundle's folder, for which `engine` is `load`'s.

    Raises:
        ConfigError: an address of another kind, or a model that takes no picture.
        BackendError: nothing answers there.
        MissingPackageError: tritonclient is not installed.
        BundleError, ImageError: as `load` and `load_image`.
    """
    parts = urlsplit(place)
    if parts.scheme in ("grpc", "http", "https") and parts.netloc:
        return await _Server.open(place, asking)
    if "://" in place:
        raise ConfigError(f"{place}: give grpc://HOST:PORT, http://HOST:PORT, or the folder of a bundle")
    return _Bundle(place, asking, engine)


class _Bundle:
    """The segmenter alone, one call at a time: the floor that a server stands on."""

    def __init__(self, place: str, asking: Asking, engine: dict[str, Any]) -> None:
        from agln_fast.runtime.segmenter import load

        self.name = place
        self._segmenter = load(place, **engine)
        contract = self._segmenter.contract
        pictures = _pictures(asking.folder, (contract.height, contract.width))
        self._sources = pictures if asking.kind == "pixels" else [_jpeg(picture) for picture in pictures]
        self._outputs = tuple(asking.outputs)
        self._thread = ThreadPoolExecutor(1, "agln-fast load")

    async def ask(self, number: int) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, number)

    async def close(self) -> None:
        self._thread.shutdown()
        self._segmenter.close()

    def _call(self, number: int) -> Answer:
        from agln_fast.serving.protocol import write_outputs

        result = self._segmenter(self._sources[number % len(self._sources)])
        write_outputs([result], self._outputs)
        timing = result.timing
        stages = {"decode_ms": timing.preprocess, "engine_ms": timing.engine, "encode_ms": timing.postprocess}
        return Answer(batch=1, stages=stages)


class _Server:
    """By the asynchronous clients of tritonclient: HTTP with binary tensors where the server has them."""

    def __init__(self, name: str, client: Any, model: str, inputs: Sequence[Any], outputs: Any, asking: Asking) -> None:
        self.name = name
        self._client, self._model, self._inputs, self._outputs = client, model, inputs, outputs
        self._asking = asking
        timeout = None if asking.timeout_ms is None else int(1e3 * asking.timeout_ms)
        self._options = {} if timeout is None else {"timeout": timeout}

    @classmethod
    async def open(cls, place: str, asking: Asking) -> _Server:
        parts = urlsplit(place)
        try:
            if parts.scheme == "grpc":
                import tritonclient.grpc as module
                import tritonclient.grpc.aio as asynchronous

                client = asynchronous.InferenceServerClient(parts.netloc)
            else:
                import tritonclient.http as module
                import tritonclient.http.aio as asynchronous

                client = asynchronous.InferenceServerClient(
                    parts.netloc + parts.path.rstrip("/"),
                    ssl=parts.scheme == "https",
                    conn_limit=1000,
                    conn_timeout=asking.limit_s,
                )
        except ModuleNotFoundError as error:
            raise MissingPackageError(error.name or "tritonclient", "load") from None
        try:
            async with asyncio.timeout(asking.limit_s):
                about = await cls._about(client, parts.scheme == "grpc", asking.model, place)
        except Exception as error:  # of gRPC, of aiohttp, of the client, and the time limit
            await client.close()
            if isinstance(error, ConfigError):
                raise
            raise BackendError(f"{place}: no server of the protocol answers ({_line(error)})") from None
        name, metadata, binary = about
        make = _input_of(metadata, asking.kind, place)
        size = ((metadata.get("parameters") or {}).get("size")) or make.size or _DEFAULT_SIZE
        inputs = []
        for picture in _pictures(asking.folder, (size[0], size[1])):
            array = make.array(picture)
            tensor = module.InferInput(make.name, list(array.shape), make.datatype)
            if parts.scheme == "grpc":
                tensor.set_data_from_numpy(array)
            else:
                tensor.set_data_from_numpy(array, binary_data=binary)
            inputs.append(tensor)
        extra = {} if parts.scheme == "grpc" else {"binary_data": binary}
        outputs = [module.InferRequestedOutput(output, **extra) for output in asking.outputs] or None
        return cls(place, client, name, inputs, outputs, asking)

    @staticmethod
    async def _about(client: Any, is_grpc: bool, model: str | None, place: str) -> tuple[str, dict[str, Any], bool]:
        """The model's name and metadata, and whether the server takes binary tensors over HTTP."""
        options: dict[str, Any] = {"as_json": True} if is_grpc else {}
        server = await client.get_server_metadata(**options)
        binary = is_grpc or any("binary" in name for name in server.get("extensions") or [])
        if model is None:
            index = await client.get_model_repository_index(**options)
            listed = index.get("models", []) if isinstance(index, dict) else index
            names = sorted({each["name"] for each in listed})
            if len(names) != 1:
                raise ConfigError(f"{place} has {len(names)} models ({', '.join(names)}): choose one with --model")
            [model] = names
        metadata = await client.get_model_metadata(model, **options)
        return model, metadata, binary

    async def ask(self, number: int) -> Answer:
        from tritonclient.utils import InferenceServerException

        tensor = self._inputs[number % len(self._inputs)]
        try:
            async with asyncio.timeout(self._asking.limit_s):
                result = await self._client.infer(self._model, [tensor], outputs=self._outputs, **self._options)
        except TimeoutError:
            return Answer("lost")
        except InferenceServerException as error:
            return Answer((error.status() or "error").removeprefix("StatusCode."))
        except Exception as error:  # of aiohttp: the connection was cut
            return Answer(type(error).__name__)
        stages = _parameters(result.get_response())
        batch = stages.pop("batch_size", None)
        return Answer(batch=None if batch is None else int(batch), stages=stages)

    async def close(self) -> None:
        await self._client.close()


@dataclass(frozen=True)
class _Input:
    """A model's input, how it is made of a picture, and the size of picture it is for, if it is for one."""

    name: str
    datatype: str
    array: Callable[[ImageArray], npt.NDArray[Any]]
    size: tuple[int, int] | None = None


def _input_of(metadata: dict[str, Any], kind: str, place: str) -> _Input:
    """By name where the server is of this protocol, else by the shapes of a contract's tensor."""
    tensors = {tensor["name"]: tensor for tensor in metadata.get("inputs", [])}
    if kind in tensors and (kind == "pixels" or tensors[kind]["datatype"] == "BYTES"):
        if kind == "image":
            return _Input("image", "BYTES", lambda picture: np.array([_jpeg(picture)], object))
        return _Input("pixels", "UINT8", lambda picture: picture[np.newaxis])
    for name, tensor in tensors.items():
        shape = [int(side) for side in tensor["shape"]]
        if len(shape) == 4 and tensor["datatype"] == "UINT8" and shape[3] == 3:
            return _Input(name, "UINT8", lambda picture: picture[np.newaxis], (shape[1], shape[2]))
        if len(shape) == 4 and tensor["datatype"] == "FP32" and shape[1] == 3:
            return _Input(name, "FP32", _normalised, (shape[2], shape[3]))
    raise ConfigError(f"{place}: the model {metadata.get('name')} has no input for pictures: {', '.join(tensors)}")


def _normalised(picture: ImageArray) -> npt.NDArray[np.float32]:
    scaled = (picture / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[np.newaxis], dtype=np.float32)


def _pictures(folder: Path | None, size: tuple[int, int]) -> list[ImageArray]:
    if folder is None:
        scenes = Scenes("val", size=size)
        return [scenes[number].image for number in range(_PICTURES)]
    found = list_images(folder)
    return [load_image(path) for path in found[:_PICTURES]]


def _jpeg(picture: ImageArray) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


def _parameters(response: Any) -> dict[str, float]:
    """Those of a response that are numbers, or texts of numbers."""
    values: dict[str, Any] = {}
    if isinstance(response, dict):
        values = response.get("parameters") or {}
    else:
        for key, value in response.parameters.items():
            values[key] = getattr(value, value.WhichOneof("parameter_choice"))
    found = {}
    for key, value in values.items():
        try:
            found[key] = float(value)
        except (TypeError, ValueError):
            continue
    return found


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
