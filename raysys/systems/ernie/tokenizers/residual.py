"""Residual vector quantisation: a vector as one code of each of several codebooks, each for what the ones before left over.

Shapes: vectors (..., D), codes (..., Q), codebooks (Q, K, D).

Notable choices
- Code 0 of every codebook is the zero vector and stays it: a level can always decline, so the error never rises from one level to
  the next, for whatever vectors.
- Codebooks follow averages of the vectors that chose them (van den Oord et al. 2017, appendix), in `observe`, which is called
  between training steps. There is no gradient to a codebook.
- A code that hardly anything chooses any more starts again at a vector of the batch, drawn by the generator that is handed in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualQuantiser(nn.Module):
    """Q codebooks of K vectors. All state is in buffers.

    Args:
        momentum: how slowly codes follow the vectors that choose them.
        dead: a code that is chosen less often than `dead` times its fair share starts again.
    """

    codebooks: Tensor
    counts: Tensor
    sums: Tensor
    seen: Tensor

    def __init__(self, levels: int, codes: int, width: int, momentum: float = 0.95, dead: float = 0.05) -> None:
        super().__init__()
        if levels < 1 or codes < 2 or width < 1:
            raise ValueError(f"expected levels, at least 2 codes and a width, got {levels}, {codes} and {width}")
        self.levels, self.codes, self.width, self.momentum, self.dead = levels, codes, width, momentum, dead
        self.register_buffer("codebooks", torch.zeros(levels, codes, width))
        self.register_buffer("counts", torch.zeros(levels, codes))
        self.register_buffer("sums", torch.zeros(levels, codes, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def encode(self, vectors: Tensor) -> Tensor:
        """Codes (..., Q) int64: at each level the nearest vector to what is left; of equal ones the first."""
        left, found = vectors, []
        for book in self.codebooks:
            found.append(_nearest(left, book))
            left = left - book[found[-1]]
        return torch.stack(found, -1)

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """The sum (..., D) of the vectors of codes (..., Q), or of the first `levels` of them."""
        if codes.shape[-1] != self.levels:
            raise ValueError(f"codes: got {tuple(codes.shape)}; expected (..., {self.levels})")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise ValueError(f"codes: got {int(codes.min())} to {int(codes.max())}; expected 0 to {self.codes - 1}")
        use = self.levels if levels is None else levels
        return torch.stack([F.embedding(codes[..., q], self.codebooks[q]) for q in range(use)]).sum(0)

    def pull(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """How far what each level is given lies from the vector that it chose: the commitment loss, a scalar."""
        left, total = vectors, vectors.new_zeros(())
        for q, book in enumerate(self.codebooks):
            chosen = F.embedding(codes[..., q], book)
            total = total + (left - chosen).square().mean()
            left = left - chosen
        return total / self.levels

    @torch.no_grad()
    def observe(self, vectors: Tensor, generator: torch.Generator, restart: bool = True) -> None:
        """Let the codebooks follow vectors (..., D); the first call draws them from these vectors."""
        left = vectors.reshape(-1, self.width)
        for q in range(self.levels):
            if not int(self.seen):
                drawn = torch.randint(len(left), (self.codes - 1,), generator=generator).to(left.device)
                self.codebooks[q, 1:] = left[drawn]
                self.counts[q] = len(left) / self.codes
                self.sums[q] = self.codebooks[q] * self.counts[q, :, None]
            chosen = _nearest(left, self.codebooks[q])
            one = F.one_hot(chosen, self.codes).to(left.dtype)
            self.counts[q].lerp_(one.sum(0), 1 - self.momentum)
            self.sums[q].lerp_(one.T @ left, 1 - self.momentum)
            after = left - self.codebooks[q][chosen]
            self.codebooks[q, 1:] = self.sums[q, 1:] / self.counts[q, 1:, None].clamp_min(1e-3)
            fair = len(left) / self.codes
            lost = (self.counts[q] < self.dead * fair).nonzero()[:, 0]
            lost = lost[lost > 0]
            if restart and len(lost):
                drawn = torch.randint(len(left), (len(lost),), generator=generator).to(left.device)
                self.codebooks[q, lost] = left[drawn]
                self.counts[q, lost] = fair
                self.sums[q, lost] = left[drawn] * fair
            left = after
        self.seen += 1

    def usage(self, codes: Tensor) -> Tensor:
        """How often each code occurs in codes (..., Q): (Q, K) shares."""
        flat = codes.reshape(-1, self.levels)
        return torch.stack([torch.bincount(flat[:, q], minlength=self.codes) for q in range(self.levels)]) / len(flat)


def _nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """Positions (...) in a codebook (K, D) of the nearest to vectors (..., D)."""
    return (book.square().sum(-1) - 2 * vectors @ book.T).argmin(-1)
