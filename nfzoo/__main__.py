"""`python -m nfzoo` is the `nfzoo` command."""

import sys

from nfzoo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
