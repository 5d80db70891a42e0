"""Muon for many matrices at once: momentum whose singular values are all made about 1, by a few matrix products.

torch.optim.Muon does the same one matrix after another, which on a GPU is some fifty small kernels for each of a
hundred matrices. Here matrices of one shape are one batch. Source: Jordan et al., "Muon: an optimizer for hidden
layers in neural networks" (2024), https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iterated quintic, chosen to raise small singular values fastest."""
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay. Tall matrices take steps sqrt(rows / columns) times as
    large.

    All parameters are matrices. The state is one `momentum_buffer` per matrix.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if any(matrix.dim() != 2 for group in self.param_groups for matrix in group["params"]):
            raise ValueError("Muon trains matrices only")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
                kept = [self._momentum(matrix) for matrix in matrices]
                torch._foreach_lerp_(kept, gradients, 1 - MOMENTUM)
                ahead = torch._foreach_lerp(gradients, kept, MOMENTUM)
                updates = orthogonal(torch.stack(ahead)).to(matrices[0].dtype).unbind()
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> bfloat16: the same singular vectors, and singular values of 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
