"""How many replicas there should be: Ray's rule by requests, and the bytes that wait."""

import math
from typing import Any

from server.generation import Generation

QUEUED_BYTES = "queued_bytes"


class ByQueuedBytes:
    """Ray asks it every few seconds, averages over the time of its look-back, and applies its delays to the answer."""

    def __init__(self, target_requests: float, target_queued_bytes: int) -> None:
        self._target_requests = target_requests
        self._target_queued_bytes = target_queued_bytes

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """context: Ray's AutoscalingContext. Returns the replicas wanted, and no state."""
        queued = sum(((context.aggregated_metrics or {}).get(QUEUED_BYTES) or {}).values())
        return self.wanted(context.total_num_requests, queued), {}

    def wanted(self, num_requests: float, queued_bytes: float) -> int:
        """Enough that no replica has more requests, and none more bytes that wait, than its target."""
        by_requests = math.ceil(num_requests / self._target_requests)
        return max(by_requests, math.ceil(queued_bytes / self._target_queued_bytes))


def queued_bytes(generations: list[Generation]) -> int:
    """Of requests without a first byte: their prompts, and all that they may generate."""
    waiting = [one for one in generations if one.first_byte is None]
    output = sum(sum(request.max_tokens for request in one.plan.requests) for one in waiting)
    return output + sum(one.plan.prompt_bytes for one in waiting)
