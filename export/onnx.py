"""Network -> ONNX, by PyTorch's dynamo exporter."""

from __future__ import annotations

import copy
import gc
import json
import logging
import sys
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from onnx_ir.passes import common
from onnxscript import optimizer

from agln_fast.contract import IOContract
from agln_fast.errors import BuildError, ConfigError
from agln_fast.export.blocks import WatchedDeployment, name_blocks
from agln_fast.export.nodes import translations
from agln_fast.files import replacing
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.plan.rewrites import rewrite
from agln_fast.precision import PRECISIONS, Precision

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

__all__ = ["OPSET", "export_onnx"]

OPSET = 22  # the first with bfloat16 convolutions


def export_onnx(
    network: SegmentationNetwork,
    path: Path,
    contract: IOContract,
    precision: Precision = "fp32",
    metadata: Mapping[str, str] | None = None,
    plan: Plan = NO_PLAN,
) -> None:
    """Write `network`, rewritten as `plan` says, behind `contract` as one checked ONNX file, weights inside.

    The input is called `image`, the output `labels` or `logits`, which `plan` may leave at low resolution. Height and
    width are fixed, the batch is the symbol "batch" where the contract gives a range. Weights and activations have the
    type of `precision`; the energy of the channel attention and all softmaxes stay in float32 by casts in the graph.
    The result of each block is called by the block's name, wherever it exists: see `agln_fast.export.blocks`.
    With the plan's `kernels` our ops are nodes of domain `agln`, see `agln_fast.export.nodes`.

    Args:
        network: in eval mode; it is not changed.
        path: must not exist.
        metadata: goes into `metadata_props`, beside the contract.
        plan: the rewrites; below fp32, BN is folded whatever it says.

    Raises:
        BuildError: the exporter or the checker refuses the network.
        ConfigError: `precision` is no floating-point one.
    """
    known = [name for name, numbers in PRECISIONS.items() if numbers.bytes > 1]
    if precision not in known:
        raise ConfigError(f"ONNX export in {precision!r}: it is {', '.join(known)}; int8 is made of the fp32 graph")
    if precision != "fp32":  # afterwards the weights are rounded
        plan = replace(plan, fold_batchnorm=True)
    if contract.output == "logits":
        plan = replace(plan, low_resolution_labels=False)
    elif plan.low_resolution_labels:
        contract = replace(contract, output="logits")
    # Without a plan it is the reference itself: peers get what the exporter makes of it.
    exported = copy.deepcopy(network) if plan == NO_PLAN else rewrite(network, plan)
    exported = exported.to(getattr(torch, PRECISIONS[precision].torch))
    deployed = WatchedDeployment(exported, contract, network.config.num_classes).eval()
    dynamic = contract.min_batch != contract.max_batch
    # torch.export takes a batch of one for a constant.
    batch = max(2, contract.min_batch) if dynamic else contract.max_batch
    dtype = torch.uint8 if contract.layout == "uint8_nhwc" else torch.float32
    shape = (batch, *(side for side in contract.input_shape[1:] if isinstance(side, int)))
    image = torch.zeros(shape, dtype=dtype)
    dimension = torch.export.Dim("batch", min=contract.min_batch, max=contract.max_batch) if dynamic else None
    try:
        with _undisturbed():
            program = torch.onnx.export(
                deployed,
                (image,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=[contract.output],
                dynamic_shapes={"image": {0: dimension} if dimension else None},
                custom_translation_table=translations() if plan.kernels else None,
                verbose=False,
                # Its patterns find nothing to fuse in a rewritten network, and take minutes to see it.
                optimize=plan == NO_PLAN,
            )
        assert program is not None
        name_blocks(program.model, deployed.blocks())
        if plan != NO_PLAN:
            _fold_constants(program.model, whatever_size=plan.kernels)  # a layer wants its weights as they are
        program.model.metadata_props.update({"agln_fast.contract": json.dumps(contract.to_dict()), **(metadata or {})})
        with replacing(path, BuildError) as part:
            program.save(part, external_data=False)
            onnx.checker.check_model(part, full_check=True)
    except (RuntimeError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"ONNX export failed: {_reason(error)}") from error


def _fold_constants(model: ir.Model, *, whatever_size: bool) -> None:
    """What the exporter's optimizer does, without its patterns, which by itself leaves large constants alone."""
    limits = ("input_size_limit", "output_size_limit") if whatever_size else ()
    optimizer.fold_constants(model, **dict.fromkeys(limits, sys.maxsize))
    for step in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        step(model)


def _reason(error: BaseException) -> str:
    """First line of the innermost cause: the exporter wraps it in its own advice. An interruption stays one."""
    while True:
        if isinstance(error, KeyboardInterrupt):
            raise error
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the exporter's remarks about itself (torchvision is absent, …) off the user's screen.

    And the garbage collector out of it: looking for garbage among millions of objects that live on takes a tenth of
    the time.
    """
    collects = gc.isenabled()
    gc.disable()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if collects:
            gc.enable()
