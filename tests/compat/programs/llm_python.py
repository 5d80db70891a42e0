"""llm's Python API, with the server in its file of further models."""

import json
import os
import sys
from pathlib import Path

folder = Path.home() / "llm"
os.environ["LLM_USER_PATH"] = str(folder)
folder.mkdir(exist_ok=True)
(folder / "keys.json").write_text('{"fastblt": "the-key-of-your-server", "wrong": "wrong"}')
server = {"api_base": "http://127.0.0.1:8000/v1", "completion": True}
models = [
    server | {"model_id": "mine", "model_name": "nano", "api_key_name": "fastblt"},
    server | {"model_id": "missing", "model_name": "gpt", "api_key_name": "fastblt"},
    server | {"model_id": "locked", "model_name": "nano", "api_key_name": "wrong"},
]
# JSON is YAML, too.
(folder / "extra-openai-models.yaml").write_text(json.dumps(models))

import llm  # noqa: E402

asked = json.load(sys.stdin)
prompt = asked.pop("prompt")
del asked["model"]
model = llm.get_model("mine")


def tell(name, result):
    print(json.dumps([name, result]), flush=True)


def failure(name="mine", **changes):
    try:
        llm.get_model(name).prompt(prompt, stream=False, **asked | changes).text()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def answers():
    tell("whole", model.prompt(prompt, stream=False, **asked).text())
    tell("stop", model.prompt(prompt, stream=False, **asked, stop="return").text())
    tell("stream", "".join(model.prompt(prompt, **asked)))
    scored = model.prompt(prompt, **asked, logprobs=2)
    tell("logprobs", [scored.text(), len(scored.response_json["logprobs"])])


def errors():
    tell("bad key", failure("locked"))
    tell("bad value", failure(max_tokens=100000))
    tell("unknown model", failure("missing"))


{"answers": answers, "errors": errors}[sys.argv[1]]()
