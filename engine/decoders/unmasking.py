"""Which cells of a block become bytes after a pass (Fast BLT 3.1.2)."""

from collections.abc import Sequence

from ..types import Unmask


def unmasked(rule: Unmask, masked: Sequence[int], confidence: Sequence[float], entropy: Sequence[float]) -> list[int]:
    """The places among `masked` that are settled now: at least one, never empty; ties go to the left.

    confidence, entropy: per place of the block.

    confidence: all whose highest probability is above alpha; if there are none, the most confident one.
    entropy: from the lowest entropy up, as many as have a sum of at most gamma; if not even one, the lowest. With
    `minus_max` the largest entropy of the sum is not counted (Ben-Hamu et al. 2025), so that one is always admitted.
    one_step: all.
    """
    if rule.rule == "one_step":
        return list(masked)
    if rule.rule == "confidence":
        above = [place for place in masked if confidence[place] > rule.alpha]
        return above or [max(masked, key=lambda place: confidence[place])]
    settled: list[int] = []
    total = 0.0
    for place in sorted(masked, key=lambda place: entropy[place]):
        # Ascending, so the largest so far is the one at hand.
        if (total if rule.minus_max else total + entropy[place]) > rule.gamma:
            break
        total += entropy[place]
        settled.append(place)
    return settled or [min(masked, key=lambda place: entropy[place])]
