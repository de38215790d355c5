"""A bundle in milliseconds: a tiny network that gives every pixel the same label, run by PyTorch alone."""

from __future__ import annotations

from pathlib import Path

import torch

import agln_fast
from agln_fast.bundle import Bundle, seal
from agln_fast.contract import IOContract
from agln_fast.data.classes import default_class_set
from agln_fast.manifest import EngineRecord, Manifest, Verification
from agln_fast.models.networks import SegmentationNetwork

CLASSES = 5


def constant_network(label: int) -> SegmentationNetwork:
    network = agln_fast.create_model("fpn_resnet18", CLASSES, width=1 / 64, channels=4).eval()
    with torch.no_grad():
        classifier = network.classifier[4]
        classifier.weight.zero_()
        classifier.bias.copy_(torch.eye(CLASSES)[label])
    return network


def hand_made_bundle(folder: Path, label: int = 0, prefix: str = "class") -> Bundle:
    """Write a bundle into `folder`, which is made unless it is there; classes are "PREFIX 0", "PREFIX 1", …"""
    folder.mkdir(exist_ok=True)
    network = constant_network(label)
    agln_fast.save_checkpoint(network, folder / "weights.safetensors")
    check = Verification("passed", "", 4, 1.0, 1.0, None, 2.5, "cpu")
    engines = tuple(
        EngineRecord(f"{backend}-fp32", backend, "fp32", "weights.safetensors", "cpu", {"torch": "2"}, (), check)
        for backend in ("torch", "fused")
    )
    manifest = Manifest(
        model=network.config,
        classes=tuple(f"{prefix} {index}" for index in range(CLASSES)),
        palette=default_class_set(CLASSES).palette,
        contract=IOContract(32, 64),
        engines=engines,
        left_out={"openvino-int8": "NNCF is not installed"},
        created_with={"agln-fast": "1"},
    )
    return Bundle(folder, seal(folder, manifest))
