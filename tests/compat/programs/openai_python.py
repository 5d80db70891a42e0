"""OpenAI's Python client, versions 1 and 3."""

import asyncio
import json
import sys

from openai import APIStatusError, APITimeoutError, AsyncOpenAI, OpenAI

OPTIONS = {"base_url": "http://127.0.0.1:8000/v1", "api_key": "the-key-of-your-server"}
client = OpenAI(**OPTIONS)
asked = json.load(sys.stdin)


def tell(name, result):
    print(json.dumps([name, result]), flush=True)


def failure(call):
    """The exception that a call raises."""
    try:
        call()
    except APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.param]
    except APITimeoutError as error:
        return [type(error).__name__]
    return None


def answers():
    tell("whole", client.completions.create(**asked).to_dict())
    several = client.completions.create(**asked, n=2, logprobs=2, echo=True, stop=["\n\n", "return"])
    tell("several", several.to_dict()["choices"])
    text, usage = "", None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    tell("stream", [text, usage.to_dict()])
    with client.completions.create(**asked, stream=True) as stream:
        tell("stream left early", bool(next(iter(stream)).choices))
    drafted = client.completions.create(**asked, extra_body={"decoder": "blt-s", "draft_length": 4})
    tell("extension", [drafted.choices[0].text, drafted.usage.fastblt["decoder"]])
    raw = client.completions.with_raw_response.create(**asked, extra_headers={"x-request-id": "a-request"})
    tell("headers", [raw.headers["x-request-id"], raw.parse().choices[0].text])
    tell("models", [model.id for model in client.models.list()])
    tell("model", client.models.retrieve("nano:blt-s").id)
    asyncio.run(asynchronous())


async def asynchronous():
    async with AsyncOpenAI(**OPTIONS) as several:
        wholes = await asyncio.gather(*(several.completions.create(**asked | {"seed": seed}) for seed in range(4)))
        tell("async", [whole.choices[0].text for whole in wholes])
        stream = await several.completions.create(**asked, stream=True)
        tell("async stream", "".join([chunk.choices[0].text async for chunk in stream]))
        try:
            await several.completions.create(model="gpt", prompt="a")
        except APIStatusError as error:
            tell("async error", [type(error).__name__, error.status_code, error.code, error.param])


def errors():
    tell("bad key", failure(lambda: OpenAI(**OPTIONS | {"api_key": "wrong"}).completions.create(**asked)))
    tell("bad value", failure(lambda: client.completions.create(**asked | {"max_tokens": -1})))
    tell("unknown field", failure(lambda: client.completions.create(**asked, extra_body={"nope": 1})))
    tell("unknown model", failure(lambda: client.completions.create(**asked | {"model": "gpt"})))
    tell("bad value, streamed", failure(lambda: client.completions.create(**asked | {"top_p": 2}, stream=True)))
    hasty = client.with_options(timeout=0.2, max_retries=0)
    tell("timeout", failure(lambda: hasty.completions.create(**asked | {"max_tokens": 8000}, n=16)))


def busy():
    tell("refused", failure(lambda: client.with_options(max_retries=0).completions.create(**asked)))
    tell("retried", client.with_options(max_retries=5).completions.create(**asked).choices[0].text)


def draining():
    tell("refused", failure(lambda: client.with_options(max_retries=0).completions.create(**asked)))


{"answers": answers, "errors": errors, "busy": busy, "draining": draining}[sys.argv[1]]()
