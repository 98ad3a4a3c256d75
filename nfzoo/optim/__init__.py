"""Clipping and optimizers: pure transforms over parameter dictionaries, and torch optimizers over them."""
