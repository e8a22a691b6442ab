"""Small tasks of the languages, and tokenizers that need no network."""

from dynamics.config import AcronymsConfig, AcronymsRun, FactsConfig, FactsRun, IoiConfig, IoiRun
from dynamics.tasks import AcronymsTask, FactsTask, IoiTask


class WholeWords:
    """Called as a tokenizer of Hugging Face is: a number for each word as it comes, some words several."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        for mark in "(,:>":
            text = text.replace(mark, f" {mark} ")
        pieces = [piece for word in text.split() for piece in self.pieces(word)]
        return {"input_ids": [self.numbers.setdefault(piece, len(self.numbers)) for piece in pieces]}

    def pieces(self, word: str) -> list[str]:
        return [word[:2], word[2:]] if word in self.broken else [word]

    def decode(self, tokens: list[int]) -> str:
        words = {number: word for word, number in self.numbers.items()}
        return " ".join(words[int(token)] for token in tokens)


def ioi_task(seed: int = 0, **changes) -> IoiTask:
    return IoiTask(IoiRun(task=IoiConfig(**{"n_names": 9, "n_prompts": 400, **changes}), seed=seed))


def acronyms_task(seed: int = 0, **changes) -> AcronymsTask:
    return AcronymsTask(
        AcronymsRun(task=AcronymsConfig(**{"n_words": 2, "n_prompts": 300, **changes}), seed=seed)
    )


def facts_task(seed: int = 0, **changes) -> FactsTask:
    return FactsTask(FactsRun(task=FactsConfig(**{"n_subjects": 12, "n_late": 3, **changes}), seed=seed))


def words_of(task, batch) -> list[str]:
    """The rows of a batch as text."""
    return [task.vocabulary.decode(row) for row in batch.tokens]
