"""Models by name: from the zoo, from a Hub repository, from disk; and onto the Hub."""

from nfzoo.hub.pretrained import from_pretrained
from nfzoo.hub.publish import push

__all__ = ["from_pretrained", "push"]
