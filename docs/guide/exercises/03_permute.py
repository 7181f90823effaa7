"""Exercise 3: a permutation of any size that needs no list."""


def scramble(x: int, key: int) -> int:
    """Any function of two numbers will do; this is the chapter's."""
    x = (x + 0x9E3779B97F4A7C15 * (key + 1)) % 2**64
    x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9 % 2**64
    return x ^ (x >> 29)


def feistel(index: int, half_bits: int, key: int, rounds: int = 6) -> int:
    """The chapter's permutation of 0 .. 4**half_bits - 1."""
    left, right = index >> half_bits, index % 2**half_bits
    for r in range(rounds):
        left, right = right, left ^ (scramble(right, 1000 * key + r) % 2**half_bits)
    return left << half_bits | right


def permute(index: int, n: int, key: int) -> int:
    """Where a permutation of 0 .. n - 1 sends `index`; each key gives a permutation of its own.

    `feistel` permutes the numbers below the least power of four that is n or more. Where it sends `index` to a number
    below n, that is the answer. Where it does not, send that number on with the same key, and again, until one is
    below n. (Why does this end, and why do no two indexes meet? Every permutation consists of cycles. Follow the
    cycle that `index` is on: at the latest it comes back to `index` itself, which is below n; and two indexes that
    skip the same numbers of a cycle, each in its own gap, never meet.)

    Uses no memory that grows with n. 0 <= index < n.
    """
    # Your code goes here.
