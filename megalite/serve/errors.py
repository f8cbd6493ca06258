"""Why the server does not take a request, or could not finish one that it took. Torch-free."""

from __future__ import annotations

from megalite.errors import MegaliteError


class Refused(MegaliteError):
    """Not now: the same request may be taken after `retry_after` seconds."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(reason)
        self.retry_after = retry_after


class Overloaded(Refused):
    """The requests that wait and run, or their tokens, have reached the limit of the config."""


class Draining(Refused):
    """The server is about to end: what runs is finished, nothing new is taken."""


class NoReplica(Refused):
    """No replica has been ready yet, or none will be again."""


class RequestLost(MegaliteError):
    """A request that was taken has no result: its replicas were lost, and nothing is left to run it on, or it was
    running whenever one was lost."""
