"""Exercise 8: the losses of a projection, by chunks of the vocabulary."""

import torch


def loss_by_columns(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, columns: int) -> torch.Tensor:
    """Losses (N,) of x (N, C) through weight (V, C) against targets (N,), in nats: of each row of logits

        ln(sum_j e^(logits_j)) - logits_target          logits = x @ weight.T

    Only `columns` columns of logits may be there at a time; in the last chunk perhaps fewer. What is known of each row
    after some chunks is the pair of the chapter, and the logit of its target, once that has come by. Logits may be in
    the thousands, either way, and be -inf; a chunk in which a row has nothing but -inf adds nothing to it. No gradient
    is asked for, and there is no loop over rows.
    """
    peak, total = x.new_full((len(x),), -float("inf")), x.new_zeros(len(x))
    of_target = x.new_zeros(len(x))
    for first in range(0, len(weight), columns):
        logits = x @ weight[first : first + columns].T
        larger = torch.maximum(peak, logits.amax(1))
        base = larger.clamp(min=torch.finfo(x.dtype).min)  # -inf less -inf would be NaN
        total = total * (peak - base).exp() + (logits - base[:, None]).exp().sum(1)
        peak = larger
        inside = (targets >= first) & (targets < first + logits.shape[1])
        column = torch.where(inside, targets - first, 0)
        of_target = torch.where(inside, logits.gather(1, column[:, None]).squeeze(1), of_target)
    return (peak - of_target) + total.log()
