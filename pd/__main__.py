"""`python -m pd` is `pd`."""

import sys

from pd.cli import main

if __name__ == "__main__":
    sys.exit(main())
