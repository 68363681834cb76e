"""KV-cache compression that reads keys as signals."""

__version__ = "0.1.0"
