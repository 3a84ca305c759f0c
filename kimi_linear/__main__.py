"""`python -m kimi_linear` is the command `kimi-linear`."""

import sys

from .cli import main

sys.exit(main())
