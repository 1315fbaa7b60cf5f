"""The AdamW kernels by Triton's interpreter, each tensor and state beside those of ``torch.optim.AdamW``.

``TRITON_INTERPRET=1 python -m tests.ops.interpreted_adamw`` prints one line a result: name, relative error, bar.
"""

from __future__ import annotations

from unittest.mock import patch

from fusiontree.ops.adamw import UPDATES
from fusiontree.ops.adamw.triton import TritonUpdate
from tests.ops.test_adamw import CASES, compare


def main() -> None:
    with patch.object(UPDATES, "choose", lambda wanted, device: TritonUpdate):
        for name, case in CASES.items():
            for what, error, bar in compare(case, "triton", rounds=False):
                print(f"{name} {what} {error:.2e} {bar:.0e}", flush=True)


if __name__ == "__main__":
    main()
