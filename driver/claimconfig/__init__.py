"""Claim configuration: strict decoding of NetworkDeviceConfig, and merging it for one device.

Invariant: pure. What goes in is text from the API server, what comes out is driver.model's NicConfig or
a ConfigError with every problem and its field path.
"""

from driver.claimconfig.resolve import DEFAULT_LIMITS, ClaimLimits, check_together, resolve
from driver.claimconfig.sections import (
    API_VERSION,
    FIELDS,
    GUARDED_FIELDS,
    KIND,
    FieldPath,
    MtuBounds,
    decode,
    decode_tree,
    json_schema,
)
from driver.claimconfig.traffic import RATE

__all__ = [
    "API_VERSION",
    "DEFAULT_LIMITS",
    "FIELDS",
    "GUARDED_FIELDS",
    "KIND",
    "RATE",
    "ClaimLimits",
    "FieldPath",
    "MtuBounds",
    "check_together",
    "decode",
    "decode_tree",
    "json_schema",
    "resolve",
]
