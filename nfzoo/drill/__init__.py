"""Whether runs survive what ends them: training under faults that are injected into system calls."""
