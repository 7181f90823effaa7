"""`make demo`: real text, a tokenizer, a model trained in three minutes, and how good it became.

corpus       the text, and which part of it is held out
settings     the model and how it is trained
completions  what the model writes after `def f(x):`, and how it is judged
compressors  gzip and xz on the same bytes
plain_gpt    the loop that speed is measured against
speed        both loops, in turns
kernels      the CUDA kernels on this CPU, for some seconds
screen       the terminal
__main__     the order of events
"""
