"""The one table of public weights: zoo name -> repository on the Hub."""

from __future__ import annotations

from typing import Literal, NamedTuple

Layout = Literal["nfzoo", "timm"]


class Repository(NamedTuple):
    """A repository of weights on the Hub.

    Attributes:
        repo_id: `organisation/name` on the Hub.
        revision: a branch, tag or commit.
        layout: whose `config.json` it holds; `None` if only the download tells.
        sha256: of the weight file, where it is known in advance. Without it a download is checked against the sha256
            that the Hub itself states.
    """

    repo_id: str
    revision: str = "main"
    layout: Layout | None = None
    sha256: str | None = None


def _timm(name: str) -> Repository:
    return Repository(f"timm/{name}", layout="timm")


# timm's repositories, as its models/nfnet.py names them. The dm_ ones hold DeepMind's own weights, published with
# arXiv 2102.06171; the others are timm's training. Their commits and checksums were not at hand here, so the main
# branch is named, and a download is checked against the checksum that the Hub states.
PUBLIC: dict[str, Repository] = {
    **{f"nfnet-f{n}": _timm(f"dm_nfnet_f{n}.dm_in1k") for n in range(7)},
    "nfnet-l0": _timm("nfnet_l0.ra2_in1k"),
    "eca-nfnet-l0": _timm("eca_nfnet_l0.ra2_in1k"),
    "eca-nfnet-l1": _timm("eca_nfnet_l1.ra2_in1k"),
    "eca-nfnet-l2": _timm("eca_nfnet_l2.ra3_in1k"),
    "timm-nf-resnet-50": _timm("nf_resnet50.ra2_in1k"),
    "timm-nf-regnet-b1": _timm("nf_regnet_b1.ra2_in1k"),
}
