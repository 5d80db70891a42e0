"""LiteLLM's text_completion, as provider `text-completion-openai` and as `hosted_vllm`."""

import asyncio
import json
import sys

import litellm
from litellm import atext_completion, text_completion

asked = json.load(sys.stdin)
server = {"api_base": "http://127.0.0.1:8000/v1", "api_key": "the-key-of-your-server", "max_retries": 0}
asked["model"] = f"text-completion-openai/{asked['model']}"


def tell(name, result):
    print(json.dumps([name, result]), flush=True)


def failure(**changes):
    try:
        text_completion(**server | asked | changes)
    except litellm.exceptions.Timeout as error:
        return [type(error).__name__]
    except litellm.exceptions.APIError as error:
        return [type(error).__name__, error.status_code]
    except Exception as error:
        return [type(error).__name__, getattr(error, "status_code", None)]
    return None


def answers():
    whole = text_completion(**server, **asked)
    tell("whole", [whole.choices[0].text, whole.usage.completion_tokens])
    several = text_completion(**server, **asked, n=2, logprobs=2, stop=["\n\n", "return"])
    tell("several", [choice.text for choice in several.choices])
    chunks = text_completion(**server, **asked, stream=True)
    tell("stream", "".join(chunk.choices[0].text or "" for chunk in chunks))
    vllm = asked | {"model": "hosted_vllm/nano"}
    tell("hosted_vllm", text_completion(**server, **vllm).choices[0].text)
    drafted = text_completion(**server, **asked, extra_body={"decoder": "blt-s"})
    tell("extension", drafted.choices[0].text)
    tell("async", asyncio.run(atext_completion(**server, **asked)).choices[0].text)


def errors():
    tell("bad key", failure(api_key="wrong"))
    tell("bad value", failure(max_tokens=-1))
    tell("unknown field", failure(extra_body={"nope": 1}))
    tell("unknown model", failure(model="text-completion-openai/gpt"))
    tell("timeout", failure(max_tokens=8000, n=16, timeout=0.2))


def busy():
    tell("refused", failure())
    tell("retried", text_completion(**server | asked | {"max_retries": 5}).choices[0].text)


{"answers": answers, "errors": errors, "busy": busy}[sys.argv[1]]()
