"""Load models by name from the zoo, a Hub repository or the disk, and publish them on the Hub."""

from nfzoo.hub.pretrained import from_pretrained
from nfzoo.hub.publish import push

__all__ = ["from_pretrained", "push"]
