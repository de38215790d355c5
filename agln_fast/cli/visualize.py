"""`agln-fast visualize`: one figure of what happens inside a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agln_fast.cli.console import out
from agln_fast.cli.request import WeightsName
from agln_fast.errors import ImageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from agln_fast.runtime.images import ImageArray

    _Labels = npt.NDArray[np.uint8]

__all__ = ["visualize"]


def visualize(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of FPN or AGLN: .pth, .pth.tar or .safetensors.")],
    image: Annotated[Path, typer.Argument(help="The image file.")],
    output: Annotated[Path, typer.Option("-o", "--to", help="The figure to write: .png, .svg or .pdf.")],
    labels: Annotated[Path | None, typer.Option(help="Ground truth: a PNG of class ids, 255 for ignored.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class set, e.g. ade20k; default by count.")] = None,
    weights: WeightsName = None,
    level: Annotated[int, typer.Option(help="Level of the decoder, 0 (1/16) to 2 (1/4); -1 is the last.")] = -1,
    block: Annotated[int, typer.Option(help="Context Fusion Block of that level; -1 is the last.")] = -1,
    descriptors: Annotated[int, typer.Option(help="How many attention maps, the most peaked ones.")] = 6,
    channels: Annotated[int, typer.Option(help="How many channels of the encoder feature.")] = 6,
    size: Annotated[str, typer.Option(help="Height x width that the network sees, or native.")] = "native",
) -> None:
    """Draw decoder features before and after enhancement, attention, and encoder features before and after refinement.

    Example: agln-fast visualize agln.safetensors photo.png -o features.png --size 512x512
    """
    from agln_fast.cli.places import check_figure
    from agln_fast.contract import IOContract, parse_size
    from agln_fast.data.classes import class_set, default_class_set
    from agln_fast.figures.panels import LEVELS, check_index, check_panels
    from agln_fast.models.shipped import find_checkpoint
    from agln_fast.runtime.images import fit, load_image

    contract = None if size == "native" else IOContract(*parse_size(size))
    given = None if classes is None else class_set(classes)
    check_index("level", level, LEVELS)
    check_panels(descriptors, channels)
    find_checkpoint(checkpoint)
    check_figure(output)
    pixels = load_image(image)
    frame = pixels if contract is None else fit(pixels, contract)[0]
    ids, truth = (None, None) if labels is None else _read_labels(labels, pixels, frame)

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.figures.features import collect_features, draw_features
    from agln_fast.figures.saving import save_figure
    from agln_fast.models.checkpoint import load_checkpoint

    network = load_checkpoint(checkpoint, weights=weights)
    names = given or network.class_set or default_class_set(network.config.num_classes)
    if ids is not None:
        _check_ids(labels, ids, network.config.num_classes)
    features = collect_features(network, frame, level=level, block=block)
    title = f"{checkpoint.name} on {image.name}"
    figure = draw_features(features, names, truth=truth, descriptors=descriptors, channels=channels, title=title)
    save_figure(figure, output)
    out.print(f"wrote {output}", highlight=False, markup=False)


def _read_labels(path: Path, image: ImageArray, frame: ImageArray) -> tuple[_Labels, _Labels]:
    """The class ids of `image` (H, W, 3): (H, W), and at the size of `frame` (h, w, 3) by nearest neighbour: (h, w).

    Raises:
        ImageError: the file is no label map: unreadable, of another size, or of several channels.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as file:
            height, width = image.shape[:2]
            if file.mode not in ("L", "P") or file.size != (width, height):
                kind = f"{file.width}x{file.height} pixels in mode {file.mode}"
                raise ImageError(f"{path}: {kind}; ground truth is {width}x{height} as the image, one byte a pixel")
            return np.array(file), np.array(file.resize(frame.shape[1::-1], Image.Resampling.NEAREST))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: is no readable PNG ({getattr(error, 'strerror', None) or error})") from None


def _check_ids(path: Path | None, ids: _Labels, num_classes: int) -> None:
    """
    Raises:
        ImageError: a class id that the network has not.
    """
    from agln_fast.data.dataset import IGNORE_INDEX

    strange = ids[(ids >= num_classes) & (ids != IGNORE_INDEX)]
    if strange.size:
        raise ImageError(f"{path}: class id {strange[0]}, but the network has {num_classes} classes (0 is the first)")
