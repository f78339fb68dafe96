"""The client side of the methods: one file where local training differs from plain SGD."""

from clients.fedlabel import FedLabel
from clients.fedlabel_fedloge import FedLabelFedLoGe
from clients.fedloge import FedLoGe
from clients.fedprox import FedProx
from clients.fixmatch import FixMatchGlobal, FixMatchLocal

__all__ = ["FedLabel", "FedLabelFedLoGe", "FedLoGe", "FedProx", "FixMatchGlobal", "FixMatchLocal"]
