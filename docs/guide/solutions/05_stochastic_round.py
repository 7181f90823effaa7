"""Exercise 5: round to bf16 at random, and be right on average."""

import torch
from torch import Tensor


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down at random, with the exact value as the mean.

    A bf16 number is an fp32 number whose lower 16 bits are zero. So every fp32 value lies between two neighbours in
    bf16 (or is one: then it stays). Of the way from the one nearer to zero to the other, let it have come the share p,
    which is its lower 16 bits as a whole number, divided by 2**16. Take the far one with probability p, else the near
    one.

    With whole numbers this is one addition: `x.view(torch.int32)` shows the bits of x as integers. Add a random
    integer from 0 to 2**16 - 1 to each (drawn from `generator`), which carries into the upper half just as often as it
    should; set the lower 16 bits to zero; and view the result as fp32 again.

    x: any shape, fp32, finite. Returns a new tensor of the same shape in bf16; x stays as it is.
    """
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, generator=generator)
    bits = (x.view(torch.int32) + noise) & -(2**16)
    return bits.view(torch.float32).bfloat16()
