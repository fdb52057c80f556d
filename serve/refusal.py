"""How the parts behind an app's front say no."""

from __future__ import annotations


class Refused(Exception):
    """A request that cannot be served: the HTTP status and one sentence for whoever asked."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status, sentence)
        self.status, self.sentence = status, sentence
