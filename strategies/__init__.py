"""The server side of the methods: one file a method, each a Flower strategy."""

from strategies.creff import CReFF
from strategies.ditto import Ditto
from strategies.fedavg import FedAvg
from strategies.fedbabu import FedBABU
from strategies.fedbn import FedBN
from strategies.fedetf import FedETF
from strategies.fedlabel import FedLabel
from strategies.fedlabel_fedloge import FedLabelFedLoGe
from strategies.fedloge import FedLoGe
from strategies.fedper import FedPer
from strategies.fedprox import FedProx
from strategies.fedrep import FedRep
from strategies.fedrod import FedRoD
from strategies.fixmatch import FixMatch
from strategies.scaffold import Scaffold

__all__ = [
    "CReFF",
    "Ditto",
    "FedAvg",
    "FedBABU",
    "FedBN",
    "FedETF",
    "FedLabel",
    "FedLabelFedLoGe",
    "FedLoGe",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedRoD",
    "FixMatch",
    "Scaffold",
]
