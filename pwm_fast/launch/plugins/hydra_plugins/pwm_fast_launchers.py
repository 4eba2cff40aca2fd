"""The launchers of pwm_fast, where Hydra looks for plugins: in the namespace `hydra_plugins`.

It lies beside the package's own modules rather than at the top of the installation, and
`pwm_fast.launch.register` puts it on the path.
"""

from hydra.plugins.launcher import Launcher

from pwm_fast.launch import local


class LocalLauncher(local.LocalSweep, Launcher):
    """``launch=local``."""


try:
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher

    from pwm_fast.launch import slurm
except ImportError:  # without pwm-fast[slurm]
    pass
else:

    class SlurmLauncher(slurm.SlurmSweep, submitit_launcher.SlurmLauncher):
        """``launch=slurm`` and ``launch=slurm_4gpu``."""
