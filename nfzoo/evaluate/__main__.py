"""`python -m nfzoo.evaluate` and `accelerate launch -m nfzoo.evaluate`."""

import sys

from nfzoo.evaluate.run import main

if __name__ == "__main__":
    sys.exit(main())
