"""Ray's interface for routers, which it calls for every request in the process that sends it: an ingress.

Ray's own router for language models keeps a tree of prompts in one more actor and comes with vLLM; its ring of hashes
is blind to load.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from . import ray_balance
from .ray_call import Call


class CostRouter(RequestRouter):
    """Asks the process' balance. Ray pickles this class by value, but not the module of that."""

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
        return [[replicas[name]] for name in ray_balance.BALANCE.choose(call.number, call.work, replicas, call.avoided)]
