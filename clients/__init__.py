"""The client side of the methods: one file where local training differs from plain SGD."""

from clients.creff import CReFF
from clients.ditto import Ditto
from clients.fedbabu import FedBABU
from clients.fedbn import FedBN
from clients.fedetf import FedETF
from clients.fedlabel import FedLabel
from clients.fedlabel_fedloge import FedLabelFedLoGe
from clients.fedloge import FedLoGe
from clients.fedper import FedPer
from clients.fedprox import FedProx
from clients.fedrep import FedRep
from clients.fedrod import FedRoD
from clients.fixmatch import FixMatchGlobal, FixMatchLocal
from clients.scaffold import Scaffold

__all__ = [
    "CReFF",
    "Ditto",
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
    "FixMatchGlobal",
    "FixMatchLocal",
    "Scaffold",
]
