"""Parameters of other servers that are accepted with values that change nothing.

Client programs send them unasked: a load tool that always sends `"length_penalty": 1.0` should not fail. Any other
value is refused by name; null means the default, as everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Neutral:
    """Allowed values of a parameter: one of `values`, or anything of the type `kind`."""

    values: tuple[Any, ...] = ()
    kind: type | None = None

    def allows(self, value: Any) -> bool:
        if self.kind:
            return isinstance(value, self.kind)
        # True equals 1 in Python, but not for a client.
        return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.values)

    @property
    def schema(self) -> dict[str, Any]:
        """For OpenAPI."""
        if self.kind:
            return {"type": ["object" if self.kind is dict else "string", "null"]}
        return {"enum": [*self.values, None]}


FALSE, TRUE, ZERO, ONE, NULL = Neutral((False,)), Neutral((True,)), Neutral((0,)), Neutral((1,)), Neutral()

NEUTRAL: Mapping[str, Neutral] = {
    # OpenAI's.
    "suffix": Neutral(("",)),
    "metadata": Neutral(kind=dict),
    "service_tier": Neutral(("auto", "default")),
    "store": FALSE,
    "safety_identifier": Neutral(kind=str),
    "prompt_cache_key": Neutral(kind=str),
    # vLLM's, SGLang's and others'.
    "bad_words": Neutral(([],)),
    "detokenize": TRUE,
    "early_stopping": FALSE,
    "ebnf": NULL,
    "guided_choice": NULL,
    "guided_grammar": NULL,
    "guided_json": NULL,
    "guided_regex": NULL,
    "json_schema": NULL,
    "length_penalty": ONE,
    "lora_path": NULL,
    "no_repeat_ngram_size": ZERO,
    "no_stop_trim": FALSE,
    "num_beams": ONE,
    "regex": NULL,
    "return_tokens_as_token_ids": FALSE,
    "skip_special_tokens": TRUE,
    "spaces_between_special_tokens": Neutral((True, False)),
    "stop_regex": NULL,
    "typical_p": ONE,
    "use_beam_search": FALSE,
}
