"""What a completion asks of a replica, as its body says before anything is checked."""

import math
from base64 import b64decode
from dataclasses import dataclass

import orjson

from engine.config import BYTE_OFFSET
from server.errors import ApiError
from server.parsing import COMPLETION, bound_prompt

SHORTEST_PREFIX = 256
"""Bytes: about the rows of an engine's step, below which it does not matter what is cached."""
MAX_TOKENS = 16
"""OpenAI's default."""
READ = frozenset({"prompt", "n", "best_of", "max_tokens", "model", "decoder"})
"""Fields that say how much work it is."""
MOST = 1 << 20
"""Bytes of a prompt, or of an output, that are counted."""


@dataclass(frozen=True)
class Work:
    """A completion's prompts and output."""

    prompt: bytes = b""
    """The first prompt, without special ids."""
    num_prompts: int = 1
    num_sequences: int = 0
    """None of a request that is no completion, or will be refused."""
    num_output: int = 0
    """Most bytes of a choice."""
    decoder: str = ""
    """Empty for the server's own choice."""

    def beginnings(self) -> list[bytes]:
        """Beginnings of the prompt that others may have, too, each twice as long as the one before."""
        if len(self.prompt) < SHORTEST_PREFIX:
            return []
        doublings = int(math.log2(len(self.prompt) / SHORTEST_PREFIX)) + 1
        return [self.prompt[: SHORTEST_PREFIX << n] for n in range(doublings)]


def work_of(body: bytes, max_prompts: int) -> Work:
    """Of a request that may be wrong in any way, which its replica then says. Nothing is built of what it would refuse
    for its size. max_prompts: most prompts of a request."""
    try:
        members = COMPLETION.split(body)
        bound_prompt(bytes(members["prompt"]), max_prompts, MOST)
        asked = {name: orjson.loads(bytes(members[name])) for name in READ & members.keys()}
    except (ApiError, KeyError, orjson.JSONDecodeError):
        return Work()
    prompts = asked["prompt"]
    many = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], str | list | dict)
    num_prompts = len(prompts) if many else 1
    samples = max(_number(asked.get("best_of"), 1), _number(asked.get("n"), 1))
    model, decoder = asked.get("model"), asked.get("decoder")
    if not isinstance(decoder, str):
        decoder = model.partition(":")[2] if isinstance(model, str) else ""
    return Work(
        _bytes_of(prompts[0] if many else prompts),
        num_prompts,
        num_prompts * samples,
        _number(asked.get("max_tokens"), MAX_TOKENS),
        decoder,
    )


def _number(value: object, default: int) -> int:
    return min(value, MOST) if isinstance(value, int) and value >= 0 else default


def _bytes_of(prompt: object) -> bytes:
    """Ids of bytes are the same as the text."""
    if isinstance(prompt, str):
        return prompt[:MOST].encode(errors="replace")
    if isinstance(prompt, dict) and isinstance(data := prompt.get("base64"), str):
        try:
            return b64decode(data[: MOST // 3 * 4])
        except ValueError:
            return b""
    if not isinstance(prompt, list):
        return b""
    ids = [item - BYTE_OFFSET for item in prompt[:MOST] if isinstance(item, int)]
    return bytes(item for item in ids if 0 <= item < 256)
