"""Write models for other runtimes, and compile them for devices that are not here."""
