"""Separate process that loads an exported folder with transformers and the folder's own code only.

python -P transformers_logits.py FOLDER IDS.pt LOGITS.pt
"""

from __future__ import annotations

import sys

import torch


def main(folder: str, ids_file: str, output: str) -> None:
    """Write the logits of the folder's model in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    ids_BS = torch.load(ids_file, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save(model(ids_BS, use_cache=False).logits.float(), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
