"""guidellm, which measures a server under load."""

import json
import re
from pathlib import Path

import httpx

from server import tokenizer_files
from tests.serving import RunningServer

from .environments import installed
from .running import RECIPES, run_recipe

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 3, 32, 24
"""As the recipe says."""


def answered(url: str, route: str) -> float:
    """How often the server has said 200 there."""
    told = httpx.get(f"{url}/metrics").text
    found = re.search(rf'^fastblt_http_responses_total{{route="{route}",status="200"}} (\S+)', told, re.M)
    return float(found[1]) if found else 0.0


def test_guidellm_measures_the_server(nano: RunningServer, tmp_path: Path) -> None:
    health = answered(nano.url, "/health")
    tokenizer_files.write(tmp_path / "tokenizer")
    run_recipe(installed("guidellm"), RECIPES["guidellm"], nano, tmp_path)
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (requests["errored"], requests["incomplete"]) == ([], []) and len(requests["successful"]) == REQUESTS
    for request in requests["successful"]:
        assert json.loads(request["request_args"])["body"]["stream_options"]["continuous_usage_stats"] is True
        assert (request["prompt_tokens"], request["output_tokens"]) == (PROMPT_TOKENS, OUTPUT_TOKENS)
        assert request["output"] and request["time_to_first_token_ms"] > 0
    # It looks there before anything else.
    assert answered(nano.url, "/health") > health
