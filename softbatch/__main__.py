"""`python -m softbatch` is the `softbatch` command."""

import sys

from softbatch.server.cli.main import main

sys.exit(main())
