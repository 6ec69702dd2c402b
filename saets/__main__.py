"""`python -m saets`."""

import sys

from saets.cli import main

sys.exit(main())
