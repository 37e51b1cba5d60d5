"""Pre-training steps (masked words, contrast, matching) of a small VLMo on digit scenes.

python examples/training_step.py
"""

import torch

from vlmo import VLMo, VLMoConfig
from vlmo.data import GlobalBatches, digit_tokenizer, loader, open_data
from vlmo.tasks.losses import compute_losses

STEPS, PAIRS = 4, 16


def main() -> None:
    torch.manual_seed(0)
    tokenizer = digit_tokenizer()
    data = open_data("digits", "pretrain", "train", image_size=32, train=True)
    config = VLMoConfig(
        dim=96,
        depth=3,
        heads=4,
        vl_start=2,
        image_size=32,
        vocab_size=tokenizer.vocab_size,
        max_text_length=tokenizer.max_length,
        text_capacity=tokenizer.max_length,
        tasks=("mlm", "itc", "itm"),
    )
    model = VLMo(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # No two scenes of a batch have the same meaning: they would be negatives of each other.
    batches = GlobalBatches(len(data), PAIRS, keys=data.keys, groups=data.groups, steps=STEPS)
    for step, batch in enumerate(loader(data, batches, tokenizer, mask_share=0.15), 1):
        losses = compute_losses(
            model, batch
        )  # each task's "..._loss", logits, and their sum "loss"
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        told = {name: v.item() for name, v in losses.items() if name.endswith("loss")}
        print(f"step {step}:", ", ".join(f"{name} {value:.3f}" for name, value in told.items()))


if __name__ == "__main__":
    main()
