"""Settings of `python -m trainer.relay`: `key=value` arguments, validated like those of `trainer.serve`."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError

from trainer.config.base import Address, Section, translate_validation_error


class RelaySettings(Section):
    """The settings of a relay; docs/serving.md describes them."""

    model: Address = Field(min_length=1)
    """Folder of the versions that TensorFlow Serving reads (its --model_base_path), local or in a bucket."""
    log: Address = Field(min_length=1)
    """File (*.jsonl) or folder of parts to which one JSON line per prediction is written; also in a bucket."""
    upstream: str = Field("http://127.0.0.1:8501", pattern=r"^http://[^/?#\s]+$")
    """REST address of TensorFlow Serving."""
    name: str = Field("kubetune", pattern=r"^[A-Za-z0-9._-]+$")
    """Its --model_name."""
    host: str = "127.0.0.1"
    """0.0.0.0 (or :: for IPv6 as well) is reachable from other machines."""
    port: int = Field(8502, ge=0, le=65535)
    """0: any free port."""
    poll: float = Field(5.0, gt=0, le=3600)
    """Seconds between two requests for the newest loaded version."""
    timeout: float = Field(60.0, gt=0, le=3600)
    """Seconds that TensorFlow Serving may take for a response."""
    max_bytes: int = Field(16 * 1024**2, ge=1024, le=2**40)
    """Maximum bytes per request; all requests in progress together have 8 times as many."""
    connections: int = Field(64, ge=1, le=4096)
    """Maximum number of requests that are forwarded at the same time."""
    log_seconds: float = Field(60.0, ge=0.1, le=86400)
    """Seconds that one part of the log is for."""
    log_sample: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Fraction of the predictions that is logged."""
    linger: float = Field(2.0, ge=0, le=600)
    """Seconds after SIGTERM in which new requests are accepted."""
    drain: float = Field(30.0, gt=0, le=3600)
    """Seconds after that in which accepted requests are completed."""


def parse_settings(values: Mapping[str, str]) -> RelaySettings:
    """Validate the arguments. Raises ConfigError with all faults."""
    tree = dict(values)
    try:
        return RelaySettings.model_validate(tree)
    except ValidationError as error:
        raise translate_validation_error(error, RelaySettings, tree) from None
