"""LangChain's `OpenAI`, its class for completions."""

import asyncio
import json
import sys

import openai
from langchain_openai import OpenAI

asked = json.load(sys.stdin)
prompt = asked.pop("prompt")
options = {"base_url": "http://127.0.0.1:8000/v1", "api_key": "the-key-of-your-server", "max_retries": 0, **asked}


def tell(name, result):
    print(json.dumps([name, result]), flush=True)


def failure(**changes):
    try:
        OpenAI(**options | changes).invoke(prompt)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code]
    except openai.APITimeoutError as error:
        return [type(error).__name__]
    return None


def answers():
    llm = OpenAI(**options)
    tell("whole", llm.invoke(prompt))
    tell("stop", llm.invoke(prompt, stop=["\n\n", "return"]))
    tell("stream", "".join(llm.stream(prompt)))
    tell("batch", llm.batch([prompt, "def f("]))
    several = OpenAI(**options, n=2, best_of=2).generate([prompt, "def f("])
    tell("generate", [[choice.text for choice in choices] for choices in several.generations])
    tell("usage", several.llm_output["token_usage"]["completion_tokens"])
    tell("logprobs", OpenAI(**options, logprobs=2).generate([prompt]).generations[0][0].generation_info["logprobs"])
    tell("extension", OpenAI(**options, extra_body={"decoder": "blt-s"}).invoke(prompt))
    tell("async", asyncio.run(llm.ainvoke(prompt)))


def errors():
    tell("bad key", failure(api_key="wrong"))
    tell("bad value", failure(temperature=3))
    tell("unknown field", failure(extra_body={"nope": 1}))
    tell("unknown model", failure(model="gpt"))
    tell("timeout", failure(max_tokens=8000, timeout=0.2))


def busy():
    tell("refused", failure())
    tell("retried", OpenAI(**options | {"max_retries": 5}).invoke(prompt))


{"answers": answers, "errors": errors, "busy": busy}[sys.argv[1]]()
