"""Exercise 1: an n-gram model that asks shorter contexts when longer ones have little to say."""


def probabilities(text: bytes, context: bytes, strength: float) -> list[float]:
    """The probability of each of the 256 bytes to come after `context`, by what followed it in `text`.

    Every order is blended with the one below it. With n(s) for how often the bytes s are followed by some byte in
    `text` (overlaps count), n(s, b) for how often by the byte b, and s' for s without its first byte,

        P(b | s) = (n(s, b) + strength * P(b | s')) / (n(s) + strength)

    which is the same rule for the empty context, after which every byte of `text` comes once; what it is blended with
    is the uniform distribution, 1 / 256 each. So a context never seen gives exactly what the shorter one gives.

    text may be empty. strength is more than 0. Returns 256 numbers that sum to 1.

    After MacKay & Peto, A hierarchical Dirichlet language model, 1995.
    """
    shorter = probabilities(text, context[1:], strength) if context else [1 / 256] * 256
    counts = [0] * 256
    at = text.find(context)
    while 0 <= at < len(text) - len(context):
        counts[text[at + len(context)]] += 1
        at = text.find(context, at + 1)
    total = sum(counts) + strength
    return [(n + strength * p) / total for n, p in zip(counts, shorter, strict=True)]
