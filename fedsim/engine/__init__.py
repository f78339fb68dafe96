"""The engine: client updates, workers, the grid and the round loop.

Its modules, in the order in which to read them. What a client does:

- ``training``: how a client trains, the experiment's ``[training]``
- ``requests``: what a client asks the engine for: passes of SGD, predictions, sums
- ``update``: what a client does in a round; all that a method is made of
- ``loader``: mini-batches of a client's examples
- ``step``: what a step of SGD computes
- ``loss_check``: whether a loss depends on its arguments alone
- ``sgd``: the training loop, for one client or for many side by side
- ``tally``: what is counted during a pass
- ``local``: carries client updates out
- ``evaluation``: tests the views of models

What makes that fast:

- ``tape``: does a step's operations again without working them out anew
- ``graph``: begins a step's work on a GPU as one
- ``stacks``: memory for the arrays of clients side by side
- ``memory``: how many clients fit on a GPU
- ``clock``: where the time of a round goes

What a worker does:

- ``schedule``: who trains where and side by side with whom
- ``reduction``: sums of uploads, the same for any number of workers
- ``replies``: what the clients of a round answer
- ``uploads``: makes replies, states and sums of what client updates return
- ``state``: what clients keep from round to round
- ``worker``: trains clients and tests models

What the server does:

- ``broadcast``: one content for many nodes, without a message for each
- ``flower``: where fedsim touches Flower's inside
- ``grid``: between a Flower strategy and the workers
- ``inline_grid``: the grid without any process but this one
- ``ray_actors``: Ray, and how its actors are started, called and ended
- ``ray_worker``: what runs in such an actor
- ``imports``: whether every process imports the same files
- ``ray_grid``: the grid whose workers are Ray actors
- ``claims``: which leaves a worker takes over that is done early
- ``loop``: the round loop
- ``checkpoint``: what a run needs to go on
- ``arrays_file``: files of arrays in which damage is noticed

``worker`` and what comes before it need only PyTorch and NumPy; Flower and Ray come in after it.
"""
