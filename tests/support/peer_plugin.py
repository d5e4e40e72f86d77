"""A pytest plugin (-p peer_plugin) under which a peer's own suite runs on these kernels, and says how often it did."""

import flexkernels

served = 0


def counted(call, kept):
    """The call, counted where ``kept`` says that these kernels did it."""

    def counting(*args, **options):
        global served
        result = call(*args, **options)
        served += kept(result)
        return result

    return counting


def pytest_configure(config):
    try:
        import torchdiffeq

        from flexkernels.integrations import torchdiffeq as ours

        ours._served = counted(ours._served, bool)
        torchdiffeq.odeint = ours.odeint
    except ImportError:
        pass
    try:
        import vector_quantize_pytorch

        fsq = vector_quantize_pytorch.FSQ
        original = fsq.__init__

        def accelerated(self, *args, **settings):
            original(self, *args, **settings)
            flexkernels.accelerate(self)
            # an FSQ that is beyond the kernels keeps its own
            if "forward" in vars(self):
                self.forward = counted(self.forward, lambda _: True)

        fsq.__init__ = accelerated
    except ImportError:
        pass


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"flexkernels served {served} calls")
