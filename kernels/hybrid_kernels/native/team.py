"""Worker threads that live as long as the model and sleep between tokens, and the programs they run together.

A program is a list of kernels with their arguments, prepared once and run many times: a whole token is one call from
Python, which lets go of the GIL. Workers draw shares of each operation's work from a counter, so that one which another
process has pushed aside holds up the others by one share only.
"""

from __future__ import annotations

import ctypes

MOST_THREADS = 256
_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)
