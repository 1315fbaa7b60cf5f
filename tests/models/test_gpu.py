"""The same model on a GPU: losses, gradients, padding and decoding agree with the CPU.

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

import pytest
import torch

from fusiontree.ops.documents import Documents
from tests.helpers import tiny_model
from tests.models.variants import VARIANTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]


def tokens(rows, length, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", VARIANTS)
def test_losses_and_gradients_of_packed_rows(kind):
    ids, labels_BS = tokens(2, 27), tokens(2, 27, seed=1)
    documents = Documents.from_positions(torch.arange(27).expand(2, 27) % 11)
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model(**VARIANTS[kind]).to(device)
        out = model(ids.to(device), labels_BS=labels_BS.to(device), documents=documents.to(device))
        (out.loss_sum + out.layer_sums.sums_LB["entropy"].sum()).backward()
        found.append((out.loss_sum.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}))
    (loss, grads), (other_loss, other_grads) = found
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_padded_prompts_decode_as_on_the_cpu(kind):
    model = tiny_model(**VARIANTS[kind])
    ids = tokens(2, 20)
    mask_BS = torch.ones(2, 9, dtype=torch.bool)
    mask_BS[1, :6] = False
    alone = [model(ids[:1]).logits_BSV[0, 8:], model(ids[1:, 6:]).logits_BSV[0, 2:]]
    model.cuda()
    cache = model.new_cache(2)
    logits = [model(ids[:, :9].cuda(), padding_mask_BS=mask_BS.cuda(), cache=cache).logits_BSV[:, -1:]]
    for start, end in ((9, 12), *((i, i + 1) for i in range(12, 20))):
        logits.append(model(ids[:, start:end].cuda(), cache=cache).logits_BSV)
    decoded = torch.cat(logits, dim=1).cpu()
    for row in range(2):
        torch.testing.assert_close(decoded[row], alone[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_decodes(dtype):
    model = tiny_model(layer_pattern="FMA", scale=1.0).to("cuda", dtype)
    ids = tokens(2, 40).cuda()
    documents = Documents.from_positions(torch.arange(40).expand(2, 40) % 17).to("cuda")
    out = model(ids, labels_BS=ids, documents=documents)
    out.loss_sum.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.inference_mode():
        full = model(ids).logits_BSV
        cache = model.new_cache(2, 40)
        pieces = [model(ids[:, :30], cache=cache).logits_BSV]
        pieces += [model(ids[:, i : i + 1], cache=cache).logits_BSV for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=0.05, rtol=0.05)
