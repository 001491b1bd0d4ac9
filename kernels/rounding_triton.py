"""What the kernels need where Triton's interpreter, which the tests use, rounds otherwise than a GPU does."""

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)  # the tests' interpreter, whose bfloat16 arithmetic is wrong


@triton.jit
def rounded(x, pointer, INTERPRET: tl.constexpr):
    """float32 x in the type that the pointer points to, rounded to nearest even (the interpreter truncates)."""
    if INTERPRET and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(pointer.dtype.element_ty)
