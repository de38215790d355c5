"""What each block of a network gives, recorded while it runs, in any of its forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from agln_fast.models.blocks import ContextFusionBlock
from agln_fast.models.networks import AGLNDecoder, FCNDecoder, FPNDecoder, SegmentationNetwork
from agln_fast.models.resnet import ResNet
from agln_fast.plan.blocks import blocks_of
from agln_fast.plan.network import Aggregation, Concatenation, Decoder, Fusion, InferenceNetwork

__all__ = ["watching"]

_Kept = TypeVar("_Kept")


@contextmanager
def watching(network: nn.Module, keep: Callable[[Tensor], _Kept]) -> Iterator[dict[str, _Kept]]:
    """What `keep` makes of the result of each block while `network` runs, under the names of `blocks_of`.

    A block whose result exists nowhere in this form of the network, because a rewrite computes it along with others or
    not at all, is missing. What is there is what the reference's block gives, in any form: (B, C, H, W) of maps,
    (B, C, N) of descriptors, (B, C, C) of the channel attention. The hooks are gone at the end, come what may.

    Args:
        network: a `SegmentationNetwork` or an `InferenceNetwork`.
        keep: is called at once, because the network may overwrite the tensor later.
    """
    assert isinstance(network, SegmentationNetwork | InferenceNetwork)
    names = [block.name for block in blocks_of(network.config)]
    found: dict[str, _Kept] = {}

    def note(name: str, result: Tensor) -> None:
        if name in names:
            found[name] = keep(result)

    with ExitStack() as stack:
        hooks = _Hooks(note, stack)
        hooks.after("classifier", network.classifier)
        if isinstance(network, SegmentationNetwork):
            _watch_reference(network, hooks)
        else:
            _watch_inference(network, hooks)
        yield found


class _Hooks:
    """Hooks that call `note` with the name of a block and its result; `stack` removes them."""

    def __init__(self, note: Callable[[str, Tensor], None], stack: ExitStack) -> None:
        self.note, self.stack = note, stack

    def after(self, name: str, module: Any) -> None:
        """The block `name` is the module's result."""
        self.see(module, lambda _, result: self.note(name, result))

    def before(self, name: str, module: Any) -> None:
        """The block `name` is the first argument of a module, if it is one."""
        if isinstance(module, nn.Module):
            hook = module.register_forward_pre_hook(lambda _, arguments: self.note(name, arguments[0]))
            self.stack.callback(hook.remove)

    def see(self, module: Any, look: Callable[[tuple[Any, ...], Any], None]) -> None:
        """Call `look` with the arguments and the result of a module, if it is one."""
        if isinstance(module, nn.Module):
            self.stack.callback(module.register_forward_hook(lambda _, *call: look(*call)).remove)

    def stages(self, stages: Iterable[nn.Module]) -> None:
        """The encoder's blocks; what the first stage takes is the stem's result."""
        for number, stage in enumerate(stages, 1):
            if number == 1:
                self.before("encoder.stem", stage)
            self.after(f"encoder.stage{number}", stage)

    def convolutions(self, decoder: FCNDecoder) -> None:
        """Of the head of MMSegmentation's FCN."""
        for number, convolution in enumerate(decoder.convs):
            self.after(f"decoder.convs.{number}", convolution)

    def pyramid(self, decoder: FPNDecoder | Decoder) -> None:
        """What all decoders have."""
        self.after("decoder.reduce", decoder.reduce)
        for level, (lateral, smooth) in enumerate(zip(decoder.lateral, decoder.smooth, strict=True)):
            self.after(f"decoder.lateral.{level}", lateral)
            self.after(f"decoder.smooth.{level}", smooth)


def _watch_reference(network: SegmentationNetwork, hooks: _Hooks) -> None:
    encoder, decoder = network.encoder, network.decoder
    hooks.stages((encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4))
    hooks.after("head", network.classifier[2])
    hooks.after("logits", network)
    if decoder is None:
        return
    hooks.after("decoder", decoder)
    if isinstance(decoder, FCNDecoder):
        hooks.convolutions(decoder)
        return
    hooks.pyramid(decoder)
    if not isinstance(decoder, AGLNDecoder):
        for level, smooth in enumerate(decoder.smooth):
            hooks.before(f"decoder.merge.{level}", smooth)
        return
    for level, sab in enumerate(decoder.sab):
        hooks.after(f"decoder.sab.{level}", sab)
    for level, chain in enumerate(decoder.cfb):
        for number, block in enumerate(cast(Iterable[ContextFusionBlock], chain)):
            name = f"decoder.cfb.{level}.{number}"
            if number == 0:
                hooks.before(f"decoder.merge.{level}", block)
            _watch_fusion_block(name, block, hooks)
            hooks.after(name, block)


def _watch_fusion_block(name: str, block: ContextFusionBlock, hooks: _Hooks) -> None:
    hooks.after(f"{name}.sdm", block.sdm)
    hooks.before(f"{name}.sum", block.enhance)
    hooks.after(f"{name}.enhance", block.enhance)
    if block.enhance is None:  # no module takes or gives the sum
        hooks.see(block.sdm, lambda call, m: hooks.note(f"{name}.sum", call[0] + block.alpha * m))
    if block.lrm is None:
        return
    hooks.after(f"{name}.lrm", block.lrm)
    compute = block.lrm.affinity

    def affinity(e: Tensor, b: Tensor) -> Tensor:
        r = compute(e, b)
        hooks.note(f"{name}.affinity", r)
        return r

    block.lrm.affinity = affinity  # type: ignore[method-assign]
    hooks.stack.callback(delattr, block.lrm, "affinity")


def _watch_inference(network: InferenceNetwork, hooks: _Hooks) -> None:
    decoder = network.decoder
    encoder: Any = network.encoder  # the fused network's is another
    plain = isinstance(encoder, ResNet)
    hooks.stages((encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4) if plain else encoder.stages)
    hooks.after("head", network.mix)
    if network.full_size:
        hooks.after("logits", network)
    if isinstance(network.mix, nn.Sequential) and isinstance(network.mix[0], Concatenation):
        hooks.after("decoder", network.mix[0])
    if decoder is None:
        return
    if isinstance(decoder, FCNDecoder):
        hooks.convolutions(decoder)
        return
    hooks.pyramid(decoder)
    for number, aggregation in network.aggregations():
        if not aggregation.projects:
            _watch_aggregation(f"decoder.sab.{number}", aggregation, hooks)
    for level, merge in enumerate(network.levels()):
        if not merge.fusions:
            hooks.after(f"decoder.merge.{level}", merge)
        for number, fusion in enumerate(cast(Iterable[Fusion], merge.fusions)):
            name = f"decoder.cfb.{level}.{number}"
            if number == 0:
                hooks.before(f"decoder.merge.{level}", fusion)
            _watch_fusion(name, fusion, hooks)
            hooks.after(name, fusion)


def _watch_aggregation(name: str, aggregation: Aggregation, hooks: _Hooks) -> None:
    hooks.see(aggregation, lambda _, made: hooks.note(name, made[0]))


def _watch_fusion(name: str, fusion: Fusion, hooks: _Hooks) -> None:
    def distributed(call: tuple[Any, ...], made: tuple[Tensor, Tensor]) -> None:
        hooks.note(f"{name}.sdm", made[0])
        if made[1] is not call[0]:  # α = 0
            hooks.note(f"{name}.sum", made[1])

    hooks.see(fusion.distribution, distributed)
    hooks.after(f"{name}.enhance", fusion.enhance)
    hooks.after(f"{name}.affinity", fusion.affinity)
    hooks.after(f"{name}.lrm", fusion.refinement)
