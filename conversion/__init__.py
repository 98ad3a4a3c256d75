"""Weights of other frameworks, read into nfzoo and written back. Imported as `nfzoo.conversion`."""
