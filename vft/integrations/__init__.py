"""Published tokenizers and generators, computed by the vft engine over their own weights.

Each module here is announced as an entry point of the group "flexkernels.integrations" in pyproject.toml, by which
:func:`flexkernels.accelerate` finds it; see :mod:`flexkernels.integrations` for what such a module has.
"""
