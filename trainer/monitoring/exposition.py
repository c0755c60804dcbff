"""Encode metrics for a scrape, in a format that the client accepts."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

OPENMETRICS = "application/openmetrics-text"


def encode_metrics(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Encode the metrics as OpenMetrics if the header `Accept` lists it, else in the Prometheus text format.

    Returns the content and its media type. Format versions in the header are ignored: prometheus_client raises an error
    for a version that it cannot parse, and copies any other version into the media type.
    """
    encode, media_type = choose_encoder(OPENMETRICS if OPENMETRICS in accept.lower() else "")
    return encode(registry), media_type
