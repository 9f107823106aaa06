"""The exact loss of any set of dropped experts, without running an expert again.

Per token, F(X) - F(X; E minus P) = sum_e c_te y_te with c = g(all) - g(survivors), so its squared norm is c^T G c with the Gram
G_t = Y_t Y_t^T of the expert outputs. A candidate costs a re-routing and a small quadratic form.

Where a token's choice is "the k best survivors of one order" (every ungrouped router but sparsemixer), everything lives in that order:
position 0 is the token's best expert, and only the first few positions can ever be used. Otherwise the 2k experts chosen before and
after are gathered from the full Gram, or where groups choose by sigmoid from one among the first few of every group.

Letters: T search tokens, P candidates, E experts, M experts in reach, R positions looked at, k chosen.
"""

from __future__ import annotations

import torch

from trimoe.calibration.search_tokens import in_group
from trimoe.calibration.statistics import LayerStats

TINY = 1e-12  # probability left to the survivors below which it is computed anew
CHUNK = 1 << 22  # elements of a temporary: small enough to stay near the cache, large enough to keep the kernels busy


class SubsetLoss:
    """`loss(drop_PE)`: relative layer loss ||F(X) - F(X; E\\P)||_F / ||F(X)||_F of each candidate (float64 [P]); rows of `drop_PE` are
    sets of experts to drop (bool). Exact for sets of at most `max_drop` experts."""

    def __init__(self, stats: LayerStats, *, device: str | torch.device = "cpu"):
        assert stats.search, "no search tokens were gathered"
        self.rule, self.device = stats.rule, torch.device(device)
        self.logits_TE = stats.search["logits_TE"].to(self.device)
        self.order_TM = stats.search["order_TM"].to(self.device)
        self.gram_TMM = stats.search["gram_TMM"].to(self.device)
        self.weight_T = stats.search["weight_T"].to(self.device)
        self.bias_E = None if stats.bias_E is None else stats.bias_E.to(self.device)
        self.num_experts = self.logits_TE.shape[1]
        reach = self.order_TM.shape[1]
        self.max_drop = self.num_experts - self.rule.min_experts
        if reach < self.num_experts:
            seen = self.rule.top_k if self.rule.ordered else self.rule.groups * in_group(self.rule)
            self.max_drop = min(self.max_drop, reach - seen)
        if self.rule.ordered:
            self._prepare_order()
        else:
            self._prepare_groups()
        self.norm = float(self._sum(self._full_energy()).clamp_min(1e-30).sqrt())

    def __call__(self, drop_PE: torch.Tensor) -> torch.Tensor:
        drop_PE = drop_PE.to(self.device)
        most = int(drop_PE.sum(1).max()) if len(drop_PE) else 0
        assert most <= self.max_drop, f"{most} experts dropped, the Gram reaches {self.max_drop}"
        squared = self._ordered(drop_PE) if self.rule.ordered else self._regrouped(drop_PE)
        return squared.clamp_min(0).sqrt().cpu() / self.norm

    def _sum(self, square_T: torch.Tensor) -> torch.Tensor:
        """Over the last axis, each search token for as many as it stands for."""
        return (square_T * self.weight_T).sum(-1, dtype=torch.float64)

    @property
    def plain_softmax(self) -> bool:
        """Softmax over all experts, not renormalised: the weights of survivors grow when others go."""
        return self.rule.score == "softmax" and not self.rule.renormalise

    # ---- ungrouped routers: positions in each token's own order

    def _prepare_order(self) -> None:
        """Everything by position in the order, the full routing included: ties are then broken alike before and after a drop."""
        self.prob_TE = self.logits_TE.softmax(-1) if self.rule.score == "softmax" else self.logits_TE.sigmoid()
        by_logit = self.rule.renormalise and self.rule.score == "softmax"
        self.base_TM = (self.logits_TE if by_logit else self.prob_TE).gather(1, self.order_TM)
        self.full_TM, _ = self._position_weights(torch.ones_like(self.order_TM, dtype=torch.bool), self.base_TM, None)

    def _full_energy(self) -> torch.Tensor:
        """||F(x_t)||^2 of each search token."""
        if self.rule.ordered:
            return (torch.bmm(self.full_TM.unsqueeze(1), self.gram_TMM).squeeze(1) * self.full_TM).sum(-1)
        return self._gathered(self.full_weights_TK, torch.zeros_like(self.full_weights_TK), self.full_index_TK, self.full_index_TK)

    def _ordered(self, drop_PE: torch.Tensor) -> torch.Tensor:
        tokens, reach = self.order_TM.shape
        top_k = self.rule.top_k
        first = min(reach, -(-max(2 * top_k, top_k + 4) // 4) * 4)
        out = []
        for drop in drop_PE.split(max(1, CHUNK // (tokens * first))):
            total_TP = self.prob_TE @ (~drop).T.to(self.prob_TE.dtype) if self.plain_softmax else None
            alive_TPR = ~drop.T[self.order_TM[:, :first]].transpose(1, 2)  # drop.T[order] is [T, R, P]
            weights, enough_TP = self._position_weights(
                alive_TPR, self.base_TM[:, None, :first], None if total_TP is None else total_TP.unsqueeze(-1)
            )
            if total_TP is not None:
                enough_TP = enough_TP & (total_TP > TINY)
            c_TPR = self.full_TM[:, None, :first] - weights
            quad_TP = (torch.bmm(c_TPR, self.gram_TMM[:, :first, :first]) * c_TPR).sum(-1)
            token, cand = (~enough_TP).nonzero(as_tuple=True)
            if len(token):
                quad_TP[token, cand] = self._far(drop, token, cand)
            out.append(self._sum(quad_TP.T))
        return torch.cat(out) if out else torch.zeros(0, dtype=torch.float64)

    def _far(self, drop_PE: torch.Tensor, token_N: torch.Tensor, cand_N: torch.Tensor) -> torch.Tensor:
        """The few (token, candidate) pairs whose k survivors lie further down the order, or beside which the dropped ones were so
        probable that dividing by what is left would lose all digits: over the whole reach, from the survivors' own softmax."""
        reach = self.order_TM.shape[1]
        parts = []
        for at in torch.arange(len(token_N), device=self.device).split(max(1, CHUNK // max(reach**2, self.num_experts))):
            token, dropped_NE = token_N[at], drop_PE[cand_N[at]]
            alive = ~dropped_NE.gather(1, self.order_TM[token])
            base = self.base_TM[token]
            if self.plain_softmax:
                base = self.logits_TE[token].masked_fill(dropped_NE, -torch.inf).softmax(-1).gather(1, self.order_TM[token])
            weights, _ = self._position_weights(alive, base, None)
            c_NM = self.full_TM[token] - weights
            parts.append((torch.bmm(c_NM.unsqueeze(1), self.gram_TMM[token]).squeeze(1) * c_NM).sum(-1))
        return torch.cat(parts)

    def _position_weights(self, alive: torch.Tensor, base: torch.Tensor, total: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Routing weights of the first k living positions (last axis), and whether k were found."""
        rank = alive.cumsum(-1, dtype=torch.int32)
        chosen = alive & (rank <= self.rule.top_k)
        enough = rank[..., -1] >= self.rule.top_k
        if self.rule.score == "softmax" and self.rule.renormalise:
            weights = torch.where(chosen, base, -torch.inf).softmax(-1).nan_to_num_(0.0)
        else:
            weights = base * chosen
            if total is not None:
                weights = weights / total.clamp_min(TINY)
            elif self.rule.renormalise:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return (weights if self.rule.scale == 1.0 else weights * self.rule.scale), enough

    # ---- grouped routers and sparsemixer: the experts chosen before and after, from the full Gram or that of each group's first

    def _prepare_groups(self) -> None:
        """Routing among those of which there are products, by their places: ties are broken alike before and after a drop."""
        self.within = self.order_TM.shape[1] < self.num_experts
        self.seen_TM = self.logits_TE.gather(1, self.order_TM) if self.within else self.logits_TE
        self.seen_bias = self.bias_E[self.order_TM] if self.within and self.bias_E is not None else self.bias_E
        self.full_weights_TK, self.full_index_TK = self.rule.route(self.seen_TM, self.seen_bias)

    def _regrouped(self, drop_PE: torch.Tensor) -> torch.Tensor:
        tokens, top_k = self.full_index_TK.shape
        out = []
        for drop in drop_PE.split(max(1, CHUNK // (tokens * max(4 * top_k * top_k, self.num_experts)))):
            keep = ~(drop[:, self.order_TM] if self.within else drop.unsqueeze(1))
            weights_PTK, index_PTK = self.rule.route(self.seen_TM, self.seen_bias, keep)
            out.append(self._sum(self._gathered(self.full_weights_TK, weights_PTK, self.full_index_TK, index_PTK)))
        return torch.cat(out) if out else torch.zeros(0, dtype=torch.float64)

    def _gathered(self, before: torch.Tensor, after: torch.Tensor, index_before: torch.Tensor, index_after: torch.Tensor) -> torch.Tensor:
        """Quadratic form of (before at index_before) - (after at index_after); an expert in both simply appears twice. [..., T]"""
        before, after = torch.broadcast_tensors(before, after)
        index_before, index_after = torch.broadcast_tensors(index_before, index_after)
        c, index = torch.cat([before, -after], -1), torch.cat([index_before, index_after], -1)
        reach = self.gram_TMM.shape[-1]
        cell = (index.unsqueeze(-1) * reach + index.unsqueeze(-2)).flatten(-2)
        flat = self.gram_TMM.flatten(1).expand(*cell.shape[:-1], -1)
        gram = flat.gather(-1, cell).unflatten(-1, index.shape[-1:] * 2)
        return torch.einsum("...i,...ij,...j->...", c, gram, c)
