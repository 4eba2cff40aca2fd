"""Fast flow-matching world models for reinforcement learning.

``pwm_fast.ops`` is the library of operations; ``python -m pwm_fast.train`` the trainer.
Importing this package, or ``pwm_fast.ops``, needs torch alone.
"""

import pkgutil

# A plain (not editable) install keeps the compiled extension in site-packages. Extending the path
# lets `import pwm_fast._C` find it there also when Python runs inside a source checkout.
__path__ = pkgutil.extend_path(__path__, __name__)

__version__ = "0.1.0"
