"""Writes golden.pt, the results of unilm (the reference implementation) for the parity tests.

    python tests/model/data/condense_golden.py FOLDER

FOLDER has one file per task that unilm wrote on the CPU in float32 (rel_pretrain.pt, rel_irtr.pt,
rel_vqa.pt, rel_textmlm.pt, abs_nlvr2.pt): config, batch, state_dict, loss, out, grads and features.
Weights are not stored, because they are generated from their names (named_init.py); gradients are
stored as fingerprints (fingerprint.py).
"""

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fingerprint import fingerprint  # noqa: E402

TASKS = ("rel_pretrain", "rel_irtr", "rel_vqa", "rel_textmlm", "abs_nlvr2")


def main(folder: Path) -> None:
    tensors: dict[bytes, torch.Tensor] = {}  # batches share tensors; each is stored once
    golden = {}
    for task in TASKS:
        full = torch.load(folder / f"{task}.pt", weights_only=True)
        batch = {}
        for key, value in full["batch"].items():
            if key.startswith("image"):
                value = value[0]
            if isinstance(value, torch.Tensor):
                value = tensors.setdefault(value.numpy().tobytes(), value)
            batch[key] = value
        golden[task] = {
            "batch": batch,
            "loss": full["loss"],
            "out": full["out"],
            "features": {key: full[key] for key in full if key.startswith("infer")},
            "gradients": {name: fingerprint(name, g) for name, g in full["grads"].items()},
        }
    temporary = HERE / "golden.pt.tmp"
    torch.save(golden, temporary)
    os.replace(temporary, HERE / "golden.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
