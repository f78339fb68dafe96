"""The engine: client updates, workers, the grid and the round loop.

``update``, ``local`` and ``worker`` need only PyTorch and NumPy; Flower and Ray come in with
``grid``, ``ray_grid`` and ``loop``.
"""
