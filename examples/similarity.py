"""Similarity of texts and images, by a model of your own or by one with random weights.

python examples/similarity.py                                   # random weights, drawn images
python examples/similarity.py runs/digits_retrieval a.png b.png --text "two fives"
"""

import argparse

import torch
from PIL import Image

from vlmo import Predictor, VLMo, VLMoConfig
from vlmo.data import train_wordpiece

TEXTS = ["a red square", "a blue square", "a green square"]


def untrained() -> Predictor:
    """A small VLMo with the head of retrieval and a vocabulary made from TEXTS."""
    torch.manual_seed(0)
    vocabulary = train_wordpiece(TEXTS, 60)
    config = VLMoConfig(
        dim=64,
        depth=2,
        heads=2,
        vl_start=1,
        image_size=32,
        max_text_length=12,
        text_capacity=12,
        vocab_size=vocabulary.get_vocab_size(),
        tasks=("irtr",),
    )
    return Predictor(VLMo(config), vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="folder of a run, or a checkpoint in it")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--text", action="append")
    options = parser.parse_args()
    if options.model is None:
        predictor, texts = untrained(), TEXTS
        images = [Image.new("RGB", (48, 32), name) for name in ("red", "blue")]
    else:
        predictor = Predictor.load(options.model)
        images, texts = options.images, options.text
        if not images or not texts:
            parser.error("give images and at least one --text")
    similarity = predictor.similarity(images, texts)  # [texts, images] cosines
    for text, row in zip(texts, similarity.tolist(), strict=True):
        print(f"{text:20}", *(f"{cosine:8.4f}" for cosine in row))


if __name__ == "__main__":
    main()
