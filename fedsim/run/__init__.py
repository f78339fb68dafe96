"""A run and its folder: written as the rounds end, read again, gone on with.

Its modules, in the order in which to read them:

- ``directory``: the folder, and how its files are written
- ``frames``: what is read off the tables of a run
- ``client_scores``: each client's scores in the last evaluated round
- ``saved``: a run as its folder holds it
- ``resume``: goes on with a run
- ``result``: what a run gives to Python
- ``recorder``: keeps what a run gives, and writes it

What people see of a run is made by ``fedsim.report``, which the recorder calls at the end.
"""
