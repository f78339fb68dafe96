"""The server side of the methods: one file a method, each a Flower strategy."""

from strategies.fedavg import FedAvg
from strategies.fedlabel import FedLabel
from strategies.fedlabel_fedloge import FedLabelFedLoGe
from strategies.fedloge import FedLoGe
from strategies.fedprox import FedProx
from strategies.fixmatch import FixMatch

__all__ = ["FedAvg", "FedLabel", "FedLabelFedLoGe", "FedLoGe", "FedProx", "FixMatch"]
