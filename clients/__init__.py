"""The client side of the methods: one file where local training differs from plain SGD."""

from clients.fedlabel import FedLabel
from clients.fedloge import FedLoGe
from clients.fedprox import FedProx
from clients.fixmatch import FixMatchGlobal, FixMatchLocal

__all__ = ["FedLabel", "FedLoGe", "FedProx", "FixMatchGlobal", "FixMatchLocal"]
