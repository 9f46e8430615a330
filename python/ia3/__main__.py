"""`python -m ia3` is `ia3`."""

import sys

from .cli.app import main

sys.exit(main())
