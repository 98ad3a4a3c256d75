"""Find what is wrong with a data set before a network is trained on it."""
