"""Train the example's model: a vision-language model of one million parameters, in minutes on two cores.

An Idefics3 (a SigLIP-like vision part, a connector, a Llama) made from nothing, with a vocabulary of the few words that
the questions have. It is trained on the training split only; the figures at the end are from the held-out pictures.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
from data import QUESTIONS, SIDE, split, truth
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
STEPS = 3000
BATCH = 48
SPECIAL = ["<pad>", "<unk>", "<s>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
IMAGE_TOKENS = (SIDE // 8 // 2) ** 2  # patches of 8 pixels, joined 2 by 2

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def make_processor() -> Idefics3Processor:
    texts = [question.text for questions in QUESTIONS.values() for question in questions]
    splitter = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    words |= {"user", "assistant", "system", ":", "even", "odd", *map(str, range(10))}
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    # Without a decoder the words are joined by spaces, and each answer would begin with one. Answers are one word.
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=SPECIAL[4:],
    )
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def make_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    tokenizer = processor.tokenizer
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    model = Idefics3ForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def augmented(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 1, side, side) in 0…1, each turned, scaled, sheared, moved, made fainter and noisy a little."""
    count = len(pictures)
    angle = (torch.rand(count) - 0.5) * 0.5
    scale = 1 + (torch.rand(count, 2) - 0.5) * 0.3
    shear = (torch.rand(count) - 0.5) * 0.3
    shift = (torch.rand(count, 2) - 0.5) * 0.24
    turn = torch.stack(
        [
            torch.stack([angle.cos() * scale[:, 0], -angle.sin() + shear, shift[:, 0]], 1),
            torch.stack([angle.sin(), angle.cos() * scale[:, 1], shift[:, 1]], 1),
        ],
        1,
    )
    grid = functional.affine_grid(turn, list(pictures.shape), align_corners=False)
    moved = functional.grid_sample(pictures, grid, align_corners=False)
    moved = moved * (0.8 + 0.4 * torch.rand(count, 1, 1, 1)) + 0.05 * torch.randn_like(moved)
    return moved.clamp(0, 1)


class Examples:
    """Makes batches of token ids, labels and pixels from pictures and questions."""

    def __init__(self, processor: Idefics3Processor) -> None:
        self._tokenizer = processor.tokenizer
        image = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
        self._image = image

    def prompt(self, text: str, count: int) -> list[int]:
        words = f"<s>user : {self._image * count}{text}<end_of_utterance>assistant :"
        return list(self._tokenizer(words, add_special_tokens=False)["input_ids"])

    def batch(self, texts: list[str], answers: list[str], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, padded on the right; only the answers are learnt."""
        rows, labels = [], []
        for text, answer in zip(texts, answers, strict=True):
            prompt = self.prompt(text, count)
            end = [self._tokenizer.convert_tokens_to_ids(answer), self._tokenizer.eos_token_id]
            rows.append(prompt + end)
            labels.append([-100] * len(prompt) + end)
        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id
        return (
            torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        )


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """8 × 8 pictures of 0…16 as (n, 1, side, side) in 0…1, enlarged as the files of the task file are."""
    small = torch.tensor(pictures, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return functional.interpolate(small, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)


def pixels(pictures: torch.Tensor, count: int) -> torch.Tensor:
    """(n · count, 1, side, side) in 0…1 as (n, count, 3, side, side) in -1…1."""
    return ((pictures - 0.5) / 0.5).expand(-1, 3, -1, -1).reshape(-1, count, 3, SIDE, SIDE)


def train(
    model: Idefics3ForConditionalGeneration, examples: Examples, pictures: torch.Tensor, digits: list[int]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=STEPS, pct_start=0.1)
    chance = random.Random(1)
    model.train()
    started, total = time.time(), 0.0
    for step in range(1, STEPS + 1):
        count = 1 + step % 2
        chosen = [[chance.randrange(len(digits)) for _ in range(count)] for _ in range(BATCH)]
        questions = [chance.choice(QUESTIONS[count]) for _ in chosen]
        answers = [
            truth(question, [digits[index] for index in group])
            for question, group in zip(questions, chosen, strict=True)
        ]
        ids, labels = examples.batch([question.text for question in questions], answers, count)
        flat = torch.tensor([index for group in chosen for index in group])
        loss = model(
            input_ids=ids,
            attention_mask=(labels != -100) | (ids != model.config.pad_token_id),
            pixel_values=pixels(augmented(pictures[flat]), count),
            labels=labels,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += float(loss.detach())
        if step % 250 == 0:
            print(f"step {step}: loss {total / 250:.4f}, {time.time() - started:.0f} s", flush=True)
            total = 0.0


@torch.inference_mode()
def accuracy(
    model: Idefics3ForConditionalGeneration, examples: Examples, pictures: torch.Tensor, digits: list[int], count: int
) -> float:
    """The share of right answers to each question, about each picture (with the next one as its second)."""
    model.eval()  # type: ignore[no-untyped-call]
    right = asked = 0
    for question in QUESTIONS[count]:
        groups = [[(start + k) % len(digits) for k in range(count)] for start in range(len(digits))]
        answers = [truth(question, [digits[index] for index in group]) for group in groups]
        ids, _ = examples.batch([question.text] * len(groups), answers, count)
        flat = torch.tensor([index for group in groups for index in group])
        logits = model(input_ids=ids[:, :-2], pixel_values=pixels(pictures[flat], count)).logits[:, -1]
        right += int((logits.argmax(-1) == ids[:, -2]).sum())
        asked += len(groups)
    return right / asked


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    flat, targets = load_digits(return_X_y=True)
    training, held_out = split(len(targets))
    processor = make_processor()
    model = make_model(processor)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    examples = Examples(processor)
    train(model, examples, as_tensor(flat[training]), [int(targets[index]) for index in training])
    pictures, digits = as_tensor(flat[held_out]), [int(targets[index]) for index in held_out]
    for count in QUESTIONS:
        share = accuracy(model, examples, pictures, digits, count)
        print(f"held-out pictures, {count} in a question: {share:.1%} right")
    model.save_pretrained(HERE / "model")
    processor.save_pretrained(HERE / "model")


if __name__ == "__main__":
    main()
