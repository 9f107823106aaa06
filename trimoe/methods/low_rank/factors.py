"""Factors of one matrix: truncated under a second moment of its inputs, and the refit of what follows a factored one.

Letters: m x n a matrix, r rank, I expert width, O = 2I (gated) or I, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import eigh

from trimoe.model.expert import activate, run_expert
from trimoe.modeling_trimoe import DENSE
from trimoe.walk.expert_inputs import DAMP, ExpertInputs, damped

RIDGE = 0.03  # of the mean diagonal, added to second moments where the last projection is refitted


@dataclass
class Cut:
    """W ~ u_mr @ v_rn, or the whole matrix where the decision is to leave it dense."""

    u_mr: torch.Tensor | None
    v_rn: torch.Tensor | None
    whole: torch.Tensor | None = None

    @property
    def product(self) -> torch.Tensor:
        return self.whole if self.whole is not None else self.u_mr @ self.v_rn  # type: ignore[operator]


@dataclass
class Joined:
    """The cuts of gate and up, of one rank, stored one behind the other: u_mr [I, 2r], v_rn [2r, H]."""

    cuts: tuple[Cut, ...]
    concatenated: bool
    whole: None = None

    @property
    def u_mr(self) -> torch.Tensor:
        return torch.cat([cut.u_mr for cut in self.cuts], 1)  # type: ignore[misc]

    @property
    def v_rn(self) -> torch.Tensor:
        return torch.cat([cut.v_rn for cut in self.cuts])  # type: ignore[misc]

    @property
    def product(self) -> torch.Tensor:
        """In the order that the rows of the first projection have."""
        parts = [cut.product for cut in self.cuts]
        return torch.cat(parts) if self.concatenated else torch.stack(parts, 1).flatten(0, 1)


def apart(experts: Any, w_OH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate [I, H], up [I, H]): the halves of the first projection's rows, or every other row."""
    if experts.is_concatenated:
        return w_OH[: len(w_OH) // 2], w_OH[len(w_OH) // 2 :]
    return w_OH[::2], w_OH[1::2]


def factor(w_mn: torch.Tensor, moment: torch.Tensor | None, rank: int) -> Cut:
    """The best rank-r approximation of W under ||(W - UV) S||_F, C = S S^T: U = Q_r, V = Q_r^T W, Q the left singular vectors of W S."""
    if rank == DENSE:
        return Cut(None, None, whole=w_mn.clone())
    w = w_mn.double()
    whitened = w if moment is None else w @ torch.linalg.cholesky(moment)
    if w.shape[0] <= w.shape[1]:
        _, q_mr = leading(whitened @ whitened.T, rank)
    else:
        values, right = leading(whitened.T @ whitened, rank)
        size = values.clamp_min(0).sqrt()
        q_mr = whitened @ right / size.clamp_min(float(size.max()) * 1e-9 + 1e-300) if rank else whitened[:, :0]
    return Cut(q_mr.to(w_mn.dtype), (q_mr.T @ w).to(w_mn.dtype))


def leading(gram_NN: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenvalues, largest first, and their eigenvectors [N, count], each with its largest number positive: LAPACK's
    signs turn with the last bits, so with the number of threads. On a CPU its relatively robust representations find a few of the
    eigenvectors in less time than all of them take (LOG.md)."""
    size = len(gram_NN)
    if gram_NN.device.type == "cpu" and 0 < count <= size // 3:
        span = (size - count, size - 1)
        values, vectors = (torch.from_numpy(part) for part in eigh(gram_NN.numpy(), subset_by_index=span, driver="evr", check_finite=False))
    else:
        values, vectors = (part[..., size - count :] for part in torch.linalg.eigh(gram_NN))
    vectors = vectors.flip(1)
    return values.flip(0), vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def spectrum(w_mn: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """Squared singular values of W S, largest first, [min(m, n)] float64."""
    w = w_mn.double()
    whitened = w if moment is None else w @ torch.linalg.cholesky(moment)
    gram = whitened @ whitened.T if w.shape[0] <= w.shape[1] else whitened.T @ whitened
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def refit(experts: Any, expert: int, given: ExpertInputs, cut_in: Cut | Joined, w_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last projection that, on the factored first one's activations h', best gives back the original outputs W_out h (ridge least
    squares), and the second moment of h' to whiten it with: M = W_out (C_hh' + mu I)(C_h'h' + mu I)^-1."""
    old, new = [], []
    for x in (given.x_SH, given.pool_PH):
        old.append(run_expert(experts, expert, x)[0])
        new.append(activate(experts, expert, x @ cut_in.product.T))
    moment = given.blended(new[0], new[0], new[1], new[1])
    cross = given.blended(old[0], new[0], old[1], new[1])
    ridge = torch.diag_embed((RIDGE * moment.diagonal().mean() + 1e-12).expand(len(moment)))
    target = torch.linalg.solve(moment + ridge, (w_out.double() @ (cross + ridge)).T).T
    return target.to(w_out.dtype), damped(moment, DAMP)
