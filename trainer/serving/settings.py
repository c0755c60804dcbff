"""Settings of `python -m trainer.serve`: `key=value` arguments, validated like the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from trainer.config.base import InvalidValue, Section, translate_validation_error


class Settings(Section):
    """The settings of a server; docs/serving.md describes them."""

    model: str = Field(min_length=1)
    """output_dir of a run, its export, or a folder of SavedModel versions; also in a bucket."""
    host: str = "127.0.0.1"
    """0.0.0.0 (or :: for IPv6 as well) is reachable from other machines."""
    port: int = Field(8501, ge=0, le=65535)
    """0: any free port."""
    poll: float = Field(30.0, ge=0, le=86400)
    """Seconds between two checks for a newer version of the model; 0: none."""
    name: str = Field("kubetune", pattern=r"^[A-Za-z0-9._-]+$")
    """In /v1/models/NAME:predict."""
    batch: int = Field(32, ge=1, le=1024)
    """Maximum number of images per call of the model."""
    window_ms: float = Field(2.0, ge=0, le=1000)
    """How long an image waits for others while the model is idle."""
    queue: int = Field(256, ge=1, le=10**6)
    """Maximum number of waiting images; requests that exceed it get 503."""
    max_bytes: int = Field(16 * 1024**2, ge=1024, le=2**40)
    """Maximum bytes per request; all requests in progress together have 8 times as many."""
    max_pixels: int = Field(50_000_000, ge=1, le=10**10)
    """Maximum pixels per image, and per call of the model."""
    max_images: int = Field(64, ge=1, le=10**6)
    """Maximum images per request."""
    log: str | None = None
    """File (*.jsonl) to which one JSON line per prediction is appended, or folder of parts; also in a bucket."""
    log_seconds: float = Field(60.0, ge=0.1, le=86400)
    """Seconds that one part of the log is for."""
    log_sample: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Fraction of the predictions that is logged."""
    linger: float = Field(2.0, ge=0, le=600)
    """Seconds after SIGTERM in which new requests are accepted."""
    drain: float = Field(30.0, gt=0, le=3600)
    """Seconds after that in which accepted requests are completed."""
    cache_dir: Annotated[str, BeforeValidator(lambda value: value or None)] = "~/.cache/kubetune"
    """Folder to which exports in a bucket are copied; $KUBETUNE_CACHE replaces the default."""

    @model_validator(mode="after")
    def _check_that_a_request_fits_the_queue(self) -> Settings:
        if self.max_images > self.queue:
            problem = f"exceeds queue={self.queue}: a request with so many images would always get 503"
            fix = f"use at most {self.queue}, or a larger queue"
            raise InvalidValue(problem, key="max_images", value=self.max_images, fix=fix)
        return self


def batch_sizes(max_batch: int) -> list[int]:
    """Return the sizes that batches are padded to: powers of two up to the first that is at least `max_batch`."""
    return [2**power for power in range((max_batch - 1).bit_length() + 1)]


def parse_settings(values: Mapping[str, str], cache_dir: str | None = None) -> Settings:
    """Validate the arguments; `cache_dir` replaces the default of that setting. Raises ConfigError with all faults."""
    tree = ({"cache_dir": cache_dir} if cache_dir else {}) | dict(values)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise translate_validation_error(error, Settings, tree) from None
