"""Run on devices and processes: what differs between them, compilation, and what programs share."""
