"""A pytest plugin (-p peer_plugin) under which a peer's own suite runs on these kernels."""

import flexkernels


def pytest_configure(config):
    try:
        import torchdiffeq

        from flexkernels.integrations.torchdiffeq import odeint

        torchdiffeq.odeint = odeint
    except ImportError:
        pass
    try:
        import vector_quantize_pytorch

        fsq = vector_quantize_pytorch.FSQ
        original = fsq.__init__

        def accelerated(self, *args, **settings):
            original(self, *args, **settings)
            flexkernels.accelerate(self)

        fsq.__init__ = accelerated
    except ImportError:
        pass
