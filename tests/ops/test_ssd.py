"""The scan against its recurrence in float64: outputs, final states and all gradients."""

from __future__ import annotations

import pytest
import torch

from fusiontree.ops.documents import Documents
from fusiontree.ops.ssd import ssd_scan
from fusiontree.ops.ssd.exchange import Exchange
from tests.ops.sequential_scan import ssd_sequential

NAMES = ("x", "dt", "A", "B", "C", "D")


def positions(rows: int, length: int, starts: list[list[int]]) -> torch.Tensor:
    """Positions of rows whose documents begin at ``starts`` (0 is always one)."""
    result = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        begin = 0
        for t in range(length):
            if t in starts[row % len(starts)]:
                begin = t
            result[row, t] = t - begin
    return result


def inputs(
    length: int, groups: int = 2, decay: tuple[float, float] = (1.0, 16.0), seed: int = 0
) -> dict[str, torch.Tensor]:
    rows, heads, width, size = 2, 4, 3, 5
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    low, high = decay
    values = {
        "x": rand(rows, length, heads, width),
        "dt": torch.nn.functional.softplus(rand(rows, length, heads) - 1),
        "A": -(low + (high - low) * torch.rand(heads, generator=g, dtype=torch.float64)),
        "B": rand(rows, length, groups, size),
        "C": rand(rows, length, groups, size),
        "D": rand(heads),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def compare(
    values: dict[str, torch.Tensor], documents: Documents | None, chunk: int, initial: torch.Tensor | None
) -> None:
    leaves = list(values.values()) + ([initial] if initial is not None else [])
    y, state = ssd_scan(*values.values(), chunk_size=chunk, documents=documents, initial_state_BHPN=initial)
    want_y, want_state = ssd_sequential(*values.values(), documents=documents, initial_state_BHPN=initial)
    torch.testing.assert_close(y, want_y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, want_state, rtol=1e-9, atol=1e-9)
    g = torch.Generator().manual_seed(1)
    weight_y = torch.randn(y.shape, generator=g, dtype=y.dtype)
    weight_state = torch.randn(state.shape, generator=g, dtype=y.dtype)
    kind = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad((y * weight_y).sum() + (state * weight_state).sum(), leaves, **kind)
    want = torch.autograd.grad((want_y * weight_y).sum() + (want_state * weight_state).sum(), leaves, **kind)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", [(1.0, 16.0), (0.01, 0.02), (1e-4, 1e-4)])
@pytest.mark.parametrize(("length", "chunk"), [(16, 4), (37, 8), (5, 8), (1, 4), (33, 32)])
def test_equals_the_recurrence(length: int, chunk: int, decay: tuple[float, float]) -> None:
    compare(inputs(length, decay=decay), None, chunk, None)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_heads_share_b_and_c(groups: int) -> None:
    compare(inputs(19, groups=groups), None, 8, None)


@pytest.mark.parametrize("chunk", [4, 8, 64])
def test_documents_restart_the_state(chunk: int) -> None:
    """Documents that start on, before and after chunk borders, several in a chunk, and across several chunks."""
    documents = Documents.from_positions(positions(2, 37, [[0, 3, 4, 8, 25, 36], [0, 17]]))
    compare(inputs(37, decay=(0.01, 0.02)), documents, chunk, None)


@pytest.mark.parametrize("offset", [0, 5])
def test_an_initial_state_belongs_to_the_document_it_came_from(offset: int) -> None:
    """With offset 0 the piece's first token starts a document and the initial state must not be seen."""
    p = positions(2, 21, [[0, 9], [0]])
    p[:, :9] += offset
    p[1, 9:] += offset
    initial = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    compare(inputs(21, decay=(0.01, 0.02)), Documents.from_positions(p), 8, initial)
    if offset:
        compare(inputs(21, decay=(0.01, 0.02)), None, 8, initial)


@pytest.mark.parametrize("starts", [[[0]], [[0, 12], [0, 5, 24]], [[0, 11, 13, 23, 25], [0, 1]]])
def test_pieces_that_exchange_states_equal_the_whole_row(starts: list[list[int]]) -> None:
    """Context parallelism in one process: three pieces of 12 tokens, states folded from left to right."""
    values = inputs(36, decay=(0.01, 0.02))
    p = positions(2, 36, starts)
    want_y, want_state = ssd_sequential(*values.values(), documents=Documents.from_positions(p))
    state = torch.zeros_like(want_state)
    outputs = []
    for begin in range(0, 36, 12):
        piece = slice(begin, begin + 12)
        arguments = [v if n in "AD" else v[:, piece] for n, v in values.items()]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def exchange(from_zero: torch.Tensor, decay: torch.Tensor, state=state, seen=seen) -> torch.Tensor:
            seen.append((from_zero, decay))
            return state

        documents = Documents.from_positions(p[:, piece])
        y, final = ssd_scan(*arguments, chunk_size=5, documents=documents, state_exchange=exchange)
        (from_zero, decay), outputs = seen[0], [*outputs, y]
        ignores = (p[:, begin] == 0)[:, None, None, None]
        folded = torch.where(ignores, from_zero, decay[..., None, None] * state + from_zero)
        torch.testing.assert_close(final, folded, rtol=1e-9, atol=1e-9)
        state = folded
    torch.testing.assert_close(torch.cat(outputs, 1), want_y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, want_state, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), list(values.values()))
    want = torch.autograd.grad(want_y.square().sum(), list(values.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_low_precision_keeps_its_type_and_an_fp32_state() -> None:
    values = {n: v.detach().to(torch.bfloat16 if n in "xBC" else torch.float32) for n, v in inputs(9).items()}
    y, state = ssd_scan(*values.values(), chunk_size=4)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@pytest.mark.parametrize("passes", [True, False])
def test_gradients_through_an_exchange_need_one_pass(passes: bool) -> None:
    """The operations of the GPU backend between its kernels: a backward recursion and a correction of the decays."""
    g = torch.Generator().manual_seed(2)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    chunks, state = 5, (2, 3, 4, 2)
    log_kept = [(-rand(2, 3).abs()).requires_grad_() for _ in range(chunks)]
    mask = torch.ones(chunks, dtype=torch.float64)
    if not passes:
        mask[2] = 0  # a document starts in chunk 2
    added = [rand(*state).requires_grad_() for _ in range(chunks)]
    elsewhere, weights, end = rand(*state), [rand(*state) for _ in range(chunks)], rand(*state)

    def exchange(z: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return torch.tanh(elsewhere * decay[..., None, None] + 0.3 * z.flip(0))

    kept = [m * log.exp() for m, log in zip(mask, log_kept, strict=True)]
    total = torch.stack(kept).prod(0)

    def passed_on(initial: torch.Tensor) -> list[torch.Tensor]:
        states = [initial]
        for k, s in zip(kept, added, strict=True):
            states.append(k[..., None, None] * states[-1] + s)
        return states

    states = passed_on(exchange(passed_on(torch.zeros(state, dtype=torch.float64))[-1], total))
    loss = sum((w * h).sum() for w, h in zip(weights, states[:-1], strict=True)) + (end * states[-1]).sum()
    want = torch.autograd.grad(loss, [*added, *log_kept])

    with torch.no_grad():
        z = passed_on(torch.zeros(state, dtype=torch.float64))[-1]
        made = Exchange(exchange, z, total)
        before = passed_on(made.initial_BHPN)[:-1]

        def passed_back(last: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
            into, decays = [], []
            for k, h, w in zip(reversed(kept), reversed(before), reversed(weights), strict=True):
                into.append(last)
                decays.append(k * (last * h).sum((-2, -1)))
                last = w + k[..., None, None] * last
            return into[::-1], decays[::-1], last

        dz, more = made.backward(passed_back(end)[2])
        into, decays, _ = passed_back(end + dz)
    for a, b in zip([*into, *(d + more for d in decays)], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_single_token_is_one_step_of_the_recurrence(groups: int, with_state: bool) -> None:
    g = torch.Generator().manual_seed(3)
    initial = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=g).requires_grad_() if with_state else None
    compare(inputs(1, groups=groups, decay=(0.01, 2.0)), None, 8, initial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_one_by_one_equal_the_row(dtype: torch.dtype) -> None:
    values = {n: v.detach().to(torch.float32 if n in ("dt", "A", "D") else dtype) for n, v in inputs(9).items()}
    want, want_state = ssd_scan(*values.values(), chunk_size=4)
    state, outputs = None, []
    for t in range(9):
        token = [v if n in "AD" else v[:, t : t + 1] for n, v in values.items()]
        y, state = ssd_scan(*token, chunk_size=4, initial_state_BHPN=state)
        assert y.dtype == dtype and state.dtype == torch.float32
        outputs.append(y)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-5)
