"""Pictures, questions and truths for the example: what training and the task file have in common.

The pictures are scikit-learn's `load_digits`: 1,797 handwritten digits of 8 × 8 pixels in 17 levels of grey, from the
UCI data set «Optical Recognition of Handwritten Digits» (E. Alpaydin, C. Kaynak, 1998, CC BY 4.0).
"""

from __future__ import annotations

import random
from typing import NamedTuple

SIDE = 64
"""Pixels of a side of the pictures: what the model's vision part takes."""

HELD_OUT = 360
"""So many pictures are never trained on; the task file shows only these."""

ONE_IMAGE = ("Which digit is this?", "What number do you see?", "Is this digit even or odd?")
TWO_IMAGES = (
    "Which digit is in the first image?",
    "Which digit is in the second image?",
    "Is the digit in the second image even or odd?",
)


class Question(NamedTuple):
    """`which` is the index of the picture that the question is about."""

    text: str
    which: int
    parity: bool


QUESTIONS = {
    1: [Question(text, 0, "even" in text) for text in ONE_IMAGE],
    2: [Question(text, int("second" in text), "even" in text) for text in TWO_IMAGES],
}
"""The questions by the number of pictures."""


def truth(question: Question, digits: list[int]) -> str:
    digit = digits[question.which]
    return ("odd" if digit % 2 else "even") if question.parity else str(digit)


def split(count: int) -> tuple[list[int], list[int]]:
    """Indices of the training pictures and of the held-out ones: the same on every machine."""
    order = list(range(count))
    random.Random(20260101).shuffle(order)
    return order[HELD_OUT:], order[:HELD_OUT]
