"""``python -m vft``: the ``vft`` command."""

import sys

from .cli import main

sys.exit(main())
