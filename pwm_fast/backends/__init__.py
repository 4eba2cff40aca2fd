"""What an operation runs on: backends, what each has kernels for, and the choice among them.

Backends of an operation are tried in order; each says why it cannot run, or None if it can:

- ``native``: C++ kernels on the CPU, float32.
- ``cuda``: CUDA C++ kernels of the native extension, where it was built with nvcc.
- ``triton``: Triton kernels, float32 on CUDA (and on the CPU in Triton's interpreter, for tests).
- ``torch``: the same algebra and hand-written backward passes in plain PyTorch, any device and
  floating dtype. Not chosen by itself: it is what the faster ones are tested against.
- ``reference``: plain PyTorch with autograd's own gradients. It runs everything, differentiates
  twice, and is the truth.

``auto`` takes the first that can run. The choice is made by, in this order: the ``backend``
argument of a call, the innermost :func:`pwm_fast.backend` context, the environment variable
``PWM_FAST_BACKEND``, ``auto``.

Not every backend has every operation: it declares what it has kernels for, and no name stands for
another's code. An argument that names a backend without the operation is refused. A context or the
environment speaks to whole programs, so under ``native`` and ``torch`` operations that these do not
have run on the ``reference``, and are reported as that.

What differentiates forward (a dual level, ``torch.func.jvp``, ``linearize``) or otherwise
transforms a call in a way that operators cannot follow, and tensors of unknown classes, leave the
reference alone: ``auto`` takes it, who asks for another is told.

The innermost :func:`pwm_fast.precision` context says how GEMMs round their operands, or the
environment variable ``PWM_FAST_PRECISION``, or ``auto``, which is ``exact`` on a CPU and ``fast``
for ``triton``:

- ``exact``: float32 (the tensors' dtype);
- ``tf32``: float32 GEMMs with operands rounded to tf32, on CUDA;
- ``bf16``: operands in bf16;
- ``fast``: operands in fp16, gradients with a power-of-two scale a row.

State, LayerNorm, integration, losses, weights and accumulators stay float32 in all of them
(docs/ops.md has the measured errors).
"""
