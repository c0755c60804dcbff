"""Encode metrics for a scrape, in a format that its client accepts."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

OPENMETRICS = "application/openmetrics-text"


def encode_metrics(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Return the metrics and their media type: OpenMetrics if the header `Accept` lists it, else Prometheus' format.

    Only the names of the formats are read: the library raises an error for a version that it cannot parse, and labels
    its response with any other one.
    """
    encode, media_type = choose_encoder(OPENMETRICS if OPENMETRICS in accept.lower() else "")
    return encode(registry), media_type
