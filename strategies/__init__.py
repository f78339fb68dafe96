"""The server side of the methods: one file a method, each a Flower strategy."""

from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx

__all__ = ["FedAvg", "FedProx"]
