"""Repositories for other servers: what is written, by the servers' own schemas where there are any, and what is not."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hand_made import hand_made_bundle
from PIL import Image

import agln_fast
from agln_fast.bundle import Bundle, open_bundle, seal
from agln_fast.contract import IOContract
from agln_fast.data.classes import default_class_set
from agln_fast.engines.base import as_promised
from agln_fast.engines.denormals import denormals_as_zero
from agln_fast.errors import BuildError, BundleChangedError, BundleError, ConfigError, MissingPackageError
from agln_fast.manifest import Accuracy, EngineRecord, Verification
from agln_fast.plan.plan import FUSED, Plan
from agln_fast.runtime.images import pack
from agln_fast.runtime.reference_file import REFERENCE_FILE, write_reference
from agln_fast.runtime.verify import Reference
from agln_fast.serving.protocol import MOST_IMAGES
from agln_fast.serving.repositories import SERVERS, Repository, export_repository, is_repository, triton
from agln_fast.serving.repositories.folder import open_named, place, place_bundle

needs_triton = pytest.mark.skipif(find_spec("tritonclient") is None, reason="needs the package tritonclient")
needs_mlserver = pytest.mark.skipif(find_spec("mlserver") is None, reason="needs the package mlserver")
CHECK = Verification("passed", "", 8, 0.9987, 0.99991, None, 2.5, "cpu")
ACCURACY = Accuracy("mIoU", "street", "val", 40, 0.62, 0.618, 0.2, 0.1, 0.3, "openvino")
ONNX = EngineRecord("onnxruntime-fp32", "onnxruntime", "fp32", "model.onnx", "cpu", {"onnxruntime": "1.32"}, (), CHECK)
BF16 = EngineRecord("openvino-bf16", "openvino", "bf16", "model.onnx", "cpu", verification=CHECK, accuracy=ACCURACY)
INT8 = EngineRecord("openvino-int8", "openvino", "int8", "model.int8.xml", "cpu")
FP16 = EngineRecord("onnxruntime-fp16", "onnxruntime", "fp16", "model.fp16.onnx", "cpu")
RTX = EngineRecord("tensorrt-rtx-fp16", "tensorrt-rtx", "fp16", "model.fp16.rtx.engine", "tensorrt-rtx")


def plan_for(capability: str) -> EngineRecord:
    file = "model.fp16.trt.engine"
    return EngineRecord("tensorrt-fp16", "tensorrt", "fp16", file, "tensorrt", {}, (capability,))


def made(
    folder: Path,
    *engines: EngineRecord,
    contract: IOContract = IOContract(32, 64),  # noqa: B008
    classes: int = 5,
    frames: bool = True,
    salt: str = "",
) -> Bundle:
    """A bundle of such engines, whose files hold their own names and `salt`; nothing runs them."""
    torch.manual_seed(0)
    manifest = hand_made_bundle(folder).manifest
    for engine in engines:
        for file in engine.files:
            (folder / file).write_text(file + salt)
    if frames:
        images = list(np.random.default_rng(0).integers(0, 256, (4, 32, 64, 3), np.uint8))
        rows = contract.min_batch
        dtype = np.uint8 if classes <= 256 else np.int32
        labels, margin = np.zeros((rows, 32, 64), dtype), np.zeros((rows, 32, 64), np.float32)
        logits = np.zeros((rows, classes, 32, 64), np.float32) if contract.output == "logits" else None
        references = [Reference(pack(images[:rows], contract), logits, labels, margin) for _ in range(2)]
        write_reference(folder / REFERENCE_FILE, images[:2], references, contract, classes, None)
    names = tuple(f"class {index}" for index in range(classes))
    changed = replace(
        manifest,
        engines=(*manifest.engines, *engines),
        contract=contract,
        model=replace(manifest.model, num_classes=classes),
        classes=names,
        palette=default_class_set(classes).palette if classes < 100 else tuple((0, 0, 0) for _ in names),
    )
    for name in ("manifest.json", "SHA256SUMS"):
        (folder / name).unlink()
    return Bundle(folder, seal(folder, changed))


def frames_of(bundle: Bundle) -> np.ndarray:
    return np.load(io.BytesIO(bundle.read(REFERENCE_FILE)))["frames"]


def config_of(model: Path):
    """`config.pbtxt`, parsed by Triton's own schema."""
    from google.protobuf import text_format

    return text_format.Parse((model / "config.pbtxt").read_text(), triton.config_schema().ModelConfig())


def tensor(port) -> tuple[str, str, list[int]]:
    return port.name, triton.config_schema().DataType.Name(port.data_type), list(port.dims)


def told(config) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def export(bundle: Bundle | Path, server: str, output: Path, **settings: bool):
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    return export_repository([("street", path)], server, output, **settings)


# ---------------------------------------------------------------------------------------------------- of every server


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    return made(tmp_path / "street.agln", ONNX, BF16)


@pytest.mark.parametrize("server", SERVERS)
def test_a_repository_says_what_it_holds(small, server, tmp_path):
    written = export(small, server, tmp_path / "models")
    record = json.loads((tmp_path / "models" / "repository.json").read_text())
    assert record["server"] == server
    assert [model["name"] for model in record["models"]] == [model.name for model in written.models]
    assert str(tmp_path / "models") in " ".join(written.start)
    for model in written.models:
        assert (tmp_path / "models" / model.name).is_dir()
    assert is_repository(tmp_path / "models")


@pytest.mark.parametrize("server", SERVERS)
def test_a_damaged_bundle_leaves_nothing_behind(small, server, tmp_path):
    (small.path / "model.onnx").write_text("changed")
    with pytest.raises(BundleError, match=r"model\.onnx was changed after the build"):
        export(small, server, tmp_path / "models")
    assert os.listdir(tmp_path) == ["street.agln"]


@pytest.mark.parametrize("server", SERVERS)
def test_what_fails_in_the_midst_leaves_nothing_behind(small, server, tmp_path, monkeypatch):
    def fail(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(BuildError, match="No space left on device"):
        export(small, server, tmp_path / "models")
    assert os.listdir(tmp_path) == ["street.agln"]


def test_a_folder_of_others_stays(small, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "repository.json").write_text('{"name": "of others"}')
    with pytest.raises(ConfigError, match="exists already"):
        export(small, "mlserver", tmp_path / "models")
    with pytest.raises(ConfigError, match="exists and is no repository that agln-fast wrote"):
        export(small, "mlserver", tmp_path / "models", overwrite=True)
    assert os.listdir(tmp_path / "models") == ["repository.json"]


def test_a_repository_is_replaced_whole(small, tmp_path):
    export(small, "triton", tmp_path / "models")
    export(small, "mlserver", tmp_path / "models", overwrite=True)
    assert sorted(os.listdir(tmp_path / "models")) == ["repository.json", "settings.json", "street"]


@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_the_bundle_is_there_whole_and_takes_no_space(small, server, tmp_path):
    export(small, server, tmp_path / "models")
    [found] = (tmp_path / "models").rglob("street.agln")
    assert open_bundle(found).manifest == small.manifest
    for file in small.manifest.files:
        assert os.path.samefile(found / file, small.path / file)


def test_files_are_copied_where_they_cannot_be_linked(small, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    export(small, "triton", tmp_path / "models")
    copy = tmp_path / "models" / "street" / "1" / "street.agln" / "model.onnx"
    assert copy.read_bytes() == (small.path / "model.onnx").read_bytes()
    assert not os.path.samefile(copy, small.path / "model.onnx")


def test_links_in_a_bundle_are_followed(small, tmp_path):
    """As a volume of Kubernetes shows files."""
    (small.path / "model.onnx").rename(tmp_path / "elsewhere")
    (small.path / "model.onnx").symlink_to(tmp_path / "elsewhere")
    place(small, "model.onnx", tmp_path / "placed")
    assert os.path.samefile(tmp_path / "placed", tmp_path / "elsewhere")
    assert not (tmp_path / "placed").is_symlink()


@pytest.mark.parametrize("change", ["changed", None], ids=["changed", "gone"])
def test_a_file_that_changes_after_its_check_is_refused(small, change, tmp_path):
    if change is None:
        (small.path / "model.onnx").unlink()
    else:
        (small.path / "model.onnx").write_text(change)
    with pytest.raises(BundleChangedError, match=r"open it again|open the bundle again"):
        place(small, "model.onnx", tmp_path / "placed")


def test_a_bundle_that_is_replaced_after_its_check_is_refused(small, tmp_path):
    """Though the other one is sound."""
    shutil.rmtree(small.path)
    made(small.path, ONNX, BF16, salt="another")
    with pytest.raises(BundleChangedError, match="was changed since it was opened"):
        place_bundle(small, tmp_path / "placed.agln")


def test_a_repository_that_appears_meanwhile_stays(small, tmp_path, monkeypatch):
    def write(folder: Path, named: object, at: Path) -> Repository:
        export(small, "mlserver", tmp_path / "models")
        return Repository((), ())

    monkeypatch.setitem(SERVERS, "triton", write)
    with pytest.raises(BuildError, match="appeared during the work"):
        export(small, "triton", tmp_path / "models")
    assert json.loads((tmp_path / "models" / "repository.json").read_text())["server"] == "mlserver"


def test_bundles_of_one_name_must_be_of_one_network(tmp_path):
    one, other = (made(tmp_path / f"{k}.agln", ONNX, contract=IOContract(32, 64, 1, k)) for k in (1, 2))
    with pytest.raises(ConfigError, match=r"street: .*1\.agln and .*2\.agln differ in weights, classes or contract"):
        open_named([("street", one.path), ("street", other.path)])


@needs_triton
def test_models_of_one_name_are_refused(small, tmp_path):
    twice = [("street", small.path), (f"street_{ONNX.name}", small.path)]
    with pytest.raises(ConfigError, match="two models would be called street_onnxruntime-fp32"):
        export_repository(twice, "triton", tmp_path / "models")


def test_the_verb_shows_what_it_wrote(small, tmp_path, cli):
    code, out, _ = cli("export-repository", f"night={small.path}", "--for", "triton", "-o", tmp_path / "models")
    assert code == 0
    assert re.search(r"night_openvino-bf16 +openvino +image uint8 \(1, 32, 64, 3\) +labels uint8 \(1, 32, 64\)", out)
    assert "left out: night_torch-fp32: Triton has no backend for torch; night runs it" in out
    assert out.endswith(f"wrote {tmp_path / 'models'}\n")


def test_the_verb_shows_it_to_machines(small, tmp_path, cli):
    code, out, _ = cli("export-repository", small.path, "--for", "mlserver", "-o", tmp_path / "a b", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["start"] == f"mlserver start '{tmp_path / 'a b'}'"
    assert [model["name"] for model in document["models"]] == ["street"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "tritn"], "unknown server 'tritn'; did you mean 'triton'?"),
        (["--for", "mlserver", "--force"], "exists and is no repository"),
    ],
    ids=["an unknown server", "a folder of others"],
)
def test_the_verb_refuses_in_one_line(small, tmp_path, cli, arguments, message):
    code, _, err = cli("export-repository", small.path, *arguments, "-o", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_the_verb_takes_no_versions(small, tmp_path, cli):
    code, _, err = cli("export-repository", f"a:2={small.path}", "--for", "mlserver", "-o", tmp_path / "models")
    assert code == 2
    assert "a:2: a repository holds one version of a bundle" in err


# --------------------------------------------------------------------------------------------------------------- Triton


@needs_triton
@pytest.mark.parametrize(
    ("contract", "engine", "classes", "most", "image", "result"),
    [
        (IOContract(32, 64), ONNX, 5, 0, ("TYPE_UINT8", [1, 32, 64, 3]), ("labels", "TYPE_UINT8", [1, 32, 64])),
        (IOContract(32, 64, 4, 4), ONNX, 5, 0, ("TYPE_UINT8", [4, 32, 64, 3]), ("labels", "TYPE_UINT8", [4, 32, 64])),
        (IOContract(32, 64, 1, 4), ONNX, 5, 4, ("TYPE_UINT8", [32, 64, 3]), ("labels", "TYPE_UINT8", [32, 64])),
        (IOContract(32, 64, 1, 4), BF16, 5, 0, ("TYPE_UINT8", [-1, 32, 64, 3]), ("labels", "TYPE_UINT8", [-1, 32, 64])),
        (IOContract(32, 64, 2, 4), ONNX, 5, 0, ("TYPE_UINT8", [-1, 32, 64, 3]), ("labels", "TYPE_UINT8", [-1, 32, 64])),
        (
            IOContract(32, 64, 1, 8, "float_nchw", "logits"),
            plan_for("sm90"),
            5,
            8,
            ("TYPE_FP32", [3, 32, 64]),
            ("logits", "TYPE_FP32", [5, 32, 64]),
        ),
        (IOContract(32, 64), ONNX, 300, 0, ("TYPE_UINT8", [1, 32, 64, 3]), ("labels", "TYPE_INT32", [1, 32, 64])),
        (
            IOContract(32, 64, 1, 4),
            replace(ONNX, plan=Plan(low_resolution_labels=True)),
            5,
            4,
            ("TYPE_UINT8", [32, 64, 3]),
            ("logits", "TYPE_FP32", [5, -1, -1]),
        ),
    ],
    ids=[
        "one image",
        "a fixed batch",
        "a range",
        "OpenVINO makes its batches itself",
        "a smallest batch that nobody sees to",
        "normalised before, logits",
        "more than 256 classes",
        "logits of low resolution",
    ],
)
def test_types_and_dims_are_the_contracts(contract, engine, classes, most, image, result, tmp_path):
    bundle = made(tmp_path / "street.agln", engine, contract=contract, classes=classes)
    export(bundle, "triton", tmp_path / "models")
    config = config_of(tmp_path / "models" / f"street_{engine.name}")
    assert config.max_batch_size == most
    assert [tensor(port) for port in config.input] == [("image", *image)]
    assert [tensor(port) for port in config.output] == [result]
    assert config.output[0].label_filename == "labels.txt"
    # What warms it up are pictures of the bundle, as the engine takes them, in the smallest and the largest batch.
    wanted = sorted({contract.min_batch, contract.max_batch})
    assert [sample.batch_size for sample in config.model_warmup] == (wanted if most else [1] * len(wanted))
    frames = frames_of(bundle)
    for sample, count in zip(config.model_warmup, wanted, strict=True):
        given = sample.inputs["image"]
        rows = 1 if most else count
        images = pack([frames[index % 2] for index in range(rows)], contract)
        assert list(given.dims) == list(images.shape[1 if most else 0 :])
        file = tmp_path / "models" / f"street_{engine.name}" / "warmup" / given.input_data_file
        assert file.read_bytes() == images.tobytes()


@needs_triton
def test_the_model_of_pictures_speaks_the_protocol(tmp_path):
    bundle = made(tmp_path / "street.agln", ONNX, contract=IOContract(32, 64, 1, 4))
    export(bundle, "triton", tmp_path / "models")
    model = tmp_path / "models" / "street"
    config = config_of(model)
    assert (config.backend, config.max_batch_size) == ("python", MOST_IMAGES)
    assert list(map(tensor, config.input)) == [("image", "TYPE_STRING", [1]), ("pixels", "TYPE_UINT8", [-1, -1, 3])]
    assert all(port.optional and port.allow_ragged_batch for port in config.input)
    assert list(map(tensor, config.output)) == [
        ("labels", "TYPE_UINT8", [-1, -1]),
        ("labels_png", "TYPE_STRING", [1]),
        ("runs", "TYPE_INT32", [2]),
        ("overlay_png", "TYPE_STRING", [1]),
        ("shares", "TYPE_FP32", [5]),
    ]
    assert [port.name for port in config.output if port.label_filename == "labels.txt"] == ["shares"]
    assert (model / "labels.txt").read_text().splitlines() == list(bundle.manifest.classes)
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    encoded, raw = (sample.inputs for sample in config.model_warmup)
    data = (model / "warmup" / encoded["image"].input_data_file).read_bytes()
    assert struct.unpack("<I", data[:4]) == (len(data) - 4,)
    frame = frames_of(bundle)[0]
    assert (np.array(Image.open(io.BytesIO(data[4:]))) == frame).all()
    assert (model / "warmup" / raw["pixels"].input_data_file).read_bytes() == frame.tobytes()
    text = (model / "1" / "model.py").read_text()
    names: dict[str, object] = {}
    exec(compile(text, "model.py", "exec"), names)
    assert names["TritonPythonModel"].__module__ == "agln_fast.serving.repositories.triton_model"


@needs_triton
def test_queues_are_bounded_and_requests_may_be_late(small, tmp_path):
    export(small, "triton", tmp_path / "models")
    for model in ("street", "street_onnxruntime-fp32", "street_openvino-bf16"):
        policy = config_of(tmp_path / "models" / model).dynamic_batching.default_queue_policy
        assert policy.allow_timeout_override
        assert policy.timeout_action == policy.REJECT
        assert policy.max_queue_size > 0
        assert policy.default_timeout_microseconds > 0  # or Triton would not look at a request's


@needs_triton
def test_each_engine_gets_what_its_backend_needs(tmp_path):
    bundle = made(tmp_path / "street.agln", ONNX, FP16, BF16, INT8, plan_for("sm120"), RTX)
    written = export(bundle, "triton", tmp_path / "models")
    models = {name: tmp_path / "models" / f"street_{name}" for name in (ONNX.name, FP16.name, BF16.name, INT8.name)}
    configs = {name: config_of(path) for name, path in models.items()}
    kinds = triton.config_schema().ModelInstanceGroup
    assert [configs[ONNX.name].platform, configs[ONNX.name].backend] == ["onnxruntime_onnx", "onnxruntime"]
    assert configs[ONNX.name].instance_group[0].kind == kinds.KIND_CPU
    assert configs[FP16.name].instance_group[0].kind == kinds.KIND_GPU  # CPUs have no kernels for it
    assert (models[ONNX.name] / "1" / "model.onnx").read_text() == "model.onnx"
    assert (models[FP16.name] / "1" / "model.onnx").read_text() == "model.fp16.onnx"
    assert configs[BF16.name].default_model_filename == "model.onnx"
    assert told(configs[BF16.name])["HINT_BF16"] == "YES"
    assert configs[INT8.name].default_model_filename == "model.xml"
    assert "HINT_BF16" not in told(configs[INT8.name])
    assert (models[INT8.name] / "1" / "model.bin").read_text() == "model.int8.bin"
    assert "street_tensorrt-rtx-fp16" in written.left_out
    assert not (tmp_path / "models" / "street_tensorrt-rtx-fp16").exists()


@needs_triton
def test_what_cannot_be_promised_is_said(tmp_path):
    """Triton's OpenVINO backend knows no hint for fp32."""
    engine = replace(BF16, name="openvino-fp32", precision="fp32")
    written = export(made(tmp_path / "street.agln", engine, frames=False), "triton", tmp_path / "models")
    assert [note.partition(":")[0] for note in written.notes] == ["street", "street_openvino-fp32"]
    assert "nothing warms it up" in written.notes[0]
    for model in ("street", "street_openvino-fp32"):
        assert not config_of(tmp_path / "models" / model).model_warmup


@needs_triton
def test_one_plan_for_each_compute_capability(tmp_path):
    bundles = [made(tmp_path / f"{sm}.agln", plan_for(sm), ONNX, salt=sm) for sm in ("sm90", "sm89", "sm120")]
    export_repository([("street", bundle.path) for bundle in bundles], "triton", tmp_path / "models")
    model = tmp_path / "models" / "street_tensorrt-fp16"
    config = config_of(model)
    assert (config.platform, config.instance_group[0].kind) == ("tensorrt_plan", 1)
    assert config.cc_model_filenames == {
        "9.0": "model.sm90.plan",
        "8.9": "model.sm89.plan",
        "12.0": "model.sm120.plan",
    }
    assert config.default_model_filename == "model.sm90.plan"
    for sm in ("sm90", "sm89", "sm120"):
        assert (model / "1" / f"model.{sm}.plan").read_text() == f"model.fp16.trt.engine{sm}"
    # All else is the first one's.
    assert (tmp_path / "models" / "street_onnxruntime-fp32" / "1" / "model.onnx").read_text() == "model.onnxsm90"


@needs_triton
def test_two_plans_for_one_compute_capability_are_refused(tmp_path):
    one, other = (made(tmp_path / f"{k}.agln", plan_for("sm90"), salt=k) for k in "ab")
    with pytest.raises(ConfigError, match=r"street_tensorrt-fp16: .*b\.agln has one more plan for sm90"):
        export_repository([("street", one.path), ("street", other.path)], "triton", tmp_path / "models")


@needs_triton
def test_a_plan_for_no_compute_capability_is_refused(tmp_path):
    bundle = made(tmp_path / "street.agln", replace(plan_for("sm90"), compute_capabilities=()))
    with pytest.raises(BundleError, match="tensorrt-fp16 is for no compute capability; build it again"):
        export(bundle, "triton", tmp_path / "models")


@needs_triton
def test_the_library_of_our_layers_comes_along_with_its_flag(tmp_path):
    engine = replace(plan_for("sm90"), name="tensorrt-fp16-kernels", plan=FUSED)
    written = export(made(tmp_path / "street.agln", engine), "triton", tmp_path / "models")
    library = tmp_path / "models" / "street_tensorrt-fp16-kernels" / "1" / "libagln_layers.so"
    assert library.read_text() == "libagln_layers.so"
    assert written.start == (
        "env",
        "AGLN_FAST_REGISTER_LAYERS=1",
        "tritonserver",
        f"--model-repository={tmp_path / 'models'}",
        f"--backend-config=tensorrt,plugins={library}",
    )


@needs_triton
def test_parameters_tell_what_the_manifest_knows(small, tmp_path):
    export(small, "triton", tmp_path / "models")
    pictures = told(config_of(tmp_path / "models" / "street"))
    assert pictures["weights_sha256"] == small.manifest.files["weights.safetensors"]
    assert (pictures["size"], pictures["layout"], pictures["resize"]) == ("32x64", "uint8_nhwc", "stretch")
    engine = told(config_of(tmp_path / "models" / "street_openvino-bf16"))
    assert engine.items() >= pictures.items()
    assert (engine["engine"], engine["precision"]) == ("openvino-bf16", "bf16")
    assert (engine["agreement"], engine["weighted_agreement"]) == ("0.998700", "0.999910")
    assert (engine["verification"], engine["mIoU"]) == ("passed", "0.6180")
    assert engine["loss"] == "0.20 points of mIoU on 40 of street"


def test_without_tritonclient_the_extra_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=re.escape('pip install "agln-fast[load]"')):
        export(small, "triton", tmp_path / "models")
    assert os.listdir(tmp_path) == ["street.agln"]


# -------------------------------------------------------------------------------------------------------- OpenVINO's

TEXT, ANY = {"type": "string"}, {"type": ["string", "number", "boolean"]}
OF_OPENVINO = {
    "type": "object",
    "required": ["model_config_list"],
    "additionalProperties": False,
    "properties": {
        "model_config_list": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["config"],
                "additionalProperties": False,
                "properties": {
                    "config": {
                        "type": "object",
                        "required": ["name", "base_path"],
                        "additionalProperties": False,
                        "properties": {
                            "name": TEXT,
                            "base_path": TEXT,
                            "shape": TEXT,
                            "target_device": TEXT,
                            "nireq": {"type": "integer", "minimum": 0},
                            "plugin_config": {"type": "object", "additionalProperties": ANY},
                        },
                    }
                },
            },
        }
    },
}
"""What its manual says of the settings that we use (docs/parameters.md of OpenVINO Model Server)."""


def of_openvino(repository: Path) -> list[dict[str, object]]:
    document = json.loads((repository / "config.json").read_text())
    jsonschema.validate(document, OF_OPENVINO)
    return [each["config"] for each in document["model_config_list"]]


def test_openvinos_server_gets_the_engines_of_openvino(tmp_path):
    contract = IOContract(32, 64, 1, 4, "float_nchw")
    bundle = made(tmp_path / "street.agln", ONNX, BF16, INT8, contract=contract)
    written = export(bundle, "openvino-model-server", tmp_path / "models")
    bf16, int8 = of_openvino(tmp_path / "models")
    assert (bf16["name"], bf16["shape"]) == ("street_openvino-bf16", "(1:4,3,32,64)")
    assert bf16["plugin_config"]["INFERENCE_PRECISION_HINT"] == "bf16"
    assert "INFERENCE_PRECISION_HINT" not in int8["plugin_config"]
    files = {
        "bf16": {"model.onnx": "model.onnx"},
        "int8": {"model.xml": "model.int8.xml", "model.bin": "model.int8.bin"},
    }
    for precision, named in files.items():
        version = tmp_path / "models" / f"street_openvino-{precision}" / "1"
        assert {file.name: file.read_text() for file in version.iterdir()} == named
    assert set(written.left_out) == {"street_torch-fp32", "street_fused-fp32", "street_onnxruntime-fp32"}


def test_openvinos_server_runs_nothing_else(tmp_path):
    with pytest.raises(BundleError, match="has no engine of OpenVINO"):
        export(made(tmp_path / "street.agln", ONNX), "openvino-model-server", tmp_path / "models")
    assert os.listdir(tmp_path) == ["street.agln"]


@pytest.mark.openvino
def test_openvino_itself_takes_what_its_server_gets(bundle, tmp_path):
    """The file, the shape and the settings, as the server would give them to the library."""
    import openvino

    export(bundle, "openvino-model-server", tmp_path / "models")
    [config] = of_openvino(tmp_path / "models")
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    with denormals_as_zero():  # the settings switch them off in this thread, too
        core = openvino.Core()
        [file] = (tmp_path / "models" / config["base_path"] / "1").glob("model.[ox]*")
        model = core.read_model(file)
        model.reshape({"image": config["shape"].replace("(", "[").replace(")", "]")})
        compiled = core.compile_model(model, config["target_device"], config["plugin_config"])
        output = np.array(compiled([image])[0])
    with agln_fast.load(bundle, "openvino") as segment:
        assert (as_promised(output, bundle.artefact(segment.engine.name)) == segment._backend.run(image)).all()


# ------------------------------------------------------------------------------------------------------------ MLServer

_SETTINGS = """
import json, sys
from mlserver.settings import ModelSettings, Settings
settings = ModelSettings.parse_file(sys.argv[1])
print(json.dumps([settings.name, settings.version, settings.parameters.uri, settings.implementation.__name__]))
"""


@needs_mlserver
def test_mlserver_reads_its_settings(small, tmp_path):
    """In a process of its own: MLServer's messages and those of tritonclient have one name."""
    export(small, "mlserver", tmp_path / "models")
    file = tmp_path / "models" / "street" / "model-settings.json"
    done = subprocess.run([sys.executable, "-c", _SETTINGS, file], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ["street", "1", "./street.agln", "BundleModel"]
