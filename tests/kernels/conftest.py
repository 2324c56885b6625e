"""What Triton's interpreter lacks, for every test that runs a kernel in it.

It patches `triton.language` anew for every call of a jitted helper, 7 ms each time. The kernel's own call has done it
already; once for each module of Triton's standard library is enough. This makes the tests many times faster and changes
nothing else.

It keeps bfloat16 as 16 bits: it cuts float32 off to make one, and multiplies matrices of them as integers. A GPU rounds
to the nearest, and so does it here; products widen their operands first.
"""

import sys

import numpy as np


def pytest_collection_finish():
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        patch_once(interpreter)
        mend_bfloat16(interpreter)


def patch_once(interpreter):
    patched = set()

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        if names.get("tl") is not interpreter.tl and names["__name__"] not in patched:
            patched.add(names["__name__"])
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def mend_bfloat16(interpreter):
    tl, builder = interpreter.tl, interpreter.InterpreterBuilder
    cast, product = builder.cast_impl, builder.create_dot

    def cast_impl(self, operand, into):
        if (operand.dtype.scalar, into.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, operand, into)
        bits = operand.data.view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        rounded = np.where(np.isnan(operand.data), 0x7FC0, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    def widen(self, operand):
        return cast(self, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand

    def create_dot(self, a, b, *args):
        return product(self, widen(self, a), widen(self, b), *args)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
