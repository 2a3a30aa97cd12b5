"""nn.LSTM, nn.GRU and nn.RNN as one operator while tracing, as cuDNN runs them; the CPU would loop over time steps.

Autograd keeps what cuDNN's needs: the input, the states, the output and a *reserve* of gates and cell states.
Sequences of different lengths (PackedSequence) count with the length of the longest. Tracing reads shapes only: on
real tensors the gradients are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_library = torch.library.Library("tpplan", "FRAGMENT")
_HOW = "str mode, int num_layers, bool biases, bool bidirectional, bool batch_first"
_library.define(
    f"_rnn(Tensor input, Tensor hx, Tensor? cx, Tensor[] weights, {_HOW}, Tensor? batch_sizes)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "_rnn_backward(Tensor? grad_out, Tensor? grad_hy, Tensor? grad_cy, Tensor input, Tensor hx, Tensor? cx,"
    f" Tensor[] weights, Tensor output, Tensor reserve, {_HOW}, bool input_gradient, bool state_gradient)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor[])"
)
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# Elements of cuDNN's reserve for each step, sample, layer, direction and hidden unit (measured with cuDNN 9.19).
RESERVE = {"lstm": 5, "gru": 6, "rnn_tanh": 1, "rnn_relu": 1}


def _steps(input: torch.Tensor, packed: bool) -> int:
    """Time steps times samples."""
    return input.shape[0] if packed else input.shape[0] * input.shape[1]


def reserve_elements(mode: str, num_layers: int, directions: int, hidden: int, out: int) -> int:
    """Elements of cuDNN's reserve for one step and sample: gates and cell states, and outputs between layers.

    A projection (`out` smaller than `hidden`) keeps what it reads and makes. Measured on an H200 for 1 to 3 layers,
    1 and 2 directions, float32 and bfloat16 (equal but for 256 bytes; a bit for each element that dropout draws
    comes on top).

    >>> reserve_elements("lstm", 2, 1, 256, 256) / 256, reserve_elements("lstm", 1, 1, 256, 64) / 256
    (11.0, 6.25)
    """
    projection = hidden + out if out != hidden else 0
    return directions * (num_layers * (RESERVE[mode] * hidden + projection) + (num_layers - 1) * hidden)


def _forward_fake(
    input: Any, hx: Any, cx: Any, weights: Any, mode: str, num_layers: int, biases: bool, bidirectional: bool,
    batch_first: bool, batch_sizes: Any,
) -> Any:  # fmt: skip
    directions = 2 if bidirectional else 1
    output = input.new_empty(*input.shape[:-1], directions * hx.shape[-1])
    hidden = weights[0].shape[0] // GATES[mode]
    kept = reserve_elements(mode, num_layers, directions, hidden, hx.shape[-1])
    kept *= _steps(input, batch_sizes is not None)
    cy = torch.empty_like(cx) if cx is not None else input.new_empty(0)
    return output, torch.empty_like(hx), cy, input.new_empty(kept)


def _forward(input: Any, hx: Any, cx: Any, weights: Any, mode: str, num_layers: int, *how: Any) -> Any:
    biases, bidirectional, batch_first, batch_sizes = how
    run: Callable[..., Any] = getattr(torch, mode)
    state = hx if cx is None else [hx, cx]
    common = (state, weights, biases, num_layers, 0.0, True, bidirectional)
    if batch_sizes is not None:
        made = run(input, batch_sizes, *common)
    else:
        made = run(input, *common, batch_first)
    like = _forward_fake(input, hx, cx, weights, mode, num_layers, biases, bidirectional, batch_first, batch_sizes)
    return tuple(real.contiguous() if i < len(made) else like[i] for i, real in enumerate((*made, *like[len(made) :])))


def _backward(
    grad_out: Any, grad_hy: Any, grad_cy: Any, input: Any, hx: Any, cx: Any, weights: Any, output: Any, reserve: Any,
    mode: str, num_layers: int, biases: bool, bidirectional: bool, batch_first: bool, input_gradient: bool,
    state_gradient: bool,
) -> Any:  # fmt: skip
    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)

    return (
        zeros(input) if input_gradient else None,
        zeros(hx) if state_gradient else None,
        zeros(cx) if state_gradient and cx is not None else None,
        [zeros(w) for w in weights],
    )


_library.impl("_rnn", _forward_fake, "Meta")
_library.impl("_rnn", _forward, "CPU")
_library.impl("_rnn_backward", _backward, "Meta")
_library.impl("_rnn_backward", _backward, "CPU")


class _Rnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: tuple[Any, ...], input: Any, hx: Any, cx: Any, batch_sizes: Any, *weights: Any) -> Any:
        output, hy, cy, reserve = torch.ops.tpplan._rnn(input, hx, cx, weights, *how, batch_sizes)
        ctx.save_for_backward(input, hx, cx, output, reserve, *weights)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return output, hy, cy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, hx, cx, output, reserve, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        made = torch.ops.tpplan._rnn_backward(
            *grads, input, hx, cx, weights, output, reserve, *ctx.how, needs[1], needs[2] or needs[3]
        )
        of_input, of_hx, of_cx, of_weights = made
        wanted = (g if n else None for g, n in zip(of_weights, needs[5:], strict=True))
        return None, of_input, of_hx, of_cx, None, *wanted


def _run(mode: str, args: Sequence[Any]) -> Any:
    """What ``torch.lstm`` and its like take: (input, state, ...) or (data, batch_sizes, state, ...) when packed."""
    packed = isinstance(args[1], torch.Tensor) and isinstance(args[3], (list, tuple))
    input, batch_sizes = args[0], args[1] if packed else None
    state, weights, biases, num_layers, _, _, bidirectional, *rest = args[2 if packed else 1 :]
    hx, cx = (state[0], state[1]) if isinstance(state, (list, tuple)) else (state, None)
    how = (mode, num_layers, biases, bidirectional, bool(rest and rest[0]))
    output, hy, cy = _Rnn.apply(how, input, hx, cx, batch_sizes, *weights)  # type: ignore[misc]
    return (output, hy) if cx is None else (output, hy, cy)


def _pack(input: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What `pack_padded_sequence` asks for, with every sequence as long as the longest."""
    steps = input.transpose(0, 1) if batch_first else input
    sizes = torch.full((steps.shape[0],), steps.shape[1], dtype=torch.int64)
    return steps.reshape(-1, *steps.shape[2:]), sizes


def _pad(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of `_pack`."""
    steps = batch_sizes.shape[0]
    padded = data.reshape(steps, -1, *data.shape[1:])
    lengths = torch.full((padded.shape[1],), steps, dtype=torch.int64)
    return (padded.transpose(0, 1) if batch_first else padded), lengths


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    **{getattr(torch, mode): lambda *args, mode=mode: _run(mode, args) for mode in GATES},
    torch._C._VariableFunctions._pack_padded_sequence: _pack,  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._VariableFunctions._pad_packed_sequence: _pad,  # pyright: ignore[reportAttributeAccessIssue]
}


def stand_in_for(func: Any) -> Callable[..., Any] | None:
    """What runs in place of a recurrent network's function of torch, None for all other functions."""
    return _FUNCTIONS.get(func)


def is_rnn(name: str) -> bool:
    """Whether an operator (without its namespace) is one of the two here."""
    return name in ("_rnn", "_rnn_backward")


def rnn_products(name: str, args: Sequence[Any]) -> list[tuple[str, float, tuple[float, ...]]]:
    """(wrt, FLOPs, gemm dimensions) of each kernel of a recurrent network's operator, by its arguments.

    FLOPs = 2 x steps x samples x (elements of all weight matrices: w_ih [gates h, in], w_hh [gates h, out] and with
    a projection w_hr [out, h], for each layer and direction); backward as much for the input and for the weights,
    w_ih of the first layer left out of the former where the input needs no gradient. The dimensions are those of
    the products one by one, step after step: (steps x layers x directions, samples, gates x h, mean fan-in).
    """
    backward = name == "_rnn_backward"
    (input, hx), weights = args[3:5] if backward else args[:2], args[6 if backward else 3]
    num_layers, bidirectional = args[10 if backward else 5], args[12 if backward else 7]
    chains = num_layers * (2 if bidirectional else 1)
    samples = hx.shape[1]
    steps = input.shape[:-1].numel() / samples
    matrices = [tuple(w.shape) for w in weights if w.dim() == 2]
    gates = matrices[0][0]

    def product(wrt: str, elements: int) -> tuple[str, float, tuple[float, ...]]:
        flops = 2 * steps * samples * elements
        return wrt, flops, (steps * chains, samples, gates, elements / (chains * gates))

    every = sum(m * n for m, n in matrices)
    if not backward:
        return [product("forward", every)]
    first = 0 if args[14] else sum(m * n for m, n in matrices[:: len(matrices) // chains][: chains // num_layers])
    return [product("input", every - first), product("weight", every)]
