"""The words of the small languages, and a vocabulary of whole words.

They are common English words, so that the same sentences can be asked of a language model with a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NAMES = [
    "John",
    "Mary",
    "Tom",
    "James",
    "Dan",
    "Martin",
    "Amy",
    "Alice",
    "Bob",
    "Emma",
    "Sarah",
    "Michael",
    "Lisa",
    "David",
    "Anna",
    "Peter",
    "Paul",
    "Mark",
    "Jack",
    "Kate",
    "Laura",
    "Robert",
    "Susan",
    "Linda",
    "Kevin",
    "Brian",
    "Eric",
    "Helen",
    "Jane",
    "Karen",
    "Frank",
    "George",
    "Henry",
    "Alex",
    "Andrew",
    "Steven",
    "Daniel",
    "Rachel",
    "Simon",
    "Sam",
    "Ben",
    "Adam",
    "Jason",
    "Matthew",
    "Ryan",
    "Scott",
    "Victoria",
    "Elizabeth",
]
"""First names; 48."""

PLACES = [
    "store",
    "park",
    "school",
    "garden",
    "office",
    "house",
    "station",
    "hospital",
    "library",
    "restaurant",
]

THINGS = ["ring", "drink", "ball", "book", "bag", "kiss", "computer", "bone", "necklace", "snack"]
"""What can be given; each goes with the article "a"."""

CAPITALIZED = {
    words.split()[0][0]: tuple(words.split())
    for words in (
        "Action Agency Air Alliance American Army Art Association",
        "Bank Bar Base Bay Bill Board Book Bureau",
        "Center Chief City Club Committee Council Court Crown",
        "Data Day Deal Defense Department Development Digital District",
        "Earth East Economic Education Electric Energy Executive Express",
        "Family Federal Field Fire First Force Foreign Fund",
        "Game Gas General Global Golden Government Green Group",
        "Hall Health Heart High History Home Hospital House",
        "Image Industry Information Institute Insurance Intelligence International Internet",
        "Japan Job John Joint Journal Judge Justice Junior",
        "Kansas Key King Kingdom Knight Kong Korean Kent",
        "Labor Land Language Law League Library Life Local",
        "Machine Magazine Major Management Market Media Medical Military",
        "National Network New News Night Nine North Nuclear",
        "Ocean Office Officer Oil Olympic Open Operation Order",
        "Palace Paper Park Party Peace Police Power Press",
        "Race Radio Railway Red Regional Research River Royal",
        "School Science Security Service Social Society Space State",
        "Team Technology Test Time Title Trade Training Transport",
        "Union United Unit Universal University Urban User Upper",
        "Valley Value Vehicle Video View Village Vision Voice",
        "Water Weapon Weather West Wild Women Work World",
    )
}
"""Words by their initial, eight for each of 22 letters."""

COUNTRIES = {
    country: (capital, language, continent)
    for country, capital, language, continent in (
        line.split()
        for line in """
        France Paris French Europe
        Spain Madrid Spanish Europe
        Italy Rome Italian Europe
        Germany Berlin German Europe
        Russia Moscow Russian Europe
        Greece Athens Greek Europe
        Poland Warsaw Polish Europe
        Sweden Stockholm Swedish Europe
        Norway Oslo Norwegian Europe
        Finland Helsinki Finnish Europe
        Denmark Copenhagen Danish Europe
        Ireland Dublin English Europe
        England London English Europe
        Scotland Edinburgh English Europe
        Portugal Lisbon Portuguese Europe
        Austria Vienna German Europe
        Switzerland Bern German Europe
        Belgium Brussels Dutch Europe
        Netherlands Amsterdam Dutch Europe
        Hungary Budapest Hungarian Europe
        Romania Bucharest Romanian Europe
        Bulgaria Sofia Bulgarian Europe
        Serbia Belgrade Serbian Europe
        Ukraine Kiev Ukrainian Europe
        Japan Tokyo Japanese Asia
        China Beijing Chinese Asia
        Korea Seoul Korean Asia
        India Delhi Hindi Asia
        Thailand Bangkok Thai Asia
        Vietnam Hanoi Vietnamese Asia
        Iran Tehran Persian Asia
        Iraq Baghdad Arabic Asia
        Syria Damascus Arabic Asia
        Lebanon Beirut Arabic Asia
        Turkey Ankara Turkish Asia
        Pakistan Islamabad Urdu Asia
        Egypt Cairo Arabic Africa
        Libya Tripoli Arabic Africa
        Kenya Nairobi Swahili Africa
        Nigeria Abuja English Africa
        Cuba Havana Spanish America
        Peru Lima Spanish America
        Chile Santiago Spanish America
        Canada Ottawa English America
        """.strip().splitlines()
    )
}
"""Capital, language and continent of each country; 44."""

FILLERS = ["red", "brown", "fox", "jumps", "quick", "lazy", "dog", "moon"]
"""Words that say nothing, to stand in a subject's place."""


class Vocabulary:
    """Whole words and punctuation marks as tokens, numbered in the order they are given.

    Attributes:
        words: word of each token.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(dict.fromkeys(words))
        self._tokens = {word: token for token, word in enumerate(self.words)}

    @classmethod
    def of(cls, *texts: str) -> Vocabulary:
        """The words of some texts."""
        return cls(word for text in texts for word in split(text))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Token of each word; an error names a word that is not known."""
        unknown = sorted({word for word in split(text) if word not in self._tokens})
        if unknown:
            raise ValueError(f"{text!r} has the words {unknown}, which the vocabulary has not.")
        return [self._tokens[word] for word in split(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of some tokens, with spaces between them."""
        return " ".join(self.words[int(token)] for token in tokens)


def split(text: str) -> list[str]:
    """Words and punctuation marks of a text."""
    return re.findall(r"\w+|[^\w\s]", text)
