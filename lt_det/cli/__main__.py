"""``python -m lt_det.cli``: the console command where its script is not on the path."""

import sys

from lt_det.cli import main

if __name__ == "__main__":
    sys.exit(main())
