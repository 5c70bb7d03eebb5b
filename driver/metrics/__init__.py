"""What monitoring sees of this node: the metrics, and the small HTTP server that shows them."""

from driver.metrics.exposition import ScrapeFailed
from driver.metrics.registry import Metrics, PodSamples
from driver.metrics.server import CONTENT_TYPE, MetricsServer, MetricsUnavailable
from driver.model import PodSample

__all__ = [
    "CONTENT_TYPE",
    "Metrics",
    "MetricsServer",
    "MetricsUnavailable",
    "PodSample",
    "PodSamples",
    "ScrapeFailed",
]
