"""Settings of `python -m trainer.relay`: `key=value` arguments, validated like those of `trainer.serve`."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError

from trainer.config.base import Address, Section, translate_validation_error


class RelaySettings(Section):
    """The relay's settings; docs/serving.md describes them."""

    model: Address = Field(min_length=1)
    """Folder of the versions of the model: --model_base_path of TensorFlow Serving, local or in a bucket."""
    log: Address = Field(min_length=1)
    """Prediction log, one JSON line per prediction: a local file (*.jsonl), or a folder of parts, also in a bucket."""
    upstream: str = Field("http://127.0.0.1:8501", pattern=r"^http://[^/?#\s]+$")
    """HTTP address of TensorFlow Serving's REST API."""
    name: str = Field("kubetune", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the model: --model_name of TensorFlow Serving."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 (or :: for IPv6 as well) is reachable from other machines."""
    port: int = Field(8502, ge=0, le=65535)
    """Port to listen on; 0 chooses any free port."""
    poll: float = Field(5.0, gt=0, le=3600)
    """Seconds between two checks for the newest version that TensorFlow Serving has loaded."""
    timeout: float = Field(60.0, gt=0, le=3600)
    """Seconds that TensorFlow Serving may take for a response."""
    max_bytes: int = Field(16 * 1024**2, ge=1024, le=2**40)
    """Maximum bytes of the body of a request; all requests in progress together may have 8 times as many."""
    connections: int = Field(64, ge=1, le=4096)
    """Maximum number of requests that are forwarded at the same time."""
    log_seconds: float = Field(60.0, ge=0.1, le=86400)
    """Maximum seconds of predictions in a part of the log."""
    log_sample: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Fraction of the predictions that is logged."""
    linger: float = Field(2.0, ge=0, le=600)
    """Seconds after SIGTERM or SIGINT in which new requests are still accepted."""
    drain: float = Field(30.0, gt=0, le=3600)
    """Seconds after `linger` in which accepted requests are completed."""


def parse_settings(values: Mapping[str, str]) -> RelaySettings:
    """Validate the arguments of `python -m trainer.relay`. Raises ConfigError, with all errors in the values."""
    tree = dict(values)
    try:
        return RelaySettings.model_validate(tree)
    except ValidationError as error:
        raise translate_validation_error(error, RelaySettings, tree) from None
