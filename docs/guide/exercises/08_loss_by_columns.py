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
    # Your code goes here.
