"""`python -m nfzoo.train` and `accelerate launch -m nfzoo.train`."""

import sys

from nfzoo.train.run import main

if __name__ == "__main__":
    sys.exit(main())
