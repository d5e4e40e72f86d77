"""Tokens of data sets: rows in and out for any engine, shards, and what other trainers read; see docs/data.md."""

from .decoder import Decoder
from .encoder import Encoder

__all__ = ["Decoder", "Encoder"]
