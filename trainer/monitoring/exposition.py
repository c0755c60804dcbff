"""Encode metrics for a scrape by Prometheus, in a format that the client accepts."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

OPENMETRICS = "application/openmetrics-text"  # media type


def encode_metrics(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Encode the metrics of a registry for a client.

    The format is OpenMetrics if `accept`, the header `Accept` of the request, lists it, else the Prometheus text
    format. Format versions in the header are ignored, because prometheus_client raises an error for a version that it
    cannot parse, and copies any other version into the media type.

    Returns:
        The encoded metrics, and their media type for the header `Content-Type`.
    """
    encode, media_type = choose_encoder(OPENMETRICS if OPENMETRICS in accept.lower() else "")
    return encode(registry), media_type
