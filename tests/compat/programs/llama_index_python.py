"""LlamaIndex's `OpenAILike`, for a model that does not chat."""

import asyncio
import json
import sys

import openai
from llama_index.llms.openai_like import OpenAILike

asked = json.load(sys.stdin)
prompt, seed = asked.pop("prompt"), asked.pop("seed")
options = {
    "api_base": "http://127.0.0.1:8000/v1",
    "api_key": "the-key-of-your-server",
    "is_chat_model": False,
    "context_window": 8192,
    "max_retries": 0,
    "additional_kwargs": {"seed": seed},
    **asked,
}


def tell(name, result):
    print(json.dumps([name, result]), flush=True)


def failure(**changes):
    try:
        OpenAILike(**options | changes).complete(prompt)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code]
    except openai.APITimeoutError as error:
        return [type(error).__name__]
    return None


def answers():
    llm = OpenAILike(**options)
    tell("whole", llm.complete(prompt).text)
    tell("stop", llm.complete(prompt, stop=["\n\n", "return"]).text)
    *_, last = llm.stream_complete(prompt)
    tell("stream", last.text)
    tell("extension", llm.complete(prompt, extra_body={"decoder": "blt-s"}).text)
    tell("async", asyncio.run(llm.acomplete(prompt)).text)


def errors():
    tell("bad key", failure(api_key="wrong"))
    tell("bad value", failure(additional_kwargs={"top_p": 2}))
    tell("unknown field", failure(additional_kwargs={"extra_body": {"nope": 1}}))
    tell("unknown model", failure(model="gpt"))
    tell("timeout", failure(max_tokens=8000, timeout=0.2))


def busy():
    tell("refused", failure())
    tell("retried", OpenAILike(**options | {"max_retries": 5}).complete(prompt).text)


{"answers": answers, "errors": errors, "busy": busy}[sys.argv[1]]()
