"""What one contestant did on one network: the columns of every table, file and figure of the suite."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AblationRow", "PipelineRow", "Row"]


@dataclass(frozen=True)
class Row:
    """One contestant on one network at one size.

    Times are milliseconds of one run of `batch` images. None: not measured, or impossible for this contestant.

    network: preset, e.g. "agln_resnet50".
    contestant: name in the registry, e.g. "planned openvino", "openvino", "torch.compile".
    ours: it runs the rewritten network; a peer runs the plain one.
    settings: what it was told, in short, e.g. "LATENCY, f32, 2 threads".
    plan: rewrites in use, e.g. "fold_batchnorm, mix_before_upsample(full, full, none)"; empty for a peer.
    median_ms, p95_ms, p99_ms: uint8 image (B, H, W, 3) in host memory to uint8 labels (B, H, W) in host memory.
    engine_ms: median of the compiled network alone, without what is done after it on the host; equal to median_ms
        where the network returns labels itself.
    images_per_second: batch / median.
    ratio: how many times as fast as the best peer of the same network, size, batch and precision class (fp32, or
        anything less): median over the rounds of peer time / own time. low and high: its 10th and 90th percentile.
    peak_memory_mb: host: largest resident set of a process that does nothing but this, less that of one that only
        imports the library and loads nothing; on CUDA: what the driver has in use after a run, less before opening.
    size_mb: what is stored: graph, weights, engine. build_s: from the network in memory to an engine that is ready.
    gmacs: multiply-adds of the plain network for one image, 1e9. parameters_m: 1e6.
    peak_fraction: 2 * gmacs * batch / time, over the rate of this machine's own matrix product in that precision.
        Of the plain network: a rewritten one can be above 1.
    agreement: share of pixels, 0..1, with the label of the fp32 reference.
    miou: percent on Scenes' test split, or on the dataset of --data, in this very contestant; None where the network is
        none of those that ship, trained, or runs at another size than theirs without --data.
    """

    network: str
    contestant: str
    ours: bool
    precision: str
    device: str
    size: str
    batch: int
    num_classes: int
    settings: str
    plan: str
    median_ms: float
    p95_ms: float
    p99_ms: float | None
    engine_ms: float | None
    images_per_second: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    peak_memory_mb: float | None
    size_mb: float | None
    build_s: float | None
    gmacs: float
    parameters_m: float
    peak_fraction: float | None
    agreement: float | None
    miou: float | None


@dataclass(frozen=True)
class PipelineRow:
    """What is done around one engine of a bundle, for images of one size: medians and minima, milliseconds.

    pre, engine, post: as in `agln_fast.runtime.result.Timing`; pre_and_post: their sum for each image.
    """

    engine_name: str
    height: int
    width: int
    pre_ms: float
    least_pre_ms: float
    engine_ms: float
    least_engine_ms: float
    post_ms: float
    least_post_ms: float
    pre_and_post_ms: float
    least_pre_and_post_ms: float


@dataclass(frozen=True)
class AblationRow:
    """A variant of the network, trained and evaluated: shares of 0..1 on the test split of Scenes.

    size: side of scenes and crops, pixels. seconds: of the training. environment: what it ran on.
    """

    model: str
    seed: int
    epochs: float
    size: int
    miou: float
    pixel_accuracy: float
    multiscale_miou: float | None
    seconds: float
    environment: str
