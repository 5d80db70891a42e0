"""A request whose text meets a number that is none fails alone, again and again."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.asking import NANO, Fields, Record, ask, ask_all, check, engine_of, mixed, serving, talking

TABLE = "model.encoder_hash_tok_embedding.weight"
ROW = 777
NAN = b"\xc0\x7f"
"""In bfloat16."""
TIMES = 6


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """models/nano, of which one number of a hash table is NaN."""
    folder = tmp_path / "nano"
    folder.mkdir()
    for name in ("config.json", "decoders.json"):
        (folder / name).symlink_to(NANO / name)
    weights = shutil.copyfile(NANO / "model.safetensors", folder / "model.safetensors")
    with weights.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[TABLE]
        assert entry["dtype"] == "BF16"
        file.seek(8 + size + entry["data_offsets"][0] + ROW * entry["shape"][1] * len(NAN))
        file.write(NAN)
    yield folder
    weights.unlink()


def candidates() -> Iterator[Fields]:
    random = Random(31)
    while True:
        prompt = [1, *(random.randrange(4, 260) for _ in range(600))]
        yield {"model": "nano", "prompt": prompt, "max_tokens": 2, "temperature": 0}


@pytest.mark.faults
async def test_a_poisoned_request_fails_alone(tmp_path: Path, model: Path, record_property: Record) -> None:
    requests = mixed(48, seed=32)
    with serving(tmp_path, "--no-prefix-cache", model=model) as server:
        engine = engine_of(server)
        async with talking(server) as http:
            # Of so many texts some meet the row themselves.
            first = await ask_all(http, requests)
            assert {answer.status for answer in first} <= {200, 500}
            innocent = [number for number, answer in enumerate(first) if answer.status == 200]
            assert len(innocent) > len(requests) / 3
            requests, expected = [requests[n] for n in innocent], [first[n] for n in innocent]
            for poison in candidates():
                if (await ask(http, poison)).status == 500:
                    break
            answers = asyncio.gather(*(ask(http, fields) for fields in requests))
            for number in range(TIMES):
                headers = {"x-request-id": f"poison-{number}"}
                told = await http.post("/v1/completions", json=poison, headers=headers)
                assert told.status_code == 500
                assert told.json()["error"]["code"] == "internal_error"
                assert f"poison-{number}" in told.json()["error"]["message"]
                await asyncio.sleep(0.05)
            check(requests, await answers, expected)
        assert engine_of(server) == engine
    record_property("figure", f"{TIMES} poisoned requests beside {len(innocent)} others: each alone got 500")
