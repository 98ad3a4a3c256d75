"""Write and read model folders and the state of runs; each file appears whole or not at all."""
