"""Packages that only some uses need (video files, pictures, progress bars), imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


class Deferred:
    """Stands for a module; an attribute of it imports the module, or raises ImportError saying what to install."""

    def __init__(self, module: str, use: str, package: str) -> None:
        self._module, self._message = module, f"{use} needs {module.partition('.')[0]}: pip install {package}"

    def __getattr__(self, name: str) -> Any:
        # what inspects any object asks for these
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            module = import_module(self._module)
        except ImportError as error:
            raise ImportError(self._message) from error
        return getattr(module, name)


if TYPE_CHECKING:
    import av
else:
    av = Deferred("av", "reading or writing a video file", "av")
Image = Deferred("PIL.Image", "a picture", "pillow")
ImageDraw = Deferred("PIL.ImageDraw", "a picture", "pillow")
ImageFont = Deferred("PIL.ImageFont", "a picture", "pillow")
