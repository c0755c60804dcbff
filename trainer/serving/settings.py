"""Settings of `python -m trainer.serve`: `key=value` arguments, validated like the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from trainer.config.base import InvalidValue, Section, translate_validation_error


class Settings(Section):
    """The server's settings; docs/serving.md describes them."""

    model: str = Field(min_length=1)
    """output_dir of a run, its export, a folder of numbered SavedModels, or one of them; also in a bucket."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 (or :: for IPv6 as well) is reachable from other machines."""
    port: int = Field(8501, ge=0, le=65535)
    """Port to listen on; 0 chooses any free port."""
    poll: float = Field(30.0, ge=0, le=86400)
    """Seconds between two checks for a newer version of the model; 0 disables them."""
    name: str = Field("kubetune", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the model in the URL, as in /v1/models/NAME:predict."""
    batch: int = Field(32, ge=1, le=1024)
    """Maximum number of images per call of the model."""
    window_ms: float = Field(2.0, ge=0, le=1000)
    """Milliseconds for which an image waits for others while the model is idle."""
    queue: int = Field(256, ge=1, le=10**6)
    """Maximum number of waiting images; a request for which there is no room gets 503."""
    max_bytes: int = Field(16 * 1024**2, ge=1024, le=2**40)
    """Maximum bytes of the body of a request; all requests in progress together may have 8 times as many."""
    max_pixels: int = Field(50_000_000, ge=1, le=10**10)
    """Maximum pixels of an image, and of all images in a call of the model."""
    max_images: int = Field(64, ge=1, le=10**6)
    """Maximum images per request."""
    log: str | None = None
    """Prediction log, one JSON line per prediction: a local file (*.jsonl), or a folder of parts, also in a bucket."""
    log_seconds: float = Field(60.0, ge=0.1, le=86400)
    """Maximum seconds of predictions in a part of the log."""
    log_sample: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Fraction of the predictions that is logged."""
    linger: float = Field(2.0, ge=0, le=600)
    """Seconds after SIGTERM or SIGINT in which new requests are still accepted."""
    drain: float = Field(30.0, gt=0, le=3600)
    """Seconds after `linger` in which accepted requests are completed."""
    cache_dir: Annotated[str, BeforeValidator(lambda value: value or None)] = "~/.cache/kubetune"
    """Folder for local copies of exports in a bucket; $KUBETUNE_CACHE replaces the default."""

    @model_validator(mode="after")
    def _check_that_a_request_fits_the_queue(self) -> Settings:
        """Reject a limit of images per request that exceeds the queue."""
        if self.max_images > self.queue:
            problem = f"exceeds queue={self.queue}: a request with so many images would always get 503"
            fix = f"use at most {self.queue}, or a larger queue"
            raise InvalidValue(problem, key="max_images", value=self.max_images, fix=fix)
        return self


def list_batch_sizes(max_batch: int) -> list[int]:
    """Return the batch sizes for warm-up and padding: powers of two up to the first that is at least `max_batch`."""
    return [2**power for power in range((max_batch - 1).bit_length() + 1)]


def parse_settings(values: Mapping[str, str], cache_dir: str | None = None) -> Settings:
    """Validate the arguments of `python -m trainer.serve`. Raises ConfigError, with all errors in the values.

    `cache_dir` replaces the default of the setting `cache_dir`, unless it is None or "".
    """
    tree = ({"cache_dir": cache_dir} if cache_dir else {}) | dict(values)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise translate_validation_error(error, Settings, tree) from None
