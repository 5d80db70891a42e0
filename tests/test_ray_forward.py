"""What an ingress notes of its replicas while it asks one, without Ray."""

from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import Message

from deploy.ray_balance import Balance
from deploy.ray_call import Call, Reply, encode_reply
from deploy.ray_forward import Forwarder
from deploy.ray_load import Load, Rates
from deploy.ray_settings import RaySettings
from server.keys import KeyRing
from server.settings import ServerSettings

FULL = Load(running=64, places=64, free=0, rates=Rates(1e-4, {"blt": 4e-3}, {"blt": 1.0}))


class Replica:
    """Tells of its load when it has a call, and again with the answer. Notes what the balance knows in between."""

    def __init__(self, status: int, load: Load, load_of_answer: Load | None = None) -> None:
        self.status = status
        self.loads = load, load_of_answer
        self.balance = Balance()
        self.ahead = 0.0
        """Seconds of prompts that the replica is known to have."""

    async def carry(self, call: Call) -> AsyncGenerator[bytes, None]:
        self.balance.choose(call.number, call.work, ["one"], call.avoided)
        yield encode_reply(Reply("one", load=self.loads[0]))
        known = self.balance._replicas["one"]
        self.ahead = sum(sent.prompt_seconds for sent in known.sent.values() if sent.when >= known.heard)
        start = {"type": "http.response.start", "status": self.status, "headers": []}
        body = b'{"error":{"code":"queue_full","message":"","param":null}}'
        yield encode_reply(Reply(messages=[start, {"type": "http.response.body", "body": body}], load=self.loads[1]))

    async def answer(self, path: str, body: bytes) -> None:
        """To one request."""
        settings, no_keys = ServerSettings(), KeyRing("API keys", (), None, tuple)
        forwarder = Forwarder(settings, RaySettings(replica_wait=0.01), no_keys, self.balance, self.carry)
        scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"}
        scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "headers": [], "client": None}

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            pass

        await forwarder.forward(scope | {"server": None}, receive, send)

    @property
    def load(self) -> Load:
        return self.balance._replicas["one"].load


async def test_a_report_that_comes_as_a_call_is_taken_does_not_count_it() -> None:
    replica = Replica(200, Load(rates=FULL.rates))
    await replica.answer("/v1/completions", b'{"prompt": "%s"}' % (b"x" * 5000))
    assert replica.ahead == 0.5


async def test_a_full_replica_is_still_full_after_it_refused_a_request() -> None:
    for of_answer in (None, FULL):
        replica = Replica(429, FULL, of_answer)
        await replica.answer("/v1/completions", b'{"prompt": "x", "n": 8}')
        assert replica.load == FULL and replica.balance.full()


async def test_a_request_that_is_no_completion_counts_as_no_sequence() -> None:
    replica = Replica(200, FULL, FULL)
    await replica.answer("/tokenize", b'{"prompt": "x"}')
    assert replica.load == FULL
