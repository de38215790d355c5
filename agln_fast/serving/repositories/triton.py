"""A model repository for Triton Inference Server.

The model NAME takes pictures and is run by Triton's Python backend: the whole bundle, by whichever engine `load`
prefers there. Each engine that Triton has a backend for is a model NAME_ENGINE of its own, which takes and gives what
the engine does. An ensemble of decoding, engine and labelling would send every picture through shared memory twice, and
carry its size along, to let Triton run what the Python backend runs as fast.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from agln_fast.artefact import LAYERS_FILE
from agln_fast.bundle import Bundle
from agln_fast.engines.base import ports_of
from agln_fast.errors import BundleError, ConfigError, MissingPackageError
from agln_fast.manifest import REBUILD, EngineRecord
from agln_fast.runtime.images import pack
from agln_fast.runtime.reference_file import REFERENCE_FILE, read_frames
from agln_fast.serving.protocol import INPUTS, MOST_IMAGES, OUTPUTS, shape_of
from agln_fast.serving.repositories.folder import (
    PICTURES,
    Model,
    Named,
    Repository,
    engine_facts,
    facts,
    new_model,
    place,
    place_bundle,
)

__all__ = ["LABELS_FILE", "config_schema", "write"]

LABELS_FILE = "labels.txt"
_MODEL = '''\
"""Served by agln-fast, which has to be installed for the Python that Triton's Python backend runs."""

from agln_fast.serving.repositories.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_PLATFORMS = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx", "openvino": ""}
_TYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32", "BYTES": "STRING"}
_MOST_WAITING, _LONGEST_WAIT_US = 128, 60_000_000


def write(folder: Path, named: Sequence[Named], at: Path) -> Repository:
    """The models of all bundles.

    Raises:
        MissingPackageError: tritonclient, which has Triton's schema of `config.pbtxt`, is not installed.
        ConfigError: two plans for one compute capability, or two models, under one name.
        BundleError, BundleChangedError: a bundle is damaged, or not what it was any more.
    """
    schema = config_schema()
    models, left_out, notes, plugins = list[Model](), dict[str, str](), list[str](), list[str]()
    for each in named:
        models.append(_write_pictures(folder, each, schema))
        if REFERENCE_FILE not in each.bundle.manifest.files:
            notes.append(f"{each.name}: the bundle has no {REFERENCE_FILE}, so nothing warms it up")
        found: dict[str, list[tuple[EngineRecord, Bundle]]] = {}
        for engine, bundle in each.engines():
            found.setdefault(engine.name, []).append((engine, bundle))
        for alike in found.values():
            engine, bundle = alike[0]
            name = f"{each.name}_{engine.name}"
            if engine.backend not in _PLATFORMS:
                left_out[name] = f"Triton has no backend for {engine.backend}; {each.name} runs it"
                continue
            models.append(_write_engine(folder, name, alike, schema))
            if LAYERS_FILE in engine.files:
                place(bundle, LAYERS_FILE, folder / name / "1" / LAYERS_FILE)
                plugins.append(f"{{repository}}/{name}/1/{LAYERS_FILE}")
            if engine.backend == "openvino" and engine.precision in ("fp32", "fp16"):
                notes.append(
                    f"{name}: Triton cannot hold OpenVINO to {engine.precision}: where the CPU has bf16, that runs"
                )
    start = ["tritonserver", "--model-repository={repository}"]
    if plugins:  # Triton loads these libraries, and does not ask them for their layers
        flag = f"--backend-config=tensorrt,plugins={';'.join(plugins)}"
        start = ["env", "AGLN_FAST_REGISTER_LAYERS=1", *start, flag]
    return Repository(tuple(models), tuple(start), left_out, tuple(notes))


def config_schema() -> Any:
    """Triton's protobuf messages of `config.pbtxt`, by themselves: beside the rest of tritonclient, whose messages have
    the names of other packages' for the same protocol, neither could be loaded."""
    spec = find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("tritonclient", "load")
    file = Path(spec.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    found = spec_from_file_location("tritonclient_model_config_pb2", file)
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "protobuf", "load") from None
    return module


def _write_pictures(repository: Path, named: Named, schema: Any) -> Model:
    """NAME: the protocol's inputs and outputs, and the whole bundle.

    A request of N pictures is a batch of N for Triton, which wants one shape for an element of it: `image` is (N, 1).
    """
    bundle = named.bundle
    contract, classes = bundle.manifest.contract, len(bundle.manifest.classes)
    folder = new_model(repository, named.name)
    config = _config(schema, folder, bundle, "python", MOST_IMAGES)
    config.dynamic_batching.preferred_batch_size.append(contract.max_batch)
    for given in INPUTS.values():
        port = config.input.add(optional=True, allow_ragged_batch=True)
        _describe(schema, port, given.name, given.datatype, given.shape[1:])
    for output in OUTPUTS.values():
        kind, shape = shape_of(output, classes)
        _describe(schema, config.output.add(), output.name, kind, shape[1:])
    next(port for port in config.output if port.name == "shares").label_filename = LABELS_FILE
    if (frames := _frames(bundle)) is not None:
        png = io.BytesIO()
        Image.fromarray(frames[0]).save(png, "PNG")
        file = struct.pack("<I", len(png.getvalue())) + png.getvalue()
        _warm_up(schema, config, folder, "image", "BYTES", (1,), file, contract.max_batch)
        _warm_up(schema, config, folder, "pixels", "UINT8", frames[0].shape, frames[0].tobytes(), 1)
    version = folder / "1"
    place_bundle(bundle, version / f"{named.name}.agln")
    (version / "model.py").write_text(_MODEL, encoding="utf-8")
    _write(config, folder)
    return Model(named.name, "python", *PICTURES)


def _write_engine(repository: Path, name: str, alike: Sequence[tuple[EngineRecord, Bundle]], schema: Any) -> Model:
    """NAME_ENGINE: what the engine's file takes and gives. `alike`: the engine, as several bundles have it."""
    engine, bundle = alike[0]
    contract = bundle.manifest.contract
    # OpenVINO's would be compiled for batches of the largest size alone. Nobody can see to it that a batch is not too
    # small, and what takes one size takes whole batches.
    batched = contract.min_batch == 1 < contract.max_batch and engine.backend != "openvino"
    folder = new_model(repository, name)
    config = _config(schema, folder, bundle, engine.backend, contract.max_batch if batched else 0)
    config.platform = _PLATFORMS[engine.backend]
    if engine.backend == "tensorrt" or (engine.backend, engine.precision) == ("onnxruntime", "fp16"):
        config.instance_group[0].kind = schema.ModelInstanceGroup.KIND_GPU
    image, result = ports_of(bundle.artefact(engine.name))
    for port, message in ((image, config.input.add()), (result, config.output.add())):
        shape = [side if isinstance(side, int) else -1 for side in port.shape]
        _describe(schema, message, port.name, port.dtype, shape[1:] if batched else shape)
    config.output[0].label_filename = LABELS_FILE
    told = engine_facts(engine)
    if result.name != contract.output:
        told["gives"] = "logits before the last resize, whose argmax are the labels"
    if engine.backend == "openvino":
        told["PERFORMANCE_HINT"] = "LATENCY"
        if engine.precision == "bf16":
            told["HINT_BF16"] = "YES"
    _tell(config, told)
    if (frames := _frames(bundle)) is not None:
        for count in sorted({contract.min_batch, contract.max_batch}):
            rows = 1 if batched else count
            images = pack([frames[index % len(frames)] for index in range(rows)], contract)
            sides = images.shape[1:] if batched else images.shape
            _warm_up(schema, config, folder, "image", image.dtype, sides, images.tobytes(), count if batched else 1)
    _place_files(config, folder / "1", alike)
    _write(config, folder)
    return Model(name, engine.backend, str(image), str(result))


def _place_files(config: Any, version: Path, alike: Sequence[tuple[EngineRecord, Bundle]]) -> None:
    version.mkdir()
    engine, bundle = alike[0]
    if engine.backend != "tensorrt":
        for file in engine.files:
            place(bundle, file, version / f"model{Path(file).suffix}")
        config.default_model_filename = f"model{Path(engine.file).suffix}"
        return
    plans: dict[str, str] = {}
    for plan, built in alike:
        if not plan.compute_capabilities:
            raise BundleError(f"{built.path}: {plan.name} is for no compute capability; {REBUILD}")
        for capability in plan.compute_capabilities:
            key = f"{capability[2:-1]}.{capability[-1]}"
            if key in plans:
                raise ConfigError(
                    f"{config.name}: {built.path} has one more plan for {capability}; give it another name"
                )
            plans[key] = f"model.{capability}.plan"
            place(built, plan.file, version / plans[key])
    config.cc_model_filenames.update(plans)
    config.default_model_filename = next(iter(plans.values()))  # on another GPU TensorRT says why it does not fit


def _config(schema: Any, folder: Path, bundle: Bundle, backend: str, max_batch: int) -> Any:
    """What is the same for all models, and the file of labels. `max_batch`: 0 where Triton is not to make batches."""
    config = schema.ModelConfig(name=folder.name, backend=backend, max_batch_size=max_batch)
    config.instance_group.add(count=1, kind=schema.ModelInstanceGroup.KIND_CPU)
    # Without a timeout of the queue's own, Triton would not look at a request's.
    config.dynamic_batching.default_queue_policy.CopyFrom(
        schema.ModelQueuePolicy(
            timeout_action=schema.ModelQueuePolicy.REJECT,
            default_timeout_microseconds=_LONGEST_WAIT_US,
            allow_timeout_override=True,
            max_queue_size=_MOST_WAITING,
        )
    )
    _tell(config, facts(bundle))
    (folder / LABELS_FILE).write_text("".join(f"{name}\n" for name in bundle.manifest.classes), encoding="utf-8")
    return config


def _tell(config: Any, told: Mapping[str, str]) -> None:
    for key, value in told.items():
        config.parameters[key].string_value = value


def _describe(schema: Any, message: Any, name: str, kind: str, shape: Sequence[int]) -> None:
    """A tensor, or an element of a batch of it. Triton has no scalars: they get a side that the model never sees."""
    message.name, message.data_type = name, _type(schema, kind)
    message.dims.extend(shape or [1])
    if not shape:
        message.reshape.SetInParent()


def _type(schema: Any, kind: str) -> Any:
    """Of NumPy's name of a type, or the protocol's."""
    return schema.DataType.Value(f"TYPE_{_TYPES.get(kind, kind)}")


def _warm_up(
    schema: Any, config: Any, folder: Path, name: str, kind: str, shape: Sequence[int], data: bytes, count: int
) -> None:
    """A request of `count` such elements before the model is ready."""
    file = f"{name}-{'x'.join(map(str, shape))}"
    (folder / "warmup").mkdir(exist_ok=True)
    (folder / "warmup" / file).write_bytes(data)
    sample = config.model_warmup.add(name=f"{count} of {file}", batch_size=count)
    sample.inputs[name].data_type = _type(schema, kind)
    sample.inputs[name].dims.extend(shape)
    sample.inputs[name].input_data_file = file


def _frames(bundle: Bundle) -> npt.NDArray[np.uint8] | None:
    """Pictures of the contract's size, if the bundle has any."""
    manifest = bundle.manifest
    if REFERENCE_FILE not in manifest.files:
        return None
    data = bundle.read(REFERENCE_FILE)
    try:
        return read_frames(data, manifest.contract, manifest.model.num_classes)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from None


def _write(config: Any, folder: Path) -> None:
    from google.protobuf import text_format

    (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
