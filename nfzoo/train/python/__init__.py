"""Training from a Python program: `nfzoo.fit`, its data sets and its callbacks."""
