"""T6: the patcher's products and the decoder's as two branches of one graph, or one after the other."""

from collections.abc import Callable
from functools import partial

import torch

from engine.costs import bandwidth

from .question import UNDECIDED, Case, find
from .scale import Scale
from .tile import product

TITLE = "patcher and decoder beside each other"
HOPED = 1.4


def cases(scale: Scale) -> list[Case]:
    return [{"order": "in turn"}, {"order": "beside each other"}]


def measure(scale: Scale, case: Case) -> Case:
    patcher, decoder = _products(scale, "patcher"), _products(scale, "decoder")

    def in_turn() -> None:
        for link in (*patcher, *decoder):
            link()

    def beside() -> None:
        here, there = torch.cuda.current_stream(), torch.cuda.Stream()
        there.wait_stream(here)
        with torch.cuda.stream(there):
            for link in patcher:
                link()
        for link in decoder:
            link()
        here.wait_stream(there)

    # Without a GPU there are no branches: their work runs in turn.
    work = beside if case["order"] == "beside each other" and scale.on_gpu else in_turn
    return {"us": scale.work_us(bandwidth.recorded(work, scale.device)), "kernels": len(patcher) + len(decoder)}


def _products(scale: Scale, name: str) -> list[Callable[[], None]]:
    """The products of a stack, layer by layer, each with its own weights."""
    stack = scale.stacks[name]
    layers = min(stack.layers, scale.links)
    links: list[list[Callable[[], None]]] = [[] for _ in range(layers)]
    for out, width in stack.matrices.values():
        x, y = scale.rows_of(1, width), torch.empty(1, out, device=scale.device, dtype=torch.bfloat16)
        for layer, weight in enumerate(scale.matrices(out, width, layers)):
            links[layer].append(partial(product, x, weight, y, overlaps=scale.overlaps))
    return [link for layer in links for link in layer]


def decide(rows: list[Case]) -> str:
    turn, beside = find(rows, order="in turn"), find(rows, order="beside each other")
    if not turn or not beside:
        return UNDECIDED
    ratio = turn["us"] / beside["us"]
    verdict = "run the patcher beside encoder and decoder" if ratio >= HOPED else "not worth the second decoder pass"
    return (
        f"{turn['us']:.0f} us in turn, {beside['us']:.0f} us as branches: {ratio:.2f} times ({HOPED} hoped): {verdict}."
    )
