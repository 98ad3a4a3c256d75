"""`python -m nfzoo.tuner` and `accelerate launch -m nfzoo.tuner`: `nfzoo find-lr` in one process and in several."""

import sys

from nfzoo.tuner.run import main

if __name__ == "__main__":
    sys.exit(main())
