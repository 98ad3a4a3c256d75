"""`python -m nfzoo.train` and `accelerate launch -m nfzoo.train`."""

import sys

from nfzoo.train.run import run

if __name__ == "__main__":
    sys.exit(run())
