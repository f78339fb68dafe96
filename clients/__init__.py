"""The client side of the methods: one file where local training differs from plain SGD."""

from clients.fedprox import FedProx

__all__ = ["FedProx"]
