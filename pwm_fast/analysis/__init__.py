"""Looking at runs and at what they learned. Nothing here trains.

Comparing runs: :mod:`runs` reads run directories, :mod:`groups` joins them over seeds,
:mod:`statistics`, :mod:`measures` and :mod:`scores` count, :mod:`figures`, :mod:`tables` and
:mod:`page` show. This needs run directories alone; ``python -m pwm_fast.compare`` is the command.

Diagnosing a world model: :mod:`prediction` has its errors, :mod:`rewards` what they are worth
beside a linear regression, :mod:`sensitivity` what it knows of actions (:mod:`simulator` is the
truth), :mod:`jacobians` its smoothness, :mod:`simplex` the drift of its latents, :mod:`gradients`
the noise of policy gradients. Each
function takes plain callables and tensors, so that it works on any model;
``python -m pwm_fast.diagnose`` runs them on checkpoints. ``docs/diagnostics.md`` defines each
quantity and its unit.

Sizes of agents: :mod:`accounting` counts parameters and FLOPs, :mod:`fairness` says whether two
agents are of one size; ``python -m pwm_fast.parity`` is the command.
"""
