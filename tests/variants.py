"""Small networks of every variant in float64, and a plan of all rewrites, for tests of rewriting."""

from __future__ import annotations

from dataclasses import fields

import torch

from agln_fast.models.networks import SegmentationNetwork, create_model
from agln_fast.plan.plan import Plan

__all__ = ["EVERYTHING", "SWITCHES", "VARIANTS", "network"]

# What comes after a plan's `kernels` has tests of its own (test_fuse.py).
OTHERS = "low_resolution_labels", "kernels"
SWITCHES = [field.name for field in fields(Plan) if field.type == "bool" and field.name not in OTHERS]
EVERYTHING = Plan(**dict.fromkeys(SWITCHES, True), mix_before_upsample=("full", "rows", "full"), winograd=4)  # type: ignore[arg-type]
VARIANTS = {
    "fcn8s": ("fcn8s_resnet18", {}),
    "fcn": ("fcn_resnet18", {}),
    "fcn of mmseg": ("fcn_concat_resnet18c", {}),
    "fpn": ("fpn_resnet18", {}),
    "paper": ("agln_resnet18", {}),
    "release": ("agln_release_resnet18", {}),
    "lite": ("agln_lite_resnet18", {}),
    "release lite": ("agln_release_resnet18", {"lite": True}),
    "no LRM": ("agln_resnet18", {"channel_resampling": False, "spatial_gating": False}),
    "release without LRM": ("agln_release_resnet18", {"channel_resampling": False, "spatial_gating": False}),
    "resampling only": ("agln_resnet18", {"spatial_gating": False}),
    "gating only": ("agln_release_resnet18", {"channel_resampling": False}),
    "average pooling": ("agln_resnet18", {"pooling": "average", "num_descriptors": 1}),
    "straight": ("agln_resnet18", {"decoder": "straight"}),
    "fixed scalars": ("agln_resnet18", {"learnable_alpha": False, "learnable_beta": False}),
}


def network(variant: str, zeros: tuple[str, ...] = ()) -> SegmentationNetwork:
    """In float64, with random weights; scalars named in `zeros` are 0."""
    name, overrides = VARIANTS[variant]
    torch.manual_seed(0)
    model = create_model(name, 5, width=0.25, channels=16, **overrides).double().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("alpha", "beta", "gamma")):
                tensor.uniform_(0.3, 0.9)
            elif key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.normal_(1.0 if ".weight" in key else 0.0, 0.2)
            if key.endswith(zeros):
                tensor.zero_()
    return model
