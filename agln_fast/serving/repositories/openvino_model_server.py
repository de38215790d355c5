"""A folder for OpenVINO Model Server: the engines of OpenVINO, each as a model that takes the contract's tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agln_fast.bundle import Bundle
from agln_fast.engines.base import ports_of
from agln_fast.errors import BundleError
from agln_fast.manifest import EngineRecord
from agln_fast.serving.repositories.folder import Model, Named, Repository, new_model, place

__all__ = ["write"]

_BACKEND = "openvino"
_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_REQUESTS = 2  # one is filled while the other runs


def write(folder: Path, named: Sequence[Named], at: Path) -> Repository:
    """`config.json`, and NAME_ENGINE/1/ with the graph of each engine of OpenVINO.

    Raises:
        BundleError: a bundle has no engine of OpenVINO.
    """
    configs, models, left_out = list[dict[str, Any]](), list[Model](), dict[str, str]()
    for each in named:
        bundle, found = each.bundle, False
        for engine in bundle.manifest.engines:
            name = f"{each.name}_{engine.name}"
            if engine.backend != _BACKEND:
                left_out[name] = f"{engine.backend} is none of its libraries"
                continue
            found = True
            graph = new_model(folder, name) / "1" / "model"
            graph.parent.mkdir()
            for file in engine.files:
                place(bundle, file, graph.with_suffix(Path(file).suffix))
            configs.append({"config": {"name": name, "base_path": name, **_settings(bundle, engine)}})
            models.append(Model(name, _BACKEND, *map(str, ports_of(bundle.artefact(engine.name)))))
        if not found:
            raise BundleError(
                f"{bundle.path}: has no engine of OpenVINO, and OpenVINO Model Server runs no other; build it again "
                "with `agln-fast build --target cpu`"
            )
    (folder / "config.json").write_text(json.dumps({"model_config_list": configs}, indent=2) + "\n", encoding="utf-8")
    notes = ("send tensors: encoded pictures it would decode to BGR, and the engines take RGB",)
    start = "ovms", "--config_path", "{repository}/config.json", "--port", "9000", "--rest_port", "8000"
    return Repository(tuple(models), start, left_out, notes)


def _settings(bundle: Bundle, engine: EngineRecord) -> dict[str, Any]:
    contract = bundle.manifest.contract
    smallest, largest = contract.min_batch, contract.max_batch
    batch = f"{smallest}" if smallest == largest else f"{smallest}:{largest}"
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "CPU_DENORMALS_OPTIMIZATION": True}
    if engine.precision in _HINTS:  # int8: the graph says it, and the rest is what the CPU is best at
        properties["INFERENCE_PRECISION_HINT"] = _HINTS[engine.precision]
    return {
        "shape": f"({','.join([batch, *map(str, contract.input_shape[1:])])})",
        "nireq": _REQUESTS,
        "target_device": "CPU",
        "plugin_config": properties,
    }
