"""Encode Prometheus metrics in a format that the client accepts."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

OPENMETRICS = "application/openmetrics-text"  # media type


def encode_metrics(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Encode a registry's metrics as OpenMetrics or in the Prometheus text format.

    OpenMetrics is used if `accept`, the request's `Accept` header, lists it. Format versions in the header are ignored,
    because prometheus_client raises an error for a version that it cannot parse, and copies any other version into the
    media type.

    Returns:
        The encoded metrics, and their media type for the `Content-Type` header.
    """
    encode, media_type = choose_encoder(OPENMETRICS if OPENMETRICS in accept.lower() else "")
    return encode(registry), media_type
