"""What `/tokenize`, `/detokenize` and `/tokenizer_info` take and give, in vLLM's shapes."""

from typing import Annotated

from pydantic import BaseModel, FailFast, Field

from .schemas import Strict


class TokenizeRequest(Strict):
    """The body of `POST /tokenize`."""

    model: str | None = Field(None, description="A name that /v1/models lists; nothing depends on it.")
    prompt: str = Field(description="A text of any length. The name of a special id, and nothing else, is that id.")
    add_special_tokens: bool = Field(True, description="Begin with the begin-of-sequence id.")
    return_token_strs: bool = Field(False, description="Also return the ids' names.")


class Tokenized(BaseModel):
    """The answer."""

    count: int
    max_model_len: int = Field(description="Most ids of a sequence.")
    tokens: list[int]
    token_strs: list[str] | None = Field(description="null unless asked for.")


class DetokenizeRequest(Strict):
    """The body of `POST /detokenize`."""

    model: str | None = Field(None, description="A name that /v1/models lists; nothing depends on it.")
    # A list may be wrong in a million places; one error is enough.
    tokens: Annotated[list[int], FailFast()] = Field(description="Token ids.")


class Detokenized(BaseModel):
    """The answer."""

    prompt: str = Field(description="Bytes that are not UTF-8 become U+FFFD, special ids their names.")


class TokenizerInfo(BaseModel):
    """What tokenizer_config.json of `fastblt tokenizer` says, and the longest sequence."""

    tokenizer_class: str
    bos_token: str
    eos_token: str
    pad_token: str
    add_bos_token: bool = Field(description="Whether a prompt begins with begin-of-sequence unless told otherwise.")
    split_special_tokens: bool = Field(description="Whether names of special ids within a text are just text.")
    clean_up_tokenization_spaces: bool
    model_max_length: int
