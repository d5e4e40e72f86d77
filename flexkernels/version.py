"""The version of the distribution: pyproject.toml, setup.py and the C++ build read it here."""

__version__ = "0.1.0"
