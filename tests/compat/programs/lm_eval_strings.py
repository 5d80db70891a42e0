"""lm-eval's command with one more model: `local-completions` whose string prompts ask for no begin-of-sequence."""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI

NAME = "completions-of-bare-strings"


@register_model(NAME)
class BareStrings(LocalCompletionsAPI):
    """lm-eval counts the tokens of a string without begin-of-sequence, and has no setting that tells the server so."""

    def _create_payload(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*arguments, **options)
        return payload | {"add_special_tokens": False}


if __name__ == "__main__":
    cli_evaluate()
