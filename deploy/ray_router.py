"""Routes a request to the replica that has the beginning of its prompt cached, unless that replica is too busy.

Ray calls this for every request, in the process that sends it. There may be several of those (`--ingresses`), and they
agree without communicating: a prefix ranks the replicas by hashes, so each is first for its share of all prefixes. When
a replica comes or goes, only its share moves. Ray's own router for language models keeps a tree of prompts in one more
actor and comes with vLLM; its ring of hashes is blind to load.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable

import orjson
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from engine.config import BYTE_OFFSET

from .ray_call import Call


class PrefixRouter(RequestRouter):
    """Sends a call to the first replica in its prefix's ranking that has at most `imbalance` requests more than the
    idlest one. So the excess of one replica always spills over to the same others."""

    def initialize_state(self, **kwargs: int) -> None:
        """Ray passes `imbalance` here."""
        self._imbalance = kwargs["imbalance"]
        self._running = Counter[ReplicaID]()
        """Requests sent from here and not yet answered."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """From best to worst: Ray tries the next if one has no room."""
        if pending_request is None:
            return [candidate_replicas]
        # Otherwise Ray would retry without a pause when no replica has room.
        pending_request.routing_context.should_backoff = True
        call: Call = pending_request.args[0]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if call.replica in replicas:
            return [[replicas[call.replica]]]
        loads = {key: self._load(replica.replica_id) for key, replica in replicas.items()}
        best = order(loads, call.prefix, self._imbalance)
        return [[replicas[key]] for key in sorted(best, key=call.avoided.__contains__)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._running[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._running[replica_id] -= 1
        if self._running[replica_id] <= 0:
            del self._running[replica_id]

    def _load(self, replica_id: ReplicaID) -> int:
        """A replica's last report counts the requests of all ingresses, but not those on their way to it."""
        return max(self._running[replica_id], self.replica_queue_len_cache.get(replica_id) or 0)


def order(loads: dict[str, int], prefix: bytes | None, imbalance: int) -> list[str]:
    """The replicas, given how many requests each has, from best to worst."""
    if prefix is None:
        return sorted(random.sample(list(loads), len(loads)), key=loads.__getitem__)
    bound = min(loads.values(), default=0) + imbalance
    ranking = rank(prefix, loads)
    return sorted(ranking, key=lambda replica: max(loads[replica] - bound, 0))


def rank(prefix: bytes, replicas: Iterable[str]) -> list[str]:
    """Rendezvous hashing."""
    return sorted(replicas, key=lambda replica: hashlib.blake2b(prefix, key=replica.encode()).digest())


def prefix_of(body: bytes, length: int) -> bytes | None:
    """The first `length` bytes of a completion request's first prompt; None if there are none."""
    try:
        prompt = orjson.loads(body)["prompt"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        # Ids of bytes map to the same prefix as the text, so both forms go to the same replica.
        ids = [item - BYTE_OFFSET for item in prompt[:length] if isinstance(item, int)]
        return bytes(item for item in ids if 0 <= item < 256) or None
    return (prompt.encode()[:length] or None) if isinstance(prompt, str) else None
