"""VideoFlexTok on flexkernels: a video tokenizer whose every token prefix is a valid, coarser video."""

from flexkernels import APG, CFG, __version__

from .checkpoint import CheckpointError
from .config import ConfigError, GeneratorConfig, TokenizerConfig
from .generator import Generator, time_first
from .tokenizer import Tokenizer
from .tokens import TokensError, VideoTokens
from .video import VideoError

__all__ = [
    "APG",
    "CFG",
    "CheckpointError",
    "ConfigError",
    "Generator",
    "GeneratorConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TokensError",
    "VideoError",
    "VideoTokens",
    "__version__",
    "time_first",
]
