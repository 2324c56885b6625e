"""Triton's interpreter patches `triton.language` anew for every call of a jitted helper, 7 ms each time. The kernel's
own call has done it already; once for each module of Triton's standard library is enough. This makes the tests many
times faster and changes nothing else."""

import sys


def pytest_collection_finish():
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    patched = set()

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        if names.get("tl") is not interpreter.tl and names["__name__"] not in patched:
            patched.add(names["__name__"])
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
