"""The `nfzoo` command."""
