"""One content for many nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from flwr.app import Message, RecordDict


class Broadcast(Sequence[Message]):
    """Messages that bring many nodes the same content; each is made when it is looked at.

    To make a message takes longer than to choose its node. A grid that only needs to know where
    they go looks at `content` and `nodes`; any other finds the messages.

    Parameters
    ----------
    content : RecordDict
        What they carry.
    nodes : sequence of int
        Where they go, in order.
    message_type : str
        One of `flwr.app.MessageType`.
    """

    def __init__(self, content: RecordDict, nodes: Sequence[int], message_type: str) -> None:
        self.content = content
        self.nodes = nodes
        self.message_type = message_type
        self._made: dict[int, Message] = {}

    @property
    def untouched(self) -> bool:
        """Whether nobody has looked at a message, which could have been changed since."""
        return not self._made

    def __len__(self) -> int:
        return len(self.nodes)

    @overload
    def __getitem__(self, place: int) -> Message: ...

    @overload
    def __getitem__(self, place: slice) -> list[Message]: ...

    def __getitem__(self, place: int | slice) -> Message | list[Message]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        place = range(len(self))[place]
        if place not in self._made:
            self._made[place] = Message(self.content, self.nodes[place], self.message_type)
        return self._made[place]
