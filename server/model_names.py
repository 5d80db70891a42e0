"""The names under which a model is offered: its own, and one alias per decoder."""

from engine.config import ModelLimits
from engine.types import DecoderName

from .errors import ApiError
from .settings import ServerSettings

DEFAULT_DECODER: DecoderName = "blt"


def offered_models(settings: ServerSettings, limits: ModelLimits) -> dict[str, DecoderName | None]:
    """`nano`, `nano:blt` and so on, each with the decoder that it stands for."""
    offered: dict[str, DecoderName | None] = {}
    for name in settings.served_model_name or [limits.name]:
        offered[name] = None
        offered |= {f"{name}:{decoder}": decoder for decoder in limits.decoders}
    return offered


def default_model(settings: ServerSettings, limits: ModelLimits) -> str:
    """The model's name if a request names none."""
    return settings.served_model_name[0] if settings.served_model_name else limits.name


def check_model(name: str, settings: ServerSettings, limits: ModelLimits) -> DecoderName | None:
    """The decoder that the name implies, if any. Raises ApiError 404 for an unknown model."""
    offered = offered_models(settings, limits)
    if name not in offered:
        message = f"the model {name[:100]!r} does not exist; offered: {', '.join(offered)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return offered[name]


def choose_decoder(
    model: str, decoder: DecoderName | None, settings: ServerSettings, limits: ModelLimits
) -> DecoderName:
    """The decoder chosen by the model's name and the decoder field. Raises ApiError if they conflict."""
    alias = check_model(model, settings, limits)
    if alias and decoder and alias != decoder:
        message = f"decoder: must be {alias!r} or left out with the model {model!r}, not {decoder!r}"
        raise ApiError(400, message, param="decoder")
    return alias or decoder or DEFAULT_DECODER
