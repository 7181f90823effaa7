"""The operations a GPT is made of, one page each: contract, PyTorch reference, public function.

Each public function checks its arguments (ValueError, by metadata alone) and then runs whatever `fastgpt.native`
selects for the device. Importing this needs torch and nothing else.
"""

from fastgpt.ops.adamw import adamw_
from fastgpt.ops.attention import attention
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.documents import document_bounds
from fastgpt.ops.embedding import embedding
from fastgpt.ops.gelu import gelu
from fastgpt.ops.grad_norm import grad_norm
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.rms_norm import rms_norm
from fastgpt.ops.rotary import rotary, rotary_tables
from fastgpt.ops.swiglu import swiglu

__all__ = [
    "adamw_",
    "attention",
    "cross_entropy",
    "document_bounds",
    "embedding",
    "gelu",
    "grad_norm",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "swiglu",
]
