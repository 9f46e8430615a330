"""`python -m ia3` is `ia3`."""

import sys

from .cli import main

sys.exit(main())
