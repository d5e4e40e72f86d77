"""Tokens of data sets: rows in and out for any engine, shards, and what other trainers read; see docs/data.md."""

from .dataset import TokenDataset, TokenStream
from .decoder import Decoder
from .encoder import Encoder
from .shards import open_shard, write_shard

__all__ = ["Decoder", "Encoder", "TokenDataset", "TokenStream", "open_shard", "write_shard"]
