"""`python -m fastgpt` is `fastgpt`."""

import sys

from .cli import main

sys.exit(main())
