"""Fast flow-matching world models for reinforcement learning.

``pwm_fast.ops`` is the library of operations; ``python -m pwm_fast.train`` the trainer.
Importing this package, or ``pwm_fast.ops``, needs torch alone.

- :func:`accelerate`: run somebody's own modules on the operations.
- :func:`explain`: what a call of an operation would do.
- :func:`load_published`: a checkpoint of PWM, Flow-MBPO-PWM or TD-MPC2.
- :func:`backend`, :class:`BackendError`: which backend runs; see :mod:`pwm_fast.backends`.
"""

import os
import pkgutil
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwm_fast.acceleration import accelerate as accelerate
    from pwm_fast.backends.select import BackendError as BackendError
    from pwm_fast.backends.select import backend as backend
    from pwm_fast.backends.select import precision as precision
    from pwm_fast.explanation import explain as explain
    from pwm_fast.published import load_published as load_published

# A plain (not editable) install keeps the compiled extension in site-packages. Extending the path
# lets `import pwm_fast._C` find it there also when Python runs inside a source checkout.
__path__ = pkgutil.extend_path(__path__, __name__)

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for one another. On a busy machine that keeps the awaited
# one from running: two threads took up to 20 times as long as one (docs/performance.md). OpenMP
# reads this when torch loads it, so the package's commands set it here, before torch comes; a
# program of the user's own is left as it is.
if sys.argv[:1] == ["-m"] and "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Where they are; imported at their first use, as they need torch and this package alone does not.
_LAZY = {
    "accelerate": "acceleration",
    "backend": "backends.select",
    "BackendError": "backends.select",
    "explain": "explanation",
    "load_published": "published",
    "precision": "backends.select",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"pwm_fast.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
