"""The plans of the three families."""
