"""What the reranker is asked, cut into a document part and a query part, and the two tokens that answer it.

    Document: {D}                                       the document part comes first, so its states know nothing of the query
    Query: {Q}                                          the query part
    Can Query be appropriately responded with Document? If the answer is true, choose T; otherwise, choose F.
    Answer:                                             the state of the last token decides

Template and order are the paper's (appendix) [P]; "T" and "F" stand for its <T> and <F>, each of which is three tokens in
Qwen's vocabulary, the first of them shared: reading the first one would compare '<' with '<'.

Notable choices
- The parts are tokenised apart and their ids are joined, so that no token ever spans both and the document's ids are the same
  with and without a query (the prefix identity rests on this).
- What is too long is cut where it matters least: a document at its end, a query at its start (the oldest turns). The question
  itself is never cut.
- Texts are data: marks and phrases that imitate the answer are taken out, words that would begin a line of the template lose
  their colon, and special tokens are read as plain letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DOCUMENT = "Document: "
QUERY = "\nQuery: "
QUESTION = (
    "\nCan Query be appropriately responded with Document? If the answer is true, choose {true}; otherwise, choose {false}."
    "\nAnswer:"
)
TRUE, FALSE = "T", "F"
INVISIBLE = dict.fromkeys(
    code
    for first, last in ((0xAD, 0xAD), (0x180E, 0x180E), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0xFE00, 0xFE0F),
                        (0xFEFF, 0xFEFF), (0xE0000, 0xE007F))
    for code in range(first, last + 1)
)  # fmt: skip
"""Characters without width, for str.translate."""
QUOTES = "\"'`*_\u2018-\u201f\u00ab\u00bb\u2039\u203a"
OPEN, CLOSE = rf"[{QUOTES}<>/()\[\]{{}}:\s]", rf"[{QUOTES}>)\]}}]"
ALONE = rf"[TF](?={CLOSE}*+(?:[\s.,;:!?\u2013\u2014]|$))"
HEADING = re.compile(r"\b(Query|Document|Answer)(?:\s?:)++")
"""The words that begin the template's lines; without their colon they are words."""
MARK = re.compile(r"(<[</\s]*+)([TF]\s?>(?:[</\s]*+[TF]\s?>)*+)?", re.IGNORECASE)
"""`<T>`, `</f>`, `<<T>T>`; or `<` alone, which stays: so every run of `<` is looked at once."""
IMITATION = re.compile(
    rf"\b(choose|pick|select){OPEN}*+{ALONE}(?:{OPEN}++{ALONE})*+{CLOSE}*+"
    rf"|\b(answer(?:\sis)?){OPEN}*+{ALONE}(?:{OPEN}++{ALONE})*+{CLOSE}*+(?=\s?(?:[\n.,;:!?\u2013\u2014]|$))",
    re.IGNORECASE,
)
"""`choose T` and the like, and `Answer: T` or `the answer is T` at the end of a clause, in a text that is to be judged: the
label stands alone, so T-shirts and F major stay. Small letters, too, because tokenizers without capitals read them alike."""


def plain(text: str) -> str:
    """A document or query in which nothing imitates an answer or the template.

    `choose <T>` leaves `choose`, `<T>` alone leaves nothing, `Query: x` leaves `Query x`. Text is read as Unicode's NFKC,
    without characters of no width. It repeats until nothing is found, so that no mark is put together by a removal; what a
    removal leaves cannot be nested, so a few times are enough and the time is linear in the length.
    """
    while True:
        cleaned = unicodedata.normalize("NFKC", text.translate(INVISIBLE))
        cleaned = "\n".join(" ".join(line.split()) for line in cleaned.splitlines())
        cleaned = MARK.sub(lambda found: " " if found[2] else found[1], cleaned)
        cleaned = IMITATION.sub(lambda found: f"{found[1] or found[2]} ", HEADING.sub(r"\1", cleaned))
        cleaned = " ".join(cleaned.split())
        if cleaned == text:
            return text
        text = cleaned


def worded(query: str, document: str, labels: tuple[str, str] = (TRUE, FALSE)) -> str:
    """The whole prompt as people read it."""
    question = QUESTION.format(true=labels[0].strip(), false=labels[1].strip())
    return f"{DOCUMENT}{plain(document)}{QUERY}{plain(query)}{question}"


@dataclass(frozen=True)
class PromptTokens:
    """The template for one tokenizer: texts to the ids of their part.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_document, max_query: tokens of a part at most, L_D and L_Q, template included.
        labels: what answers yes and no; each must be exactly one token after "Answer:".
    Raises:
        ValueError: a label is not a single token, both are the same, or a part leaves no room for a text.
    """

    tokenizer: Any
    max_document: int = 32
    max_query: int = 512
    labels: tuple[str, str] = (" " + TRUE, " " + FALSE)

    def __post_init__(self) -> None:
        for name, limit, fixed in (
            ("max_document", self.max_document, len(self.ids(DOCUMENT))),
            ("max_query", self.max_query, len(self.ids(QUERY)) + len(self.question)),
        ):
            if limit <= fixed:
                raise ValueError(f"{name}: got {limit}; the template alone takes {fixed} tokens")
        _ = self.label_ids

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of the prompt; special tokens in it are letters like any others."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return found

    @property
    def question(self) -> list[int]:
        """Ids of the question, the same after every query."""
        return self.ids(QUESTION.format(true=self.labels[0].strip(), false=self.labels[1].strip()))

    @property
    def label_ids(self) -> tuple[int, int]:
        """Ids of T and F as they follow the question."""
        found = [self._single(label) for label in self.labels]
        if found[0] == found[1]:
            raise ValueError(f"labels: got {self.labels!r}; both are token {found[0]}, expected two different tokens")
        return found[0], found[1]

    def _single(self, label: str) -> int:
        before, after = self.ids("Answer:"), self.ids("Answer:" + label)
        if len(after) != len(before) + 1 or after[: len(before)] != before:
            raise ValueError(
                f"labels: got {label!r}, which this tokenizer writes as {len(after) - len(before)} tokens after 'Answer:';"
                " expected exactly one, such as T and F or yes and no"
            )
        return after[-1]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of document parts, each of at most max_document."""
        start = self.ids(DOCUMENT)
        return [(start + self.ids(self._given("document", i, t)))[: self.max_document] for i, t in enumerate(texts)]

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of query parts, each of at most max_query: the oldest words go first, the question stays."""
        start, end = self.ids(QUERY), self.question
        room = self.max_query - len(start) - len(end)
        return [start + self.ids(self._given("query", i, t))[-room:] + end for i, t in enumerate(texts)]

    def _given(self, kind: str, position: int, text: str) -> str:
        cleaned = plain(text)
        if not cleaned:
            raise ValueError(f"{kind}: number {position} is empty; expected a text with words")
        return cleaned
