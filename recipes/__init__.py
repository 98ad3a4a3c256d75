"""Training recipes as YAML files, for `nfzoo train --recipe NAME`."""
