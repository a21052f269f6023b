"""`python -m entcov`."""

import sys

from entcov.cli import main

sys.exit(main())
