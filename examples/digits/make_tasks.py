"""Write the held-out pictures and the task file of the example: `make train` runs it before training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from data import QUESTIONS, SIDE, split, truth
from PIL import Image
from sklearn.datasets import load_digits

HERE = Path(__file__).parent
ROWS = 400


def main() -> None:
    pictures, digits = load_digits(return_X_y=True)
    _, held_out = split(len(digits))
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    for index in held_out:
        small = Image.fromarray((pictures[index].reshape(8, 8) * (255 / 16)).astype(np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png", optimize=True)
    chance = random.Random(7)
    with open(HERE / "tasks.jsonl", "w", encoding="utf-8") as stream:
        for number in range(ROWS):
            count = 1 + number % 2
            chosen = chance.sample(held_out, count)
            question = QUESTIONS[count][number // 2 % len(QUESTIONS[count])]
            paths = [f"images/{index:04d}.png" for index in chosen]
            row = {
                "id": f"q{number:03d}",
                "image": paths[0] if count == 1 else paths,
                "question": question.text,
                "truth": truth(question, [int(digits[index]) for index in chosen]),
            }
            stream.write(json.dumps(row) + "\n")
    print(f"{len(held_out)} pictures and {ROWS} tasks in {HERE}")


if __name__ == "__main__":
    main()
