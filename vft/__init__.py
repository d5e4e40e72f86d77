"""VideoFlexTok on flexkernels: a video tokenizer whose every token prefix is a valid, coarser video.

What stands here is imported when it is first asked for, so that ``import vft`` and the ``vft`` command's help need
neither torch nor its seconds.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

# for editors and type checkers; the same as _HOMES
if TYPE_CHECKING:
    from flexkernels import APG as APG
    from flexkernels import CFG as CFG
    from flexkernels.version import __version__ as __version__

    from .checkpoint import CheckpointError as CheckpointError
    from .config import ConfigError as ConfigError
    from .config import GeneratorConfig as GeneratorConfig
    from .config import TokenizerConfig as TokenizerConfig
    from .generator import Generator as Generator
    from .generator import time_first as time_first
    from .tokenizer import Tokenizer as Tokenizer
    from .tokens import TokensError as TokensError
    from .tokens import VideoTokens as VideoTokens
    from .video import VideoError as VideoError

_HOMES = {
    "APG": "flexkernels",
    "CFG": "flexkernels",
    "CheckpointError": "vft.checkpoint",
    "ConfigError": "vft.config",
    "Generator": "vft.generator",
    "GeneratorConfig": "vft.config",
    "Tokenizer": "vft.tokenizer",
    "TokenizerConfig": "vft.config",
    "TokensError": "vft.tokens",
    "VideoError": "vft.video",
    "VideoTokens": "vft.tokens",
    "__version__": "flexkernels.version",
    "time_first": "vft.generator",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value
    # vft.solver and the like, without an import of their own
    if not name.startswith("_") and find_spec(f"vft.{name}"):
        return import_module(f"vft.{name}")
    raise AttributeError(f"module 'vft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
