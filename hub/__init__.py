"""Models by name: from the zoo, from a Hub repository, from disk."""

from nfzoo.hub.load import from_pretrained

__all__ = ["from_pretrained"]
