"""The GPU kernels in Triton, one module per op.

Installed as ``pwm_fast.kernels``. Importing this package does not import triton: each kernel module
does that for itself, so that the package also imports where triton does not exist.
"""

import pkgutil

#: Names of the modules. A kernel's name begins with that of its module.
STEMS = frozenset(info.name for info in pkgutil.iter_modules(__path__))
