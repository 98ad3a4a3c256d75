"""Look inside models and runs: signal propagation, numbers that are not finite, pictures."""
