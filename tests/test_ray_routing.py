"""Which replica an ingress chooses, without Ray: the work of a request, the load of a replica, the balance of both."""

import json
import pickle
import tracemalloc
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fleet
from deploy import ray_balance
from deploy.ray_balance import FRESH_SECONDS, KNOWN_LOOKS, Balance, rank
from deploy.ray_call import Call, Reply, decode_reply, encode_reply
from deploy.ray_load import Load, Rates, rates_of
from deploy.ray_scaling import ByQueuedBytes, queued_bytes
from deploy.ray_work import MOST, Work, work_of
from engine.types import DecoderCounts, Snapshot
from server.admission import Gate
from server.settings import ServerSettings

PREFIXES = [f"{number:03} = ".encode() for number in range(1000)]
RATES = Rates(1e-4, {"blt": 4e-3, "blt-dv": 2e-3}, {"blt": 1.0, "blt-dv": 2.0})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def balance(clock: Clock) -> Balance:
    return Balance(clock)


def choose(balance: Balance, number: int, *of: Any) -> list[str]:
    """As a call of this number does."""
    balance.begun(number)
    return balance.choose(number, *of)


def completion(prompt: bytes = b"x", num_output: int = 100, decoder: str = "blt", n: int = 1) -> Work:
    return Work(prompt, 1, n, num_output, decoder)


# Hashes.


def test_a_prefix_always_gets_the_same_replica_and_prefixes_are_spread() -> None:
    first = Counter(rank(prefix, "abcd")[0] for prefix in PREFIXES)
    assert first.keys() == set("abcd") and min(first.values()) > len(PREFIXES) / 8
    assert all(rank(prefix, "abcd") == rank(prefix, "dcba") for prefix in PREFIXES)


def test_removing_a_replica_moves_only_its_own_prefixes() -> None:
    for prefix in PREFIXES:
        before, after = rank(prefix, "abcd"), rank(prefix, "abc")
        assert after == [replica for replica in before if replica != "d"]


def test_idle_ingresses_agree_whether_they_have_heard_of_the_replicas_or_not(balance: Balance, clock: Clock) -> None:
    other = Balance(clock)
    for number, prefix in enumerate(PREFIXES[:50]):
        chosen = choose(balance, number, completion(prefix), "abcd")
        balance.ended(number)
        assert chosen == rank(prefix, "abcd") == choose(other, number, completion(prefix), "dcba")
        other.ended(number)


# Balance.


def test_a_busier_replica_is_chosen_after_an_idle_one(balance: Balance) -> None:
    for number in range(40):
        choose(balance, number, completion(b"same"), "abcd")
    chosen = Counter(choose(balance, 100 + n, completion(b"same"), "abcd")[0] for n in range(8))
    assert set(chosen) == set("abcd")


def test_a_slower_replica_gets_less(balance: Balance) -> None:
    slow = Rates(2e-4, {"blt": 8e-3}, {"blt": 1.0})
    chosen = Counter[str]()
    for number, prefix in enumerate(PREFIXES[:300]):
        for name, rates, factor in (("a", RATES, 1), ("b", slow, 2)):
            step = factor * (0.004 + 0.002 * chosen[name])
            load = Load(chosen[name], places=1000, step_seconds=step, sequence_seconds=0.002 * factor, rates=rates)
            balance.heard(name, load)
        chosen[choose(balance, number, completion(prefix), "ab")[0]] += 1
    assert 1.5 < chosen["a"] / chosen["b"] < 2.4


def test_a_replica_that_has_measured_nothing_is_taken_for_one_like_the_others(balance: Balance) -> None:
    for step_seconds in (0.001, 0.1):
        rates = Rates(step_seconds / 10, {"blt": step_seconds / 2}, {"blt": 1.0})
        balance.heard("a", Load(step_seconds=step_seconds, places=32, rates=rates))
        balance.heard("b", Load(places=32))
        chosen = Counter(choose(balance, number, completion(b"same"), "abc")[0] for number in range(12))
        assert min(chosen[name] for name in "abc") >= 2
        for number in range(12):
            balance.ended(number)


def test_a_replica_that_was_busy_when_it_last_told_is_idle_now(balance: Balance, clock: Clock) -> None:
    load = Load(running=9, places=32, step_seconds=0.1, rates=RATES, shortest_seconds=0.002)
    balance.heard("b", load)
    clock.now += FRESH_SECONDS
    balance.heard("a", Load(running=9, places=32, step_seconds=0.01, rates=RATES, shortest_seconds=0.002))
    assert choose(balance, 1, completion(b"same"), "ab")[0] == "b"


def test_idle_replicas_share_the_work_whatever_a_busy_machine_made_them_measure(balance: Balance) -> None:
    """Both were measured as slow in one way: a alone, b with several sequences."""
    balance.heard("a", Load(places=64, step_seconds=0.0064, shortest_seconds=0.0064, rates=RATES))
    balance.heard(
        "b", Load(places=64, step_seconds=0.0013, shortest_seconds=0.0013, sequence_seconds=0.0138, rates=RATES)
    )
    chosen = Counter(choose(balance, number, completion(b"same", 600), "ab")[0] for number in range(9))
    assert min(chosen["a"], chosen["b"]) >= 2


def test_a_replica_that_has_hardly_run_is_taken_for_at_most_twice_as_slow(balance: Balance) -> None:
    """Or it would never run, and never be known for what it is."""
    for looks, slow_ones in ((KNOWN_LOOKS - 1, {"b"}), (KNOWN_LOOKS, set())):
        for name, shortest, count in (("a", 0.002, 100), ("b", 0.05, looks)):
            load = Load(
                places=64, step_seconds=shortest, shortest_seconds=shortest, sequence_seconds=0.002, rates=RATES,
                looks=count,
            )  # fmt: skip
            balance.heard(name, load)
        chosen = {choose(balance, number, completion(b"same", 600), "ab")[0] for number in range(6)}
        assert chosen == {"a"} | slow_ones
        for number in range(6):
            balance.ended(number)


def test_what_a_sequence_adds_is_taken_from_a_replica_that_knows(balance: Balance) -> None:
    for name, each in (("a", 0.0), ("b", 0.002)):
        balance.heard(name, Load(places=64, shortest_seconds=0.002, sequence_seconds=each, rates=RATES))
    chosen = Counter(choose(balance, number, completion(b"same", 600), "ab")[0] for number in range(8))
    assert chosen["a"] == chosen["b"] == 4


def test_a_sequence_alone_takes_the_shortest_steps(balance: Balance) -> None:
    """Only the next one makes the steps of b longer than those of a."""
    for name, shortest, each in (("a", 0.008, 0.0001), ("b", 0.006, 0.006)):
        load = Load(places=64, step_seconds=shortest, shortest_seconds=shortest, sequence_seconds=each, rates=RATES)
        balance.heard(name, load)
    assert [choose(balance, number, completion(b"same", 600), "ab")[0] for number in range(2)] == ["b", "a"]


def test_a_decoder_counts_as_what_it_costs_there(balance: Balance) -> None:
    dear = Rates(1e-4, {"blt": 4e-3, "blt-dv": 2e-2}, {"blt": 1.0, "blt-dv": 1.0})
    for number, prefix in enumerate(PREFIXES[:20]):
        balance.heard("a", Load(running=4, step_seconds=0.01, rates=RATES))
        balance.heard("b", Load(running=3, step_seconds=0.01, rates=dear))
        assert choose(balance, 2 * number, completion(prefix, 400, "blt-dv"), "ab")[0] == "a"
        assert choose(balance, 2 * number + 1, completion(prefix, 400, "blt"), "ab")[0] == "b"
        balance.ended(2 * number)
        balance.ended(2 * number + 1)


def test_a_long_prompt_goes_where_its_beginning_was_sent_unless_that_is_far_busier(balance: Balance) -> None:
    system = bytes(range(256)) * 20
    for replica in "abcd":
        balance.heard(replica, Load(rates=RATES, step_seconds=0.004))
    order = rank(system[:256], "abcd")
    last = order[-1]
    balance.begun(1)
    balance.sent(1, completion(system + b"one"), last)
    balance.ended(1)
    assert choose(balance, 2, completion(system + b"two", 20), "abcd") == [last, *order[:-1]]
    balance.ended(2)
    balance.heard(last, Load(running=30, waiting=9, step_seconds=0.1, rates=RATES))
    assert choose(balance, 3, completion(system + b"three", 20), "abcd")[-1] == last


def test_full_and_avoided_replicas_come_last(balance: Balance, clock: Clock) -> None:
    work = completion(b"p")
    first, second, third = rank(b"p", "abc")
    assert choose(balance, 1, work, "abc", frozenset(first)) == [second, third, first]
    assert balance.full() is None
    balance.heard(second, Load(free=0, retry_after=5.0))
    assert choose(balance, 1, work, "abc", frozenset(first)) == [third, second, first]
    balance.heard(first, Load(free=0, retry_after=3.0))
    balance.heard(third, Load(free=0, retry_after=7.0))
    clock.now += 1
    assert balance.full() == 2.0
    balance.heard(third, Load(free=1))
    assert balance.full() is None
    balance.heard(third, Load(free=0))
    clock.now += FRESH_SECONDS
    assert balance.full() is None, "that is old news"


def test_a_new_replica_is_found_while_all_others_are_full(balance: Balance, clock: Clock) -> None:
    choose(balance, 1, completion(), "ab")
    for _ in range(100):
        for name in "ab":
            balance.heard(name, Load(free=0, retry_after=30.0))
        clock.now += 0.25
        if balance.full() is None:
            break
    assert choose(balance, 2, completion(), "abc")[0] == "c"
    assert clock.now - 100 == FRESH_SECONDS and balance.full() is None
    balance.heard("c", Load(free=0, retry_after=7.0))
    assert balance.full() == 7.0, "all were asked for just now"


def test_a_queue_that_keys_share_is_never_full_for_the_ingress(balance: Balance, clock: Clock) -> None:
    choose(balance, 1, completion(b"p"), "ab")
    balance.heard("a", Load(free=0, retry_after=5.0))
    balance.heard("b", Load(free=0, retry_after=3.0))
    assert balance.full() == 3.0
    balance.heard("b", Load(free=0, retry_after=3.0, is_shared=True))
    assert balance.full() is None, "a request may displace one of another key there"


def test_a_request_that_has_ended_no_longer_counts(balance: Balance, clock: Clock) -> None:
    first = choose(balance, 1, completion(b"p", 500, n=8), "ab")[0]
    clock.now += 0.1
    balance.heard(first, Load(running=8, step_seconds=0.01, rates=RATES))
    balance.heard("b" if first == "a" else "a", Load(running=1, step_seconds=0.01, rates=RATES))
    assert choose(balance, 2, completion(b"p"), "ab")[0] != first
    balance.ended(2)
    balance.heard(first, Load(running=8, free=0, step_seconds=0.01, rates=RATES))
    balance.heard("b" if first == "a" else "a", Load(running=1, free=0, step_seconds=0.01, rates=RATES))
    assert balance.full()
    balance.ended(1)
    assert balance.full() is None
    assert choose(balance, 3, completion(b"p"), "ab")[0] == first


def test_a_call_that_has_ended_is_not_counted_when_ray_still_chooses_for_it(balance: Balance) -> None:
    first = choose(balance, 1, completion(b"p", 500, n=8), "ab")[0]
    balance.ended(1)
    balance.choose(1, completion(b"p", 500, n=8), "ab")
    balance.sent(1, completion(b"p", 500, n=8), first)
    assert not any(known.sent for known in balance._replicas.values())


def test_what_is_remembered_is_bounded(balance: Balance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_balance, "MOST_PREFIXES", 50)
    for number in range(200):
        work = completion(number.to_bytes(2) * 200)
        choose(balance, number, work, [f"replica {number // 10}", "b"])
        balance.sent(number, work, "b")
        balance.ended(number)
    assert len(balance._prefixes) == 50 and len(balance._replicas) == 2
    work = completion(b"a beginning that all share" * 20)
    for number in range(100):
        name = f"replica {number}"
        choose(balance, number, work, [name])
        balance.sent(number, work, name)
        balance.ended(number)
    assert balance._prefixes[ray_balance._digest(work.beginnings()[0])] == {"replica 99"}


# Work.


@pytest.mark.parametrize(
    ("fields", "work"),
    [
        ({"prompt": "abc"}, Work(b"abc", 1, 1, 16)),
        ({"prompt": "é", "max_tokens": 7, "n": 3, "decoder": "blt-s"}, Work("é".encode(), 1, 3, 7, "blt-s")),
        ({"prompt": ["ab", "c"], "best_of": 2, "model": "nano:blt-dv"}, Work(b"ab", 2, 4, 16, "blt-dv")),
        ({"prompt": [1, 101, 102], "model": "nano"}, Work(b"ab", 1, 1, 16)),
        ({"prompt": [[101], [1]]}, Work(b"a", 2, 2, 16)),
        ({"prompt": {"base64": "YWL/"}}, Work(b"ab\xff", 1, 1, 16)),
        ({"prompt": [{"base64": "YWI="}, {"base64": "YQ=="}], "n": 2}, Work(b"ab", 2, 4, 16)),
        ({"prompt": [{"base64": "a"}, {"base64": 3}]}, Work(b"", 2, 2, 16)),
        ({"prompt": "x", "n": True, "max_tokens": "9"}, Work(b"x", 1, 1, 16)),
        ({"prompt": [3000000000, -7, 1.5], "max_tokens": 1 << 70}, Work(b"", 1, 1, 16)),
        ({"prompt": None}, Work(b"", 1, 1, 16)),
        ({}, Work()),
    ],
)
def test_the_work_is_read_from_the_body(fields: dict[str, Any], work: Work) -> None:
    assert work_of(json.dumps(fields).encode(), 8) == work


def test_a_body_that_is_no_request_is_no_work() -> None:
    assert [work_of(body, 8) for body in (b"", b"[]", b"\xff", b"nonsense", b"3")] == [Work()] * 5


MANY = 1_000_000
LARGE = {
    "an unknown member": b'{"prompt":"x","a":[' + b"[]," * MANY + b"[]]}",
    "prompts": b'{"prompt":[' + b'"a",' * MANY + b'"a"]}',
    "arrays": b'{"prompt":[' + b"[]," * MANY + b"[]]}",
    "elements of two types": b'{"prompt":["a"' + b",[]" * MANY + b"]}",
    "ids": b'{"prompt":[' + b"1," * (MOST + 1) + b"1]}",
    "a large number of them": b'{"prompt":"x","n":[' + b"[]," * MANY + b"1]}",
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
def test_nothing_is_built_of_what_a_replica_refuses(body: bytes) -> None:
    tracemalloc.start()
    try:
        assert work_of(body, 8) == Work()
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_any_values_are_some_work(value: Any) -> None:
    for field in ("prompt", "n", "best_of", "max_tokens", "decoder", "model"):
        work = work_of(json.dumps({"prompt": "x", field: value}).encode(), 8)
        assert work.num_sequences >= 0 and 0 <= work.num_output <= MOST


def test_beginnings_double() -> None:
    assert [len(b) for b in Work(b"x" * 2000).beginnings()] == [256, 512, 1024]
    assert [len(b) for b in Work(b"x" * 256).beginnings()] == [256]
    assert Work(b"x" * 255).beginnings() == []


def test_the_work_is_not_sent_to_the_replica() -> None:
    call = Call({"path": "/"}, b"body", 7, Work(b"x" * 1000))
    sent = pickle.loads(pickle.dumps(call))
    assert sent == Call({"path": "/"}, b"body", 7) and len(pickle.dumps(call)) < 500


def test_a_reply_survives_its_journey() -> None:
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    body = {"type": "http.response.body", "body": b"data: \xff", "more_body": True, "told": [(0, b"event")]}
    load = Load(3, 4, rates=RATES, retry_after=2)
    reply = decode_reply(encode_reply(Reply("name", [start, body], load)))
    assert (reply.replica, reply.load) == ("name", load) and reply.messages
    assert reply.messages[0]["headers"] == [[b"content-type", b"text/event-stream"]]
    assert reply.messages[1] | {"told": [(0, b"event")]} == body
    assert decode_reply(encode_reply(Reply(messages=[]))) == Reply(messages=[])


# Load.


def test_rates_are_what_the_engine_has_measured() -> None:
    counts = DecoderCounts(committed=100, rounds=40, seconds={"encoder": 1.0, "decoder": 2.0})
    snapshot = Snapshot(prompt_rows=1000, stage_seconds={"encoder": 3.0, "decoder": 2.0}, decoders={"blt-s": counts})
    rates = rates_of(snapshot)
    assert rates == Rates(2e-3, {"blt-s": 0.03}, {"blt-s": 2.5})
    assert rates.steps(10, "blt-s") == rates.steps(10, "blt") == 4.0
    assert rates.weight("blt-s") == rates.weight("blt") == Rates().weight("blt") == 1.0
    assert rates_of(Snapshot()).steps(7, "blt") == 7.0
    assert RATES.weight("blt") == RATES.weight("blt-dv") == 1.0
    assert Rates(0.0, {"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 1.0}).weight("b") == 1.5


def test_the_gate_tells_how_long_its_queue_will_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("server.admission.time.monotonic", lambda: now[0])
    gate = Gate(ServerSettings(max_queue=4, max_choices=4))
    assert gate.retry_seconds(1) == 1
    for _ in range(100):
        ticket = gate.enter(1)
        now[0] += 3.0
        ticket.begun()
        ticket.close()
    for _ in range(4):
        gate.enter(1)
    assert gate.retry_seconds(1) == 3 and gate.retry_seconds(3) == 9 and gate.retry_seconds(100) == 60


# Scaling.


def test_replicas_are_wanted_for_requests_and_for_the_bytes_that_wait() -> None:
    policy = ByQueuedBytes(target_requests=8, target_queued_bytes=1000)
    assert [policy.wanted(*load) for load in ((0, 0), (8, 999), (9, 0), (1, 1001), (30, 2500))] == [0, 1, 2, 2, 4]
    asked = SimpleNamespace(total_num_requests=3.0, aggregated_metrics={"queued_bytes": {"a": 700.0, "b": 1500.0}})
    assert policy(asked) == (3, {})
    assert policy(SimpleNamespace(total_num_requests=3.0, aggregated_metrics=None)) == (1, {})


def test_bytes_wait_until_the_first_byte() -> None:
    plan = SimpleNamespace(prompt_bytes=30, requests=[SimpleNamespace(max_tokens=100)] * 2)
    waiting: Any = SimpleNamespace(first_byte=None, plan=plan)
    begun: Any = SimpleNamespace(first_byte=1.0, plan=plan)
    assert queued_bytes([]) == 0 and queued_bytes([waiting, begun, waiting]) == 2 * 230


# A fleet.


def test_a_simulated_fleet_is_faster_when_routed_by_cost() -> None:
    costs = fleet.Costs(0.008, 0.0008, 0.00008)
    rows = fleet.simulated(["fewest", "prefix", "cost"], 8, [4.0], 15.0, costs)
    means = {(row["slow_quarter"], row["rule"]): row["mean"] for row in rows}
    assert means[False, "cost"] < 0.95 * means[False, "fewest"] and means[False, "cost"] < 1.06 * means[False, "prefix"]
    assert means[True, "cost"] < 0.9 * means[True, "fewest"] and means[True, "cost"] < means[True, "prefix"]
    assert "| cost |" in fleet.render({"rows": rows}) and fleet.judge({"rows": rows})


def test_a_simulated_replica_does_all_that_it_is_asked() -> None:
    asked = list(fleet.requests(20.0, 10.0, seed=3))
    one = fleet.Fleet("cost", fleet.Costs(0.008, 0.0008, 0.00008), [1.0, 0.5])
    one.run(asked)
    assert len(asked) > 150 and all(a.arrives < a.first_byte <= a.ends and a.left <= 0 for a in asked)
    assert not one._sent and all(not replica.sent for replica in one._balances[0]._replicas.values())
